"""Small shards, small tokenizers and the two programs, as fixtures."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from megamup.cli import load_program
from megamup.data.shards import Shard, ShardWriter, publish
from megamup.data.tokenizer_training import sentences, train_sentencepiece, write_tokenizer

ROOT = Path(__file__).resolve().parents[2]

MakeShard = Callable[..., Shard]
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
def make_shard(tmp_path: Path) -> MakeShard:
    """A maker of shards out of lists of ids; the ids end documents themselves."""

    def make(
        documents: Sequence[Sequence[int]], vocab_size: int = 257, name: str = "shard", manifest: bool = True
    ) -> Shard:
        prefix = str(tmp_path / name)
        with ShardWriter(prefix, vocab_size) as writer:
            ids = np.array([token for document in documents for token in document], dtype=np.int64)
            writer.add(ids, [len(document) for document in documents])
            writer.finish(eod_id=vocab_size - 1, tokenizer="ids", tokenizer_sha256="0", text_bytes=0, sources=[])
            publish([writer])
        if not manifest:
            Path(prefix + ".json").unlink()
        return Shard(prefix)

    return make


@pytest.fixture
def counting_shard(make_shard: MakeShard) -> Shard:
    """1,003 tokens: token i is i, in documents of 10."""
    return make_shard([list(range(start, min(start + 10, 1003))) for start in range(0, 1003, 10)], vocab_size=1004)


@pytest.fixture(scope="session", params=["bpe", "unigram"])
def model_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of each type, of 340 pieces."""
    model = train_sentencepiece(list(sentences(PROSE)) * 10, 340, request.param)
    prefix = tmp_path_factory.mktemp("tokenizer") / request.param
    write_tokenizer(model, str(prefix))
    return Path(f"{prefix}.model")


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
