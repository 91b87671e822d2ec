"""SentencePiece models."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from megamup.data.tokenizer.base import FileTokenizer, Ids, Lengths, check_eod, join_ids, require
from megamup.data.tokenizer.text_only import text_only
from megamup.errors import MegamupError

MODEL = "tokenizer.model"
SPACE_SYMBOL = "\u2581"  # ▁, what SentencePiece writes for a space


class SentencePieceTokenizer(FileTokenizer):
    """A SentencePiece model; its end-of-sentence token ends a document unless `eod` names another control token.

    Ids are SentencePiece's own, with one exception. SentencePiece can't tell a literal ▁ (U+2581) from a
    space, so the text comes back changed. In a model that keeps every other text exactly (identity
    normalisation, byte fallback), ▁ is therefore written as its three bytes.

    Raises:
        MegamupError: not a model, or without an end-of-document token.
    """

    kind: ClassVar[str] = "sentencepiece"
    package: ClassVar[str] = "sentencepiece"

    def __init__(self, name: str, model: bytes, eod: str | None = None) -> None:
        processor = _load(name, model)
        self._controls = [
            processor.id_to_piece(piece) for piece in range(processor.get_piece_size()) if processor.is_control(piece)
        ]
        if eod is not None:
            check_eod(name, eod, self._controls)
        elif processor.eos_id() < 0:
            raise MegamupError(
                f"tokenizer {name!r}: the model has no end-of-sentence token to end documents with; name a control "
                f"token with --eod TOKEN ({', '.join(self._controls) or 'it has none'}), or train it with one "
                "(tools/train_tokenizer.py does; SentencePiece's own --eos_id=1)"
            )
        else:
            eod = processor.id_to_piece(processor.eos_id())
        super().__init__(name, {MODEL: model}, eod)
        self.vocab_size = processor.get_piece_size()
        self.eod_id = processor.piece_to_id(eod)
        self._space_symbol_bytes = _find_space_symbol_bytes(processor)

    @cached_property
    def _processor(self) -> Any:
        return _load(self.name, self._files[MODEL])

    def encode_batch(self, texts: list[str]) -> tuple[Ids, Lengths]:
        if self._space_symbol_bytes is not None and any(SPACE_SYMBOL in text for text in texts):
            return join_ids(map(self._encode_with_space_symbols, texts), np.int32)
        return join_ids(self._processor.encode(texts, out_type="numpy", num_threads=1), np.int32)

    def _encode_with_space_symbols(self, text: str) -> Ids:
        first, *others = self._processor.encode(text.split(SPACE_SYMBOL), out_type="numpy", num_threads=1)
        parts = [first]
        for other in others:
            parts += [self._space_symbol_bytes, other]
        return np.concatenate(parts)

    def decode(self, ids: Ids) -> str:
        return str(self._processor.decode(np.asarray(ids).tolist()))

    def marks(self) -> list[str]:
        processor = self._processor
        hidden = [piece for piece in range(processor.get_piece_size()) if _is_no_text(processor, piece)]
        return [*map(processor.id_to_piece, hidden), "<0x41>", SPACE_SYMBOL]

    def gigatoken(self) -> Any:
        """gigatoken reads the model into the form of a tokenizer.json, in which text could become pieces that
        SentencePiece never gives to text: control tokens, <unk> and bytes by their names."""
        gigatoken, processor = require("gigatoken"), self._processor
        pieces = range(processor.get_piece_size())
        hidden = {processor.id_to_piece(piece) for piece in pieces if _is_no_text(processor, piece)}
        byte_names = {processor.id_to_piece(piece) for piece in pieces if processor.is_byte(piece)}
        config = gigatoken.Tokenizer.from_sentencepiece(self._files[MODEL])._hf_config()
        model = config["model"]
        model["merges"] = [merge for merge in model["merges"] if "".join(merge) not in byte_names]
        return gigatoken.Tokenizer.from_json(text_only(config, hidden, keep_special=False))


def _load(name: str, model: bytes) -> Any:
    processor = require("sentencepiece").SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(model)
    except RuntimeError as error:
        raise MegamupError(f"tokenizer {name!r}: not a SentencePiece model") from error
    return processor


def _is_no_text(processor: Any, piece: int) -> bool:
    return bool(processor.is_control(piece) or processor.is_unknown(piece))


def _find_space_symbol_bytes(processor: Any) -> Ids | None:
    """The ids of ▁'s three bytes, or None where the model changes other text too."""
    spaced = "  \ufb01 e\u0301\u3000\t\n x  "
    if processor.normalize(spaced) != spaced.replace(" ", SPACE_SYMBOL):
        return None
    ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SYMBOL.encode()]
    return np.array(ids, dtype=np.int32) if all(map(processor.is_byte, ids)) else None
