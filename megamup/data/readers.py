"""Documents out of files: text, folders of text, JSON lines, and gzip of these.

Reading has two halves. `find_files` and `records` run in one process and only move bytes; `parse` turns a
record into text and may run in any worker, because a record knows where it came from.
"""

from __future__ import annotations

import argparse
import difflib
import fnmatch
import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedReader
from itertools import chain
from typing import Any, NamedTuple

from megamup.errors import MegamupError

GZIP_MAGIC = b"\x1f\x8b"
BOM = b"\xef\xbb\xbf"
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".json")
PEEK_BYTES = 8192  # a NUL byte in the first 8,000 or so bytes is also how git tells a binary file


class Record(NamedTuple):
    """One document, not yet decoded."""

    path: str
    line: int
    """Line in `path` from 1, or 0 where the whole file is the document."""
    offset: int
    """Bytes of (decompressed) file before `data`."""
    data: bytes
    source_bytes: int
    """Bytes of the file on disk that this record took; over a file they add up to its size."""

    @property
    def origin(self) -> str:
        return f"{self.path}:{self.line}" if self.line else self.path


@dataclass
class Found:
    """What `find_files` found."""

    files: list[str] = field(default_factory=list)
    total_bytes: int = 0
    sources: list[dict[str, Any]] = field(default_factory=list)
    """An entry an input: its path, its files and their bytes, for the manifest."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Files and folders left out of input folders, counted by reason."""


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every program that reads text: --input, --text-key, --suffix, --exclude."""
    parser.add_argument(
        "--input",
        nargs="+",
        action="extend",
        required=True,
        metavar="F",
        help="text files (one document each), folders of them, JSON lines; each also gzipped",
    )
    parser.add_argument("--text-key", default="text", help="key of the text in JSON lines (default: text)")
    parser.add_argument(
        "--suffix",
        nargs="+",
        action="extend",
        default=[],
        metavar="S",
        help="in folders, read only names that end in one of these",
    )
    parser.add_argument(
        "--exclude",
        nargs="+",
        action="extend",
        default=[],
        metavar="GLOB",
        help="in folders, leave out files and folders whose name or path below the folder matches",
    )


def find_files(inputs: Sequence[str], suffixes: Sequence[str] = (), exclude: Sequence[str] = ()) -> Found:
    """The files to read, in order: inputs as given, folders walked recursively in sorted order.

    A file that is named itself is always read. In folders, hidden, empty and binary files (with a NUL byte
    near their start) are left out and counted, as is what `suffixes` and `exclude` leave out.

    Args:
        inputs: files and folders.
        suffixes: in folders, read only names that end so (`.md`, also `.md.gz`); empty: all.
        exclude: in folders, leave out files and folders whose name or path below the input matches such a
            glob.

    Raises:
        MegamupError: an input is missing, empty or unreadable; a folder has nothing to read.
    """
    found = Found()
    for path in inputs:
        if not os.path.exists(path):
            raise MegamupError(f"input {path!r}: no such file or folder{_nearest_path(path)}")
        before = len(found.files), found.total_bytes
        if os.path.isdir(path):
            for file in _walk(path, suffixes, exclude, found.skipped):
                found.files.append(file)
                found.total_bytes += os.path.getsize(file)
            if len(found.files) == before[0]:
                raise MegamupError(f"input {path!r}: no file to read in this folder{describe_skipped(found)}")
        elif os.path.getsize(path) == 0:
            raise MegamupError(f"input {path!r}: the file is empty (0 bytes)")
        else:
            found.files.append(path)
            found.total_bytes += os.path.getsize(path)
        files, size = len(found.files) - before[0], found.total_bytes - before[1]
        found.sources.append({"path": path, "files": files, "bytes": size})
    return found


def describe_skipped(found: Found) -> str:
    """' (left out: 3 hidden, 1 binary)', or '' where nothing was."""
    counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(found.skipped.items()))
    return f" (left out: {counts})" if counts else ""


def _nearest_path(path: str) -> str:
    folder = os.path.dirname(path) or "."
    names = os.listdir(folder) if os.path.isdir(folder) else []
    nearest = difflib.get_close_matches(os.path.basename(path), names, n=1)
    return f"; did you mean {os.path.join(os.path.dirname(path), nearest[0])!r}?" if nearest else ""


def _walk(root: str, suffixes: Sequence[str], exclude: Sequence[str], skipped: Counter[str]) -> Iterator[str]:
    def reason_to_skip(name: str, path: str) -> str | None:
        if name.startswith("."):
            return "hidden"
        below = os.path.relpath(path, root)
        if any(fnmatch.fnmatch(name, glob) or fnmatch.fnmatch(below, glob) for glob in exclude):
            return "excluded"
        return None

    def fail(error: OSError) -> None:
        raise MegamupError(f"input {error.filename!r}: cannot be listed: {error.strerror}")

    for folder, folders, names in os.walk(root, onerror=fail):
        kept = []
        for name in sorted(folders):
            reason = reason_to_skip(name, os.path.join(folder, name))
            if reason:
                skipped[reason] += 1
            else:
                kept.append(name)
        folders[:] = kept
        for name in sorted(names):
            path = os.path.join(folder, name)
            reason = reason_to_skip(name, path) or _content_reason_to_skip(path, suffixes)
            if reason:
                skipped[reason] += 1
            else:
                yield path


def _content_reason_to_skip(path: str, suffixes: Sequence[str]) -> str | None:
    if suffixes and not path.removesuffix(".gz").endswith(tuple(suffixes)):
        return "of another suffix"
    if not os.path.isfile(path):
        return "not a regular file"
    if os.path.getsize(path) == 0:
        return "empty"
    with _open(path) as (_, stream):
        return "binary" if b"\0" in stream.peek(PEEK_BYTES) else None


@contextmanager
def _open(path: str) -> Iterator[tuple[BufferedReader, BufferedReader | gzip.GzipFile]]:
    """The file on disk and the stream of its content, gunzipped where it starts as gzip does.

    What fails while reading, in the body of the `with` too, becomes a MegamupError that names the file.
    """
    try:
        with open(path, "rb") as raw:
            if raw.peek(2)[:2] == GZIP_MAGIC:
                with gzip.GzipFile(fileobj=raw) as stream:
                    yield raw, stream
            else:
                yield raw, raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        size = os.path.getsize(path)
        raise MegamupError(f"{path}: broken gzip file of {size:,} bytes: {error}") from error
    except OSError as error:
        raise MegamupError(f"{path}: cannot be read: {error.strerror}") from error


def records(path: str) -> Iterator[Record]:
    """The records of one file, in order. Memory: one record.

    JSON lines are told by name (`.jsonl`, `.ndjson`, `.json`, each also `.gz`) or by a first line that is a
    JSON object; any other file is one document. Blank JSON lines are no records.

    Raises:
        MegamupError: the file can't be read, or its gzip is broken.
    """
    with _open(path) as (raw, stream):
        first_line = stream.readline()
        if not _is_json_lines(path, first_line):
            data = first_line + stream.read()
            yield Record(path, 0, 0, data, os.path.getsize(path))
            return
        offset, disk_offset = 0, 0
        for number, line in enumerate(chain([first_line], stream), start=1):
            if not line.isspace():
                disk_end = raw.tell() if stream is not raw else offset + len(line)
                yield Record(path, number, offset, line, disk_end - disk_offset)
                disk_offset = disk_end
            offset += len(line)


def _is_json_lines(path: str, first_line: bytes) -> bool:
    if path.removesuffix(".gz").lower().endswith(JSON_LINES_SUFFIXES):
        return True
    if not first_line.startswith(b"{"):
        return False
    try:
        return bool(json.loads(first_line))
    except ValueError:
        return False


def parse(record: Record, text_key: str = "text") -> str:
    """The text of a record; a byte order mark at the start of a file is no text.

    Raises:
        MegamupError: not UTF-8, not a JSON object, or no string at `text_key`; says file, line and byte.
    """
    data = record.data.removeprefix(BOM) if record.offset == 0 else record.data
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        at = record.offset + len(record.data) - len(data) + error.start
        raise MegamupError(
            f"{record.origin}: not UTF-8: byte 0x{data[error.start]:02x} at byte {at:,} of the file; "
            "convert it (iconv -f latin1 -t utf-8), or leave it out (--on-error skip)"
        ) from error
    return _parse_json(text, record.origin, text_key) if record.line else text


def _parse_json(line: str, origin: str, text_key: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MegamupError(f"{origin}: not JSON: {error}; expected one JSON object a line") from error
    if not isinstance(value, dict):
        raise MegamupError(f"{origin}: expected a JSON object, found {type(value).__name__}")
    if text_key not in value:
        keys = ", ".join(map(repr, list(value)[:10])) or "none"
        nearest = difflib.get_close_matches(text_key, value, n=1)
        hint = f"; did you mean --text-key {nearest[0]}?" if nearest else "; name one with --text-key"
        raise MegamupError(f"{origin}: no key {text_key!r}; its keys: {keys}{hint}")
    text = value[text_key]
    if not isinstance(text, str):
        raise MegamupError(f"{origin}: {text_key!r} holds {type(text).__name__}, expected a string")
    # JSON can spell half of a surrogate pair (\ud800), which is no character and has no UTF-8.
    if "\\u" in line and any("\ud800" <= character <= "\udfff" for character in text):
        raise MegamupError(f"{origin}: {text_key!r} holds half of a surrogate pair (\\ud800 to \\udfff)")
    return text
