"""Which tokens begin a word, and which no text holds, as a tokenizer's own files tell."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megamup.data.corpus import Corpus
from megamup.data.objectives.base import Flags, Window
from megamup.data.tokenizer import FileTokenizer, load_tokenizer
from megamup.data.tokenizer.base import require
from megamup.data.tokenizer.huggingface import TOKENIZER_JSON
from megamup.data.tokenizer.sentencepiece import MODEL, SPACE_SYMBOL
from megamup.data.tokenizer.tiktoken import ENCODING, RANKS, parse_ranks
from megamup.errors import MegamupError

WHITESPACE = b" \t\n\r\x0b\x0c"
Pieces = Iterator[tuple[int, bool, bool]]
"""(id, whether a word ends before its text, whether one ends with it) of each token that is text."""


@dataclass(frozen=True)
class Words:
    """Where words begin: at whitespace, which is part of the token after it or a token itself; special tokens are
    words of their own. A script without spaces is one long word, which no budget may hold: mask its tokens."""

    before: Flags
    """By id: a word begins here. Shape (vocabulary,)."""
    after: Flags
    """By id: one begins after it."""

    def begins(self, tokens: Window) -> Flags:
        """Whether a word begins with each of the tokens; with the first of a row always. Shape (batch, seq)."""
        found = np.asarray(self.before[tokens])
        found[:, 1:] |= self.after[tokens[:, :-1]]
        found[:, 0] = True
        return found


def words_of(tokenizer: FileTokenizer, vocab_size: int) -> Words:
    """The table of a model's vocabulary; ids that are no text are words of their own.

    Raises:
        MegamupError: the tokenizer doesn't tell what begins a word.
    """
    before, after = np.ones(vocab_size, bool), np.ones(vocab_size, bool)
    for number, begins, ends in PIECES[tokenizer.kind](tokenizer):
        if number < vocab_size:
            before[number], after[number] = begins, ends
    return Words(before, after)


def tokenizer_of(corpora: Sequence[Corpus]) -> FileTokenizer:
    """The tokenizer that lies beside one of the corpora.

    Raises:
        MegamupError: none does.
    """
    for corpus in corpora:
        if corpus.manifest and corpus.manifest.tokenizer.folder:
            return load_tokenizer(str(Path(corpus.prefix).parent / corpus.manifest.tokenizer.folder))
    raise MegamupError(
        f"objective.whole_word=true: no tokenizer lies beside {corpora[0].prefix!r}, to tell which tokens begin a "
        "word; expected a corpus of tools/preprocess_data.py, or whole_word=false"
    )


def no_text(tokenizer: FileTokenizer) -> set[int]:
    """Ids that no text becomes, the end-of-document token left out."""
    if tokenizer.kind == "huggingface":
        added = json.loads(tokenizer.files()[TOKENIZER_JSON]).get("added_tokens") or []
        found = {int(token["id"]) for token in added if token["special"]}
    elif tokenizer.kind == "tiktoken":
        found = set(json.loads(tokenizer.files()[ENCODING])["special"].values())
    elif tokenizer.kind == "sentencepiece":
        processor = sentencepiece_processor(tokenizer)
        ids = range(processor.get_piece_size())
        found = {number for number in ids if processor.is_control(number) or processor.is_unused(number)}
    else:
        found = set()
    return found - {tokenizer.eod_id}


def edges(data: bytes) -> tuple[bool, bool]:
    """Whether a word begins with a token's bytes, and whether one ends with them."""
    return data[:1] in WHITESPACE, data[-1:] in WHITESPACE  # of no bytes: both


def of_bytes(tokenizer: FileTokenizer) -> Pieces:
    for number in range(256):
        yield number, *edges(bytes([number]))


def of_tiktoken(tokenizer: FileTokenizer) -> Pieces:
    for data, number in parse_ranks(tokenizer.files()[RANKS], tokenizer.name).items():
        yield number, *edges(data)


def sentencepiece_processor(tokenizer: FileTokenizer) -> Any:
    processor = require("sentencepiece").SentencePieceProcessor()
    processor.load_from_serialized_proto(tokenizer.files()[MODEL])
    return processor


def of_sentencepiece(tokenizer: FileTokenizer) -> Pieces:
    processor = sentencepiece_processor(tokenizer)
    for number in range(processor.get_piece_size()):
        piece = processor.id_to_piece(number)
        if processor.is_byte(number):
            yield number, *edges(bytes([int(piece[3:5], 16)]))
        elif not (processor.is_control(number) or processor.is_unknown(number) or processor.is_unused(number)):
            yield number, *edges(piece.replace(SPACE_SYMBOL, " ").encode())


def of_huggingface(tokenizer: FileTokenizer) -> Pieces:
    """WordPiece marks what goes on, byte-level BPE and Metaspace what begins, and some BPE what ends.

    Raises:
        MegamupError: it does none of it.
    """
    config = json.loads(tokenizer.files()[TOKENIZER_JSON])
    model = config["model"]
    vocabulary = model["vocab"]
    pieces = vocabulary if isinstance(vocabulary, dict) else {piece: i for i, (piece, _) in enumerate(vocabulary)}
    special = {token["content"] for token in config.get("added_tokens") or []}
    text = {piece: number for piece, number in pieces.items() if piece not in special}
    kinds = set(types({key: config.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")}))
    if model.get("type") == "WordPiece":
        prefix = model.get("continuing_subword_prefix", "##")
        yield from ((number, not piece.startswith(prefix), False) for piece, number in text.items())
    elif suffix := model.get("end_of_word_suffix"):
        yield from ((number, False, piece.endswith(suffix)) for piece, number in text.items())
    elif "ByteLevel" in kinds:
        letters = byte_letters()
        for piece, number in text.items():
            yield number, *edges(bytes(letters.get(letter, ord("?")) for letter in piece))
    elif "Metaspace" in kinds or any(piece.startswith(SPACE_SYMBOL) for piece in text):
        for piece, number in text.items():
            is_byte = len(piece) == 6 and piece.startswith("<0x")
            data = bytes([int(piece[3:5], 16)]) if is_byte else piece.replace(SPACE_SYMBOL, " ").encode()
            yield number, *edges(data)
    else:
        raise MegamupError(
            f"objective.whole_word=true: tokenizer {tokenizer.name!r}, a {model.get('type')}, doesn't mark where words "
            "begin (no ## of WordPiece, no byte-level spaces, no Metaspace); expected one that does, or "
            "whole_word=false"
        )


def types(config: Any) -> Iterator[str]:
    """Every ``type`` in parts of a tokenizer.json."""
    if isinstance(config, dict):
        if isinstance(config.get("type"), str):
            yield config["type"]
        for part in config.values():
            yield from types(part)
    elif isinstance(config, list):
        for part in config:
            yield from types(part)


def byte_letters() -> dict[str, int]:
    """The letters that byte-level BPE writes bytes as (Radford et al. 2019): itself where it can be seen."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


PIECES = {
    "bytes": of_bytes,
    "tiktoken": of_tiktoken,
    "sentencepiece": of_sentencepiece,
    "huggingface": of_huggingface,
}
