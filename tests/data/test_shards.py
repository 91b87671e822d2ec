import random
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megamup.data import shards
from megamup.data.manifest import Manifest, ShardEntry, TokenizerEntry, sample_sha256
from megamup.data.shards import Shard, token_dtype, write_index
from megamup.data.writer import write_corpus
from megamup.errors import MegamupError

DOCUMENTS = [[1, 2, 3, 0], [0], [4, 0], [5, 6, 7, 8, 9, 0]]


def make(folder: Path, documents: Sequence[Sequence[int]], vocab_size: int = 257, name: str = "shard") -> Shard:
    write_corpus(str(folder / name), documents, vocab_size, eod_id=0)
    return Shard(str(folder / name))


def random_documents(vocab_size: int, count: int = 50) -> list[list[int]]:
    """Some of them empty."""
    generator = random.Random(vocab_size)
    return [[generator.randrange(vocab_size) for _ in range(generator.randrange(40))] for _ in range(count)]


def test_documents_and_stream(tmp_path: Path) -> None:
    shard = make(tmp_path, DOCUMENTS)
    assert len(shard) == 4
    assert shard.n_tokens == 13
    assert [shard.document(index).tolist() for index in range(4)] == DOCUMENTS
    assert [piece.tolist() for piece in shard.lengths()] == [[4, 1, 2, 6]]
    assert shard.tokens(2, 8).tolist() == [3, 0, 0, 4, 0, 5]
    assert not shard.tokens(0, 3).flags.writeable
    with pytest.raises(IndexError):
        shard.tokens(0, 14)
    with pytest.raises(IndexError):
        shard.document(4)


def test_bytes_on_disk(tmp_path: Path) -> None:
    shard = make(tmp_path, [[7, 0], [8]])
    assert shard.bin_path.read_bytes() == struct.pack("<3H", 7, 0, 8)
    assert shard.idx_path.read_bytes() == (
        b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 2, 3) + struct.pack("<2i2q3q", 2, 1, 0, 4, 0, 1, 2)
    )


@pytest.mark.parametrize("vocab_size", [257, *range(65_499, 65_538)])
def test_dtype_follows_the_vocabulary(tmp_path: Path, vocab_size: int) -> None:
    """Megatron's bound, and no id wraps on either side of it or of 2^16."""
    dtype = np.dtype("uint16" if vocab_size < 65_500 else "int32")
    assert token_dtype(vocab_size) == dtype
    shard = make(tmp_path, [[vocab_size - 1, 0, vocab_size // 2]], vocab_size)
    assert shard.dtype == dtype
    assert shard.document(0).tolist() == [vocab_size - 1, 0, vocab_size // 2]


@pytest.fixture(scope="module")
def indexed_dataset() -> Any:
    return pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core isn't installed")


class TestMegatron:
    """Against megatron-core's own reader and writer."""

    @pytest.mark.parametrize("vocab_size", [257, 65499, 65500, 100_000])
    def test_reads_ours(self, indexed_dataset: Any, tmp_path: Path, vocab_size: int) -> None:
        documents = random_documents(vocab_size)
        shard = make(tmp_path, documents, vocab_size)
        theirs = indexed_dataset.IndexedDataset(shard.prefix)
        assert [theirs[index].tolist() for index in range(len(theirs))] == documents
        assert theirs.document_indices.tolist() == list(range(len(documents) + 1))

    @pytest.mark.parametrize("vocab_size", [257, 65500])
    def test_writes_the_same_bytes(self, indexed_dataset: Any, tmp_path: Path, vocab_size: int) -> None:
        documents = random_documents(vocab_size)
        shard = make(tmp_path, documents, vocab_size)
        dtype = indexed_dataset.DType.optimal_dtype(vocab_size)
        builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
        for document in documents:
            builder.add_document(document, [len(document)])
        builder.finalize(str(tmp_path / "theirs.idx"))
        assert shard.bin_path.read_bytes() == (tmp_path / "theirs.bin").read_bytes()
        assert shard.idx_path.read_bytes() == (tmp_path / "theirs.idx").read_bytes()

    @pytest.mark.parametrize("dtype", [np.uint16, np.int32])
    def test_we_read_documents_of_several_sequences_and_of_none(
        self, indexed_dataset: Any, tmp_path: Path, dtype: Any
    ) -> None:
        builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
        documents: list[list[int]] = [[], [1, 2, 3, 4], [], [], [5, 6], [7], []]
        for document, lengths in zip(documents, [[], [1, 3], [], [0], [1, 1], [1], []], strict=True):
            builder.add_document(document, lengths)
        builder.finalize(str(tmp_path / "theirs.idx"))
        shard = Shard(str(tmp_path / "theirs"))
        shard.check()
        assert [shard.document(index).tolist() for index in range(len(shard))] == documents
        assert [length for piece in shard.lengths() for length in piece] == [0, 4, 0, 0, 2, 1, 0]
        assert [shard.document_at(token) for token in range(7)] == [1, 1, 1, 1, 4, 4, 5]

    def test_documents_longer_than_a_sequence(
        self, indexed_dataset: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The index holds lengths as int32: a longer document has several sequences."""
        monkeypatch.setattr(shards, "LONGEST_SEQUENCE", 4)
        documents = [[1] * 3, [2] * 4, [], [3] * 5, [4] * 13]
        shard = make(tmp_path, documents)
        theirs = indexed_dataset.IndexedDataset(shard.prefix)
        assert [len(theirs[index]) for index in range(len(theirs))] == [3, 4, 0, 4, 1, 4, 4, 4, 1]
        assert theirs.document_indices.tolist() == [0, 1, 2, 3, 5, 9]
        shard.check()
        assert [shard.document(index).tolist() for index in range(5)] == documents


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
    ],
)
def test_broken_shard(tmp_path: Path, suffix: str, break_it: Callable[[Path], None], message: str) -> None:
    prefix = make(tmp_path, DOCUMENTS).prefix
    break_it(Path(prefix + suffix))
    with pytest.raises(MegamupError, match=message):
        Shard(prefix)


@pytest.mark.parametrize(
    ("offset", "message"), [(38, r"sequence 2 doesn't start where"), (98, r"document 1 ends before it starts")]
)
def test_check_finds_an_index_that_contradicts_itself(tmp_path: Path, offset: int, message: str) -> None:
    """Lengths are at byte 34, documents' first sequences at byte 82."""
    shard = make(tmp_path, DOCUMENTS)
    shard.check()
    overwrite(shard.idx_path, offset, struct.pack("<i", 0))
    with pytest.raises(MegamupError, match=message):
        Shard(shard.prefix).check()


def test_shards_without_documents_or_tokens(tmp_path: Path) -> None:
    nothing: list[list[list[int]]] = [[], [[], []]]
    for documents in nothing:
        with pytest.raises(MegamupError, match=r"shard': no documents to write"):
            make(tmp_path, documents)
    (tmp_path / "none.bin").touch()
    (tmp_path / "none.idx").write_bytes(b"MMIDIDX\0\0" + struct.pack("<QBQQq", 1, 8, 0, 1, 0))
    with pytest.raises(MegamupError, match=r"none\.idx: the shard holds no documents"):
        Shard(str(tmp_path / "none"))


def test_misspelled_prefix(tmp_path: Path) -> None:
    make(tmp_path, DOCUMENTS, name="corpus_train")
    with pytest.raises(MegamupError, match=r"did you mean '.*/corpus_train'\?"):
        Shard(str(tmp_path / "corpus_trian"))
    with pytest.raises(MegamupError, match=r"give the prefix, without \.bin, \.idx or \.json"):
        Shard(str(tmp_path / "corpus_train.bin"))


def test_prefix_with_dots(tmp_path: Path) -> None:
    assert make(tmp_path, DOCUMENTS, name="c4.v1.2").bin_path.name == "c4.v1.2.bin"


def test_the_index_is_written_in_bounded_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However lengths are divided, the same index comes out; reading it in small pieces gives them back."""
    lengths = np.random.default_rng(0).integers(0, 50, size=1000)
    for pieces in (1, 7, 1000):
        with open(tmp_path / f"{pieces}.idx", "wb") as file:
            write_index(file, np.dtype("<u2"), lambda pieces=pieces: np.array_split(lengths, pieces))  # type: ignore[misc]
    assert len({path.read_bytes() for path in tmp_path.glob("*.idx")}) == 1
    (tmp_path / "7.bin").write_bytes(bytes(2 * int(lengths.sum())))
    monkeypatch.setattr(shards, "CHUNK", 13)
    shard = Shard(str(tmp_path / "7"))
    assert np.concatenate(list(shard.lengths())).tolist() == lengths.tolist()
    assert np.concatenate(list(shard.lengths(20, 900))).tolist() == lengths[20:900].tolist()


def write_sparse(prefix: Path, documents: int, length: int) -> None:
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * documents * length)
    with open(f"{prefix}.idx", "wb") as file:
        write_index(file, np.dtype("<u2"), lambda: (np.full(10**6, length) for _ in range(documents // 10**6)))


OPEN = """
import re, sys, time
from pathlib import Path
from megamup.data.corpus import Corpus

def high_water_kib():  # of this process alone: maxrss counts the parent's too
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

before, start = high_water_kib(), time.monotonic()
corpus = Corpus(sys.argv[1])
assert corpus.n_tokens == 10**9
assert len(corpus.document(len(corpus) - 1)) == 100
assert corpus.tokens(10**9 - 5, 10**9).tolist() == [0] * 5
assert corpus.documents_at(10**9 - 101, 10**9) == range(len(corpus) - 2, len(corpus))
print(time.monotonic() - start, high_water_kib() - before, high_water_kib())
"""


@pytest.mark.parametrize("manifest", [True, False])
def test_a_billion_tokens_open_at_once(tmp_path: Path, manifest: bool) -> None:
    """In under a second and 200 MB: ten million documents, of which nothing is read but a few blocks."""
    prefix = tmp_path / "large"
    write_sparse(prefix, documents=10_000_000, length=100)
    if manifest:
        sample = sample_sha256(tmp_path / "large.bin", tmp_path / "large.idx")
        entry = ShardEntry("large", 10_000_000, 10**9, "0" * 64, "0" * 64, sample)
        about = Manifest(10_000_000, 10**9, "uint16", 257, 0, 256, 0, TokenizerEntry.unknown(), (entry,))
        about.write(tmp_path / "large.json")
    done = subprocess.run([sys.executable, "-c", OPEN, str(prefix)], capture_output=True, text=True, check=True)
    seconds, grown, in_all = map(float, done.stdout.split())
    assert seconds < 1
    assert grown < 20_000  # KiB
    assert in_all < 200_000
