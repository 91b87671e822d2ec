"""Hashes of large files, computed once: small JSON entries in a folder that any number of processes share.

An entry holds for one state of a file: its absolute path, size, and times of change. Nothing depends on the folder but
time: an entry that is stale or broken is computed anew, and where the folder can't be written nothing is remembered.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from megamup.data.manifest import file_sha256
from megamup.data.progress import ByteProgress
from megamup.errors import MegamupError
from megamup.files import write_json_atomic

SETTLED_NS = 2_000_000_000
"""A file that changed later than this ago may change again within one tick of its file system's clock, unseen."""


def default_folder() -> Path:
    """`megamup` in the user's cache folder ($XDG_CACHE_HOME, else ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "megamup"


def cached_content_hash(bin_path: Path, idx_path: Path, folder: Path | None = None) -> str:
    """The hex SHA-256 that names a shard's content, as `Manifest.content_hash` does for a corpus of this one shard.

    Args:
        bin_path: ids.
        idx_path: index.
        folder: where hashes are remembered; default `default_folder`.

    Raises:
        MegamupError: a file can't be read, or changes while it is.
    """
    files = (cached_sha256(path, folder) for path in (bin_path, idx_path))
    return hashlib.sha256(b"".join(map(bytes.fromhex, files))).hexdigest()


def cached_sha256(path: Path, folder: Path | None = None) -> str:
    """Hex SHA-256 of a file, read only if no entry of its present state is there; see `cached_content_hash`.

    Of many processes that ask at once, one reads the file while the others wait for its entry.
    """
    try:
        return _sha256_of(Path(os.path.abspath(path)), State.of(path), folder or default_folder())
    except OSError as error:
        raise MegamupError(f"{path}: cannot be read: {error.strerror}") from error


class State(NamedTuple):
    """What changes when a file does. The ctime tells of a replacement that keeps size and mtime (cp -p, rsync -t)."""

    size: int
    mtime_ns: int
    ctime_ns: int

    @staticmethod
    def of(path: Path) -> State:
        status = path.stat()
        return State(status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@lru_cache(maxsize=4096)  # one process asks often, and must not read twice where the folder can't be written
def _sha256_of(path: Path, state: State, folder: Path) -> str:
    entry = folder / f"{hashlib.sha256(str(path).encode()).hexdigest()}.json"
    found = _recall(entry, state)
    if found is None:
        with _locked(entry.with_suffix(".lock")):
            found = _recall(entry, state) or _compute(path, state, entry)
    return found


def _compute(path: Path, state: State, entry: Path) -> str:
    with ByteProgress(f"hashing {path} (once)", state.size) as progress:
        found = file_sha256(path, progress.advance)
    if State.of(path) != state:
        raise MegamupError(f"{path}: changed while it was read; wait until it is whole, then start again")
    if time.time_ns() - max(state.mtime_ns, state.ctime_ns) > SETTLED_NS:
        with contextlib.suppress(OSError):
            write_json_atomic(entry, {"path": str(path), **state._asdict(), "sha256": found})
    return found


def _recall(entry: Path, state: State) -> str | None:
    """The hash of an entry for `state`; None without an entry that is whole and of that state."""
    try:
        values = json.loads(entry.read_bytes())
        if State(values["size"], values["mtime_ns"], values["ctime_ns"]) != state:
            return None
        return values["sha256"] if len(bytes.fromhex(values["sha256"])) == 32 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of `path`; where none can be had, go without: the work is then done twice, no worse."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(open(path, "ab")), fcntl.LOCK_EX)
        yield
