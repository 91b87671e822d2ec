import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from megamup.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from megamup.errors import MegamupError


def assert_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eod_id not in ids
    if len(ids):
        assert ids.min() >= 0
        assert ids.max() < tokenizer.vocab_size


def test_bytes_round_trip(odd_texts: list[str]) -> None:
    for text in odd_texts:
        assert_round_trip(ByteTokenizer(), text)


def test_bytes_are_utf8() -> None:
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eod_id, tokenizer.backend) == (257, 256, "bytes")
    assert tokenizer.encode("é\n").tolist() == [0xC3, 0xA9, 10]
    assert tokenizer.decode(np.array([104, 105, 256])) == "hi"


def test_sentencepiece_round_trip(model_path: Path, prose: str, odd_texts: list[str]) -> None:
    tokenizer = load_tokenizer(str(model_path))
    for text in [prose, *odd_texts]:
        assert_round_trip(tokenizer, text)


def test_sentencepiece_ids_are_its_own(model_path: Path, prose: str, odd_texts: list[str]) -> None:
    tokenizer = load_tokenizer(str(model_path))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    assert tokenizer.vocab_size == reference.get_piece_size() == 340
    assert tokenizer.eod_id == reference.eos_id()
    for text in [prose, *odd_texts]:
        if "▁" not in text:
            assert tokenizer.encode(text).tolist() == reference.encode(text)


def test_a_batch_is_its_texts(model_path: Path, odd_texts: list[str]) -> None:
    for tokenizer in (ByteTokenizer(), load_tokenizer(str(model_path))):
        ids, lengths = tokenizer.encode_batch(odd_texts)
        parts = np.split(ids, np.cumsum(lengths)[:-1])
        assert [part.tolist() for part in parts] == [tokenizer.encode(text).tolist() for text in odd_texts]
        ids, lengths = tokenizer.encode_batch([])
        assert len(ids) == len(lengths) == 0


def test_real_text_round_trips(model_path: Path, corpus: Callable[[str], Path]) -> None:
    tokenizer = load_tokenizer(str(model_path))
    with open(corpus("c4_sample.jsonl"), encoding="utf-8") as file:
        for line in list(file)[:200]:
            assert_round_trip(tokenizer, json.loads(line)["text"])


def test_a_normalising_model_is_left_as_it_is(tmp_path: Path, prose: str) -> None:
    """A model that adds a space and folds characters gives SentencePiece's own ids, also for ▁."""
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(prose.split("\n") * 10),
        model_prefix=str(tmp_path / "other"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    path = str(tmp_path / "other.model")
    reference = sentencepiece.SentencePieceProcessor(model_file=path)
    for text in ["a▁b", "  ﬁ  x", prose]:
        assert load_tokenizer(path).encode(text).tolist() == reference.encode(text)


def test_pickles_for_workers(model_path: Path) -> None:
    tokenizer = load_tokenizer(str(model_path))
    expected = tokenizer.encode("a▁b").tolist()
    pickled = pickle.dumps(tokenizer)
    assert len(pickled) < model_path.stat().st_size + 2000
    copy = pickle.loads(pickled)
    assert copy.encode("a▁b").tolist() == expected
    assert copy.sha256 == tokenizer.sha256


def test_no_end_of_sentence(tmp_path: Path, prose: str) -> None:
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(prose.split("\n")),
        model_prefix=str(tmp_path / "endless"),
        vocab_size=80,
        eos_id=-1,
        hard_vocab_limit=False,
        control_symbols=["<end>"],
        user_defined_symbols=["<sep>"],
        minloglevel=2,
    )
    path = str(tmp_path / "endless.model")
    with pytest.raises(MegamupError, match=r"endless\.model.*no end-of-sentence token.*--eod TOKEN \(<s>, <end>\)"):
        load_tokenizer(path)
    with pytest.raises(MegamupError, match=r"--eod '<sep>' is none of its special tokens; expected one of: <s>, <end>"):
        load_tokenizer(path, eod="<sep>")
    tokenizer = load_tokenizer(path, eod="<end>")
    assert tokenizer.eod_id == sentencepiece.SentencePieceProcessor(model_file=path).piece_to_id("<end>")
    assert tokenizer.eod_id not in tokenizer.encode("a <end> b")
    assert tokenizer.sha256 != load_tokenizer(path, eod="<s>").sha256
