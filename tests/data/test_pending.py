import hashlib
import multiprocessing
from pathlib import Path

import pytest

from megamup.data.pending import PendingFile
from megamup.errors import MegamupError


def test_appears_only_when_published(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    file = PendingFile(path)
    file.write(b"whole")
    file.sync()
    assert not path.exists()
    file.publish()
    file.discard()
    assert path.read_bytes() == b"whole"
    assert file.sha256 == hashlib.sha256(b"whole").hexdigest()
    assert list(path.parent.iterdir()) == [path]


def test_discard_leaves_what_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    file = PendingFile(path)
    file.write(b"after")
    file.discard()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_dead_writers_temporary_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "file.tmp").write_text("a much longer text of a process that was killed")
    file = PendingFile(tmp_path / "file")
    file.write(b"new")
    file.sync()
    file.publish()
    assert (tmp_path / "file").read_text() == "new"


def _write_too(path: Path, queue: "multiprocessing.Queue[str]") -> None:
    try:
        PendingFile(path)
    except MegamupError as error:
        queue.put(str(error))


def test_two_writers_of_one_name(tmp_path: Path) -> None:
    file = PendingFile(tmp_path / "file")
    queue: multiprocessing.Queue[str] = multiprocessing.Queue()
    process = multiprocessing.Process(target=_write_too, args=(tmp_path / "file", queue))
    process.start()
    assert "another process is writing it now" in queue.get(timeout=20)
    process.join()
    file.write(b"mine")
    file.sync()
    file.publish()
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_no_folder_to_write_in(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MegamupError, match=r"file/below: cannot be written: (Not a directory|File exists)"):
        PendingFile(tmp_path / "file" / "below")
