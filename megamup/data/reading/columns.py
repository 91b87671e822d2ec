"""Texts out of the columns of tables: parquet files by row groups, Arrow files and streams by record batches.

Only the text columns are read. Memory: pages of a parquet column, or one record batch of an Arrow file (mapped, so that
the system can drop what was read); a text in a cell is whole in memory, however long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from megamup.data.reading.documents import BATCH_CHARACTERS, Batch, Reader, batched, no_key, not_a_string
from megamup.errors import MegamupError

if TYPE_CHECKING:
    import pyarrow as pa

END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
MOST_ROWS = 1 << 13
"""Of a parquet file at a time."""


class Rows(NamedTuple):
    """Some rows of a table."""

    table: pa.RecordBatch
    first: int
    """Of the rows in the file, counted from 0."""
    start: int = 0
    stop: int = 0
    """Where they lie in an Arrow file, in bytes."""


@contextmanager
def reading(name: str) -> Iterator[None]:
    """What pyarrow says of a broken file, as an error that names it; or that pyarrow is missing."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise MegamupError(f"{name}: tables need the package pyarrow: pip install 'megamup[data]'") from error
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise MegamupError(f"{name}: cannot be read as a table: {error}") from error


def row_group_bytes(path: str, name: str) -> list[int]:
    """Compressed size of the row groups of a parquet file.

    Raises:
        MegamupError: the file is broken.
    """
    with reading(name):
        import pyarrow.parquet as pq

        metadata = pq.read_metadata(path)
        groups = (metadata.row_group(group) for group in range(metadata.num_row_groups))
        return [
            sum(group.column(column).total_compressed_size for column in range(group.num_columns)) for group in groups
        ]


def parquet_rows(path: str, name: str, keys: Sequence[str], groups: range | None = None) -> Iterator[Rows]:
    """The text columns of row groups (default: all) of a parquet file.

    Raises:
        MegamupError: a column is missing or holds no strings, or the file is broken.
    """
    with reading(name):
        import pyarrow.parquet as pq

        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            paths = [column_path(file.schema_arrow, key, name) for key in keys]
            metadata = file.metadata
            chosen = groups if groups is not None else range(metadata.num_row_groups)
            first = sum(metadata.row_group(group).num_rows for group in range(chosen.start))
            size = sum(metadata.row_group(group).total_byte_size for group in chosen)
            rows = sum(metadata.row_group(group).num_rows for group in chosen)
            per_batch = min(max(rows * BATCH_CHARACTERS // max(size, 1), 1), MOST_ROWS)
            columns = [".".join(path) for path in paths]
            for batch in file.iter_batches(per_batch, list(chosen), columns, use_threads=False):
                yield Rows(batch, first)
                first += batch.num_rows


def arrow_rows(path: str, name: str, keys: Sequence[str], is_stream: bool) -> Iterator[Rows]:
    """The record batches of an Arrow file or stream; together they span the whole file.

    Raises:
        MegamupError: a column is missing or holds no strings, the file is broken, or a stream has no mark of its end.
    """
    with reading(name):
        import pyarrow as pa

        with pa.memory_map(path) as source:
            batches = _stream_batches(source, name) if is_stream else _file_batches(source)
            first, start = 0, 0
            for batch, stop in batches:
                if not first:
                    for key in keys:
                        column_path(batch.schema, key, name)
                yield Rows(batch, first, start, stop)
                first, start = first + batch.num_rows, stop


def _file_batches(source: pa.MemoryMappedFile) -> Iterator[tuple[pa.RecordBatch, int]]:
    import pyarrow as pa

    with pa.ipc.open_file(source) as file:
        for index in range(file.num_record_batches):
            yield file.get_batch(index), source.size() * (index + 1) // file.num_record_batches


def _stream_batches(source: pa.MemoryMappedFile, name: str) -> Iterator[tuple[pa.RecordBatch, int]]:
    import pyarrow as pa

    with pa.ipc.open_stream(source) as stream:
        at = source.tell()
        for batch in stream:
            at = source.tell()
            yield batch, min(at + len(END_OF_STREAM), source.size())
    source.seek(at)
    rest = source.read(2 * len(END_OF_STREAM))
    if rest != END_OF_STREAM:  # pyarrow takes a stream that was cut between two batches for a whole one
        problem = "more data follows the end of the stream" if rest else "it has no mark of its end: truncated?"
        raise MegamupError(f"{name}: broken Arrow stream, at byte {at:,}: {problem}")


def column_path(schema: pa.Schema, key: str, name: str) -> list[str]:
    """The column of a key, and the fields to follow in it.

    Raises:
        MegamupError: there is none, or it holds something else than strings.
    """
    import pyarrow as pa

    path = [key] if key in schema.names else key.split(".")
    fields: pa.Schema | pa.StructType = schema
    for place, part in enumerate(path):
        if part not in fields.names:
            below = [
                f"{field.name}.{inner}"
                for field in schema
                if pa.types.is_struct(field.type)
                for inner in field.type.names
            ]
            raise MegamupError(f"{name}: {no_key(key, schema.names, below, 'column')}")
        kind = fields.field(part).type
        if place < len(path) - 1:
            fields = kind if pa.types.is_struct(kind) else pa.struct([])
    inner_kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not any(known(inner_kind) for known in _text_types()):
        raise MegamupError(f"{name}: {not_a_string(key, str(kind))}")
    return path


def _text_types() -> list[Callable[[pa.DataType], bool]]:
    """Strings, and the bytes that old writers of parquet store them as."""
    from pyarrow import types

    return [
        *(types.is_string, types.is_large_string, types.is_string_view),
        *(types.is_binary, types.is_large_binary, types.is_binary_view, types.is_null),
    ]


def table_batches(rows: Iterable[Rows], reader: Reader, name: str) -> Iterator[Batch]:
    """The documents of a table, a row each.

    Raises:
        MegamupError: a cell is null or not UTF-8, unless on_error is "skip".
    """
    unreadable: list[str] = []

    def origin(row: int) -> str:
        return f"{name}:row {row}"

    def documents() -> Iterator[tuple[int, str | None]]:
        keys = reader.options.text_keys
        for batch, first, *_ in rows:
            columns = [_cells(batch, column_path(batch.schema, key, name)) for key in keys]
            for row, cells in enumerate(zip(*columns, strict=True), start=first):
                try:
                    yield row, reader.join([_text(cell) for cell in cells])
                except MegamupError as error:
                    reader.give_up(origin(row), error, unreadable)
                    yield row, None

    return batched(documents(), origin, unreadable)


def _cells(batch: pa.RecordBatch, path: list[str]) -> list[str | bytes | None]:
    """A column's values; bytes where not all of them are UTF-8, which Arrow doesn't look at."""
    import pyarrow as pa
    from pyarrow import compute, types

    column = batch.column(path[0])
    if len(path) > 1:
        column = compute.struct_field(column, path[1:])
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        cells: list[str | bytes | None] = column.to_pylist()
    except UnicodeDecodeError:
        cells = column.cast(pa.large_binary()).to_pylist()
    return cells


def _text(cell: str | bytes | None) -> str | None:
    if not isinstance(cell, bytes):
        return cell
    try:
        return cell.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MegamupError(f"not UTF-8: byte 0x{cell[error.start]:02x} at byte {error.start:,} of the text") from error
