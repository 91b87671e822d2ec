"""What a file is, told by its content, and its bytes, decompressed.

Python's own `bz2` and `lzma` files drop what follows the first member where it doesn't look right, and the package
`zstandard` takes a truncated file for a whole one. Here a member is followed by another one, by zeros or by the end of
the file, and anything else is an error.
"""

from __future__ import annotations

import bz2
import json
import lzma
import re
import sys
import zlib
from collections.abc import Iterator
from types import TracebackType
from typing import BinaryIO, Literal, NamedTuple, Protocol

from megamup.errors import MegamupError

Format = Literal["text", "json lines", "parquet", "arrow file", "arrow stream", "hub", "archive"]
Compression = Literal["", "gzip", "zstd", "bzip2", "xz"]

CHUNK_BYTES = 1 << 18
COMPRESSED_BYTES = 1 << 16
"""Read at a time of a compressed file: the most that a decompressor holds of its input."""
HEAD_BYTES = 8192
"""Looked at to tell formats. A NUL in the first 8,000 or so bytes is also how git tells a binary file."""

BOM = b"\xef\xbb\xbf"
COMPRESSION_SUFFIXES = (".gz", ".zst", ".zstd", ".bz2", ".xz")
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".json")

COMPRESSIONS: dict[Compression, re.Pattern[bytes]] = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),  # a frame, or one that is to be skipped
    "bzip2": re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
}
ARCHIVE = re.compile(rb"PK\x03\x04|7z\xbc\xaf\x27\x1c|Rar!\x1a\x07|.{257}ustar", re.DOTALL)
FIRST_KEY = re.compile(rb'\{[ \t]*"(?:[^"\\]|\\.)*"[ \t]*:')
OVER_SEVERAL_LINES = re.compile(rb'\{[^\n]*\n\s*"')


class Detected(NamedTuple):
    format: Format
    compression: Compression
    binary: bool
    """Looks like neither text nor a table."""


def detect(path: str, name: str) -> Detected:
    """What the file at `path` holds; `name` is what it is called in messages, and its suffix is heard.

    Tables, compression and archives are told by their first bytes. JSON lines are told by the suffix (`.jsonl`,
    `.ndjson`, `.json`, also before `.gz` and the like) or by a first line that is a JSON object; the rest is text.

    Raises:
        MegamupError: the file can't be read, is a compressed table, or is named `.json` but holds one JSON value
            instead of JSON lines.
    """
    compression = _compression(path, name)
    with ByteStream(path, name, compression) as stream:
        head = stream.read(HEAD_BYTES)
        complete = not stream.read(1)
    if ARCHIVE.match(head):
        return Detected("archive", compression, True)
    table = _table(head)
    if table is not None:
        if compression:
            raise MegamupError(f"{name}: {table} compressed as a whole by {compression}; decompress it first")
        return Detected(table, "", False)
    if _is_json_lines(head, complete, name):
        return Detected("json lines", compression, False)
    return Detected("text", compression, b"\0" in head)


def without_compression_suffix(name: str) -> str:
    for suffix in COMPRESSION_SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def _compression(path: str, name: str) -> Compression:
    with ByteStream(path, name) as stream:
        magic = stream.read(16)
    return next((known for known, pattern in COMPRESSIONS.items() if pattern.match(magic)), "")


def _table(head: bytes) -> Format | None:
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"ARROW1\0\0"):
        return "arrow file"
    # An Arrow message begins with -1 and the length of its header, which is padded to 8 bytes.
    length = int.from_bytes(head[4:8], "little", signed=True)
    return "arrow stream" if head.startswith(b"\xff\xff\xff\xff") and length > 0 and length % 8 == 0 else None


def _is_json_lines(head: bytes, complete: bool, name: str) -> bool:
    text = head.removeprefix(BOM).lstrip()
    line, newline, rest = text.partition(b"\n")
    whole = bool(newline) or complete
    is_json = whole and _is_json(line)
    if without_compression_suffix(name.lower()).endswith(JSON_LINES_SUFFIXES):
        convert = "expected one JSON object a line: convert it with jq -c {}, or leave it out (--exclude)"
        if line.startswith(b"[") and not (is_json and rest.strip()):
            raise MegamupError(f"{name}: one JSON array, not JSON lines; " + convert.format("'.[]'"))
        if not is_json and OVER_SEVERAL_LINES.match(text):
            raise MegamupError(f"{name}: a JSON object over several lines; " + convert.format("."))
        return True
    return line.startswith(b"{") and (is_json and line.strip() != b"{}" if whole else bool(FIRST_KEY.match(line)))


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


class Decompressor(Protocol):
    """Of one member, as `bz2` and `lzma` have it."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


class _Gzip:
    """zlib's decompressor, which leaves it to its caller to keep what it hasn't used."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=31)  # 31: gzip's header and checksum

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def needs_input(self) -> bool:
        return not self._zlib.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        return self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)


def _decompressor(compression: Compression, name: str) -> Decompressor:
    if compression == "gzip":
        return _Gzip()
    if compression == "bzip2":
        return bz2.BZ2Decompressor()
    if compression == "xz":
        return lzma.LZMADecompressor(lzma.FORMAT_XZ)
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError as error:
        raise MegamupError(f"{name}: zstd needs the package backports.zstd: pip install 'megamup[data]'") from error
    return zstd.ZstdDecompressor()


class ByteStream:
    """The bytes of a file, decompressed. Memory: what `read` is asked for, and the window of the compression.

    Args:
        path: of the file.
        name: what messages call it.
        compression: how it is compressed.
        start: where to begin, only without compression.

    Raises:
        MegamupError: from all of its methods, where the file can't be read or is broken.
    """

    def __init__(self, path: str, name: str, compression: Compression = "", start: int = 0) -> None:
        self.path, self.name, self.compression = path, name, compression
        try:
            self._file: BinaryIO = open(path, "rb", buffering=0)  # noqa: SIM115  closed by __exit__
            self._file.seek(start)
        except OSError as error:
            raise self._unreadable(error) from error
        self._members = self._decompressed()

    def __enter__(self) -> ByteStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def taken(self) -> int:
        """Bytes of the file on disk that were read."""
        return self._file.tell()

    def read(self, size: int = CHUNK_BYTES) -> bytes:
        """The next `size` bytes; fewer only at the end of the file."""
        parts, missing = [], size
        while missing and (part := self._read(missing)):
            parts.append(part)
            missing -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read(self, size: int) -> bytes:
        if not self.compression:
            return self._read_disk(size)
        self._size = size
        return next(self._members, b"")

    def _read_disk(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except OSError as error:
            raise self._unreadable(error) from error

    def _decompressed(self) -> Iterator[bytes]:
        """What all members hold, at most `_size` bytes at a time."""
        data = b""
        while data := data.lstrip(b"\0") or self._read_disk(COMPRESSED_BYTES):
            if data[0]:
                member = _decompressor(self.compression, self.name)
                yield from self._member(member, data)
                data = member.unused_data

    def _member(self, member: Decompressor, data: bytes) -> Iterator[bytes]:
        while not member.eof:
            starved = member.needs_input and not data
            if starved:
                data = self._read_disk(COMPRESSED_BYTES)
                starved = not data
            try:
                part = member.decompress(data, self._size)
            except Exception as error:  # each library has an error of its own
                raise self._broken(str(error)) from error
            data = b""
            if part:
                yield part
            elif starved and not member.eof:
                raise self._broken("it ends in the middle: truncated?")

    def _unreadable(self, error: OSError) -> MegamupError:
        return MegamupError(f"{self.name}: cannot be read: {error.strerror}")

    def _broken(self, reason: str) -> MegamupError:
        return MegamupError(f"{self.name}: broken {self.compression} file, near byte {self.taken:,} of it: {reason}")
