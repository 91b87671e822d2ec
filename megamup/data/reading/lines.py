"""Lines out of a stream of bytes, by the block; a very long line as a place where it can be read."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from megamup.data.reading.cuts import LONG
from megamup.data.reading.formats import CHUNK_BYTES, ByteStream
from megamup.errors import MegamupError

BLOCK_BYTES = 1 << 20


_counted: dict[str, tuple[int, int]] = {}
"""By path: a byte of the file, and the line breaks before it."""


def line_breaks_before(path: str, offset: int) -> int:
    """Line breaks in the first `offset` bytes of a plain file; read on from where the last such question ended."""
    at, found = _counted.get(path, (0, 0))
    if at > offset:
        at, found = 0, 0
    with ByteStream(path, path, start=at) as stream:
        while data := stream.read(min(CHUNK_BYTES, offset - at)):
            at += len(data)
            found += data.count(b"\n")
    _counted[path] = at, found
    return found


class Block(NamedTuple):
    """Whole lines, none above `LONG`."""

    data: bytes
    offset: int
    """Of `data` in the decompressed file."""
    line: int
    """Lines between the reader's start and `data`."""


class Span(NamedTuple):
    """Bytes that are too many to hold, in a file that can be read more than once."""

    file: BinaryIO
    start: int
    stop: int
    offset: int
    """Of the first byte in the decompressed file that messages speak of."""

    def chunks(self, size: int = 1 << 16) -> Iterator[bytes]:
        """The bytes, `size` at a time; others may read the file meanwhile.

        Raises:
            MegamupError: the file has become shorter.
        """
        at = self.start
        while at < self.stop:
            self.file.seek(at)
            chunk = self.file.read(min(size, self.stop - at))
            if not chunk:
                raise MegamupError(f"the file has become shorter: expected {self.stop - at:,} more bytes")
            at += len(chunk)
            yield chunk

    def part(self, start: int, stop: int) -> Span:
        """Bytes `start` to `stop` of this span."""
        return Span(self.file, self.start + start, self.start + stop, self.offset + start)


class LongLine(NamedTuple):
    """A line above `LONG`. Its file is the reader's to close: use it before the next block."""

    span: Span
    line: int


class LineReader:
    """Reads the lines of a stream in blocks. Memory: `LONG` and two chunks.

    Args:
        stream: where they come from.
        offset: of the stream's first byte in the decompressed file.
    """

    def __init__(self, stream: ByteStream, offset: int = 0) -> None:
        self.stream = stream
        self.offset = offset
        """Of the next line in the decompressed file."""
        self.line = 0
        """Lines passed."""
        self._buffer = b""

    def at_end(self) -> bool:
        return not self._buffer and not self._fill()

    def skip(self, stop: int) -> None:
        """Pass over the lines that start before byte `stop` of the decompressed file."""
        if self.offset >= stop:
            return
        while True:
            end = self._buffer.find(b"\n", max(stop - 1 - self.offset, 0)) + 1
            self._take(end or len(self._buffer))
            if end or not self._fill():
                return

    def blocks(self, stop: int) -> Iterator[Block | LongLine]:
        """The lines that start before byte `stop` of the decompressed file.

        Raises:
            MegamupError: the stream is broken.
        """
        while self.offset < stop and not self.at_end():
            end = self._end_of_block(stop)
            if end:
                offset, line = self.offset, self.line
                yield Block(self._take(end), offset, line)
            else:
                yield from self._long_line()

    def _end_of_block(self, stop: int) -> int:
        """How many bytes of the buffer are whole lines that start before `stop`; 0: the first line is long."""
        searched = 0
        while not (first := self._buffer.find(b"\n", searched) + 1):
            searched = len(self._buffer)
            if searched > LONG:
                return 0
            if not self._fill():
                return searched  # the last line of a file may lack its line break
        if first > LONG:
            return 0
        if first > BLOCK_BYTES:
            return first
        return self._buffer.find(b"\n", stop - 1 - self.offset) + 1 or self._buffer.rfind(b"\n") + 1

    def _long_line(self) -> Iterator[LongLine]:
        """The line at the start of the buffer: where it lies in a plain file, else in a temporary copy."""
        offset, line = self.offset, self.line
        plain = not self.stream.compression
        with open(self.stream.path, "rb") if plain else tempfile.TemporaryFile() as file:
            while True:
                end = self._buffer.find(b"\n") + 1
                data = self._take(end or len(self._buffer))
                if not plain:
                    file.write(data)
                if end or not self._fill():
                    break
            start = offset if plain else 0
            yield LongLine(Span(file, start, start + self.offset - offset, offset), line)

    def _take(self, size: int) -> bytes:
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        self.offset += size
        self.line += data.count(b"\n")
        return data

    def _fill(self) -> bool:
        chunk = self.stream.read(CHUNK_BYTES)
        self._buffer += chunk
        return bool(chunk)
