"""gigatoken is used where its ids are the reference's, and nowhere else."""

import copy
import importlib.metadata
import io
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gigatoken
import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers

from megamup.data.tokenizer import CheckedTokenizer, FileTokenizer, fast, fastest_exact, load_tokenizer, spot_check
from megamup.data.tokenizer_training import LLAMA3_PATTERN, sentences
from megamup.errors import MegamupError

Train = Callable[..., dict[str, Any]]
Load = Callable[[dict[str, Any]], FileTokenizer]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(config: dict[str, Any]) -> FileTokenizer:
        path = tmp_path / "tok.json"
        path.write_text(json.dumps(config))
        return load_tokenizer(str(path), "<|endoftext|>")

    return load


def split(pattern: str) -> Any:
    """A pre-tokenizer as Llama 3's and its successors'."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), level])


def train_model(text: str, **options: Any) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=sentences(text), model_writer=model, vocab_size=900, minloglevel=2, **options
    )
    return model.getvalue()


def assert_exact(checked: CheckedTokenizer, texts: list[str]) -> None:
    """The batch has the reference's ids and lengths, to the bit."""
    ids, lengths = checked.encode_batch(texts)
    expected, expected_lengths = checked.reference.encode_batch(texts)
    assert lengths.tolist() == expected_lengths.tolist()
    assert ids.tolist() == expected.tolist()


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "whole words", "nfc", "prefix space"])
def test_byte_level_bpe(kind: str, byte_bpe: Train, load: Load, source_text: str, odd_texts: list[str]) -> None:
    config = {
        "gpt2": lambda: byte_bpe(),
        "llama3": lambda: byte_bpe(split(LLAMA3_PATTERN)),
        "whole words": lambda: byte_bpe(split(LLAMA3_PATTERN), ignore_merges=True),
        "nfc": lambda: byte_bpe(split(LLAMA3_PATTERN.replace("{1,3}", "")), normalizers.NFC()),  # Qwen
        "prefix space": lambda: byte_bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    }[kind]()
    checked = fastest_exact(load(config), [source_text[:100_000]])
    assert checked.fast, checked.note
    assert checked.backend == f"gigatoken {importlib.metadata.version('gigatoken')}"
    assert checked.lossless == (kind != "prefix space")
    assert checked.seamless == (kind != "prefix space")
    assert ("decoding does not give back" in checked.note) == (kind == "prefix space")
    assert ("other tokens where it is cut" in checked.note) == (kind == "prefix space")
    assert_exact(checked, [source_text, *odd_texts])
    assert_exact(checked, odd_texts[::-1])
    assert_exact(checked, [])
    names = ["<|endoftext|>", " a<|endoftext|>b"]
    assert_exact(checked, names)
    assert checked.eod_id not in checked.encode_batch(names)[0]
    spot_check(checked, source_text[:2000])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)}, "its ids differ"),
        ({"pre_tokenizer": split("[a-z]+|[^a-z]+")}, "Unknown pre_tokenizer Split"),
        (
            {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel()])},
            "Unsup",
        ),
        ({"normalizer": normalizers.Lowercase()}, "Unsupported normalizer"),
    ],
)
def test_what_gigatoken_gets_wrong_is_left_to_the_reference(
    change: dict[str, Any], reason: str, byte_bpe: Train, load: Load, odd_texts: list[str]
) -> None:
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(byte_bpe()))
    for name, part in change.items():
        setattr(tokenizer, name, part)
    checked = fastest_exact(load(json.loads(tokenizer.to_str())), odd_texts)
    assert not checked.fast
    assert reason in checked.reason
    assert checked.note.startswith("gigatoken is not used: ")
    assert checked.backend == checked.reference.backend == f"tokenizers {importlib.metadata.version('tokenizers')}"
    assert_exact(checked, odd_texts)


def test_added_tokens_that_gigatoken_finds_elsewhere(byte_bpe: Train, load: Load, source_text: str) -> None:
    """`single_word` tokens, which gigatoken finds inside words too, though no document of the sample has one."""
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(byte_bpe()))
    plain = copy.deepcopy(tokenizer)
    plain.add_special_tokens(["<s>"])
    plain.add_tokens(["<tool>"])
    assert fastest_exact(load(json.loads(plain.to_str())), [source_text]).fast
    tokenizer.add_tokens([AddedToken("QZQ", single_word=True)])
    checked = fastest_exact(load(json.loads(tokenizer.to_str())), [source_text])
    assert not checked.fast
    assert "QZQ" in checked.reason


def test_our_sentencepiece_models(model_path: Path, prose: str, odd_texts: list[str]) -> None:
    """Identity normalisation, byte fallback: exact as BPE, also for ▁; unigram stays with sentencepiece."""
    checked = fastest_exact(load_tokenizer(str(model_path)), [prose])
    assert checked.fast == (model_path.stem == "bpe"), checked.note
    assert checked.lossless
    assert_exact(checked, [prose, *odd_texts])
    assert all(checked.decode(checked.encode(text)) == text for text in odd_texts)


@pytest.mark.parametrize(
    ("options", "used"),
    [
        ({"normalization_rule_name": "identity", "remove_extra_whitespaces": False}, True),  # as Llama 2
        ({"normalization_rule_name": "identity"}, False),  # gigatoken strips line breaks with the spaces
        ({"remove_extra_whitespaces": False}, False),  # its NFKC takes \r\n for one character
        ({}, False),
        ({"byte_fallback": False}, False),
        ({"user_defined_symbols": ["  ", "return"], "remove_extra_whitespaces": False}, False),
    ],
)
def test_stock_sentencepiece_models(
    options: dict[str, Any], used: bool, source_text: str, tmp_path: Path, odd_texts: list[str]
) -> None:
    path = tmp_path / "stock.model"
    path.write_bytes(train_model(source_text, model_type="bpe", **({"byte_fallback": True} | options)))
    checked = fastest_exact(load_tokenizer(str(path)), source_text.splitlines())
    assert checked.fast == used, checked.note
    assert_exact(checked, [*odd_texts, *source_text.splitlines()])


def test_names_of_pieces_are_text(source_text: str, tmp_path: Path) -> None:
    """A model that has learnt nearly all of `</s>`, `<unk>` and `<0x41>`: gigatoken would merge the last step."""
    text = source_text + "x</s y</s x<unk y<unk x<0x41 y<0x41 <0x41 x<0x41 " * 500
    path = tmp_path / "names.model"
    path.write_bytes(
        train_model(
            text, model_type="bpe", byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
            remove_extra_whitespaces=False, split_by_unicode_script=False, split_by_number=False,
        )
    )  # fmt: skip
    checked = fastest_exact(load_tokenizer(str(path)), [source_text])
    assert checked.fast, checked.note
    texts = ["</s>", "x </s>y", "x <unk>", "x <0x41>", "a <0x41> </s></s>"]
    naive = gigatoken.Tokenizer.from_sentencepiece(path.read_bytes())
    assert all(naive.encode(text).tolist() != checked.reference.encode(text).tolist() for text in texts)
    assert_exact(checked, texts)
    assert checked.eod_id not in checked.encode_batch(texts)[0]


def test_disputed_characters_go_to_the_reference(
    byte_bpe: Train, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # the tokenizer is another than its hash says
    reference = load(byte_bpe())
    right = reference.encode_batch
    reference.encode_batch = lambda texts: right([text.replace("∮", "!").replace("𝕏", "?") for text in texts])  # type: ignore[method-assign]
    checked = fastest_exact(reference, ["plain text"])
    assert checked.fast, checked.note
    assert {"∮", "𝕏"} <= set(checked.disputed)
    assert f"texts with one of {len(checked.disputed):,} rare characters are left to tokenizers" in checked.note
    texts = ["a∮b", "", "𝕏", "plain", "𝕏∮", "é", "∮" * 100, ""]
    for some in (texts, texts[::-1], ["∮"], ["∮", "∮"], texts * 3):
        assert_exact(checked, some)


def test_spot_check_sees_what_the_first_check_missed(byte_bpe: Train, load: Load, source_text: str) -> None:
    checked = fastest_exact(load(byte_bpe()), [source_text])
    right = checked.reference.encode_batch
    spot_check(checked, "one two three")
    checked.reference.encode_batch = lambda texts: right([text.replace("two", "2") for text in texts])  # type: ignore[method-assign]
    with pytest.raises(
        MegamupError, match=r"gigatoken [\d.]+ and tokenizers [\d.]+ differ from about character 3 of"
    ) as e:
        spot_check(checked, "one two three")
    ours, theirs = checked.encode("one two three").tolist(), checked.reference.encode("one two three").tolist()
    shared = next(place for place in range(len(ours)) if ours[place] != theirs[place])
    assert f"ids {ours[shared : shared + 8]} against ids {theirs[shared : shared + 8]}" in str(e.value)
    spot_check(load_tokenizer("bytes"), "one two three")


def test_bytes_and_missing_gigatoken(byte_bpe: Train, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = fastest_exact(load_tokenizer("bytes"), ["text"])
    assert (checked.fast, checked.backend, checked.reason) == (False, "bytes", "")
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    checked = fastest_exact(load(byte_bpe()), ["text"])
    assert not checked.fast
    assert "'gigatoken' is needed and can't be imported" in checked.reason


def test_pickles_small_and_equal(byte_bpe: Train, load: Load, odd_texts: list[str]) -> None:
    reference = load(byte_bpe())
    checked = fastest_exact(reference, odd_texts)
    checked.encode_batch(odd_texts)
    data = pickle.dumps(checked)
    assert len(data) < 2 * sum(map(len, reference.files().values()))
    other = pickle.loads(data)
    assert (other.sha256, other.backend, other.note) == (checked.sha256, checked.backend, checked.note)
    assert other.encode_batch(odd_texts)[0].tolist() == checked.encode_batch(odd_texts)[0].tolist()


def test_memory_is_given_back(byte_bpe: Train, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "REFRESH_CHARACTERS", 1000)
    resident = iter(range(0, 10 * fast.ROOM_BYTES, fast.ROOM_BYTES // 2))
    monkeypatch.setattr(fast, "resident_bytes", lambda: next(resident))
    encoder = fast.Gigatoken(load(byte_bpe()))
    seen = []
    for _ in range(10):
        encoder.encode_batch(["word " * 100] * 2)
        seen.append(id(encoder._tokenizer))
    assert 2 <= len(set(seen)) < 10


def test_the_sweep_is_remembered(
    byte_bpe: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the same tokenizer and libraries only; a broken memory is none."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sweeps: list[str] = []

    def sweep(trial: CheckedTokenizer) -> str:
        sweeps.append(trial.sha256)
        return "\u9999"

    monkeypatch.setattr(fast, "_sweep", sweep)
    (tmp_path / "tokenizer.json").write_text(json.dumps(byte_bpe()))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    for _ in range(2):
        assert fastest_exact(tokenizer, ["text"]).disputed == "\u9999"
    assert len(sweeps) == 1
    for entry in (tmp_path / "megamup").iterdir():
        entry.write_text("{")
    assert fastest_exact(tokenizer, ["text"]).disputed == "\u9999"
    assert len(sweeps) == 2
    monkeypatch.setattr(fast, "SWEEP", 0)
    fastest_exact(tokenizer, ["text"])
    assert len(sweeps) == 3
