import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from megamup.data.readers import describe_skipped, find_files, parse, records
from megamup.errors import MegamupError


def texts(path: Path, text_key: str = "text") -> list[str]:
    return [parse(record, text_key) for record in records(str(path))]


def write_lines(path: Path, *values: Any) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def test_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\ntwo\n")
    assert texts(path) == ["one\r\n\ntwo\n"]


def test_json_lines_by_name_and_by_content(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json", "a.NDJSON", "part-00000"):
        path = write_lines(tmp_path / name, {"text": "one\n"}, {"text": "é"})
        assert texts(path) == ["one\n", "é"]
    prose = tmp_path / "braces.txt"
    prose.write_text("{not json}\n{}\n")
    assert texts(prose) == ["{not json}\n{}\n"]


def test_text_key(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"text": "one", "body": "uno"})
    assert texts(path, "body") == ["uno"]


def test_blank_json_lines_are_no_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n  \r\n{"text": ""}')
    assert texts(path) == ["one", ""]
    assert [record.line for record in records(str(path))] == [1, 4]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_gzip_reads_the_same(tmp_path: Path, name: str) -> None:
    path = write_lines(tmp_path / name, {"text": "one"}, {"text": "two"})
    zipped = tmp_path / f"{name}.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert texts(zipped) == texts(path) == ["one", "two"]


def test_source_bytes_add_up(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", *({"text": "x" * n} for n in range(2000)))
    assert sum(record.source_bytes for record in records(str(path))) == path.stat().st_size
    zipped = tmp_path / "a.jsonl.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert 0.9 < sum(record.source_bytes for record in records(str(zipped))) / zipped.stat().st_size <= 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "folder"
    for name, content in {
        "b.txt": b"b",
        "a.md": b"a",
        "sub/c.py": b"c",
        "sub/deep/d.py": b"d",
        "test/e.py": b"e",
        ".hidden/f.txt": b"f",
        ".dotfile": b"g",
        "image.png": b"\x89PNG\0\0",
        "sub/__init__.py": b"",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "dangling").symlink_to(root / "nowhere")
    return root


def test_folder_is_walked_in_order(folder: Path) -> None:
    found = find_files([str(folder)])
    assert [texts(Path(path))[0] for path in found.files] == ["a", "b", "c", "d", "e"]
    assert found.total_bytes == 5
    assert found.sources == [{"path": str(folder), "files": 5, "bytes": 5}]
    assert describe_skipped(found) == " (left out: 1 binary, 1 empty, 2 hidden, 1 not a regular file)"


def test_folder_suffix_and_exclude(folder: Path) -> None:
    found = find_files([str(folder)], suffixes=[".py"], exclude=["test", "sub/deep/*"])
    assert [Path(path).name for path in found.files] == ["c.py"]
    assert found.skipped["excluded"] == 2
    assert found.skipped["of another suffix"] == 4


def test_a_named_file_is_always_read(folder: Path) -> None:
    found = find_files([str(folder / ".dotfile")], suffixes=[".py"])
    assert found.files == [str(folder / ".dotfile")]


def test_missing_empty_and_fruitless_inputs(folder: Path) -> None:
    with pytest.raises(MegamupError, match=r"b\.text': no such file or folder; did you mean '.*b\.txt'"):
        find_files([str(folder / "b.text")])
    with pytest.raises(MegamupError, match=r"__init__\.py': the file is empty"):
        find_files([str(folder / "sub" / "__init__.py")])
    with pytest.raises(MegamupError, match=r"no file to read in this folder \(left out: 2 hidden, 8 of"):
        find_files([str(folder)], suffixes=[".rs"])


def test_not_utf8_names_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"\xef\xbb\xbfcaf\xe9 au lait")
    with pytest.raises(MegamupError, match=r"latin\.txt: not UTF-8: byte 0xe9 at byte 6 of the file"):
        texts(path)
    lines = tmp_path / "latin.jsonl"
    lines.write_bytes(b'{"text": "one"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(MegamupError, match=r"latin\.jsonl:2: not UTF-8: byte 0xe9 at byte 29"):
        texts(lines)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "two"', r"a\.jsonl:2: not JSON: Expecting ',' .*expected one JSON object a line"),
        ("[", r"a\.jsonl:2: not JSON"),
        ('["two"]', r"a\.jsonl:2: expected a JSON object, found list"),
        ('{"txt": "two", "url": ""}', r"a\.jsonl:2: no key 'text'; its keys: 'txt', 'url'.*--text-key txt\?"),
        ("{}", r"a\.jsonl:2: no key 'text'; its keys: none"),
        ('{"text": 2}', r"a\.jsonl:2: 'text' holds int, expected a string"),
        ('{"text": null}', r"a\.jsonl:2: 'text' holds NoneType"),
        (r'{"text": "\ud83d"}', r"a\.jsonl:2: 'text' holds half of a surrogate pair"),
    ],
)
def test_bad_json_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one \\ud83d\\ude00"}\n' + line + "\n")
    with pytest.raises(MegamupError, match=message):
        texts(path)


def test_broken_gzip(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(b'{"text": "one"}\n' * 1000)
    path.write_bytes(whole[:-20])
    with pytest.raises(MegamupError, match=r"a\.jsonl\.gz: broken gzip file of \d+ bytes: .*ended"):
        texts(path)


def test_a_document_is_all_that_is_held(tmp_path: Path) -> None:
    """A reader that read ahead would fail on the broken tail before it gives the head."""
    path = tmp_path / "a.jsonl.gz"
    head = gzip.compress(b'{"text": "one"}\n' * 10_000)
    path.write_bytes(head + b"\x1f\x8bbroken")
    assert parse(next(records(str(path)))) == "one"
