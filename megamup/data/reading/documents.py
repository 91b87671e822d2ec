"""Documents: the texts in lines of JSON, and the batches in which texts are handed on."""

from __future__ import annotations

import difflib
import json
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import orjson

from megamup.data.reading.cuts import LONG, TEXT_CHARACTERS, Part, cut_up
from megamup.data.reading.formats import BOM
from megamup.data.reading.lines import Block
from megamup.errors import MegamupError

BATCH_CHARACTERS = 1 << 20
TEXT_OVERHEAD = 64
"""Characters that a text counts for beside its own, so that empty ones fill a batch too."""


@dataclass(frozen=True)
class ReadOptions:
    """How documents are read.

    Args:
        text_keys: keys of JSON objects, or columns of tables. `a.b` is the key `a.b`, or else `b` in the object `a`.
        separator: stands between the texts of several keys.
        on_error: what becomes of a document that can't be read: an error, or an entry in `Batch.unreadable`.

    Raises:
        MegamupError: no key, or the same one twice.
    """

    text_keys: tuple[str, ...] = ("text",)
    separator: str = "\n\n"
    on_error: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        if not self.text_keys or len(set(self.text_keys)) < len(self.text_keys):
            raise MegamupError(f"--text-key {' '.join(self.text_keys)}: expected one or more different keys")


Origin = Callable[[int], str]


class Batch(NamedTuple):
    """Texts, in order: about a megabyte of them together, or one longer text."""

    texts: list[str]
    continues: bool = False
    """The last text goes on in the first text of the next batch: part of a long document."""
    source_bytes: int = 0
    """Bytes on disk that were read for it; over a unit of input they add up to its size."""
    unreadable: Sequence[str] = ()
    """What was wrong with documents that were left out (`on_error="skip"`)."""
    origins: tuple[tuple[int, Origin], ...] = ()
    """(first text, what tells where it and the following ones come from), ascending."""

    def origin(self, text: int) -> str:
        """Where a text comes from: `path:line`, `path:row 7` or `path`."""
        first, name = next(entry for entry in reversed(self.origins) if entry[0] <= text)
        return name(text - first)


def part_batch(part: Part, origin: Origin) -> Batch:
    """A part of a long document as a batch of its own."""
    return Batch([part.text], part.continues, origins=((0, origin),))


def batched(documents: Iterable[tuple[int, str | None]], origin: Origin, unreadable: list[str]) -> Iterator[Batch]:
    """Documents in batches, long ones cut up.

    Args:
        documents: (number, text), None for one that can't be read.
        origin: of the document with a number.
        unreadable: the source of `documents` notes there what it leaves out; emptied with each batch.
    """
    texts: list[str] = []
    numbers: list[int] = []
    size = 0

    def batch() -> Batch:
        nonlocal texts, numbers, size
        numbered = numbers
        result = Batch(texts, unreadable=tuple(unreadable), origins=((0, lambda text: origin(numbered[text])),))
        unreadable.clear()
        texts, numbers, size = [], [], 0
        return result

    for number, text in documents:
        if text is not None and len(text) > LONG:
            yield batch()
            yield from (part_batch(part, partial(_origin_of, origin, number)) for part in cut_up(_slices(text)))
            continue
        if text is not None:
            texts.append(text)
            numbers.append(number)
        size += TEXT_OVERHEAD + len(text or "")
        if size > BATCH_CHARACTERS:
            yield batch()
    yield batch()


def _slices(text: str) -> Iterator[str]:
    return (text[start : start + TEXT_CHARACTERS] for start in range(0, len(text), TEXT_CHARACTERS))


def _origin_of(origin: Origin, number: int, _: int) -> str:
    """Of the only text of a batch."""
    return origin(number)


def merged(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same texts in fewer batches. Parts of long documents stay as they are."""
    held: list[Batch] = []
    size, long = 0, False
    for batch in batches:
        of_long, long = long or batch.continues, batch.continues
        size += sum(map(len, batch.texts)) + TEXT_OVERHEAD * (1 + len(batch.texts))
        if held and (of_long or size > BATCH_CHARACTERS):
            yield _joined(held)
            held, size = [], 0
        if of_long:
            yield batch
        else:
            held.append(batch)
    if held:
        yield _joined(held)


def _joined(batches: list[Batch]) -> Batch:
    texts: list[str] = []
    unreadable: list[str] = []
    origins: list[tuple[int, Origin]] = []
    for batch in batches:
        origins += ((len(texts) + first, origin) for first, origin in batch.origins)
        texts += batch.texts
        unreadable += batch.unreadable
    source_bytes = sum(batch.source_bytes for batch in batches)
    return Batch(texts, source_bytes=source_bytes, unreadable=unreadable, origins=tuple(origins))


class Reader:
    """Takes the texts out of values, with one error for each that has none.

    Args:
        options: which texts, and what to do where there is none.
    """

    def __init__(self, options: ReadOptions) -> None:
        self.options = options
        self._get: Callable[[Any], str]
        """Fast, and right about objects that have the texts; fails in some way or gives no string for others."""
        if len(options.text_keys) == 1 and "." not in options.text_keys[0]:
            self._get = operator.itemgetter(options.text_keys[0])
        else:
            self._get = self.text_of

    def block(self, block: Block, name: Callable[[int], str]) -> Batch:
        """The documents of a block of JSON lines; blank lines are none.

        Args:
            block: whole lines.
            name: what a line of the block, counted from 0, is called in messages.

        Raises:
            MegamupError: a line isn't UTF-8, not a JSON object or has no text, unless on_error is "skip".
        """
        data = block.data.removeprefix(BOM) if block.offset == 0 else block.data
        every = data.split(b"\n")
        if not every[-1]:
            every.pop()
        lines = [line for line in every if line and not line.isspace()]
        numbers: Sequence[int] = range(len(lines))
        if len(lines) < len(every):
            numbers = [number for number, line in enumerate(every) if line and not line.isspace()]
        unreadable: list[str] = []
        try:
            loads, get = orjson.loads, self._get
            texts = [get(loads(line)) for line in lines]
            exact = set(map(type, texts)) <= {str}
        except (ValueError, LookupError, TypeError, MegamupError):
            exact = False
        if not exact:
            texts, numbers = self._one_by_one(
                every, numbers, block.offset + len(block.data) - len(data), name, unreadable
            )
        return Batch(texts, unreadable=unreadable, origins=((0, lambda text: name(numbers[text])),))

    def _one_by_one(
        self, every: list[bytes], numbers: Sequence[int], offset: int, name: Callable[[int], str], unreadable: list[str]
    ) -> tuple[list[str], list[int]]:
        """Texts and numbers of the lines that can be read."""
        texts, kept = [], []
        wanted = set(numbers)
        for number, line in enumerate(every):
            if number in wanted:
                try:
                    texts.append(self._line(line, offset))
                    kept.append(number)
                except MegamupError as error:
                    self.give_up(name(number), error, unreadable)
            offset += len(line) + 1
        return texts, kept

    def _line(self, line: bytes, offset: int) -> str:
        try:
            return self.text_of(orjson.loads(line))
        except orjson.JSONDecodeError:
            pass  # it refuses more than it must, and its messages are short
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(line[error.start], offset + error.start) from error
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise MegamupError(f"not JSON: {error}; expected one JSON object a line") from error
        result = self.text_of(value)
        try:
            result.encode("utf-8")
        except UnicodeEncodeError as error:
            raise half_surrogate(self.options) from error
        return result

    def text_of(self, value: Any) -> str:
        """The text of a parsed document.

        Raises:
            MegamupError: it isn't an object, or has no text at a key.
        """
        if not isinstance(value, dict):
            raise MegamupError(f"expected a JSON object, found {type(value).__name__}")
        return self.join([_lookup(value, key) for key in self.options.text_keys])

    def join(self, texts: Sequence[Any]) -> str:
        """The document whose texts, in the order of the keys, are these.

        Raises:
            MegamupError: one is no string.
        """
        for key, text in zip(self.options.text_keys, texts, strict=True):
            if not isinstance(text, str):
                raise not_a_string(key, type(text).__name__)
        return texts[0] if len(texts) == 1 else self.options.separator.join(texts)

    def give_up(self, origin: str, error: MegamupError, unreadable: list[str]) -> None:
        """Raise the error with the document's origin, or note it, as `on_error` says."""
        message = MegamupError(f"{origin}: {error}")
        if self.options.on_error == "stop":
            raise message from error
        unreadable.append(str(message))


def _lookup(value: dict[str, Any], key: str) -> Any:
    if key in value:
        return value[key]
    inner: Any = value
    for name in key.split("."):
        if not isinstance(inner, dict) or name not in inner:
            below = [f"{outer}.{name}" for outer, part in value.items() if isinstance(part, dict) for name in part]
            raise no_key(key, list(value), below)
        inner = inner[name]
    return inner


def no_key(key: str, keys: Sequence[str], below: Sequence[str] = (), kind: str = "key") -> MegamupError:
    """Of a document with other keys (or a table with other columns), some of them `below` others."""
    known = ", ".join(map(repr, keys[:10])) or "none"
    nearest = difflib.get_close_matches(key, [*keys, *below], n=1)
    hint = f"did you mean --text-key {nearest[0]}?" if nearest else "name one with --text-key"
    return MegamupError(f"no {kind} {key!r}; its {kind}s: {known}; {hint}")


def not_a_string(key: str, found: str) -> MegamupError:
    return MegamupError(f"{key!r} holds {found}, expected a string")


def not_utf8(byte: int, position: int) -> MegamupError:
    encoding = "utf-16" if position < 2 and byte in (0xFE, 0xFF) else "latin1"
    return MegamupError(
        f"not UTF-8: byte 0x{byte:02x} at byte {position:,} of the file; "
        f"convert it (iconv -f {encoding} -t utf-8), or leave it out (--on-error skip)"
    )


def half_surrogate(options: ReadOptions) -> MegamupError:
    """JSON can spell half of a surrogate pair (\\ud800), which is no character and has no UTF-8."""
    keys = ", ".join(map(repr, options.text_keys))
    return MegamupError(f"{keys} holds half of a surrogate pair (\\ud800 to \\udfff)")
