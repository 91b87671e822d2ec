"""The corpus on disk: writer, manifest and reader together."""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megamup.data import writer
from megamup.data.corpus import Corpus, text_counts
from megamup.data.manifest import Manifest, TokenizerEntry
from megamup.data.shards import token_dtype
from megamup.data.writer import CorpusWriter, documents_that_fit, write_corpus
from megamup.errors import MegamupError

UNSPLIT = writer.UNSPLIT


@pytest.fixture
def documents() -> list[Any]:
    """300 of 0 to 29 tokens; equal neighbours never, so that a wrong place shows."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 1000, size=int(size)) for size in rng.integers(0, 30, size=300)]


@pytest.mark.parametrize("shard_bytes", [UNSPLIT, 400, 7])
def test_however_it_is_split_the_stream_is_the_same(tmp_path: Path, documents: list[Any], shard_bytes: int) -> None:
    manifest = write_corpus(str(tmp_path / "c"), documents, 1001, 1000, shard_bytes=shard_bytes)
    corpus = Corpus(str(tmp_path / "c"))
    stream = np.concatenate(documents)
    starts = np.concatenate([[0], np.cumsum([len(document) for document in documents])])
    assert len(corpus) == 300
    assert corpus.tokens(0, corpus.n_tokens).tolist() == stream.tolist()
    assert [corpus.document(index).tolist() for index in range(300)] == [document.tolist() for document in documents]
    assert [corpus.bounds(index) for index in range(300)] == list(itertools.pairwise(starts))
    for token in range(corpus.n_tokens):
        (found,) = corpus.documents_at(token, token + 1)
        assert starts[found] <= token < starts[found + 1]
    assert corpus.tokens(100, 700).tolist() == stream[100:700].tolist()
    assert list(corpus.documents_at(100, 700)) == list(
        range(*np.searchsorted(starts, [100, 699], side="right") - [1, 0])
    )
    for shard, entry in zip(corpus.shards, manifest.shards, strict=True):
        with_tokens = sum(int((lengths > 0).sum()) for lengths in shard.lengths())
        assert shard.bin_path.stat().st_size <= shard_bytes or with_tokens == 1, entry
    assert (len(manifest.shards) == 1) == (shard_bytes == UNSPLIT)


def test_documents_that_fit() -> None:
    lengths = np.array([3, 0, 4, 1])
    assert documents_that_fit(lengths, used=0, limit=6) == 2
    assert documents_that_fit(lengths, used=0, limit=7) == 3
    assert documents_that_fit(lengths, used=5, limit=7) == 0
    assert documents_that_fit(lengths, used=0, limit=2) == 1  # too large for any shard: in one for itself
    assert documents_that_fit(np.array([0, 0, 9, 1]), used=0, limit=2) == 3


def test_manifest(tmp_path: Path, documents: list[Any]) -> None:
    written = write_corpus(str(tmp_path / "c"), documents, 1001, 1000, shard_bytes=2000)
    manifest = Manifest.read(tmp_path / "c.json")
    assert manifest == written
    assert (manifest.documents, manifest.tokens, manifest.dtype) == (300, sum(map(len, documents)), "uint16")
    assert manifest.max_id == max(document.max() for document in documents if len(document))
    assert [shard.name for shard in manifest.shards] == [f"c-{number:05d}" for number in range(len(manifest.shards))]
    for shard in manifest.shards:
        assert shard.bin_sha256 == hashlib.sha256((tmp_path / f"{shard.name}.bin").read_bytes()).hexdigest()
        assert shard.idx_sha256 == hashlib.sha256((tmp_path / f"{shard.name}.idx").read_bytes()).hexdigest()
    assert Corpus(str(tmp_path / "c")).manifest == manifest


def test_content_hash_is_of_the_content(tmp_path: Path, documents: list[Any]) -> None:
    for name in ("one", "two"):
        write_corpus(str(tmp_path / name), documents, 1001, 1000)
    write_corpus(str(tmp_path / "other"), [*documents[:-1], [1]], 1001, 1000)
    one, two, other = (Corpus(str(tmp_path / name)).content_hash for name in ("one", "two", "other"))
    assert one == two != other
    os.rename(tmp_path / "one.json", tmp_path / "gone")
    assert Corpus(str(tmp_path / "one"), cache=tmp_path / "cache").content_hash == one  # as Megatron's, hashed anew


def flip_bit(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_a_replaced_shard_is_noticed_at_opening(tmp_path: Path, documents: list[Any]) -> None:
    """Of the same size and counts: what differs are the tokens."""
    write_corpus(str(tmp_path / "c"), documents, 1001, 1000)
    path = tmp_path / "c.bin"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(MegamupError, match=r"c\.bin: it or its index is another than .*c\.json was written for"):
        Corpus(str(tmp_path / "c"))


def test_a_missing_shard(tmp_path: Path, documents: list[Any]) -> None:
    write_corpus(str(tmp_path / "c"), documents, 1001, 1000, shard_bytes=2000)
    (tmp_path / "c-00001.idx").unlink()
    with pytest.raises(MegamupError, match=r"no file '.*c-00001\.idx'"):
        Corpus(str(tmp_path / "c"))


def test_another_shard_in_its_place(tmp_path: Path, documents: list[Any]) -> None:
    write_corpus(str(tmp_path / "c"), documents, 1001, 1000, shard_bytes=2000)
    for suffix in (".bin", ".idx"):
        shutil.copy(tmp_path / f"c-00001{suffix}", tmp_path / f"c-00000{suffix}")
    with pytest.raises(MegamupError, match=r"c\.json: tells of .*'c-00000'.*another shard"):
        Corpus(str(tmp_path / "c"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:50], "JSONDecodeError"),
        (lambda text: "{}", "KeyError"),
        (lambda text: text.replace('"c"', '"../c"'), "shard name '../c'"),
    ],
)
def test_a_broken_manifest(tmp_path: Path, change: Any, message: str) -> None:
    write_corpus(str(tmp_path / "c"), [[1]], 1001, 1000)
    path = tmp_path / "c.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(MegamupError, match=rf"c\.json: not the manifest of a corpus: .*{message}"):
        Corpus(str(tmp_path / "c"))


def test_a_manifest_from_before_words_were_counted(tmp_path: Path) -> None:
    write_corpus(str(tmp_path / "c"), [[1]], 1001, 1000)
    path = tmp_path / "c.json"
    values = json.loads(path.read_text())
    del values["text_words"]
    path.write_text(json.dumps(values | {"text_bytes": 5}))
    corpus = Corpus(str(tmp_path / "c"))
    assert text_counts([corpus, corpus]) == (10, 0)


def test_text_of_corpora_that_do_not_all_tell(tmp_path: Path) -> None:
    with CorpusWriter(str(tmp_path / "told"), token_dtype(10)) as corpus:
        corpus.add(np.array([1, 9]), [2])
        corpus.finish(vocab_size=10, eod_id=9, tokenizer=TokenizerEntry.unknown(), text_bytes=7, text_words=2)
    for name in ("untold", "theirs"):
        write_corpus(str(tmp_path / name), [[1]], 10, 9)
    (tmp_path / "theirs.json").unlink()
    told, untold, theirs = (Corpus(str(tmp_path / name)) for name in ("told", "untold", "theirs"))
    assert text_counts([told, told]) == (14, 4)
    assert text_counts([told, untold]) == (0, 0)
    assert text_counts([told, theirs]) == (0, 0)


def test_no_corpus(tmp_path: Path) -> None:
    write_corpus(str(tmp_path / "wiki_train"), [[1]], 1001, 1000)
    with pytest.raises(MegamupError, match=r"no file '.*wiki\.json' or '.*wiki\.idx'; did you mean '.*/wiki_train'\?"):
        Corpus(str(tmp_path / "wiki"))


def test_the_writer_refuses_what_it_cant_hold(tmp_path: Path) -> None:
    with CorpusWriter(str(tmp_path / "c"), token_dtype(10)) as corpus:
        for wrong in ([1 << 16], [-1]):
            with pytest.raises(ValueError, match="don't fit in uint16"):
                corpus.add(np.array(wrong), [1])
        with pytest.raises(ValueError, match="lengths add up to 2, for 1 ids"):
            corpus.add(np.array([1]), [2])
    with pytest.raises(MegamupError, match="token id 10 outside a vocabulary of 10"):
        write_corpus(str(tmp_path / "c"), [[10]], 10, 0)
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_corpus_leaves_the_earlier_one(tmp_path: Path) -> None:
    write_corpus(str(tmp_path / "c"), [[1, 2]], 1001, 1000)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with CorpusWriter(str(tmp_path / "c"), token_dtype(1001)) as corpus:
        corpus.add(np.array([1, 2]), [2])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_smaller_corpus_leaves_nothing_of_a_larger_one(tmp_path: Path, documents: list[Any]) -> None:
    write_corpus(str(tmp_path / "c"), documents, 1001, 1000, shard_bytes=500)
    write_corpus(str(tmp_path / "c"), documents[:3], 1001, 1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.bin", "c.idx", "c.json"]


def test_dying_while_publishing(tmp_path: Path, documents: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after any number of renames there is no manifest over other tokens than its own; writing again helps."""
    prefix = str(tmp_path / "c")
    for renames in range(7):  # three shards and the manifest
        write_corpus(prefix, documents[:7], 1001, 1000, shard_bytes=64)
        left: Iterator[int] = iter(range(renames))

        def replace_some(source: Any, target: Any, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise RuntimeError("killed")
            os.rename(source, target)

        staged = CorpusWriter(prefix, token_dtype(1001), 4000)
        staged.add(np.concatenate(documents), [len(document) for document in documents])
        monkeypatch.setattr(os, "replace", replace_some)
        with pytest.raises(RuntimeError, match="killed"):
            staged.finish(vocab_size=1001, eod_id=1000, tokenizer=TokenizerEntry.unknown())
        monkeypatch.undo()
        assert not (tmp_path / "c.json").exists()
        staged.__exit__(None, None, None)
        write_corpus(prefix, documents, 1001, 1000, shard_bytes=4000)
        assert Corpus(prefix).tokens(0, sum(map(len, documents))).tolist() == np.concatenate(documents).tolist()


def test_a_full_disk_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(str(tmp_path / "c"), [[1, 2]], 1001, 1000)
    before = (tmp_path / "c.json").read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MegamupError, match=r"cannot be written: No space left on device; nothing is lost"):
        write_corpus(str(tmp_path / "c"), [[3]], 1001, 1000)
    assert (tmp_path / "c.json").read_bytes() == before
    assert json.loads(before)["tokens"] == 2
    assert [path.name for path in tmp_path.glob("*staging*")] == []
