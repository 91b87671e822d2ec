"""Documents that are too long to hold: read twice, first to see that they are right, then to hand them on in parts.

A JSON line is walked token by token to the strings at its text keys. Memory: a few chunks, and the nesting.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import deque
from collections.abc import Iterator
from itertools import chain
from typing import AnyStr

import orjson

from megamup.data.reading.cuts import Part, cut_up
from megamup.data.reading.documents import ReadOptions, half_surrogate, no_key, not_a_string, not_utf8
from megamup.data.reading.formats import BOM
from megamup.data.reading.lines import Span
from megamup.errors import MegamupError

Path = tuple[str | None, ...]

MOST_NESTING = 500
NAMED_KEYS = 100
LONGEST_TOKEN = 1 << 13
"""Bytes of a number or of a key that is compared with the text keys."""

SPACE = re.compile(rb"[ \t\r\n]*")
SCALAR = re.compile(
    rb"(true|false)|(null)|(NaN|-?Infinity|-?(?:0|[1-9]\d*)(?:\.\d+(?:[eE][+-]?\d+)?|[eE][+-]?\d+))|(-?(?:0|[1-9]\d*))"
)
SCALAR_TYPES = ("", "bool", "NoneType", "float", "int")
CHARACTERS = re.compile(rb'(?:[^"\\\x00-\x1f]+|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*')
"""Of a string, each escape whole."""
ESCAPE_BYTES = 6
WHOLE_PAIRS = re.compile(
    r"(?:[^\\]+|\\(?:[^u]|u(?![dD][89abAB])[0-9a-fA-F]{4}|u[dD][89abAB][0-9a-fA-F]{2}\\u[0-9a-fA-F]{4}))*"
)
"""Of a string known to be right, each escape and each pair of surrogates whole."""
PAIR_CHARACTERS = 12


def text_parts(span: Span) -> Iterator[Part]:
    """A text in parts; a byte order mark at the start of a file is no text.

    Raises:
        MegamupError: not UTF-8; before any part is given.
    """
    span = _without_mark(span)
    exhaust(decoded(span))
    return cut_up(decoded(span))


def json_parts(span: Span, options: ReadOptions) -> Iterator[Part]:
    """The text of a JSON object in parts.

    Raises:
        MegamupError: not UTF-8, not an object, or no text at a key; before any part is given.
    """
    span = _without_mark(span)
    exhaust(decoded(span))
    strings = Walk(span, options).strings()

    def slices() -> Iterator[str]:
        for index, string in enumerate(strings):
            yield from chain([options.separator] if index else [], unescaped(string, options))

    exhaust(slices())
    return cut_up(slices())


def _without_mark(span: Span) -> Span:
    marked = span.offset == 0 and next(span.chunks(len(BOM)), b"") == BOM
    return span.part(len(BOM), span.stop - span.start) if marked else span


def exhaust(slices: Iterator[str]) -> None:
    deque(slices, maxlen=0)


def decoded(span: Span) -> Iterator[str]:
    """UTF-8 to text, a slice a chunk.

    Raises:
        MegamupError: not UTF-8; with the position of the byte.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = span.offset
    for chunk in chain(span.chunks(), [b""]):
        held = len(decoder.getstate()[0])
        try:
            yield decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise not_utf8(error.object[error.start], position - held + error.start) from error
        position += len(chunk)


def unescaped(string: Span, options: ReadOptions) -> Iterator[str]:
    """The text of a JSON string, given what is between its quotes.

    Raises:
        MegamupError: half of a surrogate pair; all else is known to be right.
    """
    rest = ""
    for piece in chain(decoded(string), [None]):
        rest += piece or ""
        end = _match_end(WHOLE_PAIRS, rest, 0)
        if piece is None or len(rest) - end >= PAIR_CHARACTERS:
            end = len(rest)
        try:
            yield orjson.loads(f'"{rest[:end]}"')
        except orjson.JSONDecodeError as error:
            raise half_surrogate(options) from error
        rest = rest[end:]


def _match_end(pattern: re.Pattern[AnyStr], data: AnyStr, at: int) -> int:
    match = pattern.match(data, at)
    return match.end() if match else at


class Walk:
    """One walk over the tokens of a JSON object.

    Args:
        span: the object, and white space around it.
        options: whose text keys are looked for.
    """

    def __init__(self, span: Span, options: ReadOptions) -> None:
        self._span, self._options = span, options
        self._chunks = span.chunks()
        self._data = b""
        self._at = 0
        self._before = 0
        """Bytes of the span before `_data`."""
        self._paths = {path for key in options.text_keys for path in _paths(key)}
        self._depth = max(map(len, self._paths))
        self._found: dict[Path, Span | str] = {}
        """By path: a string, or the type of another value."""
        self._keys: list[str] = []

    def strings(self) -> list[Span]:
        """What is between the quotes of the strings at the text keys, in the order of these.

        Raises:
            MegamupError: no JSON object, or no string at a key.
        """
        self._walk()
        values = [self._at_key(key) for key in self._options.text_keys]
        for key, value in zip(self._options.text_keys, values, strict=True):
            if isinstance(value, str):
                raise not_a_string(key, value)
        return [value for value in values if isinstance(value, Span)]

    def _at_key(self, key: str) -> Span | str:
        for path in _paths(key):
            if path in self._found:
                return self._found[path]
        raise no_key(key, self._keys)

    def _walk(self) -> None:
        """Go through the object, noting what is at the paths."""
        self._expect(b"{", "a JSON object")
        opened: list[str | None] = []  # the key in each object that is open, None for an array
        while True:
            if self._value(opened):
                continue
            while opened:  # a value has ended
                if self._next_is(b","):
                    if opened[-1] is not None:
                        opened[-1] = self._key(len(opened))
                    break
                self._expect(b"]" if opened[-1] is None else b"}", "',' or the end of the array or object")
                self._at += 1
                opened.pop()
            else:
                self._expect(b"", "the end of the line")
                return

    def _value(self, opened: list[str | None]) -> bool:
        """Pass a value, or the start of one that holds others; returns whether another value follows right away."""
        token = self._peek()
        if token == b'"':
            self._note(opened, self._string())
        elif token not in (b"{", b"["):
            self._note(opened, self._scalar())
        else:
            self._at += 1
            self._note(opened, "dict" if token == b"{" else "list")
            if self._next_is(b"}" if token == b"{" else b"]"):
                return False
            if len(opened) == MOST_NESTING:
                raise self._wrong(f"at most {MOST_NESTING} levels of arrays and objects")
            opened.append(self._key(len(opened) + 1) if token == b"{" else None)
            return True
        return False

    def _note(self, opened: list[str | None], value: Span | str) -> None:
        """Of equal keys the last one counts, as everywhere."""
        if len(opened) <= self._depth:
            path = tuple(opened)
            self._found = {known: kept for known, kept in self._found.items() if known[: len(path)] != path}
            if path in self._paths:
                self._found[path] = value

    def _key(self, depth: int) -> str:
        """Pass a key and its colon; returns the key where it may matter."""
        string = self._string()
        self._expect(b":", "':'")
        self._at += 1
        if depth > self._depth or string.stop - string.start > LONGEST_TOKEN:
            return ""
        key = str(json.loads(b'"' + b"".join(string.chunks()) + b'"'))
        if depth == 1 and len(self._keys) < NAMED_KEYS and key not in self._keys:
            self._keys.append(key)
        return key

    def _string(self) -> Span:
        """Pass a string; returns what is between its quotes."""
        self._expect(b'"', "a string")
        self._at += 1
        start = self._position
        while True:
            self._at = _match_end(CHARACTERS, self._data, self._at)
            if self._data[self._at : self._at + 1] == b'"':
                stop = self._position
                self._at += 1
                return self._span.part(start, stop)
            if len(self._data) - self._at >= ESCAPE_BYTES or not self._fill():
                raise self._wrong("the end of the string, or a valid character of one")

    def _scalar(self) -> str:
        """Pass a number or a word; returns its type."""
        while len(self._data) - self._at < LONGEST_TOKEN and self._fill():
            pass
        match = SCALAR.match(self._data, self._at)
        if match is None or match.end() - self._at >= LONGEST_TOKEN:
            raise self._wrong("a value")
        self._at = match.end()
        return SCALAR_TYPES[match.lastindex or 0]

    @property
    def _position(self) -> int:
        return self._before + self._at

    def _peek(self) -> bytes:
        """The next byte that is no white space; b"" at the end."""
        while True:
            self._at = _match_end(SPACE, self._data, self._at)
            if self._at < len(self._data) or not self._fill():
                return self._data[self._at : self._at + 1]

    def _next_is(self, token: bytes) -> bool:
        """Whether this is the next token, which is passed then."""
        found = self._peek() == token
        self._at += found
        return found

    def _expect(self, token: bytes, name: str) -> None:
        if self._peek() != token:
            raise self._wrong(name)

    def _fill(self) -> bool:
        chunk = next(self._chunks, b"")
        self._before += self._at
        self._data, self._at = self._data[self._at :] + chunk, 0
        return bool(chunk)

    def _wrong(self, expected: str) -> MegamupError:
        position = self._span.offset + self._position
        found = f"found {self._data[self._at : self._at + 1]!r}" if self._at < len(self._data) else "it ends"
        return MegamupError(f"not JSON: expected {expected} at byte {position:,} of the file, {found}")


def _paths(key: str) -> list[Path]:
    """Where the text of a key may be: the key itself counts before what its parts lead to."""
    return [(key,), tuple(key.split("."))] if "." in key else [(key,)]
