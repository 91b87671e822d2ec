"""Where a long text may be cut so that its tokens don't change.

Tokenizers divide a text before they merge anything: by a pattern (GPT-2, cl100k, o200k, Llama 3, Qwen, DeepSeek), at
spaces (WordPiece), or by having no piece with a space behind another character (SentencePiece, unless trained without
`split_by_whitespace`). All of them have a border before a single space between two letters, so both sides encoded one
after the other give the tokens of the whole. The patterns also have one

- before any white space behind a letter or digit. (They look ahead from white space, but no text that is cut so ends
  with any.)
- before a space behind punctuation; not before a line break there, which some of them take along.

Two kinds of tokenizer see more than that: those that put a space before every text, also where it begins with one, and
those whose tokens span words. They tokenize the words beside a cut a little differently; the encoder counts such cuts.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import NamedTuple

LONG = 4 << 20
"""Bytes of a line or a file, or characters of a text: a document above that is handed on in several texts."""
TEXT_CHARACTERS = 1 << 20
"""Of each of these texts, at most; at least half of that (but the last). Up to `LONG` where no place to cut is good."""

GOOD_PLACES = tuple(map(re.compile, (r"(?<=[^\W\d_]) (?=[^\W\d_])", r"(?<=[^\W_])(?=\s)", r"(?<=\S)(?= )")))
WHITE_SPACE = re.compile(r"(?<=\S)(?=\s)")
GRAPHEME = 64
"""Characters that a grapheme is thought to have at most."""
ZERO_WIDTH_JOINER = "\u200d"


def cut(text: str) -> int:
    """Where to cut without a change of tokens: the last place of the best kind in the second half; 0: nowhere."""
    return next((at for kind in GOOD_PLACES if (at := _last(kind, text))), 0)


def forced_cut(text: str) -> int:
    """Where to cut a text that has no good place: before white space, else between two characters that stand apart."""
    at = _last(WHITE_SPACE, text)
    if at:
        return at
    end = len(text) - 1
    return next(
        (at for at in range(end, max(end - GRAPHEME, 0), -1) if not _belong_together(text[at - 1], text[at])), end
    )


def _last(place: re.Pattern[str], text: str) -> int:
    """Where `place` is found last in the second half of `text`, near its end first; 0: nowhere."""
    half = len(text) // 2
    for window in (1 << 10, 1 << 15, half):
        at = 0
        for match in place.finditer(text, len(text) - min(window, half)):
            at = match.start()
        if at:
            return at
    return 0


def _belong_together(left: str, right: str) -> bool:
    joined = left == "\r" and right == "\n"
    return joined or ZERO_WIDTH_JOINER in (left, right) or unicodedata.category(right).startswith("M")


class Part(NamedTuple):
    """Of a long document."""

    text: str
    continues: bool
    """Another part follows."""


def cut_up(slices: Iterable[str]) -> Iterator[Part]:
    """The document whose text comes in `slices`, in parts that can be tokenized one by one; at least one part.

    Memory: a few times `LONG` characters.
    """
    held: list[str] = []
    size, wanted = 0, TEXT_CHARACTERS
    for piece in slices:
        held.append(piece)
        size += len(piece)
        if size < wanted:
            continue
        text = "".join(held)
        at = cut(text)
        if not at and size >= LONG:
            at = forced_cut(text)
        if at:
            yield Part(text[:at], continues=True)
        held = [text[at:]]
        size -= at
        wanted = TEXT_CHARACTERS if at else min(size + TEXT_CHARACTERS, LONG)
    yield Part("".join(held), continues=False)
