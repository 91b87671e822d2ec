"""Progress in bytes: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

from tqdm import tqdm


class ByteProgress:
    """Says on stderr how far a program is, how fast it goes and how long it still takes.

    On a terminal it is tqdm's bar; into a log file goes a plain line every `interval` seconds.

    Args:
        label: what is being done.
        total: bytes to do, 0 where that isn't known.
        stream: where to say it; default stderr.
        interval: seconds between plain lines.
    """

    def __init__(self, label: str, total: int, *, stream: TextIO | None = None, interval: float = 10.0) -> None:
        self.label, self.total, self.interval = label, total, interval
        self.stream = stream or sys.stderr
        self.done = self._before = 0
        self._start = self._said = time.monotonic()
        self._bar = None
        if self.stream.isatty():
            self._bar = tqdm(total=total or None, desc=label, unit="B", unit_scale=True, file=self.stream)

    def __enter__(self) -> ByteProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, n_bytes: int) -> None:
        self.done += n_bytes
        if self._bar is not None:
            self._bar.update(n_bytes)
            return
        now = time.monotonic()
        if now - self._said >= self.interval:
            self._said = now
            print(self._line(now - self._start), file=self.stream, flush=True)

    def resume(self, n_bytes: int) -> None:
        """Count what an earlier run has done; it has no part in the rate."""
        self.done += n_bytes
        self._before += n_bytes
        if self._bar is not None:
            self._bar.initial += n_bytes
            self._bar.update(n_bytes)

    def _line(self, seconds: float) -> str:
        rate = (self.done - self._before) / seconds
        if not self.total:  # data sets of the hub don't tell their size
            return f"{self.label}: {self.done / 1e6:,.1f} MB, {rate / 1e6:.1f} MB/s"
        left = max(self.total - self.done, 0) / rate if rate else float("inf")
        return (
            f"{self.label}: {self.done / 1e6:,.1f} of {self.total / 1e6:,.1f} MB "
            f"({self.done / self.total:.0%}), {rate / 1e6:.1f} MB/s, {left:,.0f} s left"
        )
