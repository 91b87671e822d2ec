import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from megamup.data.objectives.words import byte_letters, no_text, words_of
from megamup.data.tokenizer import ByteTokenizer, FileTokenizer, SentencePieceTokenizer
from megamup.data.tokenizer.huggingface import HuggingFaceTokenizer
from megamup.data.tokenizer.tiktoken import TiktokenTokenizer
from megamup.errors import MegamupError

TEXT = "The order of samples, it's a function\n\tof the seed:  and (of) the samples consumed.\nDéjà vu naïve 東京"


def groups(tokenizer: FileTokenizer, text: str) -> list[str]:
    """What the table says are words, as text without the whitespace around them."""
    ids = np.asarray(tokenizer.encode(text)).astype(np.int64)
    begins = words_of(tokenizer, tokenizer.vocab_size).begins(ids[None])[0]
    parts = np.split(ids, np.flatnonzero(begins)[1:])
    return [word for part in parts if (word := tokenizer.decode(part).strip())]


def test_bytes() -> None:
    assert groups(ByteTokenizer(), TEXT) == TEXT.split()


def test_sentencepiece(model_path: Path) -> None:
    tokenizer = SentencePieceTokenizer("model", model_path.read_bytes())
    assert groups(tokenizer, TEXT) == TEXT.split()
    assert no_text(tokenizer) == set(), "the end of documents, and <unk>, which text may become"


def test_byte_level_bpe(byte_bpe: Callable[..., dict[str, Any]]) -> None:
    tokenizer = HuggingFaceTokenizer("bpe", json.dumps(byte_bpe()).encode())
    assert groups(tokenizer, TEXT) == TEXT.split()
    assert no_text(tokenizer) == set(), "the end of documents stands in text"


def test_tiktoken() -> None:
    ranks = b"".join(
        base64.b64encode(token) + b" %d\n" % rank
        for rank, token in enumerate([*(bytes([byte]) for byte in range(256)), b" t", b"he", b" the"])
    )
    encoding = {"pattern": r" ?\S+|\s+", "special": {"<|endoftext|>": 300, "<mask>": 301}}
    tokenizer = TiktokenTokenizer("ranks", ranks, json.dumps(encoding).encode())
    assert groups(tokenizer, TEXT) == TEXT.split()
    assert no_text(tokenizer) == {301}


def test_wordpiece(train_hf: Callable[..., dict[str, Any]]) -> None:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    config = train_hf(
        tokenizers.models.WordPiece(unk_token="[UNK]"),
        tokenizers.trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False),
        pre_tokenizer=tokenizers.pre_tokenizers.BertPreTokenizer(),
        decoder=tokenizers.decoders.WordPiece(),
    )
    tokenizer = HuggingFaceTokenizer("wordpiece", json.dumps(config).encode(), eod="[SEP]")
    text = "The order of samples is a function of the seed"
    assert groups(tokenizer, text) == text.split()
    assert groups(tokenizer, "it, is") == ["it", ",", "is"], "punctuation is a word of BERT's"
    mask, sep = (special.index(name) for name in ("[MASK]", "[SEP]"))
    assert mask in no_text(tokenizer)
    assert sep not in no_text(tokenizer)


def test_ends_of_words(train_hf: Callable[..., dict[str, Any]]) -> None:
    config = train_hf(
        tokenizers.models.BPE(end_of_word_suffix="</w>", unk_token="<unk>"),
        tokenizers.trainers.BpeTrainer(
            vocab_size=400, end_of_word_suffix="</w>", special_tokens=["<unk>", "</s>"], show_progress=False
        ),
        pre_tokenizer=tokenizers.pre_tokenizers.WhitespaceSplit(),
        decoder=tokenizers.decoders.BPEDecoder(suffix="</w>"),
    )
    tokenizer = HuggingFaceTokenizer("bpe", json.dumps(config).encode())
    text = "The order of samples is a function of the seed"
    assert groups(tokenizer, text) == text.split()


def test_a_tokenizer_that_marks_no_words_is_refused(train_hf: Callable[..., dict[str, Any]]) -> None:
    config = train_hf(
        tokenizers.models.BPE(unk_token="<unk>"),
        tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"], show_progress=False),
    )
    tokenizer = HuggingFaceTokenizer("plain", json.dumps(config).encode())
    with pytest.raises(
        MegamupError, match=r"whole_word=true: tokenizer 'plain', a BPE, doesn't mark where words begin"
    ):
        words_of(tokenizer, tokenizer.vocab_size)


def test_letters_of_bytes_are_the_librarys() -> None:
    letters = byte_letters()
    assert set(letters) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert (letters["Ġ"], letters["Ċ"], letters["a"], letters["é"]) == (0x20, 0x0A, 0x61, 0xE9)


def test_ids_beyond_the_tokenizer_are_words_of_their_own() -> None:
    words = words_of(ByteTokenizer(), 300)
    assert words.begins(np.array([[97, 98, 280, 99, 256, 100]])).tolist() == [[True, False, True, True, True, True]]
