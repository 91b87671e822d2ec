"""Pieces to shards: which documents of which pieces make a shard, and the making of one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megamup.data.manifest import ShardEntry
from megamup.data.preprocess.pieces import PartInfo, PieceFolder
from megamup.data.shards import Lengths
from megamup.data.writer import StagedShard, documents_that_fit
from megamup.files import write_json_atomic


@dataclass(frozen=True)
class Segment:
    """Some documents of one piece."""

    key: str
    info: PartInfo
    first: int
    last: int
    """Documents `first` to before `last`."""
    start: int
    stop: int
    """Their tokens in the piece."""


@dataclass
class ShardPlan:
    """The shards of one part of the output: pieces come in, in order, and full shards come out.

    Args:
        limit: tokens of a shard; one ends before the document that would make it larger.
        lengths: gives the tokens of a piece's documents, asked for where a shard ends in the middle of it.
    """

    limit: int
    lengths: Callable[[str], Lengths]
    tokens: int = 0
    segments: list[Segment] = field(default_factory=list)

    def feed(self, key: str, info: PartInfo) -> list[list[Segment]]:
        """The shards that are full now, each as its segments."""
        if self.tokens + info.tokens <= self.limit:
            self._take(Segment(key, info, 0, info.documents, 0, info.tokens))
            return []
        full, first, start, lengths = [], 0, 0, self.lengths(key)
        while first < info.documents:
            last = first + documents_that_fit(lengths[first:], self.tokens, self.limit)
            stop = start + int(lengths[first:last].sum())
            self._take(Segment(key, info, first, last, start, stop))
            if last < info.documents:
                full.append(self.finish())
            first, start = last, stop
        return full

    def _take(self, segment: Segment) -> None:
        if segment.last > segment.first:
            self.segments.append(segment)
            self.tokens += segment.stop - segment.start

    def finish(self) -> list[Segment]:
        """The shard that isn't full: what is left at the end."""
        segments, self.segments, self.tokens = self.segments, [], 0
        return segments


def assemble(folder: Path, part: int, segments: list[Segment], dtype: np.dtype[Any]) -> ShardEntry:
    """Write one shard to the work folder, verified, and a record of it that a later run finds.

    The ids are compared with the checksum that the worker took of them in memory, and what was written with what the
    disk gives back.

    Raises:
        MegamupError: a piece is damaged, or the shard can't be written.
    """
    pieces = PieceFolder(folder / "pieces")
    shard = StagedShard(folder / "shards", staged_name(part, segments), dtype)
    try:
        for segment in segments:
            start, stop = segment.start * dtype.itemsize, segment.stop * dtype.itemsize
            for block in pieces.checked_ids(segment.key, part, segment.info, start, stop):
                shard.write(block)
            lengths = pieces.checked_lengths(segment.key, part, segment.info)
            shard.end_documents(lengths[segment.first : segment.last])
        entry = shard.finish()
    finally:
        shard.close()
    write_json_atomic(record_path(folder, part, segments), asdict(entry))
    return entry


def staged_name(part: int, segments: list[Segment]) -> str:
    """The name says what is in the shard: one that was staged for other input isn't taken for it."""
    content = repr([part, *((segment.key, segment.first, segment.last) for segment in segments)])
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def record_path(folder: Path, part: int, segments: list[Segment]) -> Path:
    return folder / "shards" / f"{staged_name(part, segments)}.json"


def assembled(folder: Path, part: int, segments: list[Segment]) -> ShardEntry | None:
    """The shard that an earlier run staged, if it is still there: one killed while publishing has moved it."""
    path = record_path(folder, part, segments)
    if not all(file.is_file() for file in (path, path.with_suffix(".bin"), path.with_suffix(".idx"))):
        return None
    return ShardEntry(**json.loads(path.read_text(encoding="utf-8")))
