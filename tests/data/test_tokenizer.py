import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from megamup.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from megamup.errors import MegamupError

ODD_TEXTS = [
    "",
    " ",
    "\n",
    "\t",
    "\r\n",
    "  two  spaces  ",
    "\n\n\n    indented\n\tby tab\n",
    "\0",
    "a\0b",
    "\ufeffmark",
    "e\u0301 is not é",
    "ﬁ ① Ａ",
    "\u2028\u3000\u00a0\u200b",
    "▁",
    "▁▁ ▁",
    "a▁b",
    "▅",
    "</s><s><unk><pad><0x41>",
    "⁇ \ufffd",
    "👩‍👩‍👧 🏳️‍🌈",
    "\ue000\U0010ffff",
    "x" * 10_000,
]
ALPHABETS = ["ab \n", " \t\n\r\0", "▁▅ a\n", "éßπ東👍", "".join(map(chr, range(32, 127)))]


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of few characters, so that runs and repeats are common, and texts of any character."""
    generator = random.Random(seed)
    texts = []
    for _ in range(count):
        length = generator.randrange(60)
        if generator.random() < 0.7:
            texts.append("".join(generator.choices(generator.choice(ALPHABETS), k=length)))
        else:
            points = (generator.randrange(0x110000) for _ in range(length))
            texts.append("".join(chr(point) for point in points if not 0xD800 <= point < 0xE000))
    return texts


def assert_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eod_id not in ids
    if len(ids):
        assert ids.min() >= 0
        assert ids.max() < tokenizer.vocab_size


def test_bytes_round_trip() -> None:
    for text in ODD_TEXTS + random_texts(500):
        assert_round_trip(ByteTokenizer(), text)


def test_bytes_are_utf8() -> None:
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (257, 256)
    assert tokenizer.encode("é\n").tolist() == [0xC3, 0xA9, 10]
    assert tokenizer.decode(np.array([104, 105, 256])) == "hi"


def test_sentencepiece_round_trip(model_path: Path, prose: str) -> None:
    tokenizer = load_tokenizer(str(model_path))
    for text in [prose, *ODD_TEXTS, *random_texts(500)]:
        assert_round_trip(tokenizer, text)


def test_sentencepiece_ids_are_its_own(model_path: Path, prose: str) -> None:
    tokenizer = load_tokenizer(str(model_path))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    assert tokenizer.vocab_size == reference.get_piece_size() == 340
    assert tokenizer.eod_id == reference.eos_id()
    for text in [prose, *ODD_TEXTS, *random_texts(200)]:
        if "▁" not in text:
            assert tokenizer.encode(text).tolist() == reference.encode(text)


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
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("a▁b").tolist() == tokenizer.encode("a▁b").tolist()
    assert copy.sha256 == tokenizer.sha256


def test_no_end_of_document(tmp_path: Path, prose: str) -> None:
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(prose.split("\n")),
        model_prefix=str(tmp_path / "endless"),
        vocab_size=80,
        eos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(MegamupError, match=r"endless\.model.*no end-of-sentence token.*train_tokenizer"):
        load_tokenizer(str(tmp_path / "endless.model"))


def test_unknown_spec(tmp_path: Path) -> None:
    with pytest.raises(MegamupError, match=r"'gpt2': not a known tokenizer; expected a SentencePiece"):
        load_tokenizer("gpt2")
    with pytest.raises(MegamupError, match=r"no such file; expected"):
        load_tokenizer(str(tmp_path / "absent.model"))
    broken = tmp_path / "broken.model"
    broken.write_bytes(b"not a model")
    with pytest.raises(MegamupError, match=r"broken\.model'?: not a SentencePiece model; expected"):
        load_tokenizer(str(broken))
