"""Text to tokens: what a worker does with a piece of input."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megamup.data.preprocess.filters import SEEN_CHARACTERS, Filter, code_sha256, load_filter
from megamup.data.preprocess.pieces import NAMED_DOCUMENTS, PieceWriter
from megamup.data.reading.documents import Batch
from megamup.data.shards import token_dtype
from megamup.data.tokenizer import Ids, Tokenizer, spot_check
from megamup.errors import MegamupError

SPOT_CHARACTERS = 2000
"""Of each piece, compared with the reference backend: a thousandth of it."""

BESIDE_CUT = 256
"""Characters on each side of a cut through a long document that are encoded together and apart."""
SPACES_AND_LETTERS = bytes(ord(" " if chr(byte).isspace() else "x") for byte in range(256))
"""A byte of ASCII -> a space, or an x for all that is none."""


@dataclass
class LongDocument:
    """A document that comes in several texts, so far."""

    part: int | None
    """Part of the output, None where a filter left it out."""
    tokens: int = 0
    end: str = ""
    """The last characters so far."""


class Encoder:
    """Tokenizes the documents of a piece, filters them and divides them among the parts of the output.

    Args:
        tokenizer: its `eod_id` is added to each document.
        filters: specs (see `filters`); a document stays if each keeps it; they see its first `SEEN_CHARACTERS`.
        valid_fraction: expected share of the documents in part 1 (valid), the others are in part 0 (train).
        seed: of that choice, a hash of (seed, the first `SEEN_CHARACTERS`): equal documents are never on both sides.
    """

    def __init__(
        self, tokenizer: Tokenizer, filters: Sequence[str] = (), valid_fraction: float = 0.0, seed: int = 0
    ) -> None:
        self.tokenizer, self.filters, self.valid_fraction, self.seed = tokenizer, tuple(filters), valid_fraction, seed
        self.dtype = token_dtype(tokenizer.vocab_size)
        self._end = np.array([tokenizer.eod_id], dtype=self.dtype)
        self._filters: list[Filter] = [load_filter(spec) for spec in filters]
        self._long: LongDocument | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Encoder, (self.tokenizer, self.filters, self.valid_fraction, self.seed)

    @property
    def digest(self) -> str:
        """Of all that the result depends on."""
        filters = [(spec, code_sha256(spec)) for spec in self.filters]
        content = repr((self.tokenizer.sha256, self.tokenizer.backend, filters, self.valid_fraction, self.seed))
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def n_parts(self) -> int:
        return 2 if self.valid_fraction else 1

    def encode(self, batches: Iterator[Batch], piece: PieceWriter) -> None:
        """Write the documents of `batches` to `piece`.

        Raises:
            MegamupError: an id outside the tokenizer's vocabulary, or a backend that isn't exact after all.
        """
        self._long = None
        checked = False
        for batch in batches:
            piece.info.source_bytes += batch.source_bytes
            piece.info.named += batch.unreadable[: NAMED_DOCUMENTS - len(piece.info.named)]
            if batch.unreadable:
                piece.info.left_out["unreadable"] += len(batch.unreadable)
            if not checked and batch.texts and batch.texts[0]:
                spot_check(self.tokenizer, batch.texts[0][:SPOT_CHARACTERS])
                checked = True
            self._encode_batch(batch, piece)

    def _encode_batch(self, batch: Batch, piece: PieceWriter) -> None:
        texts, first, last = batch.texts, 0, len(batch.texts)
        if self._long is not None and texts:
            first = 1
            self._add_long(texts[0], piece, ends=last > 1 or not batch.continues)
        if batch.continues and last > first:
            last -= 1
        self._add_documents(texts[first:last], piece)
        if last < len(texts) and last >= first:
            self._begin_long(texts[last], piece)

    def _begin_long(self, text: str, piece: PieceWriter) -> None:
        reason = self._reason_to_leave_out(text)
        if reason:
            piece.info.left_out[reason] += 1
        self._long = LongDocument(None if reason else self.part_of(text))
        self._add_long(text, piece, ends=False)

    def _add_long(self, text: str, piece: PieceWriter, ends: bool) -> None:
        document = self._long
        assert document is not None
        if document.part is not None:
            if document.end and not self._is_exact_cut(document.end, text[:BESIDE_CUT]):
                piece.info.inexact_cuts += 1
            new_words = words(text) - parts_word(document.end, text)
            document.end = text[-BESIDE_CUT:]
            ids, _ = self._ids([text])
            piece.write(document.part, ids, utf8_bytes(text), new_words)
            document.tokens += len(ids)
            if ends:
                piece.write(document.part, self._end)
                piece.end_documents(document.part, np.array([document.tokens + 1]))
        if ends:
            self._long = None

    def _is_exact_cut(self, left: str, right: str) -> bool:
        """Whether the ids on both sides of a cut are those of the whole."""
        ids, lengths = self._ids([left + right, left, right])
        return bool(np.array_equal(ids[: lengths[0]], ids[lengths[0] :]))

    def _add_documents(self, texts: list[str], piece: PieceWriter) -> None:
        kept = self._filtered(texts, piece)
        if not kept:
            return
        if self.n_parts == 1:
            self._write_documents(0, kept, piece)
            return
        parts = [self.part_of(text) for text in kept]
        for part in range(self.n_parts):
            self._write_documents(part, [text for text, place in zip(kept, parts, strict=True) if place == part], piece)

    def _filtered(self, texts: list[str], piece: PieceWriter) -> list[str]:
        kept = [text for text in texts if text]
        if len(kept) < len(texts):
            piece.info.left_out["empty"] += len(texts) - len(kept)
        if not self._filters:
            return kept
        reasons = [self._reason_to_leave_out(text) for text in kept]
        piece.info.left_out.update(reason for reason in reasons if reason)
        return [text for text, reason in zip(kept, reasons, strict=True) if not reason]

    def _reason_to_leave_out(self, text: str) -> str | None:
        return next((item.name for item in self._filters if not item.keeps(text[:SEEN_CHARACTERS])), None)

    def part_of(self, text: str) -> int:
        """0 (train) or 1 (valid)."""
        if not self.valid_fraction:
            return 0
        digest = hashlib.blake2b(text[:SEEN_CHARACTERS].encode(), digest_size=8, key=str(self.seed).encode()).digest()
        return int(int.from_bytes(digest, "little") < self.valid_fraction * 2**64)

    def _write_documents(self, part: int, texts: list[str], piece: PieceWriter) -> None:
        if not texts:
            return
        ids, lengths = self._ids(texts)
        ended = np.insert(ids, np.cumsum(lengths), self._end[0])
        piece.write(part, ended, sum(map(utf8_bytes, texts)), sum(map(words, texts)))
        piece.end_documents(part, lengths + 1)

    def _ids(self, texts: list[str]) -> tuple[Ids, npt.NDArray[np.int64]]:
        """Ids in the output's dtype, and how many each text has. Shapes (tokens,), (texts,)."""
        ids, lengths = self.tokenizer.encode_batch(texts)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.tokenizer.vocab_size:  # before it could wrap
            raise MegamupError(
                f"tokenizer {self.tokenizer.name!r} gave ids {ids.min():,} to {ids.max():,}, outside its vocabulary of "
                f"{self.tokenizer.vocab_size:,}; its files contradict each other"
            )
        return ids.astype(self.dtype), lengths


def utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def words(text: str) -> int:
    """`len(text.split())`, some times as fast for ASCII: words are where a letter follows a space."""
    if not text.isascii():
        return len(text.split())
    return (b" " + text.encode().translate(SPACES_AND_LETTERS)).count(b" x")


def parts_word(left: str, right: str) -> bool:
    """Whether a word goes on from one text to the next."""
    beside = left[-1:], right[:1]
    return words("".join(beside)) < sum(map(words, beside))
