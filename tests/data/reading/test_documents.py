"""JSON lines, from files to texts: what is read, and what is said of what can't be."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from megamup.data.reading.documents import BATCH_CHARACTERS, Batch, ReadOptions, merged
from megamup.data.reading.sources import find
from megamup.data.reading.units import plan_units
from megamup.errors import MegamupError


def batches_of(path: Path, options: ReadOptions | None = None) -> list[Batch]:
    units = plan_units(find([str(path)]))
    return [
        batch for unit in units for _, some in unit.pieces(options or ReadOptions(), lambda _: True) for batch in some
    ]


def texts(path: Path, *keys: str, separator: str = "\n\n") -> list[str]:
    options = ReadOptions(keys or ("text",), separator)
    return [text for batch in batches_of(path, options) for text in batch.texts]


def write_lines(path: Path, *values: Any) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def test_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\ntwo\n")
    assert texts(path) == ["one\r\n\ntwo\n"]


def test_blank_json_lines_are_no_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\n  \r\n{"text": ""}')
    (batch,) = batches_of(path)
    assert batch.texts == ["one", ""]
    assert [batch.origin(text) for text in range(2)] == [f"{path}:1", f"{path}:4"]
    assert batch.source_bytes == path.stat().st_size


def test_keys(tmp_path: Path) -> None:
    value = {"text": "one", "title": "T", "a": {"b": {"c": "nested"}, "d": "also"}, "a.d": "literal"}
    path = write_lines(tmp_path / "a.jsonl", value)
    assert texts(path, "title") == ["T"]
    assert texts(path, "a.b.c") == ["nested"]
    assert texts(path, "a.d") == ["literal"]
    assert texts(path, "title", "text") == ["T\n\none"]
    assert texts(path, "a.b.c", "title", separator="|") == ["nested|T"]


def test_what_json_allows_beyond_the_fast_parser(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"text": "one", "score": NaN}\n{"junk": "\\ud800", "text": "two"}\n{"text": "x", "text": "three"}\n'
    )
    assert texts(path) == ["one", "two", "three"]


BAD_LINES = [
    ('{"text": "two"', r"not JSON: Expecting ',' .*expected one JSON object a line"),
    ("[", r"not JSON"),
    ('["two"]', r"expected a JSON object, found list"),
    ('{"txt": "two", "url": ""}', r"no key 'text'; its keys: 'txt', 'url'; did you mean --text-key txt\?"),
    ('{"meta": {"text": "two"}}', r"no key 'text'; its keys: 'meta'; did you mean --text-key meta.text\?"),
    ("{}", r"no key 'text'; its keys: none"),
    ('{"text": 2}', r"'text' holds int, expected a string"),
    ('{"text": null}', r"'text' holds NoneType"),
    (r'{"text": "\ud83d"}', r"'text' holds half of a surrogate pair \(\\ud800 to \\udfff\)"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_bad_json_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one \\ud83d\\ude00"}\n' + line + '\n{"text": "three"}\n')
    with pytest.raises(MegamupError, match=r"a\.jsonl:2: " + message):
        texts(path)
    (batch,) = batches_of(path, ReadOptions(on_error="skip"))
    assert batch.texts == ["one 😀", "three"]
    assert [batch.origin(text) for text in range(2)] == [f"{path}:1", f"{path}:3"]
    assert len(batch.unreadable) == 1


def test_not_utf8_names_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"\xef\xbb\xbfcaf\xe9 au lait")
    with pytest.raises(MegamupError, match=r"latin\.txt: not UTF-8: byte 0xe9 at byte 6 of the file; .*latin1"):
        texts(path)
    lines = tmp_path / "latin.jsonl"
    lines.write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(MegamupError, match=r"latin\.jsonl:2: not UTF-8: byte 0xe9 at byte 32 of"):
        texts(lines)
    wide = tmp_path / "wide.txt"
    wide.write_text("hello", encoding="utf-16")
    with pytest.raises(MegamupError, match=r"iconv -f utf-16"):
        texts(wide)
    (batch,) = batches_of(wide, ReadOptions(on_error="skip"))
    assert (batch.texts, len(batch.unreadable)) == ([], 1)


def test_batches_are_about_a_megabyte_and_merging_keeps_all(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", *({"text": f"{number} " * 1000} for number in range(1500)))
    batches = batches_of(path)
    assert len(batches) > 5
    assert max(sum(map(len, batch.texts)) for batch in batches) < 1.3 * BATCH_CHARACTERS
    assert sum(batch.source_bytes for batch in batches) == path.stat().st_size
    last = batches[-2]
    number = int(last.texts[-1].split()[0])
    assert last.origin(len(last.texts) - 1) == f"{path}:{number + 1}"


def test_merged_leaves_long_documents_alone() -> None:
    def batch(text: str, continues: bool = False) -> Batch:
        return Batch([text], continues, source_bytes=1, origins=((0, lambda _: text),))

    given = [batch("a"), batch("b"), batch("L1", True), batch("L2", True), batch("L3"), batch("c"), batch("d")]
    result = list(merged(given))
    assert [one.texts for one in result] == [["a", "b"], ["L1"], ["L2"], ["L3"], ["c", "d"]]
    assert [one.continues for one in result] == [False, True, True, False, False]
    assert sum(one.source_bytes for one in result) == 7
    assert result[-1].origin(1) == "d"


def test_a_million_empty_documents_come_in_batches(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": ""}\n' * 1_000_000)

    def counts(batches: Iterable[Batch]) -> list[int]:
        return [len(batch.texts) for batch in batches]

    found = counts(batches_of(path))
    assert sum(found) == 1_000_000
    assert max(found) < 100_000
