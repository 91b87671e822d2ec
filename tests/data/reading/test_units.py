"""The plan: every document once, in order, however the input is divided."""

import gzip
import json
import pickle
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megamup.data.reading import cuts, lines, units
from megamup.data.reading.documents import ReadOptions
from megamup.data.reading.sources import find
from megamup.data.reading.units import Unit, plan_units
from megamup.errors import MegamupError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Wanted = Callable[[int], bool]


def everything(_: int) -> bool:
    return True


def plan(*paths: Path) -> list[Unit]:
    return plan_units(find([str(path) for path in paths]))


def documents(unit: Unit, wanted: Wanted = everything, on_error: str = "stop") -> list[tuple[int, str, str]]:
    """(piece, origin, text) of all documents, put together again."""
    found: list[tuple[int, str, str]] = []
    n_bytes = 0
    pieces = []
    options = ReadOptions(on_error=on_error)  # type: ignore[arg-type]
    for piece, batches in unit.pieces(options, wanted):
        pieces.append(piece)
        goes_on = False
        for batch in batches:
            n_bytes += batch.source_bytes
            for number, text in enumerate(batch.texts):
                if goes_on and number == 0:
                    piece_, origin, before = found.pop()
                    assert origin == batch.origin(0)
                    found.append((piece_, origin, before + text))
                else:
                    found.append((piece, batch.origin(number), text))
            goes_on = batch.continues if batch.texts else goes_on
        assert not goes_on
    assert pieces == list(range(len(pieces)))
    if wanted is everything:
        assert n_bytes == unit.source_bytes
    if not unit.is_stream:
        assert pieces == [0]
    return found


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in kilobytes instead of megabytes."""
    monkeypatch.setattr(units, "UNIT_BYTES", 5000)
    monkeypatch.setattr(lines, "CHUNK_BYTES", 700)
    monkeypatch.setattr(lines, "BLOCK_BYTES", 900)
    for module in (lines, cuts):
        monkeypatch.setattr(module, "LONG", 3000)
    monkeypatch.setattr(cuts, "TEXT_CHARACTERS", 800)


def corpus_lines(seed: int, end: bytes = b"\n") -> tuple[bytes, list[tuple[int, str]]]:
    """JSON lines with documents of very different lengths and blank lines, and the (line, text) of each."""
    generator = random.Random(seed)
    data, expected = [], []
    for number in range(1, 120):
        if generator.random() < 0.1:
            data.append(b" ")
            continue
        words = generator.choice([0, 1, 10, 60, 100, 900 if number % 7 == 0 else 5, 6000 if number % 50 == 0 else 3])
        text = " ".join(generator.choices(["one", "zwei", "très", "中", "\n", '"'], k=words))
        data.append(json.dumps({"text": text}, ensure_ascii=False).encode())
        expected.append((number, text))
    return b"\n".join(data) + end, expected


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("seed", range(6))
def test_json_lines_give_the_same_pieces_plain_and_compressed(tmp_path: Path, seed: int) -> None:
    data, expected = corpus_lines(seed, b"\n" if seed % 2 else b"")
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    ranges = plan(path)
    assert len(ranges) == -(-len(data) // 5000)
    assert sum(unit.source_bytes for unit in ranges) == len(data)
    plain = [(number, *rest) for number, unit in enumerate(ranges) for _, *rest in documents(unit)]
    assert [(origin, text) for _, origin, text in plain] == [(f"{path}:{line}", text) for line, text in expected]
    for packed, suffix in ((gzip.compress(data, 0), "gz"), (zstd.compress(data), "zst")):
        other = tmp_path / f"a.jsonl.{suffix}"
        other.write_bytes(packed + b"\0" * 5000)  # padding, so that it isn't a small file
        (stream,) = plan(other)
        assert stream.is_stream
        assert stream.source_bytes == other.stat().st_size
        of_stream = documents(pickle.loads(pickle.dumps(stream)))
        assert [(piece, text) for piece, _, text in of_stream] == [(piece, text) for piece, _, text in plain]
        assert [origin for _, origin, _ in of_stream] == [f"{other}:{line}" for line, _ in expected]


@pytest.mark.usefixtures("small")
def test_borders_of_units(tmp_path: Path) -> None:
    """Lines that start exactly at a border, and a last line over several of them."""
    even = b"".join(b'{"text": "%087d"}\n' % number for number in range(150))
    assert len(even) == 150 * 100
    data = even + b'{"text": "' + b"long " * 2500 + b'"}'
    for name, content in (("a.jsonl", data), ("a.jsonl.gz", gzip.compress(data, 0))):
        (tmp_path / name).write_bytes(content)
    places = [number for number, unit in enumerate(plan(tmp_path / "a.jsonl")) for _ in documents(unit)]
    assert places == [0] * 50 + [1] * 50 + [2] * 50 + [3]
    (stream,) = plan(tmp_path / "a.jsonl.gz")
    assert [piece for piece, _, _ in documents(stream)] == places
    assert [piece for piece, _ in stream.pieces(ReadOptions(), lambda _: False)] == [0, 1, 2, 3, 4, 5]
    assert len(plan(tmp_path / "a.jsonl")) == 6


@pytest.mark.usefixtures("small")
def test_unwanted_pieces_are_passed_over(tmp_path: Path) -> None:
    data, _ = corpus_lines(1)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(data, 0))
    (stream,) = plan(path)
    whole = documents(stream)
    for wanted in (lambda piece: piece % 2 == 0, lambda piece: piece == 3, lambda piece: False):
        asked: list[int] = []

        def remember(piece: int, wanted: Wanted = wanted, asked: list[int] = asked) -> bool:
            asked.append(piece)
            return wanted(piece)

        assert documents(stream, remember) == [entry for entry in whole if wanted(entry[0])]
        assert asked == list(range(len(asked)))
        assert len(asked) == -(-len(data) // 5000)


@pytest.mark.usefixtures("small")
def test_errors_in_ranges_and_streams_name_line_and_byte(tmp_path: Path) -> None:
    good = b'{"text": "%s"}\n' % (b"good " * 20)
    data = good * 100 + b'{"text": "caf\xe9"}\n' + good * 3 + b'{"text": "' + b"x" * 4000 + b"\xe9" + b'"}\n' + good
    for name, content in (("a.jsonl", data), ("a.jsonl.gz", gzip.compress(data, 0))):
        path = tmp_path / name
        path.write_bytes(content)
        message = rf"{name}:101: not UTF-8: byte 0xe9 at byte {100 * len(good) + 13:,} of the file"
        broken = plan(path)[100 * len(good) // 5000 if name == "a.jsonl" else 0]
        with pytest.raises(MegamupError, match=message):
            documents(broken)
        unreadable = [
            problem
            for unit in plan(path)
            for _, batches in unit.pieces(ReadOptions(on_error="skip"), everything)
            for batch in batches
            for problem in batch.unreadable
        ]
        assert [problem.split(": ")[0] for problem in unreadable] == [f"{path}:101", f"{path}:105"]
        assert f"at byte {103 * len(good) + 17 + 4010:,} of the file" in unreadable[1]
        read = [text for unit in plan(path) for _, _, text in documents(unit, on_error="skip")]
        assert read == ["good " * 20] * 104


@pytest.mark.usefixtures("small")
def test_a_file_that_shrinks_is_noticed(tmp_path: Path) -> None:
    data, _ = corpus_lines(2)
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    ranges = plan(path)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(MegamupError, match="has become shorter than"):
        documents(ranges[-1])


@pytest.mark.usefixtures("small")
def test_small_files_go_together(tmp_path: Path) -> None:
    texts = [f"document {number}" for number in range(40)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number:02}.txt").write_text(text)
    (tmp_path / "50.txt").write_text("long " * 2000)
    (tmp_path / "60.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "61.txt").write_text("last")
    found = plan(tmp_path)
    assert len(found) == 40 + 3  # a small file counts for 4096 bytes of 5000 here
    read = [entry[1:] for unit in found for entry in documents(unit)]
    assert [text for _, text in read] == [*texts, "long " * 2000, "a", "b", "last"]
    assert read[-2][0] == f"{tmp_path / '60.jsonl'}:2"
    assert sum(unit.source_bytes for unit in found) == find([str(tmp_path)]).total_bytes


def test_small_text_files_share_batches(tmp_path: Path) -> None:
    for number in range(300):
        (tmp_path / f"{number:03}.txt").write_text(f"document {number}")
    (unit,) = plan(tmp_path)
    assert unit.name == f"{tmp_path}/000.txt and 299 more files"
    ((_, batches),) = unit.pieces(ReadOptions(), everything)
    (batch,) = batches
    assert len(batch.texts) == 300
    assert batch.origin(299) == f"{tmp_path}/299.txt"
    assert batch.source_bytes == unit.source_bytes


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("packed", [False, True])
def test_one_long_text_is_one_document(tmp_path: Path, packed: bool) -> None:
    text = "Ein Satz ohne Ende, très long. " * 2000
    path = tmp_path / "a.txt"
    path.write_bytes(gzip.compress(text.encode(), 0) if packed else text.encode())
    (unit,) = plan(path)
    assert documents(unit) == [(0, str(path), text)]
    path.write_bytes(path.read_bytes()[:-1] if packed else text.encode()[:-1] + b"\xff")
    with pytest.raises(MegamupError, match="truncated" if packed else f"byte 0xff at byte {len(text.encode()) - 1:,}"):
        documents(plan(path)[0])


def test_a_text_without_a_space_is_cut_anyway(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x" * (9 << 20))
    (unit,) = plan(path)
    ((_, batches),) = unit.pieces(ReadOptions(), everything)
    found = list(batches)
    assert [batch.continues for batch in found if batch.texts] == [True, True, False]
    assert sum(len(text) for batch in found for text in batch.texts) == 9 << 20
