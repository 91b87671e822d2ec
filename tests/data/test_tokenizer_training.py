import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megamup.data.tokenizer import fastest_exact, load_tokenizer
from megamup.data.tokenizer_training import (
    LLAMA3_PATTERN,
    EvenSample,
    Pattern,
    sentences,
    stretches,
    train_byte_bpe,
    train_sentencepiece,
)
from megamup.errors import MegamupError

Main = Callable[[list[str]], int]


def test_sentences_keep_all_but_separators() -> None:
    text = "  a line\n\n\tindented  \r\n" + "word " * 1000 + "x" * 2500
    pieces = list(sentences(text))
    assert "".join(pieces) == text.replace("\n", "").replace("\t", "").replace("\r", "")
    assert max(len(piece.encode()) for piece in pieces) <= 4000
    assert pieces[:2] == ["  a line", "indented  "]
    assert all(piece.endswith("word") for piece in pieces if piece.startswith("word"))


def test_stretches_are_the_text(source_text: str) -> None:
    for text in ("", "  a line\n\n\tindented  \r\n" + "word " * 1000 + "x" * 2500, source_text):
        pieces = list(stretches(text))
        assert "".join(pieces) == text
        assert max(map(len, pieces), default=0) <= 1000


def test_even_sample() -> None:
    sample = EvenSample(max_bytes=100)
    for number in range(1000):
        sample.add(f"{number:04}")
    assert sample.kept == [f"{number:04}" for number in range(0, 1000, 64)]
    assert sample.kept_bytes == 4 * len(sample.kept)


def test_tool_trains_a_tokenizer(train_main: Main, tmp_path: Path, prose: str) -> None:
    source = tmp_path / "source.txt"
    source.write_text(prose * 5)
    arguments = ["--input", str(source), "--vocab-size", "380", "--output", str(tmp_path / "new" / "tok")]
    assert train_main(arguments) == 0
    tokenizer = load_tokenizer(str(tmp_path / "new" / "tok.model"))
    assert tokenizer.vocab_size == 380
    assert tokenizer.decode(tokenizer.encode(prose)) == prose
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tok.model"]


@pytest.mark.parametrize(
    ("vocab_size", "message"),
    [
        (100, "expected at least 259: 256 bytes"),
        (260, r"--vocab-size 260 is too small: bytes and the characters of this text alone take \d+"),
        (9000, r"--vocab-size 9000 is too large for so little text: expected at most \d+, or more text"),
    ],
)
def test_vocabulary_of_wrong_size(vocab_size: int, message: str, prose: str) -> None:
    for model_type in ("bpe", "unigram"):
        with pytest.raises(MegamupError, match=message):
            train_sentencepiece(list(sentences(prose)), vocab_size, model_type)


def test_no_text_to_train_on(train_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "blank.txt"
    source.write_text("\n\n\t\n")
    assert train_main(["--input", str(source), "--vocab-size", "300", "--output", str(tmp_path / "t")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: no text to train on")
    assert not (tmp_path / "t.model").exists()


@pytest.mark.parametrize("pattern", ["gpt2", "llama3"])
def test_byte_bpe(pattern: Pattern, source_text: str, odd_texts: list[str], tmp_path: Path) -> None:
    """Exactly N tokens, all bytes, lossless, the same each time; gigatoken gives its ids."""
    data = train_byte_bpe(list(stretches(source_text)), 700, pattern)
    assert data == train_byte_bpe(list(stretches(source_text)), 700, pattern)
    (tmp_path / "tok.json").write_bytes(data)
    tokenizer = fastest_exact(load_tokenizer(str(tmp_path / "tok.json")), [source_text])
    assert tokenizer.fast, tokenizer.note
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (700, 0)
    assert len(json.loads(data)["model"]["merges"]) == 700 - 257
    assert tokenizer.lossless
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in odd_texts)
    assert (LLAMA3_PATTERN in str(json.loads(data)["pre_tokenizer"]).replace("\\\\", "\\")) == (pattern == "llama3")


@pytest.mark.parametrize(
    ("vocab_size", "message"),
    [(256, r"expected at least 257: 256 bytes and <\|endoftext\|>"), (9000, r"expected at most \d+, or more text")],
)
def test_byte_bpe_of_wrong_size(vocab_size: int, message: str, prose: str) -> None:
    with pytest.raises(MegamupError, match=rf"--vocab-size {vocab_size}.*{message}"):
        train_byte_bpe([prose], vocab_size, "gpt2")


def test_tool_trains_byte_bpe(train_main: Main, tmp_path: Path, source_text: str) -> None:
    source = tmp_path / "source.txt"
    source.write_text(source_text)
    arguments = [
        "--input",
        str(source),
        "--vocab-size",
        "600",
        "--output",
        str(tmp_path / "tok"),
        "--pattern",
        "llama3",
    ]
    assert train_main([*arguments, "--type", "byte-bpe"]) == 0
    assert load_tokenizer(str(tmp_path / "tok.json")).vocab_size == 600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.txt", "tok.json"]


def test_pattern_is_of_byte_bpe(train_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--input", "x", "--vocab-size", "600", "--output", str(tmp_path / "tok"), "--pattern", "llama3"]
    assert train_main(arguments) == 2
    assert "--pattern llama3: expected with --type byte-bpe only, not bpe" in capsys.readouterr().err


@pytest.mark.parametrize("model_type", ["bpe", "byte-bpe"])
def test_interrupt_ends_training_at_once(model_type: str, tmp_path: Path) -> None:
    """While the library trains, in no Python code; on words at random, which take it long."""
    program = f"""
import random, sys
from megamup.data.tokenizer_training import ended_by_interrupt, train_byte_bpe, train_sentencepiece
words = random.Random(0)
sample = [" ".join("%x" % words.getrandbits(128) for _ in range(20)) for _ in range(20_000)]
print("training", flush=True)
with ended_by_interrupt():
    if {model_type!r} == "bpe":
        train_sentencepiece(sample, 8000, "bpe")
    else:
        train_byte_bpe(sample, 30_000, "gpt2")
print("done", flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"training\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    assert process.wait(timeout=20) == -signal.SIGINT
    assert time.monotonic() - start < 1
    assert process.stdout.read() == b""
