"""One token shard in Megatron's indexed format: `NAME.bin` and `NAME.idx`.

The .bin is all token ids one after the other. The .idx, little endian and unpadded, as
`megatron.core.datasets.indexed_dataset` reads and writes it:

    offset  bytes  what
    0       9      b"MMIDIDX\\0\\0"
    9       8      version, 1
    17      1      code of the ids' dtype
    18      8      number of sequences s
    26      8      number of documents + 1
    34      4 s    int32: tokens of each sequence
            8 s    int64: byte in the .bin where each sequence starts
            8 d+8  int64: the sequence at which each document starts, then s

A document that Megatron splits in sentences has several sequences; ours has one for every 2^31 - 1 tokens.
"""

from __future__ import annotations

import difflib
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megamup.data.tokenizer import Ids
from megamup.errors import MegamupError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype[Any]] = {
    code: np.dtype(name) for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()
}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
LONGEST_SEQUENCE = 2**31 - 1
CHUNK = 1 << 20
"""Entries of an index that are handled at a time."""

Lengths = npt.NDArray[np.int64]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Megatron's choice (`DType.optimal_dtype`): uint16 for less than 65,500 tokens, else int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def shard_path(prefix: str, suffix: str) -> Path:
    """`prefix` may hold dots, so the suffix is added to the name as it is."""
    return Path(prefix + suffix)


class Shard:
    """A shard on disk, memory-mapped: opening costs no more than its header, whatever its size.

    Raises:
        MegamupError: a file is missing, is no shard, is cut short or too long, or holds no tokens.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.bin_path, self.idx_path = shard_path(prefix, ".bin"), shard_path(prefix, ".idx")
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise MegamupError(f"shard {prefix!r}: no file {str(path)!r}{missing_hint(prefix)}")
        self._read_index()
        self.n_tokens = self._check_bin()
        self._tokens: Ids = np.memmap(self.bin_path, dtype=self.dtype, mode="r").view(np.ndarray)

    def _read_index(self) -> None:
        path, size = self.idx_path, self.idx_path.stat().st_size
        with open(path, "rb") as file:
            header = file.read(HEADER.size)
        if not header.startswith(MAGIC):
            raise MegamupError(f"{path}: not a shard's index: byte 0 reads {header[:9]!r}, expected {MAGIC!r}")
        if len(header) < HEADER.size:
            raise MegamupError(f"{path}: cut short: expected at least {HEADER.size} bytes of header, found {size}")
        _, version, code, sequences, ends = HEADER.unpack(header)
        if version != 1:
            raise MegamupError(f"{path}: version {version} at byte 9, expected 1")
        if code not in DTYPES:
            raise MegamupError(
                f"{path}: dtype code {code} at byte 17 is none of an integer; expected one of {list(DTYPES)}"
            )
        self.dtype = DTYPES[code]
        expected = HEADER.size + 12 * sequences + 8 * ends
        if size != expected:
            state = "cut short" if size < expected else "too long"
            raise MegamupError(f"{path}: {state}: expected {expected:,} bytes, found {size:,}")
        if ends < 2 or not sequences:
            raise MegamupError(f"{path}: the shard holds no documents")
        index = np.memmap(path, mode="r").view(np.ndarray)[HEADER.size :]
        lengths, pointers, documents = np.split(index, [4 * sequences, 12 * sequences])
        self._lengths = lengths.view("<i4")  # unaligned views: element by element they cost nothing, and whole-array
        self._pointers = pointers.view("<i8")  # operations would copy, so that none is used outside of `check`
        self._documents = documents.view("<i8")
        if self._documents[0] != 0 or self._documents[-1] != sequences:
            at = HEADER.size + 12 * sequences
            raise MegamupError(
                f"{path}: broken from byte {at:,}: documents span sequences {self._documents[0]:,} "
                f"to {self._documents[-1]:,}, expected 0 to {sequences:,}"
            )

    def _check_bin(self) -> int:
        """Tokens in the .bin, after its size is found to be what the index says."""
        size = self.bin_path.stat().st_size
        expected = int(self._pointers[-1]) + int(self._lengths[-1]) * self.dtype.itemsize
        if size != expected:
            state = "cut short" if size < expected else "too long"
            raise MegamupError(
                f"{self.bin_path}: {state}: expected {expected:,} bytes after its index, found {size:,}; "
                "write the shard again"
            )
        if size == 0:
            raise MegamupError(f"{self.bin_path}: the shard holds no tokens, only empty documents")
        return size // self.dtype.itemsize

    def __len__(self) -> int:
        """The number of documents."""
        return len(self._documents) - 1

    def _start(self, document: int) -> int:
        sequence = int(self._documents[document])
        if sequence == len(self._pointers):
            return self.n_tokens
        return int(self._pointers[sequence]) // self.dtype.itemsize

    def bounds(self, document: int) -> tuple[int, int]:
        """The document's tokens in the stream, as (start, stop)."""
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        return self._start(document), self._start(document + 1)

    def document_at(self, token: int) -> int:
        """The document that holds a token of the stream: O(log documents)."""
        if not 0 <= token < self.n_tokens:
            raise IndexError(f"token {token} of {self.n_tokens}")
        sequence = bisect_right(self._pointers, token * self.dtype.itemsize) - 1
        return bisect_right(self._documents, sequence) - 1

    def first_document_from(self, token: int) -> int:
        """The first document that starts at `token` or after it: O(log documents)."""
        sequence = bisect_left(self._pointers, token * self.dtype.itemsize)
        return bisect_left(self._documents, sequence)

    def document(self, index: int) -> Ids:
        """Ids of document `index`, its end-of-document token included. Shape (tokens,), read-only."""
        return self.tokens(*self.bounds(index))

    def tokens(self, start: int, stop: int) -> Ids:
        """Ids `start` to before `stop` of the stream of all documents. Shape (stop - start,), read-only."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.n_tokens}")
        return self._tokens[start:stop]

    def lengths(self, start: int = 0, stop: int | None = None) -> Iterator[Lengths]:
        """Tokens of documents `start` to before `stop`, in pieces of at most `CHUNK`."""
        stop = len(self) if stop is None else stop
        for first in range(start, stop, CHUNK):
            sequences = self._documents[first : min(first + CHUNK, stop) + 1].astype(np.int64)  # (documents + 1,)
            counts = self._lengths[sequences[0] : sequences[-1]].astype(np.int64)  # (sequences,)
            ends = np.concatenate([[0], np.cumsum(counts)])[sequences - sequences[0]]
            yield np.diff(ends)

    def check(self) -> None:
        """Read the whole index.

        Raises:
            MegamupError: sequences don't follow each other without a gap, or documents are out of order.
        """
        end = 0
        for first in range(0, len(self._lengths), CHUNK):
            lengths = self._lengths[first : first + CHUNK].astype(np.int64) * self.dtype.itemsize
            ends = end + np.cumsum(lengths)
            wrong = np.flatnonzero((self._pointers[first : first + CHUNK] != ends - lengths) | (lengths < 0))
            if len(wrong):
                raise MegamupError(
                    f"{self.idx_path}: sequence {first + int(wrong[0]):,} doesn't start where the last ends"
                )
            end = int(ends[-1])
        for first in range(0, len(self), CHUNK):
            backwards = np.flatnonzero(np.diff(self._documents[first : first + CHUNK + 1]) < 0)
            if len(backwards):
                raise MegamupError(f"{self.idx_path}: document {first + int(backwards[0]):,} ends before it starts")


def missing_hint(prefix: str) -> str:
    """What a user may have meant by a prefix of which a file is missing."""
    if prefix.endswith((".bin", ".idx", ".json")):
        return "; give the prefix, without .bin, .idx or .json"
    path = Path(prefix)
    names = {file.stem for pattern in ("*.idx", "*.json") for file in path.parent.glob(pattern)} - {path.name}
    nearest = difflib.get_close_matches(path.name, sorted(names), n=1, cutoff=0.4)
    if nearest:
        return f"; did you mean {str(path.parent / nearest[0])!r}?"
    return "; tools/preprocess_data.py writes shards"


def write_index(file: BinaryIO, dtype: np.dtype[Any], lengths: Callable[[], Iterable[Lengths]]) -> None:
    """Write the .idx of documents one after the other, in memory that doesn't grow with their number.

    Args:
        file: open for writing at its start.
        dtype: of the ids.
        lengths: gives the tokens of each document, in pieces, anew at every call. Each of shape (documents,).

    Raises:
        OSError: the file can't be written.
    """

    def sequences() -> Iterator[Lengths]:
        for counts in lengths():
            yield _split_lengths(counts)

    documents = sum(len(counts) for counts in lengths())
    n_sequences = sum(len(counts) for counts in sequences())
    file.write(HEADER.pack(MAGIC, 1, DTYPE_CODES[dtype], n_sequences, documents + 1))
    for counts in sequences():
        file.write(counts.astype("<i4").tobytes())
    end = 0
    for counts in sequences():
        ends = end + np.cumsum(counts, dtype=np.int64) * dtype.itemsize
        file.write((ends - counts * dtype.itemsize).astype("<i8").tobytes())
        end = int(ends[-1]) if len(ends) else end
    file.write(np.zeros(1, "<i8").tobytes())
    end = 0
    for counts in lengths():
        ends = end + np.cumsum(_n_sequences(counts), dtype=np.int64)
        file.write(ends.astype("<i8").tobytes())
        end = int(ends[-1]) if len(ends) else end


def _n_sequences(counts: Lengths) -> Lengths:
    """How many sequences each document takes: the index holds their lengths as int32. An empty one takes one too."""
    return np.maximum(-(-counts // LONGEST_SEQUENCE), 1)


def _split_lengths(counts: Lengths) -> Lengths:
    """The sequences' lengths of documents' lengths: full ones first, the rest last."""
    parts = _n_sequences(counts)
    if (parts == 1).all():
        return counts
    split = np.full(parts.sum(), LONGEST_SEQUENCE, dtype=np.int64)
    split[np.cumsum(parts) - 1] = counts - (parts - 1) * LONGEST_SEQUENCE
    return split
