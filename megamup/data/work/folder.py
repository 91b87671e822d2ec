"""The folder `PREFIX.work` of a preprocessing job: its lock, and what is done of it."""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from megamup.data.writer import writing
from megamup.errors import MegamupError


class WorkFolder:
    """Where a job keeps what is done, so that the same command goes on after any end, and a similar one with what both
    share. It needs about as much space as the tokens.

    Args:
        prefix: of the output; the folder is `PREFIX.work`.
    """

    def __init__(self, prefix: str) -> None:
        self.path = Path(f"{prefix}.work")

    @contextmanager
    def held(self, part: int | None = None) -> Iterator[None]:
        """Hold the folder: alone, or (with `part`) beside processes that work on other parts. Made if missing.

        Raises:
            MegamupError: another process holds it, or it can't be written.
        """
        with ExitStack() as stack:
            shutil.rmtree(self._discarded, ignore_errors=True)  # of a process that was killed in the middle of it
            with writing(self.path):
                for name in ("pieces", "shards"):
                    (self.path / name).mkdir(parents=True, exist_ok=True)
            self._lock(stack, "lock", fcntl.LOCK_EX if part is None else fcntl.LOCK_SH)
            if part is not None:
                self._lock(stack, f"part-{part}.lock", fcntl.LOCK_EX)
            else:
                for leftover in self.path.glob("*/*.tmp"):  # of killed workers
                    leftover.unlink(missing_ok=True)
            try:
                yield
            finally:
                if part is None and not any((self.path / "pieces").glob("*")):  # ended before anything was done
                    self.discard()

    def _lock(self, stack: ExitStack, name: str, kind: int) -> None:
        with writing(self.path):
            file = stack.enter_context(open(self.path / name, "ab"))  # noqa: SIM115
        with suppress(OSError):  # file systems that know no locks go without
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                raise MegamupError(f"{self.path}: another process is working on it now") from None

    @contextmanager
    def alive(self) -> Iterator[Path]:
        """A file that is there as long as this run is: its workers stop where it vanishes."""
        path = self.path / f"run-{uuid.uuid4().hex}"
        with writing(path):
            path.touch()
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the folder with all that is done, at one stroke: a part of it would be taken for the whole."""
        with suppress(OSError):
            os.rename(self.path, self._discarded)
        shutil.rmtree(self._discarded, ignore_errors=True)

    @property
    def _discarded(self) -> Path:
        return self.path.with_name(f"{self.path.name}.discarded")
