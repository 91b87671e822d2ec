"""Train a SentencePiece tokenizer that gives every text back exactly."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from megamup.data.pending import PendingFile
from megamup.data.progress import ByteProgress
from megamup.data.readers import Found, parse, records
from megamup.data.tokenizer import SentencePieceTokenizer
from megamup.errors import MegamupError

BYTE_PIECES = 256
META_PIECES = 2  # <unk>, </s>
# Line breaks are no part of any piece (byte fallback keeps them, as in Llama). SentencePiece drops a training
# sentence that holds a tab or ▅, which it uses for itself, and takes ▁ for a space.
SEPARATORS = re.compile("[\n\r\t\0\u2581\u2585]+")
# Longer sentences than 4,192 bytes are dropped, silently: cut long lines before a space, at most 4 bytes a
# character.
SENTENCE = re.compile(r".{1,1000}(?= |\Z)|.{1,1000}", re.DOTALL)


def sentences(text: str) -> Iterator[str]:
    """`text` in the pieces that SentencePiece can learn from; spaces are kept."""
    for line in SEPARATORS.split(text):
        yield from SENTENCE.findall(line)


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


def sample_sentences(found: Found, text_key: str, max_bytes: int) -> EvenSample:
    """Sentences of all documents, evenly thinned to `max_bytes`.

    Raises:
        MegamupError: a document can't be read.
    """
    sample = EvenSample(max_bytes)
    with ByteProgress("reading", found.total_bytes) as progress:
        for path in found.files:
            for record in records(path):
                for sentence in sentences(parse(record, text_key)):
                    sample.add(sentence)
                progress.advance(record.source_bytes)
    return sample


def train_sentencepiece(sample: list[str], vocab_size: int, model_type: Literal["bpe", "unigram"]) -> bytes:
    """A serialized SentencePiece model of exactly `vocab_size` pieces, 256 bytes, <unk> and </s> among them.

    Nothing is normalised, no space is added or dropped, and what has no piece falls back to bytes, so
    decoding gives back what was encoded. </s> ends a document.

    Raises:
        MegamupError: the vocabulary is too small for bytes and characters, or too large for the text.
    """
    import sentencepiece

    smallest = BYTE_PIECES + META_PIECES + 1
    if vocab_size < smallest:
        raise MegamupError(
            f"--vocab-size {vocab_size}: expected at least {smallest}: 256 bytes, <unk>, </s> and one piece"
        )
    if not sample:
        raise MegamupError("no text to train on: the input holds only line breaks or tabs")
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


def write_tokenizer(model: bytes, prefix: str) -> SentencePieceTokenizer:
    """Write `prefix`.model, whole or not at all, and load it.

    Raises:
        MegamupError: the file can't be written.
    """
    file = PendingFile(Path(f"{prefix}.model"))
    try:
        file.write(model)
        file.sync()
        file.publish()
    finally:
        file.discard()
    return SentencePieceTokenizer(file.path)
