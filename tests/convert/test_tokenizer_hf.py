"""Tokenizer files of an export against the corpus's own tokenizer, and of an import."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megamup.convert.hf.tokenizer import TokenizerFiles, copy_tokenizer, exported, files_of, special_ids
from megamup.data.manifest import TokenizerEntry
from megamup.data.shards import token_dtype
from megamup.data.tokenizer import ByteTokenizer, FileTokenizer, SentencePieceTokenizer, store_tokenizer
from megamup.data.tokenizer.huggingface import HuggingFaceTokenizer
from megamup.data.tokenizer.probes import TEXTS
from megamup.data.tokenizer.tiktoken import ENCODINGS, TiktokenTokenizer, encoding_json
from megamup.data.tokenizer_training import train_byte_bpe, train_sentencepiece
from megamup.data.writer import CorpusWriter
from megamup.errors import MegamupError
from tests.convert import hf_cases

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SAMPLE = [line for path in sorted(Path(__file__).parent.glob("*.py")) for line in path.read_text().splitlines() if line]


def tokenizers() -> dict[str, FileTokenizer]:
    return {
        "bytes": ByteTokenizer(),
        "bpe": SentencePieceTokenizer("bpe", train_sentencepiece(SAMPLE, 600, "bpe")),
        "unigram": SentencePieceTokenizer("unigram", train_sentencepiece(SAMPLE, 600, "unigram")),
        "byte-level": HuggingFaceTokenizer("byte-level", train_byte_bpe(SAMPLE, 600, "gpt2")),
    }


def loaded(found: TokenizerFiles, folder: Path) -> Any:
    folder.mkdir()
    for name, data in found.files.items():
        (folder / name).write_bytes(data)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", tokenizers())
def test_transformers_reads_the_same_ids(name: str, tmp_path: Path) -> None:
    own = tokenizers()[name]
    found = files_of(own, 512)
    assert (found.eod_id, found.notes) == (own.eod_id, ())
    theirs = loaded(found, tmp_path / "export")
    assert theirs.eos_token_id == own.eod_id
    assert theirs.model_max_length == 512
    texts = [text for text in TEXTS if "</s>" not in text and "▁" not in text]  # a token and a space to transformers
    for text in [*texts, "def f(x):\n    return x\n"]:
        ids = theirs(text)["input_ids"]
        assert ids == own.encode(text).tolist(), text
        assert theirs.decode(ids) == text


def test_the_corpus_names_its_tokenizer(tmp_path: Path) -> None:
    own = tokenizers()["bpe"]
    store_tokenizer(own, tmp_path / "corpus_tokenizer")
    ids = own.encode("for x in y:")
    with CorpusWriter(str(tmp_path / "corpus"), token_dtype(own.vocab_size)) as writer:
        writer.add(ids.astype(token_dtype(own.vocab_size)), [len(ids)])
        entry = TokenizerEntry(own.name, own.sha256, folder="corpus_tokenizer")
        writer.finish(vocab_size=600, eod_id=own.eod_id, tokenizer=entry, text_bytes=11, text_words=4)
    config = hf_cases.config_of(hf_cases.LLAMA, data={"train": str(tmp_path / "corpus")})
    assert exported(config) == files_of(own, config.model.max_seq_len)
    other = tokenizers()["unigram"]
    shutil.rmtree(tmp_path / "corpus_tokenizer")
    store_tokenizer(other, tmp_path / "corpus_tokenizer")
    with pytest.raises(MegamupError, match="holds another tokenizer"):
        exported(config)
    shutil.rmtree(tmp_path / "corpus_tokenizer")
    assert (exported(config).eod_id, exported(config).files) == (own.eod_id, {})
    moved = hf_cases.config_of(hf_cases.LLAMA, data={"train": str(tmp_path / "elsewhere")})
    assert exported(moved).files == {}
    assert "the tokenizer isn't known" in exported(moved).notes[0]


def test_what_has_no_such_file_is_said() -> None:
    ranks = b"".join(b"%s %d\n" % (base64.b64encode(bytes([byte])), byte) for byte in range(256))
    own = TiktokenTokenizer("gpt2", ranks, encoding_json("gpt2", ENCODINGS["gpt2"]))
    found = files_of(own, 512)
    assert found.files == {}
    assert found.eod_id == own.eod_id
    assert "kind tiktoken" in found.notes[0]


def test_a_post_processor_is_told_of() -> None:
    described = json.loads(train_byte_bpe(SAMPLE, 300, "gpt2"))
    template = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}
    own = HuggingFaceTokenizer("own", json.dumps(described | {"post_processor": template}).encode())
    assert "may add tokens" in files_of(own, 512).notes[0]


def test_special_ids_of_a_model(tmp_path: Path) -> None:
    assert special_ids(tmp_path) == {}
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[MASK]\n")
    assert special_ids(tmp_path)["[MASK]"] == 2
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [{"id": 32099, "content": "<extra_id_0>"}]}')
    assert special_ids(tmp_path)["<extra_id_0>"] == 32099
    assert copy_tokenizer(tmp_path, tmp_path / "copy") == ["tokenizer.json", "vocab.txt"]
    assert (tmp_path / "copy" / "vocab.txt").read_text().startswith("[PAD]")
