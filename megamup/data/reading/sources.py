"""Where text comes from: what the inputs of a program name, in order."""

from __future__ import annotations

import argparse
import difflib
import fnmatch
import glob
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megamup.data.reading.documents import ReadOptions
from megamup.data.reading.formats import CHUNK_BYTES, Compression, Detected, Format, detect, without_compression_suffix
from megamup.data.reading.huggingface import PREFIX, HubData, saved_files
from megamup.errors import MegamupError

STANDARD_INPUT = "-"


@dataclass(frozen=True)
class Source:
    """A file, or a shard of a data set that is read by its name."""

    name: str
    """For messages; of a shard, its data set and number."""
    path: str
    """The file, or the data set's `hf:` name."""
    size: int
    """Bytes on disk, 0 where that isn't known."""
    format: Format
    compression: Compression = ""
    state: str = ""
    """Changes when the content does."""
    shard: int = 0

    def check_unchanged(self) -> None:
        """Raise MegamupError where a file isn't what it was when it was found; data sets and copies don't change."""
        if self.format == "hub" or self.name == STANDARD_INPUT:
            return
        try:
            now = _state(os.stat(self.path))
        except OSError as error:
            raise MegamupError(f"{self.name}: cannot be read any more: {error.strerror}") from error
        if now != self.state:
            raise MegamupError(f"{self.name}: changed while it was read; wait until it is whole, then start again")


def _state(status: os.stat_result) -> str:
    """What changes when a file does. The ctime tells of a replacement that keeps size and mtime (cp -p, rsync -t)."""
    return f"{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"


@dataclass
class Found:
    """What `find` found."""

    sources: list[Source] = field(default_factory=list)
    total_bytes: int = 0
    inputs: list[dict[str, Any]] = field(default_factory=list)
    """An entry an input: its path, its files and their bytes, for the manifest."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Files and folders left out of input folders, counted by reason."""


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every program that reads text; `read_options` takes those about documents."""

    def several(name: str, metavar: str, help: str) -> None:
        parser.add_argument(name, nargs="+", action="extend", default=[], metavar=metavar, help=help)

    parser.add_argument(
        "--input",
        nargs="+",
        action="extend",
        required=True,
        metavar="F",
        help="text (a document a file), JSON lines, each also in gzip, zstd, bzip2 or xz; parquet, Arrow; folders and "
        "quoted globs of these; data sets saved by save_to_disk; hf:NAME[:CONFIG[:SPLIT]]; - for standard input",
    )
    parser.add_argument(
        "--text-key",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="key or column of the text, a.b for a nested one; several are joined (default: text)",
    )
    parser.add_argument(
        "--key-separator",
        default=ReadOptions.separator,
        metavar="S",
        help="between the texts of several keys, such as $'\\n' in bash (default: an empty line)",
    )
    several("--suffix", "S", "in folders and globs, read only names that end in one of these")
    several("--exclude", "GLOB", "in folders and globs, leave out what has such a name or path below the folder")


def add_error_argument(parser: argparse.ArgumentParser) -> None:
    """--on-error of the programs that keep what they read."""
    parser.add_argument(
        "--on-error",
        choices=["stop", "skip"],
        default="stop",
        help="on a document that isn't UTF-8 or valid JSON: stop (default), or leave it out and report it",
    )


def read_options(arguments: argparse.Namespace, on_error: Literal["stop", "skip"] = "stop") -> ReadOptions:
    """How documents are read, from the options of `add_input_arguments`."""
    return ReadOptions(tuple(arguments.text_key), arguments.key_separator, on_error)


def describe_skipped(found: Found) -> str:
    """' (left out: 3 hidden, 1 binary)', or '' where nothing was."""
    counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(found.skipped.items()))
    return f" (left out: {counts})" if counts else ""


def find(
    inputs: Sequence[str], suffixes: Sequence[str] = (), exclude: Sequence[str] = (), spool: Path | None = None
) -> Found:
    """What to read, in order: inputs as given; folders (recursively) and globs sorted.

    A file that is named itself is always read. In folders and globs, hidden, empty and binary files (with a NUL byte
    near their start) are left out and counted, as is what `suffixes` and `exclude` leave out.

    Args:
        inputs: files, folders, globs, `hf:` names, and `-` for standard input.
        suffixes: in folders, read only names that end so (`.md`, also `.md.gz`); empty: all.
        exclude: in folders, leave out files and folders whose name or path below the input matches such a glob.
        spool: file that standard input is copied to, whole, before anything is read; its content tells its format.

    Raises:
        MegamupError: an input is missing, empty, unreadable or no text or table; a folder has no file to read.
    """
    search = _Search(suffixes, exclude, spool)
    for given in inputs:
        sources = list(search.sources(given))
        size = sum(source.size for source in sources)
        search.found.sources += sources
        search.found.total_bytes += size
        search.found.inputs.append({"path": given, "files": len(sources), "bytes": size})
    return search.found


class _Search:
    def __init__(self, suffixes: Sequence[str], exclude: Sequence[str], spool: Path | None) -> None:
        self.suffixes, self.exclude, self.spool = tuple(suffixes), exclude, spool
        self.found = Found()

    def sources(self, given: str) -> Iterator[Source]:
        """What one input names."""
        if given == STANDARD_INPUT:
            yield self._standard_input()
        elif given.startswith(PREFIX):
            data = HubData(given)
            for shard in range(data.shards):
                yield Source(f"{given} shard {shard}", given, 0, "hub", "", data.state, shard)
        elif os.path.isdir(given):
            yield from self._several(given, [given], "in this folder")
        elif os.path.exists(given):
            yield _named_file(given)
        elif glob.has_magic(given):
            yield from self._several(given, sorted(glob.glob(given, recursive=True)), "by this pattern")
        else:
            raise MegamupError(f"input {given!r}: no such file or folder{_nearest_path(given)}")

    def _standard_input(self) -> Source:
        if self.spool is None or any(entry["path"] == STANDARD_INPUT for entry in self.found.inputs):
            problem = "it can be read only once" if self.spool else "this program can't read it"
            raise MegamupError(f"input '-': standard input: {problem}; give a file")
        digest = hashlib.sha256()
        self.spool.parent.mkdir(parents=True, exist_ok=True)
        with open(self.spool, "wb") as file:
            while chunk := sys.stdin.buffer.read(CHUNK_BYTES):
                digest.update(chunk)
                file.write(chunk)
        size = self.spool.stat().st_size
        if not size:
            raise MegamupError("input '-': standard input is empty (0 bytes)")
        detected = detect(str(self.spool), STANDARD_INPUT)
        _refuse_archive(STANDARD_INPUT, detected)
        return Source(STANDARD_INPUT, str(self.spool), size, detected.format, detected.compression, digest.hexdigest())

    def _several(self, given: str, paths: list[str], where: str) -> Iterator[Source]:
        """What is below folders and files that weren't named one by one."""
        skipped, seen = Counter[str](), set[str]()
        for path in paths:
            files = self._walk(path, skipped) if os.path.isdir(path) else [path]
            for file in files:
                source = None if file in seen else self._wanted(file, path, skipped)
                if source:
                    seen.add(file)
                    yield source
        self.found.skipped.update(skipped)
        if not seen:
            raise MegamupError(f"input {given!r}: no file to read {where}{describe_skipped(Found(skipped=skipped))}")

    def _walk(self, root: str, skipped: Counter[str]) -> Iterator[str]:
        def fail(error: OSError) -> None:
            raise MegamupError(f"input {error.filename!r}: cannot be listed: {error.strerror}")

        for folder, folders, names in os.walk(root, onerror=fail):
            saved = saved_files(folder)
            if saved is not None:
                folders.clear()
                yield from saved
                continue
            paths = {name: os.path.join(folder, name) for name in sorted(folders)}
            reasons = {name: self._name_reason(path, root) for name, path in paths.items()}
            skipped.update(reason for reason in reasons.values() if reason)
            folders[:] = [name for name, reason in reasons.items() if not reason]
            yield from (os.path.join(folder, name) for name in sorted(names))

    def _wanted(self, path: str, root: str, skipped: Counter[str]) -> Source | None:
        reason = self._name_reason(path, root)
        if not reason and self.suffixes and not without_compression_suffix(path).endswith(self.suffixes):
            reason = "of another suffix"
        if not reason and not os.path.isfile(path):
            reason = "not a regular file"
        if not reason and os.path.getsize(path) == 0:
            reason = "empty"
        if not reason:
            source, detected = _file(path)
            if not detected.binary:
                return source
            reason = "binary"
        skipped[reason] += 1
        return None

    def _name_reason(self, path: str, root: str) -> str | None:
        """Why a file or folder below `root` is left out by its name."""
        name, below = os.path.basename(path), os.path.relpath(path, root)
        if name.startswith("."):
            return "hidden"
        excluded = any(fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(below, pattern) for pattern in self.exclude)
        return "excluded" if excluded else None


def _named_file(path: str) -> Source:
    if not os.path.isfile(path):
        raise MegamupError(f"input {path!r}: not a regular file; pipe it into standard input, --input -")
    if os.path.getsize(path) == 0:
        raise MegamupError(f"input {path!r}: the file is empty (0 bytes)")
    source, detected = _file(path)
    _refuse_archive(path, detected)
    return source


def _refuse_archive(name: str, detected: Detected) -> None:
    if detected.format == "archive":
        raise MegamupError(f"input {name!r}: an archive; unpack it, and give the folder")


def _file(path: str) -> tuple[Source, Detected]:
    detected, status = detect(path, path), os.stat(path)
    state = _state(status)
    return Source(path, path, status.st_size, detected.format, detected.compression, state), detected


def _nearest_path(path: str) -> str:
    folder = os.path.dirname(path) or "."
    names = os.listdir(folder) if os.path.isdir(folder) else []
    nearest = difflib.get_close_matches(os.path.basename(path), names, n=1)
    if nearest:
        return f"; did you mean {os.path.join(os.path.dirname(path), nearest[0])!r}?"
    is_name = "." not in path and path.count("/") <= 1 and not path.startswith("/")
    return f"; a data set of the Hugging Face hub is named as {PREFIX}{path}" if is_name else ""
