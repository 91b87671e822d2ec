"""Cut texts give the tokens of whole ones, under the tokenizers that people use."""

import gzip
import io
import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from megamup.data.reading import cuts
from megamup.data.reading.cuts import cut, cut_up, forced_cut

Encode = Callable[[str], list[int]]

PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]"
    r"|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


@pytest.fixture(scope="module", params=list(PATTERNS))
def byte_bpe(request: pytest.FixtureRequest) -> Encode:
    """A byte-level BPE under one of the patterns, whose merges cross everything that the pattern lets them."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERNS[request.param]), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=3000, show_progress=False)
    tokenizer.train_from_iterator(itertools.islice(noise(0), 400), trainer)
    return lambda text: list(tokenizer.encode(text).ids)


def noise(seed: int) -> Iterator[str]:
    """Texts in which all sorts of characters meet."""
    generator = random.Random(seed)
    atoms = [
        *"ab Zé\n\t,.'-_/1 2½中。 ",
        "the",
        "don't",
        "\r\n",
        "  ",
        "\n\n",
        "e\u0301",
        "\u00a0",
        "👩\u200d🚀",
        "\x1c",
        "ſ",
    ]
    while True:
        yield "".join(generator.choices(atoms, k=generator.randrange(2, 60)))


def pieces(text: str, window: int) -> Iterator[str]:
    """`text` cut wherever a window ends, at the good places only."""
    while len(text) > window and (at := cut(text[:window])):
        yield text[:at]
        text = text[at:]
    yield text


def test_good_places_keep_tokens_of_noise(byte_bpe: Encode) -> None:
    n_cuts = 0
    for text in itertools.islice(noise(1), 3000):
        at = cut(text)
        if at:
            n_cuts += 1
            assert byte_bpe(text[:at]) + byte_bpe(text[at:]) == byte_bpe(text), (text[:at], text[at:])
    assert n_cuts > 2000


def test_each_kind_of_place_keeps_tokens(byte_bpe: Encode) -> None:
    for kind in cuts.GOOD_PLACES:
        found = 0
        for text in itertools.islice(noise(2), 500):
            whole = byte_bpe(text)
            for match in kind.finditer(text):
                at = match.start()
                found += 1
                assert byte_bpe(text[:at]) + byte_bpe(text[at:]) == whole, (text[:at], text[at:])
        assert found > 100


def real_text(corpus: Callable[[str], Path]) -> str:
    lines = corpus("c4_sample.jsonl").read_text().splitlines()[:300]
    with gzip.open(corpus("novels.jsonl.gz"), "rt") as file:
        novel = json.loads(file.readline())["text"][:400_000]
    return str(novel + "\n".join(json.loads(line)["text"] for line in lines))


def test_real_prose_keeps_tokens(byte_bpe: Encode, corpus: Callable[[str], Path]) -> None:
    text = real_text(corpus)
    parts = list(pieces(text, 5000))
    assert len(parts) > 100
    assert "".join(parts) == text
    assert list(itertools.chain.from_iterable(map(byte_bpe, parts))) == byte_bpe(text)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("stock", [False, True])
def test_real_prose_keeps_pieces_of_sentencepiece(model_type: str, stock: bool, corpus: Callable[[str], Path]) -> None:
    """With text kept as it is, and as SentencePiece normalises it by default, a space put before."""
    text = real_text(corpus)[:200_000]
    model = io.BytesIO()
    keep: dict[str, Any] = {
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
    }
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=model,
        model_type=model_type,
        vocab_size=2000,
        byte_fallback=True,
        minloglevel=2,
        **({} if stock else keep),
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    parts = list(pieces(text, 2000))
    assert len(parts) > 80
    assert list(itertools.chain.from_iterable(processor.encode(parts))) == processor.encode(text)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("0123456789 a b, c", "0123456789 a"),
        ("1, 2, 3  4, 5", "1, 2, 3"),
        ("1, 2, 3, 4", "1, 2, 3,"),
        ("0123456789 a\nb.\n\n4.", "0123456789 a"),
        ("0123456789 é 中\n1", "0123456789 é"),
        ("one twothree", ""),
        ("1,\n 2,\n", ""),
        ("nothing", ""),
        ("。\n他。\n", ""),
        (" a", ""),
        ("", ""),
    ],
)
def test_cut(text: str, left: str) -> None:
    assert text[: cut(text)] == left


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("我和他。\r\n他们", "\r\n他们"),
        ("abcdef", "f"),
        ("abcde\u0301", "e\u0301"),
        ("ab👩\u200d🚀", "👩\u200d🚀"),
        ("ab\r\n", "\r\n"),
        ("\u0301" * 200, "\u0301"),
    ],
)
def test_forced_cut(text: str, right: str) -> None:
    assert text[forced_cut(text) :] == right


def test_cut_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuts, "TEXT_CHARACTERS", 100)
    monkeypatch.setattr(cuts, "LONG", 400)
    prose = "some words and some more of them " * 100
    for text in (prose, "x" * 2000, prose + "x" * 1000 + prose, "short", ""):
        slices = [text[start : start + 37] for start in range(0, len(text), 37)]
        parts = list(cut_up(slices))
        assert "".join(part.text for part in parts) == text
        assert [part.continues for part in parts] == [True] * (len(parts) - 1) + [False]
        assert max(len(part.text) for part in parts) <= 437
        assert all(part.text for part in parts) or not text
