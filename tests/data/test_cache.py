import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megamup.data import cache
from megamup.data.cache import cached_content_hash, cached_sha256
from megamup.data.corpus import Corpus
from megamup.data.manifest import file_sha256
from megamup.errors import MegamupError

MakeCorpus = Callable[..., Corpus]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read whole, from now on; no process has asked before."""
    found: list[Path] = []

    def counted(path: Path, advance: Callable[[int], None]) -> str:
        found.append(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    cache._sha256_of.cache_clear()
    monkeypatch.setattr(cache, "file_sha256", counted)
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "data.bin"
    path.write_bytes(b"content")
    return path


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of these tests count as old: times of change can't be set."""
    monkeypatch.setattr(cache, "SETTLED_NS", -1)


def ask(path: Path, folder: Path) -> str:
    """As a new process would."""
    cache._sha256_of.cache_clear()
    return cached_sha256(path, folder)


def entry_of(folder: Path) -> Path:
    (entry,) = folder.glob("*.json")
    return entry


def test_a_file_is_read_once(file: Path, tmp_path: Path, reads: list[Path]) -> None:
    folder = tmp_path / "cache"
    expected = hashlib.sha256(b"content").hexdigest()
    assert [ask(file, folder) for _ in range(3)] == [expected] * 3
    assert reads == [file]
    assert json.loads(entry_of(folder).read_text())["path"] == str(file)


@pytest.mark.parametrize("times", ["new", "kept"])
def test_a_changed_file_is_noticed(file: Path, tmp_path: Path, reads: list[Path], times: str) -> None:
    """Of the same size, and with the same mtime, as copying tools give it."""
    folder = tmp_path / "cache"
    ask(file, folder)
    before = file.stat()
    time.sleep(0.02)  # a tick of the file system's clock
    file.write_bytes(b"CONTENT")
    if times == "kept":
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert cached_sha256(file, folder) == ask(file, folder) == hashlib.sha256(b"CONTENT").hexdigest()
    assert len(reads) == 2


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"null", b"\xff", b'{"size": 7', "short", "no hex"])
def test_a_broken_entry_is_computed_anew(file: Path, tmp_path: Path, reads: list[Path], content: bytes | str) -> None:
    folder = tmp_path / "cache"
    expected = ask(file, folder)
    whole = entry_of(folder).read_text()
    if isinstance(content, bytes):
        entry_of(folder).write_bytes(content)
    else:
        entry_of(folder).write_text(whole.replace(expected, {"short": "ab", "no hex": "z" * 64}[content]))
    assert ask(file, folder) == expected
    assert len(reads) == 2
    assert entry_of(folder).read_text() == whole


def test_a_folder_that_cannot_be_written_is_no_error(file: Path, tmp_path: Path, reads: list[Path]) -> None:
    (tmp_path / "in the way").write_text("")
    for _ in range(2):
        assert cached_sha256(file, tmp_path / "in the way" / "cache") == hashlib.sha256(b"content").hexdigest()
    assert len(reads) == 1, "a process remembers for itself"


def test_a_file_that_changed_just_now_is_not_remembered(
    file: Path, tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within one tick of the clock it may change again without a trace."""
    monkeypatch.setattr(cache, "SETTLED_NS", 10**12)
    ask(file, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.json"))


def test_a_file_that_changes_while_it_is_read(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def growing(path: Path, advance: Callable[[int], None]) -> str:
        path.write_bytes(b"content and more")
        return "0" * 64

    monkeypatch.setattr(cache, "file_sha256", growing)
    with pytest.raises(MegamupError, match=r"data\.bin: changed while it was read; wait until it is whole"):
        ask(file, tmp_path / "cache")
    with pytest.raises(MegamupError, match=r"absent: cannot be read: No such file"):
        ask(tmp_path / "absent", tmp_path / "cache")


def _ask_and_count(file: Path, folder: Path, results: "multiprocessing.Queue[tuple[str, int]]") -> None:
    reads = 0

    def slow(path: Path, advance: Callable[[int], None]) -> str:
        nonlocal reads
        reads += 1
        time.sleep(0.2)
        return file_sha256(path, advance)

    cache.__dict__["file_sha256"] = slow  # in this process only
    results.put((ask(file, folder), reads))


def test_of_many_processes_one_reads(file: Path, tmp_path: Path) -> None:
    results: multiprocessing.Queue[tuple[str, int]] = multiprocessing.Queue()
    arguments = (file, tmp_path / "cache", results)
    processes = [multiprocessing.Process(target=_ask_and_count, args=arguments) for _ in range(8)]
    for process in processes:
        process.start()
    found = [results.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    assert {digest for digest, _ in found} == {hashlib.sha256(b"content").hexdigest()}
    assert sum(reads for _, reads in found) == 1


def test_the_users_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_folder() == tmp_path / "megamup"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache.default_folder() == Path("/home/someone/.cache/megamup")


def test_a_corpus_without_a_manifest_is_named_as_with_one(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    corpus = make_corpus([[1, 2, 3], [4]])
    bare = make_corpus([[1, 2, 3], [4]], name="bare", manifest=False)
    shard = bare.shards[0]
    assert bare.content_hash == corpus.content_hash
    assert cached_content_hash(shard.bin_path, shard.idx_path, tmp_path / "cache") == corpus.content_hash
    time.sleep(0.02)
    shard.bin_path.write_bytes(np.array([1, 2, 3, 5], "<u2").tobytes())
    assert Corpus(bare.prefix, tmp_path / "cache").content_hash != corpus.content_hash


def test_read_only_data_works(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    """Nothing is written beside the data."""
    bare = make_corpus([[1, 2, 3], [4]], name="data/bare", manifest=False)
    before = sorted(path.name for path in (tmp_path / "data").iterdir())
    bare.content_hash  # noqa: B018  computed
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == before
