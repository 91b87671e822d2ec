from collections.abc import Callable
from pathlib import Path

import pytest

from megamup.data.tokenizer import load_tokenizer
from megamup.data.tokenizer_training import EvenSample, sentences, train_sentencepiece
from megamup.errors import MegamupError

Main = Callable[[list[str]], int]


def test_sentences_keep_all_but_separators() -> None:
    text = "  a line\n\n\tindented  \r\n" + "word " * 1000 + "x" * 2500
    pieces = list(sentences(text))
    assert "".join(pieces) == text.replace("\n", "").replace("\t", "").replace("\r", "")
    assert max(len(piece.encode()) for piece in pieces) <= 4000
    assert pieces[:2] == ["  a line", "indented  "]
    assert all(piece.endswith("word") for piece in pieces if piece.startswith("word"))


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
