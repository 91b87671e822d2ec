import argparse
import gzip
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from megamup.data.reading.documents import ReadOptions
from megamup.data.reading.sources import add_input_arguments, describe_skipped, find, read_options
from megamup.errors import MegamupError


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
        "old.zip": b"PK\x03\x04",
        "sub/__init__.py": b"",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "dangling").symlink_to(root / "nowhere")
    return root


def names(*inputs: object, suffixes: list[str] | None = None, exclude: list[str] | None = None) -> list[str]:
    return [Path(source.path).name for source in find(list(map(str, inputs)), suffixes or [], exclude or []).sources]


def test_folder_is_walked_in_order(folder: Path) -> None:
    found = find([str(folder)])
    assert [Path(source.name).read_text() for source in found.sources] == ["a", "b", "c", "d", "e"]
    assert found.total_bytes == 5
    assert found.inputs == [{"path": str(folder), "files": 5, "bytes": 5}]
    assert describe_skipped(found) == " (left out: 2 binary, 1 empty, 2 hidden, 1 not a regular file)"


def test_suffix_and_exclude(folder: Path) -> None:
    (folder / "sub" / "z.py.zst").write_bytes(b"plain after all")
    found = find([str(folder)], suffixes=[".py"], exclude=["test", "sub/deep/*"])
    assert [Path(source.path).name for source in found.sources] == ["c.py", "z.py.zst"]
    assert found.skipped["excluded"] == 2
    assert found.skipped["of another suffix"] == 5


def test_globs(folder: Path) -> None:
    assert names(f"{folder}/*.[mt]*") == ["a.md", "b.txt"]
    assert names(f"{folder}/**/*.py") == ["c.py", "d.py", "e.py"]
    assert sorted(names(f"{folder}/**")) == ["a.md", "b.txt", "c.py", "d.py", "e.py"]  # each once
    assert names(f"{folder}/s*", exclude=["deep"]) == ["c.py"]
    with pytest.raises(MegamupError, match=r"\*\.rs': no file to read by this pattern"):
        find([f"{folder}/*.rs"])


def test_a_name_with_a_bracket_is_no_pattern(tmp_path: Path) -> None:
    path = tmp_path / "a[1].txt"
    path.write_text("a")
    assert names(path) == ["a[1].txt"]


def test_what_is_named_is_read(folder: Path) -> None:
    assert names(folder / ".dotfile", folder / "image.png", folder / "a.md", folder / "a.md", suffixes=[".py"]) == [
        ".dotfile",
        "image.png",
        "a.md",
        "a.md",
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("b.text", r"b\.text': no such file or folder; did you mean '.*b\.txt'"),
        ("sub/__init__.py", r"__init__\.py': the file is empty"),
        ("old.zip", r"old\.zip': an archive; unpack it"),
    ],
)
def test_bad_inputs(folder: Path, name: str, message: str) -> None:
    with pytest.raises(MegamupError, match=message):
        find([str(folder / name)])


def test_fruitless_folder_and_device(folder: Path) -> None:
    with pytest.raises(MegamupError, match=r"no file to read in this folder \(left out: 2 hidden, 9 of another"):
        find([str(folder)], suffixes=[".rs"])
    with pytest.raises(MegamupError, match=r"not a regular file; pipe it into standard input"):
        find(["/dev/null"])


def test_state_follows_the_content(folder: Path) -> None:
    before = find([str(folder)]).sources
    assert find([str(folder)]).sources == before
    (folder / "a.md").write_text("other")
    after = find([str(folder)]).sources
    assert [old.state == new.state for old, new in zip(before, after, strict=True)] == [False, True, True, True, True]


def test_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def give(data: bytes) -> None:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(data)))

    data = gzip.compress(json.dumps({"text": "a"}).encode() + b"\n", mtime=0)
    give(data)
    spool = tmp_path / "work" / "stdin"
    (source,) = find(["-"], spool=spool).sources
    assert (source.name, source.path, source.size) == ("-", str(spool), len(data))
    assert (source.format, source.compression) == ("json lines", "gzip")
    assert spool.read_bytes() == data
    give(data)
    assert find(["-"], spool=spool).sources[0] == source  # another run, after one that was killed
    give(data)
    with pytest.raises(MegamupError, match=r"it can be read only once"):
        find(["-", "-"], spool=spool)
    give(b"")
    with pytest.raises(MegamupError, match=r"standard input is empty"):
        find(["-"], spool=tmp_path / "other")
    with pytest.raises(MegamupError, match=r"'-': standard input: this program can't read it"):
        find(["-"])


def test_arguments_become_options() -> None:
    parser = argparse.ArgumentParser()
    add_input_arguments(parser)
    arguments = parser.parse_args(["--input", "a", "--input", "b", "--exclude", "x", "y"])
    assert (arguments.input, arguments.exclude, arguments.suffix) == (["a", "b"], ["x", "y"], [])
    assert read_options(arguments) == ReadOptions()
    arguments = parser.parse_args(["--input", "a", "--text-key", "title", "meta.body", "--key-separator", " "])
    assert read_options(arguments, "skip") == ReadOptions(("title", "meta.body"), " ", "skip")
    with pytest.raises(MegamupError, match=r"--text-key a a: expected one or more different keys"):
        ReadOptions(("a", "a"))
