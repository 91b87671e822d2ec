"""Pieces: the tokens of one stretch of input, on their way from a worker to a shard.

Piece k of a unit lies in the work folder as `KEY-k.PART.bin` (ids) and `KEY-k.PART.len` (int64 lengths of documents)
for each part of the output, and `KEY-k.json`, which is written last and says that the others are whole, with their
checksums. The key is a hash of all that the piece is made of, so a piece is either the right one or isn't found.
"""

from __future__ import annotations

import json
import os
import uuid
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from megamup.data.shards import Lengths
from megamup.data.tokenizer import Ids
from megamup.data.writer import writing
from megamup.errors import MegamupError

COPY_BYTES = 1 << 22
NAMED_DOCUMENTS = 20
"""Unreadable documents of a piece that are named; the others are counted."""


def piece_key(unit_key: str, number: int) -> str:
    return f"{unit_key}-{number:06d}"


@dataclass
class PartInfo:
    """What a piece holds for one part of the output (train or valid)."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    text_words: int = 0
    max_id: int = -1
    bin_bytes: int = 0
    bin_crc: int = 0
    len_crc: int = 0


@dataclass
class PieceInfo:
    """What a piece holds, and what of its input was left out."""

    parts: list[PartInfo]
    source_bytes: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    named: list[str] = field(default_factory=list)
    """What was wrong with the first unreadable documents."""
    inexact_cuts: int = 0


class PieceFolder:
    """The pieces of a job.

    Args:
        path: made by the caller.
        with_unreadable: whether pieces will do from which unreadable documents were left out.
    """

    def __init__(self, path: Path, with_unreadable: bool = True) -> None:
        self.path, self.with_unreadable = path, with_unreadable

    def _file(self, key: str, suffix: str) -> Path:
        return self.path / f"{key}.{suffix}"

    def info(self, key: str) -> PieceInfo | None:
        """What a piece holds, or None while it isn't whole."""
        try:
            values = json.loads(self._file(key, "json").read_bytes())
            values["parts"] = [PartInfo(**part) for part in values["parts"]]
            values["left_out"] = Counter(values["left_out"])
            info = PieceInfo(**values)
        except (FileNotFoundError, ValueError, TypeError, KeyError):  # a torn marker is none
            return None
        usable = self.with_unreadable or not info.left_out["unreadable"]
        return info if usable and self._has_files(key, info) else None

    def _has_files(self, key: str, info: PieceInfo) -> bool:
        """Whether the files are there in full: a crash of the machine may leave the marker alone, or empty files."""
        sizes: dict[str, int] = {}
        for part, about in enumerate(info.parts):
            sizes |= {f"{part}.bin": about.bin_bytes, f"{part}.len": 8 * about.documents}
        try:
            return all(os.stat(self._file(key, suffix)).st_size == size for suffix, size in sizes.items())
        except FileNotFoundError:
            return False

    def mark(self, key: str, info: PieceInfo) -> None:
        """Say that the files of a piece are whole."""
        values = vars(info) | {"parts": [asdict(part) for part in info.parts]}
        self._put(self._file(key, "json"), json.dumps(values).encode())

    def stream_end(self, unit_key: str) -> int | None:
        """How many pieces a stream has, once that is known."""
        try:
            return int(self._file(unit_key, "end").read_text())
        except (FileNotFoundError, ValueError):
            return None

    def mark_stream_end(self, unit_key: str, pieces: int) -> None:
        self._put(self._file(unit_key, "end"), str(pieces).encode())

    def _put(self, path: Path, data: bytes) -> None:
        """Write a marker. It is not synced: what power loss tears is noticed by its checksums, and made again."""
        beside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        with writing(self.path):
            beside.write_bytes(data)
            os.replace(beside, path)

    def lengths(self, key: str, part: int) -> Lengths:
        """Tokens of the documents. Shape (documents,)."""
        return np.fromfile(self._file(key, f"{part}.len"), dtype="<i8").astype(np.int64, copy=False)

    def checked_lengths(self, key: str, part: int, info: PartInfo) -> Lengths:
        """`lengths`, or MegamupError where they aren't what was written."""
        path = self._file(key, f"{part}.len")
        data = path.read_bytes() if path.exists() else b""
        if zlib.crc32(data) != info.len_crc or len(data) != 8 * info.documents:
            raise self._damaged(key)
        return np.frombuffer(data, dtype="<i8").astype(np.int64, copy=False)

    def checked_ids(self, key: str, part: int, info: PartInfo, start: int, stop: int) -> Iterator[bytes]:
        """Bytes `start` to `stop` of a piece's ids; the whole of them is read, and compared with its checksum.

        Raises:
            MegamupError: at the end, where it isn't what was written; the piece is forgotten then.
        """
        crc = at = 0
        path = self._file(key, f"{part}.bin")
        if path.exists():
            with open(path, "rb", buffering=0) as file:
                while block := file.read(COPY_BYTES):
                    crc = zlib.crc32(block, crc)
                    yield block[max(start - at, 0) : max(stop - at, 0)]
                    at += len(block)
        if crc != info.bin_crc:
            raise self._damaged(key)

    def _damaged(self, key: str) -> MegamupError:
        """Forget a piece that the disk has lost, so that the next run makes it again."""
        self._file(key, "json").unlink(missing_ok=True)
        return MegamupError(
            f"{self._file(key, 'bin')}: what is on the disk isn't what was written (a crash of the machine, or a "
            "failing disk); this piece was given up: start the same command again, and it is made anew"
        )


class PieceWriter:
    """Writes one piece; it counts only when the block was left without an error.

    Files have names of their own until then, so that two workers at the same piece do no harm: they write the
    same.
    """

    def __init__(self, folder: PieceFolder, key: str, n_parts: int) -> None:
        self.info = PieceInfo([PartInfo() for _ in range(n_parts)])
        self._folder, self._key, self._suffix = folder, key, f".{uuid.uuid4().hex}.tmp"
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> PieceWriter:
        for part in range(len(self.info.parts)):
            for suffix in (f"{part}.bin", f"{part}.len"):
                path = self._path(suffix)
                with writing(self._folder.path):
                    self._files[suffix] = open(path, "wb", buffering=1 << 16)
        return self

    def _path(self, suffix: str) -> Path:
        return self._folder.path / f"{self._key}.{suffix}{self._suffix}"

    def write(self, part: int, ids: Ids, text_bytes: int = 0, text_words: int = 0) -> None:
        """Append ids of the output's dtype; `end_documents` says later how they fall into documents."""
        if not len(ids):
            return
        info, data = self.info.parts[part], ids.view(np.uint8).data
        info.bin_crc = zlib.crc32(data, info.bin_crc)
        info.bin_bytes += ids.nbytes
        info.tokens += len(ids)
        info.text_bytes += text_bytes
        info.text_words += text_words
        info.max_id = max(info.max_id, int(ids.max()))
        self._write(f"{part}.bin", data)

    def end_documents(self, part: int, lengths: Lengths) -> None:
        info, data = self.info.parts[part], lengths.astype("<i8").tobytes()
        info.len_crc = zlib.crc32(data, info.len_crc)
        info.documents += len(lengths)
        self._write(f"{part}.len", data)

    def _write(self, suffix: str, data: Any) -> None:
        with writing(self._folder.path):
            self._files[suffix].write(data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with writing(self._folder.path):
                for file in self._files.values():
                    file.close()
            if error is None:
                for suffix in self._files:
                    os.replace(self._path(suffix), self._folder.path / f"{self._key}.{suffix}")
                self._folder.mark(self._key, self.info)
        finally:
            for suffix in self._files:
                self._path(suffix).unlink(missing_ok=True)
