"""Texts on which tokenizer libraries differ, where they do.

Each line is of a kind that some library gets wrong for some tokenizer: a pre-tokenizer's pattern that another library
imitates by hand, white space that is stripped, an added token inside a word, Unicode tables of different years.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

TEXTS = (
    "",
    " ",
    "  ",
    "\n",
    "\t",
    "\r\n",
    "a ",
    "  two  spaces  and   three ",
    "\n\n\n    indented\n\tby tab\n \n",
    " \r\n\r\n\r\r\n x\n\r y",
    "\0a\0 \0\0b\x01\x7f",
    "\x85\x85a\x85 \x85b\n\x85",
    "\u3000a\u00a0b\u2028c\u2029d\u200be\u2009 \u3000",
    "\ufeffmark \ufeff",
    "I'm you're he'll we've she'd it's don't 'tis 'S 'T 'LL 'Ve 'rE O'S's'' 'ſ 'ſx",
    "isn’t ‘quoted’ “double” — dash – en … dots",
    "1 12 123 1234 12345 1234567890 1,234.56 3.14159e-10 0x1F 1a2b3c a1b22c333",
    "٠١٢٣٤٥ १२३४५ Ⅷ½²³①一二三",
    "ALLCAPS CamelCase snake_case kebab-case mixedCASEWord XMLHttpRequest aB AbC ǅungla",
    "İstanbul ıßſK Åﬁ① Ａ ﬀ",
    "e\u0301 é n\u0303o\u0308 q\u0323\u0307 q\u0307\u0323 \u0301 \u0301\u0301a",
    "क्षत्रिय ப்ரா ภาษาไทย 한국어 \u1112\u1161\u11ab 漢字かな交じり文 עִבְרִית العَرَبِيَّة",
    "👩‍👩‍👧 🏳️‍🌈 👍🏽👍🏽 ☃️ 🇩🇪🇫🇷 ❤️",
    "!!! ??? ... --- === *** ### //// \\\\ (([{<>}])) ,;: @user #tag $5 50% a&b ~`^|",
    "http://example.com/a_b?c=d&e=f#g user@example.org C:\\dir\\file.txt /usr/bin/env",
    "def f(x):\n    return x  # comment\n\n\nclass A:\n\tpass\n",
    "<p>html</p> <s> </s> <unk> <pad> [CLS] [SEP] [MASK] [UNK] <0x41> <|endoftext|> <|im_end|>",
    "▁ ▁▁ a▁b ▅ ⁇ \ufffd Ġ Ċ ĠĠ",
    "\ue000\U000f0000\U0010ffff\ufdd0",
    "x" * 300,
    "ab" * 200 + " " * 100 + "\n" * 100 + "-" * 100 + "1" * 100,
    "word" * 50 + "é" * 100 + "漢" * 100 + "🙂" * 50,
    " leading",
    "\nleading",
    "\u00a0leading",
    "trailing\n ",
    "trailing\t",
)


def around(mark: str) -> Iterator[str]:
    """`mark` in the neighbourhoods that decide whether a library sees it in a text."""
    yield from (mark, f" {mark}", f"{mark} ", f"a{mark}b", f"a {mark} b", f"1{mark}1", f"\n{mark}\n", mark * 2)
    yield from (mark.lower(), mark.upper(), mark[:-1], mark[1:])


def probes(marks: Iterable[str]) -> list[str]:
    """All texts to compare, those around each of `marks` among them."""
    return [*TEXTS, *chain.from_iterable(map(around, marks))]


# Planes 0 and 1 without surrogates, the ideographs and syllables that nobody disputes, and private use; what the ends
# of the ideographs' blocks in planes 2 and 3 have been growing into; tags.
RANGES = [
    *((0x0, 0x3500), (0x4DA0, 0x4E10), (0x9FF0, 0xAC10), (0xD790, 0xD800), (0xF8F0, 0x17010), (0x187F0, 0x20000)),
    *((0x2A6D0, 0x2A710), (0x2B730, 0x2B750), (0x2B810, 0x2B830), (0x2CEA0, 0x2CEC0), (0x2EBD0, 0x2EE70)),
    *((0x2FA10, 0x2FA30), (0x31340, 0x33500), (0xE0000, 0xE0200)),
]


def characters() -> Iterator[str]:
    """Characters in which Unicode tables of different years may differ, and their neighbours."""
    return (chr(point) for start, stop in RANGES for point in range(start, stop))


def late_compositions() -> str:
    """Scripts of Unicode 16 whose letters normalisation composes, in pairs that `settings` doesn't make.

    No older characters compose anew, by Unicode's promise of stability.
    """
    blocks = ((0x105C0, 0x10600), (0x11380, 0x11400), (0x16100, 0x16140), (0x16D40, 0x16D80))
    return "".join(chr(point) for start, stop in blocks for point in range(start, stop))


def settings(character: str) -> str:
    """`character` beside what only some classes (letter, digit, mark, punctuation) are tied to."""
    return f"\u0301{character}'s{character}123 {character}{character}\u0323e\n"
