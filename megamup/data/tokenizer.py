"""Text to token ids and back: SentencePiece models, and plain UTF-8 bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megamup.errors import MegamupError

Ids = npt.NDArray[np.integer[Any]]

ACCEPTED = "a SentencePiece .model file, or `bytes`"
SPACE_SYMBOL = "\u2581"  # ▁, what SentencePiece writes for a space


class Tokenizer(Protocol):
    """What the pipeline asks of a tokenizer. Instances are sent to worker processes, so they must pickle."""

    @property
    def name(self) -> str: ...

    @property
    def sha256(self) -> str:
        """Of the tokenizer's file, or of its name where it has no file: equal hashes mean equal ids."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eod_id(self) -> int:
        """The end-of-document token: no text encodes to it and it decodes to nothing."""

    def encode(self, text: str) -> Ids:
        """Ids of `text`, without end-of-document. Shape (tokens,)."""

    def decode(self, ids: Ids) -> str: ...


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that `spec` names: a SentencePiece `.model` file, or `bytes`.

    Raises:
        MegamupError: unknown spec, missing or broken file, no end-of-document token.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec)
    if path.is_file():
        return SentencePieceTokenizer(path)
    problem = "no such file" if path.suffix == ".model" else "not a known tokenizer"
    raise MegamupError(f"tokenizer {spec!r}: {problem}; expected {ACCEPTED}")


class ByteTokenizer:
    """The 256 byte values of UTF-8, and 256 for the end of a document. Exact for every text."""

    name = "bytes"
    sha256 = hashlib.sha256(b"bytes").hexdigest()
    vocab_size = 257
    eod_id = 256

    def encode(self, text: str) -> Ids:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)

    def decode(self, ids: Ids) -> str:
        values = np.asarray(ids)
        data: bytes = values[values != self.eod_id].astype(np.uint8).tobytes()
        return data.decode("utf-8", errors="replace")


class SentencePieceTokenizer:
    """A SentencePiece model; its end-of-sentence token ends a document.

    Ids are SentencePiece's own, with one exception. SentencePiece can't tell a literal ▁ (U+2581) from a
    space, so the text comes back changed. In a model that keeps every other text exactly (identity
    normalisation, byte fallback), ▁ is therefore written as its three bytes.
    """

    def __init__(self, path: Path) -> None:
        import sentencepiece

        model = path.read_bytes()
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.load_from_serialized_proto(model)
        except RuntimeError as error:
            raise MegamupError(f"tokenizer {str(path)!r}: not a SentencePiece model; expected {ACCEPTED}") from error
        self.name = path.name
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._processor.get_piece_size()
        self.eod_id: int = self._processor.eos_id()
        if self.eod_id < 0:
            raise MegamupError(
                f"tokenizer {str(path)!r}: the model has no end-of-sentence token to end documents with; "
                "train it with one (tools/train_tokenizer.py does; SentencePiece's own --eos_id=1)"
            )
        self._space_symbol_bytes = self._find_space_symbol_bytes()

    def _find_space_symbol_bytes(self) -> Ids | None:
        """The ids of ▁'s three bytes, or None where the model changes other text too."""
        spaced = "  \ufb01 e\u0301\u3000\t\n x  "
        if self._processor.normalize(spaced) != spaced.replace(" ", SPACE_SYMBOL):
            return None
        pieces = [f"<0x{byte:02X}>" for byte in SPACE_SYMBOL.encode()]
        ids = [self._processor.piece_to_id(piece) for piece in pieces]
        return np.array(ids, dtype=np.int32) if all(map(self._processor.is_byte, ids)) else None

    def encode(self, text: str) -> Ids:
        if self._space_symbol_bytes is None or SPACE_SYMBOL not in text:
            return self._encode(text)
        first, *others = (self._encode(part) for part in text.split(SPACE_SYMBOL))
        parts = [first]
        for other in others:
            parts += [self._space_symbol_bytes, other]
        return np.concatenate(parts)

    def _encode(self, text: str) -> Ids:
        ids: Ids = self._processor.encode(text, out_type="numpy")
        return ids

    def decode(self, ids: Ids) -> str:
        return str(self._processor.decode(np.asarray(ids).tolist()))
