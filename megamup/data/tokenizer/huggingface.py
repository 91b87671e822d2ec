"""Hugging Face's tokenizer.json."""

from __future__ import annotations

import json
import os
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from megamup.data.tokenizer.base import FileTokenizer, Ids, Lengths, choose_eod, join_ids, require
from megamup.data.tokenizer.text_only import text_only
from megamup.errors import MegamupError

TOKENIZER_JSON = "tokenizer.json"


class HuggingFaceTokenizer(FileTokenizer):
    """A tokenizer.json: its normaliser, pre-tokenizer and model, without what it would add to a text or cut off.

    Added tokens that aren't special are found in text as the file says. Special ones are not, and neither is the
    end-of-document token, special or not.

    Args:
        name: for people.
        data: the file.
        eod: the end-of-document token, an added token; default: the special token that is well known for it.

    Raises:
        MegamupError: not a tokenizer.json, or no such token.
    """

    kind: ClassVar[str] = "huggingface"
    package: ClassVar[str] = "tokenizers"

    def __init__(self, name: str, data: bytes, eod: str | None = None) -> None:
        tokenizers = require("tokenizers")
        try:
            whole = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # tokenizers raises Exception itself
            raise MegamupError(f"tokenizer {name!r}: not a tokenizer.json that tokenizers reads: {error}") from error
        added = whole.get_added_tokens_decoder()
        self._added = [token.content for token in added.values()]
        special = [token.content for token in added.values() if token.special]
        eod = choose_eod(name, eod, special if eod is None else self._added)
        super().__init__(name, {TOKENIZER_JSON: data}, eod)
        self._special = {eod, *special}
        self.eod_id = next(number for number, token in added.items() if token.content == eod)
        self.vocab_size = max(whole.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def _processor(self) -> Any:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        config = json.loads(self._files[TOKENIZER_JSON])
        processor = require("tokenizers").Tokenizer.from_str(text_only(config, self._special, keep_special=True))
        processor.encode_special_tokens = True
        return processor

    def encode_batch(self, texts: list[str]) -> tuple[Ids, Lengths]:
        encodings = self._processor.encode_batch_fast(texts, add_special_tokens=False)
        return join_ids((np.array(encoding.ids, np.uint32) for encoding in encodings), np.uint32)

    def decode(self, ids: Ids) -> str:
        return str(self._processor.decode(np.asarray(ids).tolist(), skip_special_tokens=True))

    def marks(self) -> list[str]:
        return self._added

    def gigatoken(self) -> Any:
        config = json.loads(self._files[TOKENIZER_JSON])
        return require("gigatoken").Tokenizer.from_json(text_only(config, self._special, keep_special=False))
