import hashlib
import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megamup.data.pending import PendingFile
from megamup.data.shards import Manifest, Shard, ShardWriter, publish, token_dtype
from megamup.errors import MegamupError

MakeShard = Callable[..., Shard]

DOCUMENTS = [[1, 2, 3, 0], [0], [4, 0], [5, 6, 7, 8, 9, 0]]


def random_documents(vocab_size: int, count: int = 50) -> list[list[int]]:
    generator = random.Random(vocab_size)
    return [[generator.randrange(vocab_size) for _ in range(generator.randrange(40))] for _ in range(count)]


def test_documents_and_stream(make_shard: MakeShard) -> None:
    shard = make_shard(DOCUMENTS)
    assert len(shard) == 4
    assert shard.n_tokens == 13
    assert [shard.document(index).tolist() for index in range(4)] == DOCUMENTS
    assert shard.tokens(2, 8).tolist() == [3, 0, 0, 4, 0, 5]
    assert not shard.tokens(0, 3).flags.writeable
    with pytest.raises(IndexError):
        shard.tokens(0, 14)
    with pytest.raises(IndexError):
        shard.document(4)


def test_bytes_on_disk(make_shard: MakeShard) -> None:
    shard = make_shard([[7, 0], [8]])
    assert shard.bin_path.read_bytes() == struct.pack("<3H", 7, 0, 8)
    assert shard.idx_path.read_bytes() == (
        b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 2, 3) + struct.pack("<2i2q3q", 2, 1, 0, 4, 0, 1, 2)
    )


def test_manifest(make_shard: MakeShard) -> None:
    shard = make_shard(DOCUMENTS)
    manifest = shard.manifest
    assert manifest is not None
    assert (manifest.documents, manifest.tokens, manifest.max_id, manifest.dtype) == (4, 13, 9, "uint16")
    assert manifest.bin_sha256 == hashlib.sha256(shard.bin_path.read_bytes()).hexdigest()
    assert manifest.idx_sha256 == hashlib.sha256(shard.idx_path.read_bytes()).hexdigest()
    assert make_shard(DOCUMENTS, name="bare", manifest=False).manifest is None


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(257, "uint16"), (65499, "uint16"), (65500, "int32"), (65537, "int32")]
)
def test_dtype_follows_the_vocabulary(make_shard: MakeShard, vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size) == np.dtype(dtype)
    shard = make_shard([[vocab_size - 1, 0]], vocab_size)
    assert shard.dtype == np.dtype(dtype)
    assert shard.document(0).tolist() == [vocab_size - 1, 0]


@pytest.fixture(scope="module")
def indexed_dataset() -> Any:
    return pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core isn't installed")


class TestMegatron:
    """Against megatron-core's own reader and writer."""

    @pytest.mark.parametrize("vocab_size", [257, 65499, 65500, 100_000])
    def test_reads_ours(self, indexed_dataset: Any, make_shard: MakeShard, vocab_size: int) -> None:
        documents = random_documents(vocab_size)
        shard = make_shard(documents, vocab_size)
        theirs = indexed_dataset.IndexedDataset(shard.prefix)
        assert [theirs[index].tolist() for index in range(len(theirs))] == documents
        assert theirs.document_indices.tolist() == list(range(len(documents) + 1))

    @pytest.mark.parametrize("vocab_size", [257, 65500])
    def test_writes_the_same_bytes(
        self, indexed_dataset: Any, make_shard: MakeShard, tmp_path: Path, vocab_size: int
    ) -> None:
        documents = random_documents(vocab_size)
        shard = make_shard(documents, vocab_size)
        dtype = indexed_dataset.DType.optimal_dtype(vocab_size)
        builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
        for document in documents:
            builder.add_document(document, [len(document)])
        builder.finalize(str(tmp_path / "theirs.idx"))
        assert shard.bin_path.read_bytes() == (tmp_path / "theirs.bin").read_bytes()
        assert shard.idx_path.read_bytes() == (tmp_path / "theirs.idx").read_bytes()

    def test_we_read_documents_of_several_sequences(self, indexed_dataset: Any, tmp_path: Path) -> None:
        builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
        builder.add_document([1, 2, 3, 4], [1, 3])
        builder.add_document([], [])
        builder.add_document([5], [1])
        builder.finalize(str(tmp_path / "theirs.idx"))
        shard = Shard(str(tmp_path / "theirs"))
        assert [shard.document(index).tolist() for index in range(3)] == [[1, 2, 3, 4], [], [5]]


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def overwrite(path: Path, offset: int, data: bytes) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:offset] + data + content[offset + len(data) :])


@pytest.mark.parametrize(
    ("suffix", "break_it", "message"),
    [
        (".bin", lambda path: cut(path, 20), r"\.bin: cut short: expected 26 bytes .* found 20"),
        (".bin", lambda path: path.write_bytes(path.read_bytes() + b"12"), r"\.bin: too long.*26.*found 28"),
        (".bin", lambda path: path.unlink(), r"shard '.*shard': no file '.*shard\.bin'"),
        (".idx", lambda path: path.unlink(), r"shard '.*shard': no file '.*shard\.idx'"),
        (".idx", lambda path: cut(path, 100), r"\.idx: cut short: expected 122 bytes, found 100"),
        (".idx", lambda path: cut(path, 20), r"\.idx: cut short: expected at least 34 bytes.*found 20"),
        (".idx", lambda path: cut(path, 0), r"\.idx: not a shard's index: byte 0 reads b''"),
        (".idx", lambda path: overwrite(path, 0, b"X"), r"\.idx: not a shard's .* reads b'XMIDIDX"),
        (".idx", lambda path: overwrite(path, 9, b"\2"), r"\.idx: version 2 at byte 9, expected 1"),
        (".idx", lambda path: overwrite(path, 17, b"\6"), r"\.idx: dtype code 6 at byte 17"),
        (".idx", lambda path: overwrite(path, 114, b"\3"), r"\.idx: broken from byte 82: .* 0 to 3, .*to 4"),
        (".json", lambda path: cut(path, 50), r"\.json: not a shard's manifest: JSONDecodeError"),
        (".json", lambda path: path.write_text("{}"), r"\.json: not a shard's manifest: KeyError"),
    ],
)
def test_broken_shard(make_shard: MakeShard, suffix: str, break_it: Callable[[Path], None], message: str) -> None:
    prefix = make_shard(DOCUMENTS).prefix
    break_it(Path(prefix + suffix))
    with pytest.raises(MegamupError, match=message):
        Shard(prefix)


def test_another_shards_manifest(make_shard: MakeShard) -> None:
    one, two = make_shard(DOCUMENTS, name="one"), make_shard(DOCUMENTS[:2], name="two")
    Path(one.prefix + ".json").write_bytes(Path(two.prefix + ".json").read_bytes())
    with pytest.raises(MegamupError, match=r"one\.json: counts 2 documents and 5 tokens.*another shard"):
        Shard(one.prefix)


def test_shards_without_documents_or_tokens(make_shard: MakeShard, tmp_path: Path) -> None:
    with pytest.raises(MegamupError, match=r"shard\.bin: the shard holds no tokens, only empty documents"):
        make_shard([[], []])
    with pytest.raises(MegamupError, match=r"shard '.*shard': no documents to write"):
        make_shard([])
    (tmp_path / "none.bin").touch()
    (tmp_path / "none.idx").write_bytes(b"MMIDIDX\0\0" + struct.pack("<QBQQq", 1, 8, 0, 1, 0))
    with pytest.raises(MegamupError, match=r"none\.idx: the shard holds no documents"):
        Shard(str(tmp_path / "none"))


def test_misspelled_prefix(make_shard: MakeShard, tmp_path: Path) -> None:
    make_shard(DOCUMENTS, name="corpus_train")
    with pytest.raises(MegamupError, match=r"did you mean '.*/corpus_train'\?"):
        Shard(str(tmp_path / "corpus_trian"))
    with pytest.raises(MegamupError, match=r"give the prefix, without \.bin or \.idx"):
        Shard(str(tmp_path / "corpus_train.bin"))


def test_prefix_with_dots(make_shard: MakeShard) -> None:
    assert make_shard(DOCUMENTS, name="c4.v1.2").bin_path.name == "c4.v1.2.bin"


def test_writer_rejects_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "shard"), vocab_size=10) as writer:
        for ids in ([10], [-1]):
            with pytest.raises(ValueError, match="outside a vocabulary of 10"):
                writer.add(np.array(ids), [1])
        with pytest.raises(ValueError, match="lengths add up to 2, for 1 ids"):
            writer.add(np.array([1]), [2])
    assert list(tmp_path.iterdir()) == []


def test_an_unpublished_shard_leaves_the_earlier_one(make_shard: MakeShard, tmp_path: Path) -> None:
    shard = make_shard(DOCUMENTS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with ShardWriter(shard.prefix, 257) as writer:
        writer.add(np.array([1, 2]), [2])
        writer.finish(eod_id=0, tokenizer="", tokenizer_sha256="", text_bytes=0, sources=[])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_dying_while_publishing_leaves_no_whole_shard(
    make_shard: MakeShard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after any number of renames, the new tokens never stand beside the old index."""
    for renames in range(3):
        shard = make_shard(DOCUMENTS)
        with ShardWriter(shard.prefix, 257) as writer:
            writer.add(np.array([9] * 13), [4, 1, 2, 6])
            writer.finish(eod_id=0, tokenizer="", tokenizer_sha256="", text_bytes=0, sources=[])
            left = iter(range(renames))

            def publish_some(file: PendingFile, left: Iterator[int] = left) -> None:
                if next(left, None) is None:
                    raise RuntimeError("killed")
                os.replace(f"{file.path}.tmp", file.path)

            monkeypatch.setattr(PendingFile, "publish", publish_some)
            with pytest.raises(RuntimeError, match="killed"):
                publish([writer])
        monkeypatch.undo()
        with pytest.raises(MegamupError, match=r"no file '.*\.idx'"):
            Shard(shard.prefix)


def test_manifest_survives_json(make_shard: MakeShard) -> None:
    shard = make_shard(DOCUMENTS)
    values = json.loads(Path(shard.prefix + ".json").read_text())
    assert Manifest(**values) == shard.manifest


def test_a_large_index_opens_at_once(tmp_path: Path) -> None:
    """A sparse shard of a billion tokens in a million documents: nothing of it is read but the header."""
    documents, length = 1_000_000, 1000
    prefix = tmp_path / "large"
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * documents * length)
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, documents, documents + 1))
        file.write(np.full(documents, length, "<i4").tobytes())
        file.write((np.arange(documents, dtype="<i8") * 2 * length).tobytes())
        file.write(np.arange(documents + 1, dtype="<i8").tobytes())
    shard = Shard(str(prefix))
    assert shard.n_tokens == 10**9
    assert len(shard.document(documents - 1)) == length
    assert shard.tokens(10**9 - 5, 10**9).tolist() == [0] * 5
