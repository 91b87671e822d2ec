import base64
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tiktoken_ext.openai_public  # type: ignore[import-untyped]
import tokenizers

from megamup.data.tokenizer import load_tokenizer, store_tokenizer
from megamup.data.tokenizer.gpt2 import byte_characters
from megamup.data.tokenizer.tiktoken import ENCODINGS, parse_ranks
from megamup.data.tokenizer_training import sentences, train_sentencepiece
from megamup.errors import MegamupError

ByteBpe = Callable[..., dict[str, Any]]


def write_json(path: Path, value: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return str(path)


def with_added(config: dict[str, Any], *names: str, special: bool = True) -> dict[str, Any]:
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(config))
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(list(names))
    added: dict[str, Any] = json.loads(tokenizer.to_str())
    return added


@pytest.fixture
def rank_file(tmp_path: Path, byte_bpe: ByteBpe) -> Path:
    """A rank file of 999 tokens, named so that nothing says what encoding it has."""
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    vocab = byte_bpe()["model"]["vocab"]
    ranks = [bytes(byte_of[each] for each in token) for token in vocab if token != "<|endoftext|>"]
    path = tmp_path / "mine.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks)))
    return path


@pytest.fixture(params=["bytes", "sentencepiece", "huggingface", "tiktoken"])
def spec(request: pytest.FixtureRequest, tmp_path: Path, prose: str) -> str:
    if request.param == "sentencepiece":
        path = tmp_path / "tok.model"
        path.write_bytes(train_sentencepiece(list(sentences(prose)), 340, "bpe"))
        return str(path)
    if request.param == "huggingface":
        return write_json(tmp_path / "tok.json", request.getfixturevalue("byte_bpe")())
    if request.param == "tiktoken":
        return f"{request.getfixturevalue('rank_file')}:cl100k_base"
    return "bytes"


def test_a_stored_tokenizer_is_the_same(spec: str, tmp_path: Path, odd_texts: list[str]) -> None:
    tokenizer, folder = load_tokenizer(spec), tmp_path / "c4.tokenizer"
    store_tokenizer(tokenizer, folder)
    stored = load_tokenizer(str(folder))
    for name in ("name", "sha256", "vocab_size", "eod_id", "backend"):
        assert getattr(stored, name) == getattr(tokenizer, name)
    assert stored.files() == tokenizer.files() == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert stored.encode_batch(odd_texts)[0].tolist() == tokenizer.encode_batch(odd_texts)[0].tolist()
    assert list(tmp_path.glob(".c4*")) == []


def test_a_stored_tokenizer_that_changed_is_noticed(spec: str, tmp_path: Path) -> None:
    folder = tmp_path / "c4.tokenizer"
    store_tokenizer(load_tokenizer(spec), folder)
    description = folder / "megamup.json"
    about = json.loads(description.read_text())
    for change, message in ({"sha256": "0" * 64}, "are not those that were stored"), ({"kind": "x"}, "expected a kind"):
        write_json(description, about | change)
        with pytest.raises(MegamupError, match=message):
            load_tokenizer(str(folder))
    write_json(description, about)
    for file in about["files"]:
        (folder / file).rename(tmp_path / file)
        with pytest.raises(MegamupError, match=f"{file}.*cannot be read"):
            load_tokenizer(str(folder))
        (tmp_path / file).rename(folder / file)


def test_storing_replaces_another_and_keeps_an_equal_one(model_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "c4.tokenizer"
    store_tokenizer(load_tokenizer("bytes"), folder)
    (tmp_path / ".c4.tokenizer.tmp").mkdir()  # left by a killed process
    tokenizer = load_tokenizer(str(model_path))
    store_tokenizer(tokenizer, folder)
    before = folder.stat().st_ino
    store_tokenizer(tokenizer, folder)
    assert folder.stat().st_ino == before
    assert load_tokenizer(str(folder)).sha256 == tokenizer.sha256
    assert [path.name for path in tmp_path.iterdir()] == ["c4.tokenizer"]


def test_hash_is_of_what_determines_ids(byte_bpe: ByteBpe, tmp_path: Path) -> None:
    config = with_added(byte_bpe(), "</s>")
    one = write_json(tmp_path / "a" / "one.json", config)
    two = write_json(tmp_path / "b" / "two.json", config)
    assert load_tokenizer(one, "</s>").sha256 == load_tokenizer(two, "</s>").sha256
    assert load_tokenizer(one, "</s>").sha256 != load_tokenizer(one, "<|endoftext|>").sha256
    config["model"]["merges"].pop()
    other = load_tokenizer(write_json(tmp_path / "other.json", config), "</s>")
    assert other.sha256 != load_tokenizer(one, "</s>").sha256


def test_end_of_document(byte_bpe: ByteBpe, tmp_path: Path) -> None:
    config, folder = byte_bpe(), tmp_path / "folder"
    path = write_json(folder / "tokenizer.json", with_added(config, "</s>", "<|im_end|>"))
    with pytest.raises(MegamupError, match=r"could be each of <\|endoftext\|>, </s>; name it with --eod TOKEN"):
        load_tokenizer(path)
    with pytest.raises(MegamupError, match=r"--eod 'the' is none.*expected one of: <\|endoftext\|>, </s>, <\|im_end"):
        load_tokenizer(path, eod="the")
    assert load_tokenizer(path, eod="</s>").eod_id == 1000
    write_json(folder / "tokenizer_config.json", {"eos_token": {"content": "<|im_end|>", "special": True}})
    assert load_tokenizer(str(folder)).eod_id == load_tokenizer(path).eod_id == 1001
    assert load_tokenizer(str(folder), eod="</s>").eod_id == 1000
    write_json(folder / "tokenizer_config.json", {"eos_token": "<nowhere>"})
    with pytest.raises(MegamupError, match="'<nowhere>' is none of its special tokens"):
        load_tokenizer(str(folder))
    config["added_tokens"] = []
    with pytest.raises(MegamupError, match="is not known; name it with --eod TOKEN, one of: none"):
        load_tokenizer(write_json(tmp_path / "endless.json", config))
    with pytest.raises(MegamupError, match="ends documents with its id 256"):
        load_tokenizer("bytes", eod="</s>")


def test_gpt2_files(byte_bpe: ByteBpe, tmp_path: Path, odd_texts: list[str]) -> None:
    """vocab.json and merges.txt give what Hugging Face's own loader of these files gives."""
    whole = tokenizers.Tokenizer.from_str(json.dumps(byte_bpe()))
    whole.model.save(str(tmp_path))
    for spec in (str(tmp_path), str(tmp_path / "vocab.json")):
        tokenizer = load_tokenizer(spec)
        assert (tokenizer.vocab_size, tokenizer.eod_id) == (1000, 0)
        own = tokenizers.ByteLevelBPETokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
        for text in odd_texts:
            assert tokenizer.encode(text).tolist() == own.encode(text).ids
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_gpt2_files_that_are_none(byte_bpe: ByteBpe, tmp_path: Path) -> None:
    tokenizers.Tokenizer.from_str(json.dumps(byte_bpe())).model.save(str(tmp_path))
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer"})
    with pytest.raises(MegamupError, match=r"of a Qwen2Tokenizer, which splits text in another way"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").unlink()
    with open(tmp_path / "merges.txt", "a") as file:
        file.write("zz qq\n")
    with pytest.raises(MegamupError, match=r"1 bytes or merges have no id in vocab\.json, the first 'zzqq'"):
        load_tokenizer(str(tmp_path))
    with open(tmp_path / "merges.txt", "a") as file:
        file.write("a b c\n")
    with pytest.raises(MegamupError, match=r"'a b c' in merges\.txt: expected two tokens a line"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(MegamupError, match=r"merges\.txt.*cannot be read"):
        load_tokenizer(str(tmp_path / "vocab.json"))
    with pytest.raises(MegamupError, match=r"this folder holds no tokenizer\.json"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("encoding", ["r50k_base", "cl100k_base", "o200k_base"])
def test_rank_file(rank_file: Path, encoding: str, odd_texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank file gives the ids of tiktoken's own encoding of that name over these ranks."""
    ranks = parse_ranks(rank_file.read_bytes(), "")
    monkeypatch.setattr(tiktoken_ext.openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks)
    own = tiktoken_ext.openai_public.ENCODING_CONSTRUCTORS[encoding]()
    own.pop("explicit_n_vocab", None)
    reference = tiktoken.Encoding(**own)
    tokenizer = load_tokenizer(f"{rank_file}:{encoding}")
    assert tokenizer.eod_id == reference.eot_token
    assert tokenizer.vocab_size == reference.n_vocab
    for text in odd_texts:
        assert tokenizer.encode(text).tolist() == reference.encode_ordinary(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    named = rank_file.rename(rank_file.with_name(f"{encoding}.tiktoken"))
    assert load_tokenizer(str(named)).sha256 == tokenizer.sha256


@pytest.mark.parametrize("encoding", list(ENCODINGS))
def test_encodings_are_those_of_tiktoken(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for loader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(tiktoken_ext.openai_public, loader, lambda *_, **__: {})
    own = tiktoken_ext.openai_public.ENCODING_CONSTRUCTORS[encoding]()
    assert ENCODINGS[encoding] == (own["pat_str"], own["special_tokens"])


def test_tiktoken_by_name(rank_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = parse_ranks(rank_file.read_bytes(), "")
    monkeypatch.setattr(tiktoken_ext.openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks)
    assert load_tokenizer("tiktoken:cl100k_base").sha256 == load_tokenizer(f"{rank_file}:cl100k_base").sha256
    assert load_tokenizer("tiktoken:o200k_harmony").vocab_size == 201088

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken_ext.openai_public, "load_tiktoken_bpe", offline)
    with pytest.raises(MegamupError, match=r"can't get its files \(ConnectionError\).*set TIKTOKEN_CACHE_DIR"):
        load_tokenizer("tiktoken:cl100k_base")
    with pytest.raises(MegamupError, match=r"'tiktoken:gpt9': no such encoding; expected one of: .*cl100k_base"):
        load_tokenizer("tiktoken:gpt9")


def test_broken_rank_files(rank_file: Path) -> None:
    with pytest.raises(MegamupError, match=r"encoding 'mine': .*FILE\.tiktoken:ENCODING, one of: gpt2, r50k_base"):
        load_tokenizer(str(rank_file))
    whole = rank_file.read_bytes()
    lines = whole.splitlines(keepends=True)
    for data, message in [
        (whole + b"YWJjZA== x\n", r"line 1,000: expected a token in base64 and its rank, found b'YWJjZA== x'"),
        (b"".join(lines[1:]), "a byte has none"),
        (whole + b"YWJjZGVm 7\n", "a rank stands twice"),
        (whole + b"YWJjZGVm 100257\n", "1 ranks are ids of this encoding's special tokens, the first 100,257"),
    ]:
        rank_file.write_bytes(data)
        with pytest.raises(MegamupError, match=message):
            load_tokenizer(f"{rank_file}:cl100k_base")


def test_unknown_specs(tmp_path: Path) -> None:
    with pytest.raises(MegamupError, match=r"'gpt2': not a known tokenizer; expected a SentencePiece"):
        load_tokenizer("gpt2")
    for name in ("absent.model", "absent.json", "absent.tiktoken:cl100k_base"):
        with pytest.raises(MegamupError, match=r"no such file or folder; expected"):
            load_tokenizer(str(tmp_path / name))
    for name, message in [("broken.model", "not a SentencePiece model"), ("broken.json", "not a tokenizer.json that")]:
        (tmp_path / name).write_bytes(b"not a model")
        with pytest.raises(MegamupError, match=rf"'{name}': {message}"):
            load_tokenizer(str(tmp_path / name))


def test_a_missing_package_is_named(tmp_path: Path, byte_bpe: ByteBpe, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_json(tmp_path / "tok.json", byte_bpe())
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MegamupError, match=r"'tokenizers' is needed.*pip install 'megamup\[data\]'"):
        load_tokenizer(path)
