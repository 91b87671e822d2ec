"""A tokenizer.json gives the ids of the library that defines it, and no text becomes a special token."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from megamup.data.tokenizer import FileTokenizer, load_tokenizer

Train = Callable[..., dict[str, Any]]
SPECIALS = ["[UNK]", "</s>", "<|endoftext|>"]


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., FileTokenizer]:
    def load(config: dict[str, Any], eod: str | None = None) -> FileTokenizer:
        path = tmp_path / "tok.json"
        path.write_text(json.dumps(config))
        return load_tokenizer(str(path), eod)

    return load


def reference_ids(config: dict[str, Any], text: str) -> list[int]:
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(config))
    tokenizer.encode_special_tokens = True
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


@pytest.fixture(params=["bpe", "bpe-whole-words", "unigram", "wordpiece", "wordlevel"])
def config(request: pytest.FixtureRequest, train_hf: Train) -> dict[str, Any]:
    """A tokenizer.json of each model, with `SPECIALS`; "bpe-whole-words" looks whole words up before it merges."""
    space = pre_tokenizers.WhitespaceSplit()
    common: dict[str, Any] = {"special_tokens": SPECIALS, "show_progress": False, "vocab_size": 400}
    if request.param == "unigram":
        trainer = trainers.UnigramTrainer(unk_token="[UNK]", **common)
        return train_hf(models.Unigram(), trainer, pre_tokenizer=space, decoder=decoders.Metaspace())
    if request.param == "wordpiece":
        word_piece = models.WordPiece(unk_token="[UNK]")
        return train_hf(
            word_piece, trainers.WordPieceTrainer(**common), pre_tokenizer=space, decoder=decoders.WordPiece()
        )
    if request.param == "wordlevel":
        return train_hf(models.WordLevel(unk_token="[UNK]"), trainers.WordLevelTrainer(**common), pre_tokenizer=space)
    model = models.BPE(unk_token="[UNK]", ignore_merges=request.param == "bpe-whole-words")
    return train_hf(model, trainers.BpeTrainer(**common), pre_tokenizer=space)


def test_no_text_is_a_special_token(config: dict[str, Any], load: Callable[..., FileTokenizer]) -> None:
    """Not as an added token, a piece of a Unigram model, or a whole word; ids of other text stay."""
    tokenizer = load(config, "</s>")
    names = {token["content"]: token["id"] for token in config["added_tokens"]}
    assert tokenizer.eod_id == names["</s>"]
    for text in ["</s>", "a </s> b", "</s></s>", "<|endoftext|>", "x <|endoftext|>", "</S> </s"]:
        ids = tokenizer.encode(text).tolist()
        assert {names["</s>"], names["<|endoftext|>"]}.isdisjoint(ids)
    for text in ["", "return self.shard", "  import random\n", "zażółć 東京 [UN K]"]:
        assert tokenizer.encode(text).tolist() == reference_ids(config, text)


def test_byte_level_keeps_special_names_as_text(byte_bpe: Train, load: Callable[..., FileTokenizer]) -> None:
    tokenizer = load(byte_bpe())
    for text in ["<|endoftext|>", "a<|endoftext|>b", "\n<|endoftext|>\n<|endoftext|>"]:
        ids = tokenizer.encode(text)
        assert tokenizer.eod_id not in ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode(np.append(tokenizer.encode("ab"), tokenizer.eod_id)) == "ab"


def test_ids_of_byte_level_bpe(byte_bpe: Train, load: Callable[..., FileTokenizer], odd_texts: list[str]) -> None:
    config = byte_bpe()
    tokenizer = load(config)
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (1000, 0)
    whole = tokenizers.Tokenizer.from_str(json.dumps(config))
    whole.encode_special_tokens = True
    ids, lengths = tokenizer.encode_batch(odd_texts)
    expected = [encoding.ids for encoding in whole.encode_batch(odd_texts, add_special_tokens=False)]
    assert ids.tolist() == [number for each in expected for number in each]
    assert lengths.tolist() == [len(each) for each in expected]
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in odd_texts)


def test_nothing_is_added_or_cut_off(byte_bpe: Train, load: Callable[..., FileTokenizer]) -> None:
    plain = byte_bpe()
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(plain))
    tokenizer.enable_truncation(max_length=4)
    tokenizer.enable_padding(length=16)
    tokenizer.post_processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    config = json.loads(tokenizer.to_str())
    config["model"]["dropout"] = 0.5
    texts = ["a", "the order of samples is a function of the seed"]
    assert load(config).encode_batch(texts)[0].tolist() == load(plain).encode_batch(texts)[0].tolist()


def test_added_tokens_keep_their_ids(byte_bpe: Train, load: Callable[..., FileTokenizer]) -> None:
    """Special and ordinary added tokens in turn; ordinary ones are found in text as the file says."""
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(byte_bpe()))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.add_tokens(["<tool>", AddedToken("QQ", single_word=True)])
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.add_tokens(["<end>", AddedToken("ZZ", lstrip=True)])
    config = json.loads(tokenizer.to_str())
    ours = load(config, "</s>")
    assert ours.eod_id == 1003
    assert ours.vocab_size == 1006
    for text in ["a<tool>b", "QQ aQQb", "x  ZZ", "<s></s><end>", "<tool><end>"]:
        assert ours.encode(text).tolist() == reference_ids(config, text)
    assert 1001 in ours.encode("a<tool>b")
    by_ordinary = load(config, "<end>")  # one that ends documents is no longer found in text
    assert by_ordinary.eod_id == 1004
    assert by_ordinary.eod_id not in by_ordinary.encode("a <end> b")
