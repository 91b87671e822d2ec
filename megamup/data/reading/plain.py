"""The documents of text files and of JSON lines."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from megamup.data.reading.cuts import LONG, Part
from megamup.data.reading.documents import Batch, Origin, Reader, not_utf8, part_batch
from megamup.data.reading.formats import BOM, CHUNK_BYTES, ByteStream
from megamup.data.reading.lines import LineReader, LongLine, Span
from megamup.data.reading.long_documents import json_parts, text_parts
from megamup.data.reading.sources import Source
from megamup.errors import MegamupError


def text_batches(source: Source, reader: Reader) -> Iterator[Batch]:
    """The one document of a text file.

    Raises:
        MegamupError: the file can't be read, or isn't UTF-8 (unless on_error is "skip").
    """

    def origin(_: int) -> str:
        return source.name

    with ByteStream(source.path, source.name, source.compression) as stream:
        data = stream.read(LONG + 1)
        if len(data) <= LONG:
            yield from _parts(partial(_short_text, data), reader, origin)
        elif not source.compression:
            with open(source.path, "rb") as plain:
                yield from _parts(partial(text_parts, Span(plain, 0, source.size, 0)), reader, origin)
        else:
            with tempfile.TemporaryFile() as spooled:
                while data:
                    spooled.write(data)
                    data = stream.read(CHUNK_BYTES)
                yield from _parts(partial(text_parts, Span(spooled, 0, spooled.tell(), 0)), reader, origin)


def _short_text(data: bytes) -> list[Part]:
    """The text of a whole file, in one part; a byte order mark at its start is none."""
    start = len(BOM) if data.startswith(BOM) else 0
    try:
        return [Part(data[start:].decode("utf-8"), continues=False)]
    except UnicodeDecodeError as error:
        raise not_utf8(data[start + error.start], start + error.start) from error


def line_batches(lines: LineReader, stop: int, reader: Reader, name: str, before: Callable[[], int]) -> Iterator[Batch]:
    """The documents in the JSON lines that start before byte `stop` of the decompressed file.

    Args:
        lines: where they are read, from the next line on.
        stop: in bytes.
        reader: takes the texts out of them.
        name: of the file.
        before: lines of the file before the ones that `lines` has counted.

    Raises:
        MegamupError: the file is broken, or a line can't be read (unless on_error is "skip").
    """
    for block in lines.blocks(stop):

        def origin(number: int, first: int = block.line) -> str:
            return f"{name}:{before() + first + number + 1}"

        if isinstance(block, LongLine):
            yield from _parts(partial(json_parts, block.span, reader.options), reader, origin)
        else:
            yield reader.block(block, origin)


def _parts(parts: Callable[[], Iterable[Part]], reader: Reader, origin: Origin) -> Iterator[Batch]:
    """A document in parts, or what was wrong with it. `parts` finds that out before it returns."""
    unreadable: list[str] = []
    try:
        found = parts()
    except MegamupError as error:
        reader.give_up(origin(0), error, unreadable)
        yield Batch([], unreadable=unreadable)
        return
    for part in found:
        yield part_batch(part, origin)
