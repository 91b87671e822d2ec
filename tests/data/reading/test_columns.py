"""Tables: parquet and Arrow, as pyarrow and datasets write them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megamup.data.reading import units
from megamup.data.reading.cuts import LONG
from megamup.data.reading.documents import Batch, ReadOptions
from megamup.data.reading.sources import find
from megamup.data.reading.units import Unit, plan_units
from megamup.errors import MegamupError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TEXTS = [f"row {number} " * (number % 300) for number in range(2000)]


def table() -> Any:
    nested = [{"body": {"text": f"nested {number}"}, "n": 1} for number in range(len(TEXTS))]
    return pa.table({"id": range(len(TEXTS)), "text": TEXTS, "meta": nested})


def write(path: Path, content: Any, kind: str) -> Path:
    if kind == "parquet":
        pq.write_table(content, path, row_group_size=100)
        return path
    make = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as sink, make(sink, content.schema) as writer:
        for batch in content.to_batches(max_chunksize=100):
            writer.write_batch(batch)
    return path


def batches_of(path: Path, options: ReadOptions | None = None) -> Iterator[Batch]:
    for unit in plan_units(find([str(path)])):
        for _, batches in unit.pieces(options or ReadOptions(), lambda _: True):
            yield from batches


def texts(path: Path, *keys: str) -> list[str]:
    return [text for batch in batches_of(path, ReadOptions(keys or ("text",))) for text in batch.texts]


kinds = pytest.mark.parametrize("kind", ["parquet", "file", "stream"])


@kinds
def test_columns_and_nested_fields(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "no-suffix", table(), kind)
    assert texts(path) == TEXTS
    assert texts(path, "meta.body.text")[-1] == "nested 1999"
    assert texts(path, "meta.body.text", "text")[1] == "nested 1\n\nrow 1 "
    batches = list(batches_of(path))
    assert max(sum(map(len, batch.texts)) for batch in batches) < 1 << 21
    assert next(batch for batch in batches if batch.texts).origin(7) == f"{path}:row 7"


@kinds
def test_large_files_are_divided(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a", table(), kind)
    monkeypatch.setattr(units, "UNIT_BYTES", path.stat().st_size // 5)
    found = plan_units(find([str(path)]))
    read: list[str] = []
    pieces, total, last = 0, 0, ""
    for unit in found:
        for _, batches in unit.pieces(ReadOptions(), lambda _: True):
            pieces += 1
            for batch in batches:
                read += batch.texts
                total += batch.source_bytes
                last = batch.origin(len(batch.texts) - 1) if batch.texts else last
    assert read == TEXTS
    assert last == f"{path}:row 1999"
    assert 4 <= pieces <= 8
    assert len(found) == (pieces if kind == "parquet" else 1)
    assert total == sum(unit.source_bytes for unit in found) == path.stat().st_size


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_unwanted_pieces_of_arrow_are_passed_over(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a", table(), kind)
    monkeypatch.setattr(units, "UNIT_BYTES", path.stat().st_size // 5)
    (unit,) = plan_units(find([str(path)]))

    def read(unit: Unit, wanted: set[int]) -> list[list[str]]:
        pieces = unit.pieces(ReadOptions(), wanted.__contains__)
        return [[text for batch in batches for text in batch.texts] for _, batches in pieces]

    whole = read(unit, set(range(100)))
    some = read(unit, {1, 3})
    assert len(whole) == len(some)
    assert some == [piece if number in (1, 3) else [] for number, piece in enumerate(whole)]


@kinds
def test_null_and_bad_utf8_are_errors_of_their_rows(tmp_path: Path, kind: str) -> None:
    bad = pa.array([b"ok", None, b"caf\xe9", b"fine"], pa.binary())
    path = write(tmp_path / "a", pa.table({"text": bad.view(pa.string())}), kind)
    with pytest.raises(MegamupError, match=r"a:row 1: 'text' holds NoneType, expected a string"):
        texts(path)
    batches = list(batches_of(path, ReadOptions(on_error="skip")))
    assert [text for batch in batches for text in batch.texts] == ["ok", "fine"]
    assert batches[0].origin(1) == f"{path}:row 3"
    problems = [problem for batch in batches for problem in batch.unreadable]
    assert len(problems) == 2
    assert problems[1].startswith(f"{path}:row 2: not UTF-8: byte 0xe9 at byte 3 of the text")


@kinds
@pytest.mark.parametrize(
    "kind_of_text", ["string", "large_string", "string_view", "binary", "large_binary", "dictionary"]
)
def test_kinds_of_strings(tmp_path: Path, kind: str, kind_of_text: str) -> None:
    column = pa.array(["a", "é", ""])
    column = column.dictionary_encode() if kind_of_text == "dictionary" else column.cast(getattr(pa, kind_of_text)())
    assert texts(write(tmp_path / "a", pa.table({"text": column}), kind)) == ["a", "é", ""]


@kinds
def test_wrong_columns(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "a", table(), kind)
    with pytest.raises(
        MegamupError, match=r"a: no column 'txt'; its columns: 'id', 'text', 'meta'; did you mean --text-key"
    ):
        texts(path, "txt")
    with pytest.raises(MegamupError, match=r"a: no column 'meta.n.x'"):
        texts(path, "meta.n.x")
    with pytest.raises(MegamupError, match=r"a: 'id' holds int64, expected a string"):
        texts(path, "id")
    with pytest.raises(MegamupError, match=r"a: 'meta' holds struct<"):
        texts(path, "meta")


@kinds
def test_truncation_is_noticed(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "a", table(), kind)
    whole = path.read_bytes()
    for size in (len(whole) // 2, len(whole) - 8):  # a stream without its last 8 bytes ends after a batch
        path.write_bytes(whole[:size])
        with pytest.raises(MegamupError, match=r"a: (cannot be read as a table|broken Arrow stream, at byte)"):
            texts(path)


def test_two_streams_in_one_file_are_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "a", table(), "stream")
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(MegamupError, match="more data follows the end of the stream"):
        texts(path)


def test_a_long_cell_comes_in_parts(tmp_path: Path) -> None:
    long = "many words " * (LONG // 10)
    path = write(tmp_path / "a", pa.table({"text": ["a", long, "b"]}), "parquet")
    batches = [batch for batch in batches_of(path) if batch.texts]
    assert "".join(text for batch in batches for text in batch.texts) == f"a{long}b"
    assert [batch.continues for batch in batches] == [False] + [True] * (len(batches) - 3) + [False, False]
    assert batches[2].origin(0) == f"{path}:row 1"
