"""Units: the input divided into stretches that can be read apart, as a function of the input alone.

Small files go together; plain JSON lines are divided by bytes, parquet by row groups, data sets by shards. What can
only be read from its start is a stream; it is handed on in pieces, and a reader that wants only some of them passes
over the others, but parses nothing there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import count, groupby
from typing import Any, NamedTuple, Protocol

from megamup.data.reading.columns import Rows, arrow_rows, parquet_rows, row_group_bytes, table_batches
from megamup.data.reading.documents import Batch, Reader, ReadOptions, batched, merged
from megamup.data.reading.formats import ByteStream
from megamup.data.reading.huggingface import HubData
from megamup.data.reading.lines import LineReader, line_breaks_before
from megamup.data.reading.plain import line_batches, text_batches
from megamup.data.reading.sources import Found, Source
from megamup.errors import MegamupError

UNIT_BYTES = 16 << 20
FILE_OVERHEAD = 4096
"""Bytes that a file counts for at least, so that units of tiny files aren't long lists."""
NO_END = 1 << 62

Wanted = Callable[[int], bool]
Pieces = Iterator[tuple[int, Iterator[Batch]]]


class Unit(Protocol):
    """A stretch of the input. Cheap to make, and to send to a worker."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def source_bytes(self) -> int:
        """Bytes on disk that it covers."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """What it is read from."""

    @property
    def is_stream(self) -> bool:
        """Whether it has any number of pieces, known at the end; otherwise it is one piece."""

    def pieces(self, options: ReadOptions, wanted: Wanted) -> Pieces:
        """Piece 0, 1, ..., each with its documents, or none of them where it isn't wanted.

        A piece's batches are to be used up before the next piece is asked for. The `source_bytes` of batches add up to
        the unit's where all pieces are wanted.

        Raises:
            MegamupError: input can't be read, or (with on_error "stop") a document of a wanted piece.
        """


def plan_units(found: Found) -> list[Unit]:
    """The input as units, in order.

    Raises:
        MegamupError: a parquet file is broken.
    """
    units: list[Unit] = []
    group: list[Source] = []
    size = 0

    def end_group() -> None:
        nonlocal group, size
        if group:
            units.append(Files(tuple(group)))
        group, size = [], 0

    for source in found.sources:
        small = source.format != "hub" and source.size <= UNIT_BYTES
        weight = max(source.size, FILE_OVERHEAD)
        if not small or size + weight > UNIT_BYTES:
            end_group()
        if small:
            group.append(source)
            size += weight
        else:
            units += _units_of(source)
    end_group()
    return units


def _units_of(source: Source) -> Iterable[Unit]:
    """A source that is no part of a group."""
    if source.format == "hub":
        return [HubShard(source)]
    if source.format == "parquet":
        return _row_groups(source)
    if source.format == "text":
        return [Files((source,))]  # one document is one piece, however long
    if source.format == "json lines" and not source.compression:
        starts = range(0, source.size, UNIT_BYTES)
        return [LineRange(source, start, min(start + UNIT_BYTES, source.size)) for start in starts]
    return [CompressedLines(source)] if source.format == "json lines" else [ArrowStream(source)]


def _row_groups(source: Source) -> Iterator[Unit]:
    """Runs of row groups up to UNIT_BYTES; a unit's bytes are its share of the file."""
    sizes = row_group_bytes(source.path, source.name)
    total, before, first = max(sum(sizes), 1), 0, 0
    for group in range(1, len(sizes) + 1):
        run = sum(sizes[first:group])
        if group == len(sizes) or run + sizes[group] > UNIT_BYTES:
            start, stop = (source.size * part // total for part in (before, before + run))
            yield RowGroups(source, first, group, stop - start)
            before, first = before + run, group


@dataclass(frozen=True)
class Files:
    """Whole files, in one piece."""

    sources: tuple[Source, ...]
    is_stream = False

    @property
    def name(self) -> str:
        others = len(self.sources) - 1
        return self.sources[0].name + (f" and {others:,} more files" if others else "")

    @property
    def source_bytes(self) -> int:
        return sum(source.size for source in self.sources)

    def pieces(self, options: ReadOptions, wanted: Wanted) -> Pieces:
        reader = Reader(options)
        batches = (batch for source in self.sources for batch in _whole(source, reader))
        yield 0, merged(batches) if wanted(0) else iter(())


def _whole(source: Source, reader: Reader) -> Iterator[Batch]:
    """All documents of a file."""
    keys = reader.options.text_keys
    if source.format == "text":
        yield from text_batches(source, reader)
    elif source.format == "json lines":
        with ByteStream(source.path, source.name, source.compression) as stream:
            yield from line_batches(LineReader(stream), NO_END, reader, source.name, lambda: 0)
    elif source.format == "parquet":
        yield from table_batches(parquet_rows(source.path, source.name, keys), reader, source.name)
    else:
        rows = arrow_rows(source.path, source.name, keys, source.format == "arrow stream")
        yield from table_batches(rows, reader, source.name)
    yield Batch([], source_bytes=source.size)


@dataclass(frozen=True)
class OfSource:
    """What units of one source share."""

    source: Source

    @property
    def sources(self) -> tuple[Source, ...]:
        return (self.source,)


@dataclass(frozen=True)
class LineRange(OfSource):
    """The lines of a plain file that start in a range of its bytes."""

    start: int
    stop: int
    is_stream = False

    @property
    def name(self) -> str:
        return f"{self.source.name} from byte {self.start:,}"

    @property
    def source_bytes(self) -> int:
        return self.stop - self.start

    def pieces(self, options: ReadOptions, wanted: Wanted) -> Pieces:
        yield 0, self._batches(Reader(options)) if wanted(0) else iter(())

    def _batches(self, reader: Reader) -> Iterator[Batch]:
        source = self.source
        start = max(self.start - 1, 0)  # whether a line starts at `start` is told by the byte before it
        before = partial(line_breaks_before, source.path, start)
        with ByteStream(source.path, source.name, start=start) as stream:
            lines = LineReader(stream, start)
            lines.skip(self.start)
            taken = self.start
            for batch in line_batches(lines, self.stop, reader, source.name, before):
                at = min(max(lines.offset, taken), self.stop)
                yield batch._replace(source_bytes=at - taken)
                taken = at
            if lines.offset < self.stop:
                raise MegamupError(
                    f"{source.name}: has become shorter than the {source.size:,} bytes that were planned for"
                )
        yield Batch([], source_bytes=self.stop - taken)


@dataclass(frozen=True)
class RowGroups(OfSource):
    """Some row groups of a parquet file."""

    first: int
    stop: int
    source_bytes: int
    is_stream = False

    @property
    def name(self) -> str:
        return f"{self.source.name} from row group {self.first:,}"

    def pieces(self, options: ReadOptions, wanted: Wanted) -> Pieces:
        yield 0, self._batches(Reader(options)) if wanted(0) else iter(())

    def _batches(self, reader: Reader) -> Iterator[Batch]:
        source, groups = self.source, range(self.first, self.stop)
        rows = parquet_rows(source.path, source.name, reader.options.text_keys, groups)
        yield from table_batches(rows, reader, source.name)
        yield Batch([], source_bytes=self.source_bytes)


@dataclass(frozen=True)
class Stream(OfSource):
    """A source that can only be read from its start."""

    is_stream = True

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def source_bytes(self) -> int:
        return self.source.size


@dataclass(frozen=True)
class CompressedLines(Stream):
    """A file of compressed JSON lines. A piece is the lines that start in UNIT_BYTES of what they are decompressed."""

    def pieces(self, options: ReadOptions, wanted: Wanted) -> Pieces:
        reader, name = Reader(options), self.source.name
        with ByteStream(self.source.path, name, self.source.compression) as stream:
            lines = LineReader(stream)
            taken = 0

            def batches(stop: int) -> Iterator[Batch]:
                nonlocal taken
                for batch in line_batches(lines, stop, reader, name, lambda: 0):
                    yield batch._replace(source_bytes=stream.taken - taken)
                    taken = stream.taken

            for piece in count():
                stop = (piece + 1) * UNIT_BYTES
                yield piece, batches(stop) if wanted(piece) else iter(())
                lines.skip(stop)
                if lines.at_end() and lines.offset <= stop:
                    return
                taken = stream.taken


@dataclass(frozen=True)
class ArrowStream(Stream):
    """A large Arrow file. A piece is the record batches that start in UNIT_BYTES of it."""

    def pieces(self, options: ReadOptions, wanted: Wanted) -> Pieces:
        reader, source = Reader(options), self.source
        rows = arrow_rows(source.path, source.name, options.text_keys, source.format == "arrow stream")

        def batches(some: Iterator[Rows]) -> Iterator[Batch]:
            taken = 0

            def counted() -> Iterator[Rows]:
                nonlocal taken
                for one in some:
                    taken += one.stop - one.start
                    yield one

            yield from table_batches(counted(), reader, source.name)
            yield Batch([], source_bytes=taken)

        for piece, (_, some) in enumerate(groupby(rows, key=lambda one: one.start // UNIT_BYTES)):
            yield piece, batches(some) if wanted(piece) else iter(())


@dataclass(frozen=True)
class HubShard(Stream):
    """A shard of a data set that is read by its name. A piece is the rows that start in UNIT_BYTES characters of it."""

    def pieces(self, options: ReadOptions, wanted: Wanted) -> Pieces:
        reader, name = Reader(options), self.source.name
        unreadable: list[str] = []

        def origin(row: int) -> str:
            return f"{name}:row {row}"

        def documents(rows: Iterator[HubRow]) -> Iterator[tuple[int, str | None]]:
            for row in rows:
                try:
                    yield row.number, reader.text_of(row.values)
                except MegamupError as error:
                    reader.give_up(origin(row.number), error, unreadable)
                    yield row.number, None

        rows = _hub_data(self.source.path).rows(self.source.shard)
        for piece, (_, some) in enumerate(groupby(_hub_rows(rows), key=lambda row: row.start // UNIT_BYTES)):
            yield piece, batched(documents(some), origin, unreadable) if wanted(piece) else iter(())


_hub_data = lru_cache(maxsize=4)(HubData)
"""Opened once a process: that takes a while."""


class HubRow(NamedTuple):
    number: int
    start: int
    """Characters in the rows before it."""
    values: dict[str, Any]


def _hub_rows(rows: Iterator[dict[str, Any]]) -> Iterator[HubRow]:
    start = 0
    for number, values in enumerate(rows):
        yield HubRow(number, start, values)
        start += sum(len(value) for value in values.values() if isinstance(value, str))
