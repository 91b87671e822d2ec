"""Small corpora, small tokenizers and the two programs, as fixtures."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest

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
