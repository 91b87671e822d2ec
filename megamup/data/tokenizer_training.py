"""Train tokenizers that give every text back exactly: SentencePiece models and byte-level BPE."""

from __future__ import annotations

import io
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from megamup.data.progress import ByteProgress
from megamup.data.reading.documents import ReadOptions
from megamup.data.reading.sources import Found
from megamup.data.reading.units import plan_units
from megamup.data.tokenizer import FileTokenizer, load_tokenizer
from megamup.data.tokenizer.base import require
from megamup.data.writer import writing
from megamup.errors import MegamupError
from megamup.files import write_bytes_atomic

BYTE_PIECES = 256
META_PIECES = 2  # <unk>, </s>
# Line breaks are no part of any piece (byte fallback keeps them, as in Llama). SentencePiece drops a training
# sentence that holds a tab or ▅, which it uses for itself, and takes ▁ for a space.
SEPARATORS = re.compile("[\n\r\t\0\u2581\u2585]+")
# Longer sentences than 4,192 bytes are dropped, silently: cut long lines before a space, at most 4 bytes a
# character.
SENTENCE = re.compile(r".{1,1000}(?= |\Z)|.{1,1000}", re.DOTALL)

END_OF_TEXT = "<|endoftext|>"
Pattern = Literal["gpt2", "llama3"]
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def sentences(text: str) -> Iterator[str]:
    """`text` in the pieces that SentencePiece can learn from; spaces are kept."""
    for line in SEPARATORS.split(text):
        yield from SENTENCE.findall(line)


def stretches(text: str) -> Iterator[str]:
    """`text` in pieces of at most 1,000 characters, that together are the text; cut before spaces where there are."""
    yield from SENTENCE.findall(text)


class EvenSample:
    """At most `max_bytes` of the strings added: every k-th, k the smallest power of two that fits.

    One pass and bounded memory: whenever the sample is too large, every second string goes and k doubles.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.kept: list[str] = []
        self.kept_bytes = 0
        self._stride = 1
        self._added = 0

    def add(self, text: str) -> None:
        if self._added % self._stride == 0:
            self.kept.append(text)
            self.kept_bytes += len(text.encode())
        self._added += 1
        while self.kept_bytes > self.max_bytes and len(self.kept) > 1:
            self.kept = self.kept[::2]
            self.kept_bytes = sum(len(text.encode()) for text in self.kept)
            self._stride *= 2


def sample_text(
    found: Found, options: ReadOptions, max_bytes: int, divide: Callable[[str], Iterable[str]]
) -> EvenSample:
    """What `divide` makes of all documents, evenly thinned to `max_bytes`.

    Raises:
        MegamupError: a document can't be read.
    """
    sample = EvenSample(max_bytes)
    with ByteProgress("reading", found.total_bytes) as progress:
        for unit in plan_units(found):
            for _, batches in unit.pieces(options, lambda _: True):
                for batch in batches:
                    for text in batch.texts:
                        for part in divide(text):
                            sample.add(part)
                    progress.advance(batch.source_bytes)
    if not sample.kept:
        raise MegamupError("no text to train on: the input holds only line breaks or tabs")
    return sample


@contextmanager
def ended_by_interrupt() -> Iterator[None]:
    """Ctrl-C ends the process at once: while a library trains, Python would hear of it only at the end."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # as nohup leaves it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def train_sentencepiece(sample: list[str], vocab_size: int, model_type: Literal["bpe", "unigram"]) -> bytes:
    """A serialized SentencePiece model of exactly `vocab_size` pieces, 256 bytes, <unk> and </s> among them.

    Nothing is normalised, no space is added or dropped, and what has no piece falls back to bytes, so
    decoding gives back what was encoded. </s> ends a document.

    Raises:
        MegamupError: the vocabulary is too small for bytes and characters, or too large for the text.
    """
    sentencepiece = require("sentencepiece")
    smallest = BYTE_PIECES + META_PIECES + 1
    if vocab_size < smallest:
        raise MegamupError(
            f"--vocab-size {vocab_size}: expected at least {smallest}: 256 bytes, <unk>, </s> and one piece"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise MegamupError(_explain(str(error), vocab_size)) from error
    return model.getvalue()


def _explain(message: str, vocab_size: int) -> str:
    """SentencePiece's failed checks in a user's words."""
    if match := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return (
            f"--vocab-size {vocab_size} is too small: bytes and the characters of this text alone take "
            f"{match[1]}; expected more than that"
        )
    if match := re.search(r"size too high \(\d+\)\. Please set it to a value <= (\d+)", message):
        return f"--vocab-size {vocab_size} is too large for so little text: expected at most {match[1]}, or more text"
    return f"SentencePiece failed: {message}"


def train_byte_bpe(sample: list[str], vocab_size: int, pattern: Pattern) -> bytes:
    """A tokenizer.json of byte-level BPE with exactly `vocab_size` tokens: END_OF_TEXT, the 256 bytes, and merges.

    Args:
        sample: text to count in.
        vocab_size: tokens.
        pattern: how text is split before merging, which never joins two parts: as GPT-2 does, or Llama 3 (digits by
            three, line breaks with what stands before).

    Raises:
        MegamupError: the vocabulary is too small for the bytes, or too large for the text.
    """
    tokenizers = require("tokenizers")
    smallest = BYTE_PIECES + 1
    if vocab_size < smallest:
        raise MegamupError(f"--vocab-size {vocab_size}: expected at least {smallest}: 256 bytes and {END_OF_TEXT}")
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer: Any = tokenizers.Tokenizer(tokenizers.models.BPE())
    if pattern == "gpt2":
        tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    else:
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(LLAMA3_PATTERN), "isolated")
        bytes_only = byte_level(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, bytes_only])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=byte_level.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(sample, trainer, length=len(sample))
    if tokenizer.get_vocab_size() < vocab_size:
        raise MegamupError(
            f"--vocab-size {vocab_size} is too large for so little text: expected at most "
            f"{tokenizer.get_vocab_size()}, or more text"
        )
    return str(tokenizer.to_str(pretty=True)).encode()


def write_tokenizer(data: bytes, path: Path) -> FileTokenizer:
    """Write `path`, whole or not at all, and load it.

    Raises:
        MegamupError: the file can't be written.
    """
    with writing(path):
        write_bytes_atomic(path, data)
    return load_tokenizer(str(path))
