"""tools/shards.py, as its user starts it."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megamup.data.corpus import Corpus
from megamup.data.manifest import Manifest
from megamup.data.writer import write_corpus

Main = Callable[[list[str]], int]
TEXTS = ["It was the best of times,", "it was the worst of times,", "it was the age of wisdom", "in 東京."]


@pytest.fixture
def corpus(tmp_path: Path, preprocess_main: Main, capsys: pytest.CaptureFixture[str]) -> str:
    """TEXTS as bytes, in two shards; returns the prefix."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    call = ["--input", str(tmp_path / "a.jsonl"), "--output-prefix", str(tmp_path / "c"), "--tokenizer", "bytes"]
    assert preprocess_main([*call, "--shard-size", "120"]) == 0
    capsys.readouterr()
    return str(tmp_path / "c")


def test_info(shards_main: Main, corpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert shards_main(["info", corpus]) == 0
    said = capsys.readouterr().out
    assert "c: 4 documents, 89 tokens (uint16)" in said
    assert "document lengths: 11 to 27, mean 22" in said
    assert "tokenizer bytes, 257 ids (largest used 256)" in said
    assert "shard c-00001: 2 documents" in said


def test_head(shards_main: Main, corpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert shards_main(["head", corpus, "-n", "9", "--tokens", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "--- document 0: 26 tokens, the first 20 shown"
    assert lines[1::2] == [text.encode()[:20].decode() for text in TEXTS]


def test_verify(shards_main: Main, corpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert shards_main(["verify", corpus]) == 0
    assert "4 documents, 89 tokens: checksums, index, ids and tokenizer are right" in capsys.readouterr().out


def flip_bit(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("offset", range(0, 108, 7))
def test_verify_finds_every_flipped_bit(
    shards_main: Main, corpus: str, offset: int, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_bit(Path(f"{corpus}-00000.bin"), min(offset, Path(f"{corpus}-00000.bin").stat().st_size - 1))
    assert shards_main(["verify", corpus]) == 2
    assert "c-00000.bin" in capsys.readouterr().err


def test_verify_finds_a_bit_that_opening_does_not_look_at(
    shards_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Opening compares a few blocks of a large file; verify all of it."""
    write_corpus(str(tmp_path / "big"), [[1] * 500_000], 257, 256)
    flip_bit(tmp_path / "big.bin", 100_000)
    Corpus(str(tmp_path / "big"))
    assert shards_main(["verify", str(tmp_path / "big")]) == 2
    assert "big.bin: damaged or replaced: SHA-256" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda prefix: flip_bit(Path(f"{prefix}-00000.idx"), 34), "c-00000.bin: it or its index is another than"),
        (lambda prefix: Path(f"{prefix}-00001.bin").unlink(), "no file"),
        (lambda prefix: Path(f"{prefix}-00001.bin").write_bytes(b"ab"), "c-00001.bin: cut short"),
        (lambda prefix: shutil.rmtree(f"{prefix}.tokenizer"), "c.tokenizer: missing: the tokenizer of"),
        (lambda prefix: edit(prefix, max_id=255), "ids 32 to 256; the manifest says at most 255"),
        (lambda prefix: edit(prefix, eod_id=0), "document 0 doesn't end with token 0"),
        (lambda prefix: edit(prefix, documents=5), "tells of 5 documents and 89 tokens, its shards hold 4 and 89"),
    ],
)
def test_verify_finds(
    shards_main: Main, corpus: str, damage: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(corpus)
    assert shards_main(["verify", corpus]) == 2
    assert message in capsys.readouterr().err


def edit(prefix: str, **values: Any) -> None:
    path = Path(prefix + ".json")
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_swapped_tokenizer(
    shards_main: Main, corpus: str, model_path: Path, preprocess_main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(corpus).parent
    call = ["--input", str(folder / "a.jsonl"), "--output-prefix", str(folder / "d"), "--tokenizer", str(model_path)]
    assert preprocess_main(call) == 0
    shutil.rmtree(f"{corpus}.tokenizer")
    shutil.copytree(folder / "d.tokenizer", f"{corpus}.tokenizer")
    for verb in ("verify", "head"):
        assert shards_main([verb, corpus]) == 2
        assert "c.tokenizer: holds another tokenizer" in capsys.readouterr().err
    assert shards_main(["merge", corpus, str(folder / "d"), "--output", str(folder / "cd")]) == 2
    assert "made by different tokenizers; their ids don't mean the same" in capsys.readouterr().err


def test_merge_and_split_keep_documents(shards_main: Main, corpus: str, tmp_path: Path) -> None:
    whole = [Corpus(corpus).document(index).tolist() for index in range(4)]
    assert shards_main(["split", corpus, "--output", str(tmp_path / "fine"), "--shard-size", "1"]) == 0
    assert shards_main(["merge", str(tmp_path / "fine"), corpus, "--output", str(tmp_path / "both")]) == 0
    fine, both = Corpus(str(tmp_path / "fine")), Corpus(str(tmp_path / "both"))
    assert [len(corpus.shards) for corpus in (fine, both)] == [4, 1]
    assert [both.document(index).tolist() for index in range(8)] == whole * 2
    assert both.manifest is not None
    assert both.manifest.text_bytes == 2 * len("".join(TEXTS).encode())
    assert both.manifest.text_words == 2 * sum(len(text.split()) for text in TEXTS)
    assert shards_main(["verify", str(tmp_path / "fine"), str(tmp_path / "both")]) == 0
    assert shards_main(["head", str(tmp_path / "both")]) == 0


def test_split_by_document(shards_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = [[number % 40, number % 7, 256] for number in range(500)]
    write_corpus(str(tmp_path / "c"), documents, 257, 256, shard_bytes=100)
    call = ["split", str(tmp_path / "c"), "--output", str(tmp_path / "held"), "--tokenizer", "bytes"]
    assert shards_main([*call, "--valid-fraction", "0.2"]) == 0
    train, valid = (
        [tuple(corpus.document(index).tolist()) for index in range(len(corpus))]
        for corpus in (Corpus(str(tmp_path / "held_train")), Corpus(str(tmp_path / "held_valid")))
    )
    assert sorted(train + valid) == sorted(map(tuple, documents))
    assert not set(train) & set(valid)  # equal documents are on one side
    assert 40 < len(valid) < 160
    assert shards_main([*call, "--valid-fraction", "0.0001"]) == 2
    assert "no document fell into" in capsys.readouterr().err


def test_output_is_no_input(shards_main: Main, corpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert shards_main(["merge", corpus, "--output", corpus]) == 2
    assert "is also an input; give it another name" in capsys.readouterr().err


def test_megatrons_shards_get_a_manifest(shards_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    indexed_dataset = pytest.importorskip(
        "megatron.core.datasets.indexed_dataset", reason="megatron-core isn't installed"
    )
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    builder.add_document([1, 2, 256], [1, 2])
    builder.finalize(str(tmp_path / "theirs.idx"))
    call = ["merge", str(tmp_path / "theirs"), "--output", str(tmp_path / "ours")]
    assert shards_main(call) == 2
    assert "nothing tells what its ids mean; name its tokenizer with --tokenizer" in capsys.readouterr().err
    assert shards_main([*call, "--tokenizer", "bytes"]) == 0
    assert Corpus(str(tmp_path / "ours")).document(0).tolist() == [1, 2, 256]
    assert Corpus(str(tmp_path / "ours")).dtype == np.uint16
    assert shards_main(["verify", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0


class TestFromNanoGPT:
    IDS = (5, 6, 50256, 7, 50256, 50256, 8, 9)

    def test_documents_end_with_the_token(self, shards_main: Main, tmp_path: Path) -> None:
        (tmp_path / "train.bin").write_bytes(np.array(self.IDS, "<u2").tobytes())
        assert shards_main(["from-nanogpt", str(tmp_path / "train.bin"), "--output", str(tmp_path / "c")]) == 0
        corpus = Corpus(str(tmp_path / "c"))
        assert corpus.tokens(0, 8).tolist() == list(self.IDS)
        assert [len(corpus.document(index)) for index in range(len(corpus))] == [3, 2, 1, 2]
        assert corpus.eod_id == 50256
        assert corpus.manifest is not None
        assert corpus.manifest.vocab_size == 50257
        assert shards_main(["verify", str(tmp_path / "c")]) == 0

    def test_documents_across_chunks(self, shards_main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "train.bin").write_bytes(np.array(self.IDS, "<u2").tobytes())
        monkeypatch.setattr("megamup.data.corpus_tools.COPY_TOKENS", 2)
        assert shards_main(["from-nanogpt", str(tmp_path / "train.bin"), "--output", str(tmp_path / "c")]) == 0
        corpus = Corpus(str(tmp_path / "c"))
        assert [len(corpus.document(index)) for index in range(len(corpus))] == [3, 2, 1, 2]

    def test_llm_c_header_is_no_token(
        self, shards_main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        header = struct.pack("<3i", 20240520, 1, 8).ljust(1024, b"\0")
        path = tmp_path / "train.bin"
        path.write_bytes(header + np.array(self.IDS, "<u2").tobytes())
        assert shards_main(["from-nanogpt", str(path), "--output", str(tmp_path / "c")]) == 0
        assert Corpus(str(tmp_path / "c")).tokens(0, 8).tolist() == list(self.IDS)
        path.write_bytes(path.read_bytes()[:-2])
        assert shards_main(["from-nanogpt", str(path), "--output", str(tmp_path / "c")]) == 2
        assert "which the size of 1,038 bytes contradicts" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "train.bin: empty"),
            (b"abc", "3 bytes, an odd number: not uint16 ids, or cut short"),
            (np.array([60_000], "<u2").tobytes(), "token id 60,000 outside a vocabulary of 50,257"),
            (None, "train.bin: no such file"),
        ],
    )
    def test_errors(
        self, shards_main: Main, tmp_path: Path, content: bytes | None, message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        if content is not None:
            (tmp_path / "train.bin").write_bytes(content)
        assert shards_main(["from-nanogpt", str(tmp_path / "train.bin"), "--output", str(tmp_path / "c")]) == 2
        assert message in capsys.readouterr().err
        assert list(tmp_path.glob("c*")) == []


def test_manifests_are_json_that_others_read(corpus: str) -> None:
    values = json.loads(Path(corpus + ".json").read_text())
    assert values["tokens"] == 89
    assert [shard["name"] for shard in values["shards"]] == ["c-00000", "c-00001"]
    assert Manifest.read(Path(corpus + ".json")).options["text_keys"] == ["text"]
