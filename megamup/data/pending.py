"""Large files written piece by piece, that appear under their name only when whole."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from pathlib import Path

from megamup.errors import MegamupError


class PendingFile:
    """A file written as `NAME.tmp` beside its final name `NAME`, and renamed onto it by `publish`.

    The temporary has a fixed name and is locked: one left by a killed process is taken over, one that a
    living process still writes is an error. Whatever is at `NAME` stays until `publish`.

    Raises:
        MegamupError: from every method, where the file can't be written (no space, no permission, another
            writer); the temporary is gone then.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._hash = hashlib.sha256()
        self._temporary = path.with_name(path.name + ".tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._temporary, "ab", buffering=1 << 20)  # noqa: SIM115  held until publish
        except OSError as error:
            raise MegamupError(f"{path}: cannot be written: {error.strerror}") from error
        self._lock()
        self._file.truncate(0)

    def _lock(self) -> None:
        with contextlib.suppress(OSError):  # file systems that know no locks go without
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.close()
                raise MegamupError(f"{self.path}: another process is writing it now") from None
        # Between open and lock the other writer may have published this very file.
        if not os.path.exists(self._temporary) or not os.path.samestat(
            os.fstat(self._file.fileno()), os.stat(self._temporary)
        ):
            self._file.close()
            raise MegamupError(f"{self.path}: another process has just written it")

    @property
    def sha256(self) -> str:
        """Of all that was written."""
        return self._hash.hexdigest()

    def write(self, data: bytes | memoryview) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            self._fail(error)
        self._hash.update(data)
        self.size += len(data)

    def sync(self) -> None:
        """Everything written is on the disk when this returns."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            self._fail(error)

    def publish(self) -> None:
        """Rename onto the final name. Call `sync` before."""
        try:
            os.replace(self._temporary, self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            self._fail(error)
        self._file.close()

    def discard(self) -> None:
        """Remove the temporary; nothing happens after `publish` or a second time."""
        if self._file.closed:
            return
        with contextlib.suppress(OSError):
            os.unlink(self._temporary)
        with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
            self._file.close()

    def _fail(self, error: OSError) -> None:
        self.discard()
        raise MegamupError(
            f"{self.path}: cannot be written: {error.strerror} after {self.size:,} bytes; "
            "the part written was removed, and what stood under this name before is untouched"
        ) from error


def sync_folder(folder: Path) -> None:
    """Make renames and removals in `folder` last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
