"""Small corpora, small tokenizers and the two programs, as fixtures."""

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tokenizers

from megamup.cli import load_program
from megamup.data.corpus import Corpus
from megamup.data.manifest import TokenizerEntry
from megamup.data.tokenizer_training import sentences, train_sentencepiece, write_tokenizer
from megamup.data.writer import UNSPLIT, write_corpus

ROOT = Path(__file__).resolve().parents[2]

MakeCorpus = Callable[..., Corpus]
RunTool = Callable[..., subprocess.CompletedProcess[str]]

PROSE = (
    "The order of samples is a function of the seed and of the samples consumed.\n"
    "It doesn't depend on the number of ranks, so a run resumes exactly, on another layout too.\n"
    "    def sample(self, index: int) -> Ids:\n        return self.shard.tokens(start, stop)\n"
    "Déjà vu: naïve façades, 東京 and Ελλάδα; 3.14159 = π, more or less.\n"
)


@pytest.fixture(scope="session")
def prose() -> str:
    return PROSE


def load_tool(name: str) -> ModuleType:
    """`tools/name.py` as a module; tools are programs, not a package."""
    return load_program(ROOT / "tools" / f"{name}.py")


@pytest.fixture(scope="session")
def preprocess_main() -> Callable[[list[str]], int]:
    main: Callable[[list[str]], int] = load_tool("preprocess_data").main
    return main


@pytest.fixture(scope="session")
def train_main() -> Callable[[list[str]], int]:
    main: Callable[[list[str]], int] = load_tool("train_tokenizer").main
    return main


@pytest.fixture(scope="session")
def shards_main() -> Callable[[list[str]], int]:
    main: Callable[[list[str]], int] = load_tool("shards").main
    return main


def checkout_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def make_corpus(tmp_path: Path) -> MakeCorpus:
    """A maker of corpora out of lists of ids; the ids end documents themselves."""

    def make(
        documents: Sequence[Sequence[int]],
        vocab_size: int = 257,
        name: str = "corpus",
        manifest: bool = True,
        tokenizer: TokenizerEntry | None = None,
        shard_bytes: int = UNSPLIT,
    ) -> Corpus:
        prefix = str(tmp_path / name)
        write_corpus(prefix, documents, vocab_size, vocab_size - 1, tokenizer, shard_bytes)
        if not manifest:
            Path(prefix + ".json").unlink()
        return Corpus(prefix, tmp_path / "cache")

    return make


@pytest.fixture
def counting_corpus(make_corpus: MakeCorpus) -> Corpus:
    """1,003 tokens in 5 shards: token i is i, in documents of 10."""
    documents = [list(range(start, min(start + 10, 1003))) for start in range(0, 1003, 10)]
    return make_corpus(documents, vocab_size=1004, shard_bytes=500)


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
    "\u2028\u3000\u00a0\u200b\x85",
    "▁",
    "▁▁ ▁",
    "a▁b",
    "▅",
    "</s><s><unk><pad><0x41> [SEP][UNK] <|endoftext|>",
    "⁇ \ufffd",
    "👩‍👩‍👧 🏳️‍🌈",
    "\ue000\U0010ffff",
    "new in Unicode 16 and 17: \u1acf\u088f's \U000323b0123 \u0301\u1ae4\u0323",
    "\U00011382\U000113c9 \U000105d2\u0307 \U00016121\U0001611f",
    "x" * 10_000,
]
ALPHABETS = [
    "ab \n",
    " \t\n\r\0",
    "▁▅ a\n",
    "éßπ東👍",
    "".join(map(chr, range(32, 127))),
    "0123456789., ",
    "'sStTdDlLmMvVeErR ’ſ",
    "\u00a0\u2028\u2029\x85\u3000\u200b\u200d\ufeff a\n",
    "e\u0301\u0323\u0307 क्षिก็한",
]


@pytest.fixture(scope="session")
def odd_texts() -> list[str]:
    """Texts that break tokenizers: chosen ones, texts of few characters (so that runs are common), and of any."""
    generator = random.Random(0)
    texts = list(ODD_TEXTS)
    for _ in range(1000):
        length = generator.randrange(60)
        if generator.random() < 0.7:
            texts.append("".join(generator.choices(generator.choice(ALPHABETS), k=length)))
        else:
            points = (generator.randrange(0x110000) for _ in range(length))
            texts.append("".join(chr(point) for point in points if not 0xD800 <= point < 0xE000))
    return texts


@pytest.fixture(scope="session")
def source_text() -> str:
    """200 kB of English and Python that every machine has."""
    return "".join(Path(str(module.__file__)).read_text("utf-8") for module in (argparse, random)) + PROSE * 20


@pytest.fixture(scope="session")
def train_hf(source_text: str) -> Callable[..., dict[str, Any]]:
    """Trains a tokenizer of Hugging Face's on the source text: `train(model, trainer, **parts)` is a tokenizer.json."""

    def train(model: Any, trainer: Any, **parts: Any) -> dict[str, Any]:
        tokenizer: Any = tokenizers.Tokenizer(model)
        for name, part in parts.items():
            setattr(tokenizer, name, part)
        tokenizer.train_from_iterator(source_text.splitlines(keepends=True), trainer)
        config: dict[str, Any] = json.loads(tokenizer.to_str())
        return config

    return train


@pytest.fixture(scope="session")
def byte_bpe(train_hf: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Trains byte-level BPE of 1,000 tokens, `<|endoftext|>` the first; returns a tokenizer.json."""

    def train(pre_tokenizer: Any = None, normalizer: Any = None, **model: Any) -> dict[str, Any]:
        byte_level = tokenizers.pre_tokenizers.ByteLevel
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=1000,
            initial_alphabet=byte_level.alphabet(),
            special_tokens=["<|endoftext|>"],
            show_progress=False,
        )
        return train_hf(
            tokenizers.models.BPE(**model),
            trainer,
            pre_tokenizer=pre_tokenizer or byte_level(add_prefix_space=False),
            decoder=tokenizers.decoders.ByteLevel(),
            **({"normalizer": normalizer} if normalizer else {}),
        )

    return train


@pytest.fixture(scope="session", params=["bpe", "unigram"])
def model_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of each type, of 340 pieces."""
    model = train_sentencepiece(list(sentences(PROSE)) * 10, 340, request.param)
    path = tmp_path_factory.mktemp("tokenizer") / f"{request.param}.model"
    write_tokenizer(model, path)
    return path


@pytest.fixture
def run_python() -> RunTool:
    """Runs Python in a process of its own that finds the checkout; returns what it said."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            env=checkout_environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


@pytest.fixture
def corpus() -> Callable[[str], Path]:
    """Finds a real corpus beside the checkout; the test is skipped where there is none."""

    def find(name: str) -> Path:
        path = ROOT.parent / "shared" / "corpora" / name
        if not path.is_file():
            pytest.skip(f"no corpus {path}")
        return path

    return find
