"""Which documents are duplicates of earlier ones.

Each document gets a signature of 32-bit numbers: the digest of its text (exact), or MinHashes of its n-grams of words.
The share of MinHashes that two documents have in common estimates the share of n-grams that they do (Jaccard's
similarity). A signature is cut into bands; documents with an equal band are compared, and two are linked where enough
of their numbers are equal. Of documents that are linked, directly or through others, the first stays.

This is MinHash LSH as in Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3. rensa computes the
MinHashes, SciPy the connected components.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megamup.errors import MegamupError

Signature = npt.NDArray[np.uint32]
Keys = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.int64]

MINHASH_SLOTS = 128
MINHASH_SEED = 1
RECALL = 0.99
"""Share of pairs at the threshold that have a band in common."""
DOCUMENTS_AT_ONCE = 1 << 14
"""Documents of a piece whose keys are made at a time."""
KEYS_AT_ONCE = 1 << 25
"""Documents whose bands are sorted at a time, at about 40 bytes each."""
NEIGHBOURS = 16
"""How many of the following documents with the same band each is compared with. Duplicates are linked to the next one;
the others are for bands that documents share by chance, or for a common passage."""
PAIRS_AT_ONCE = 1 << 17
"""Pairs whose signatures are compared at a time."""
OPEN_SIGNATURES = 4096
"""Files of signatures that are mapped at a time."""
# Scripts that put no spaces between words: each character counts as a word. They stand before \w, which holds them too.
WORD = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
    r"|\w+"
)


class Signer(Protocol):
    """Makes the signature of one document after the other, each of which comes in one text or several."""

    def add(self, text: str) -> None:
        """Take the next text of the document."""
        ...

    def finish(self) -> Signature:
        """The document's signature, shape (slots,); what is added next belongs to another one."""
        ...


class Method(Protocol):
    """What counts as a duplicate. Picklable."""

    @property
    def slots(self) -> int:
        """Numbers in a signature."""
        ...

    @property
    def rows(self) -> int:
        """Numbers in a band."""
        ...

    @property
    def least(self) -> int:
        """Numbers that are equal in duplicates."""
        ...

    def signer(self) -> Signer:
        """Raises MegamupError where a package is missing."""
        ...


@dataclass(frozen=True)
class Exact:
    """Documents of equal text, by a digest of 128 bits."""

    slots = rows = least = 4

    def signer(self) -> Signer:
        return _ExactSigner()


@dataclass(frozen=True)
class MinHash:
    """Documents that share most of their n-grams of words; case, punctuation and white space don't count.

    Documents without an n-gram, of few words or of none, are duplicates where their texts are equal.

    Args:
        threshold: least similarity of duplicates, the share of their n-grams that they have in common. It is estimated
            with a standard error of sqrt(s(1 - s) / 128), 0.035 at 0.8.
        ngram: words of an n-gram.

    Raises:
        MegamupError: a threshold that isn't between 0.1 and 1, or no words.
    """

    threshold: float = 0.8
    ngram: int = 5
    slots = MINHASH_SLOTS

    def __post_init__(self) -> None:
        if not 0.1 <= self.threshold <= 1:
            raise MegamupError(f"--threshold {self.threshold}: expected a similarity from 0.1 to 1")
        if self.ngram < 1:
            raise MegamupError(f"--ngram {self.ngram}: expected 1 word or more")

    @property
    def least(self) -> int:
        return math.ceil(self.threshold * self.slots - 1e-9)

    @property
    def rows(self) -> int:
        """As many as possible, so that few documents are compared in vain, while `RECALL` holds at the threshold."""

        def recall(rows: int) -> float:
            return 1 - (1 - self.threshold**rows) ** (self.slots // rows)

        return max(rows for rows in range(1, self.slots + 1) if rows == 1 or recall(rows) >= RECALL)

    def signer(self) -> Signer:
        return _MinHashSigner(self.ngram)


class _ExactSigner:
    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=16)

    def add(self, text: str) -> None:
        self._digest.update(text.encode())

    def finish(self) -> Signature:
        signature = np.frombuffer(self._digest.digest(), dtype="<u4")
        self._digest = hashlib.blake2b(digest_size=16)
        return signature


class _MinHashSigner:
    def __init__(self, ngram: int) -> None:
        try:
            self._rensa: Any = importlib.import_module("rensa")
        except ImportError as error:
            raise MegamupError(f"--method minhash: {error}; pip install 'megamup[filters]'") from error
        self._ngram = ngram
        self._text = _ExactSigner()
        self._begin()

    def _begin(self) -> None:
        self._hashes = self._rensa.RMinHash(MINHASH_SLOTS, MINHASH_SEED)
        self._has_ngrams = False
        self._last_words: list[str] = []

    def add(self, text: str) -> None:
        words = self._last_words + WORD.findall(text.lower())
        ngrams = list(map(" ".join, zip(*(words[first:] for first in range(self._ngram)), strict=False)))
        if ngrams:
            self._hashes.update(ngrams)
            self._has_ngrams = True
        elif not self._has_ngrams:
            self._text.add(text)
        self._last_words = words[max(len(words) - self._ngram + 1, 0) :]

    def finish(self) -> Signature:
        text = self._text.finish()
        if not self._has_ngrams:
            self._hashes.update([text.tobytes()])
        signature = np.array(self._hashes.digest(), dtype=np.uint32)
        self._begin()
        return signature


def band_keys(signatures: Signature, rows: int) -> Keys:
    """A number for each band of each document, equal where the bands are equal.

    Shapes (documents, slots), (bands, documents).
    """
    bands = signatures.shape[1] // rows
    columns = signatures[:, : bands * rows].T.reshape(bands, rows, len(signatures)).astype(np.uint64)
    keys = np.zeros((bands, len(signatures)), dtype=np.uint64)
    for row in range(rows):
        keys = (keys ^ columns[:, row]) * np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: Fibonacci hashing
        keys ^= keys >> np.uint64(32)
    return keys


class SignatureFiles:
    """The signatures of a corpus, as `write_signatures` left them.

    Args:
        paths: of its pieces, in order.
        documents: of each piece.
        method: that made the signatures.
    """

    def __init__(self, paths: Sequence[Path], documents: Sequence[int], method: Method) -> None:
        self.method = method
        self._paths = [path for path, count in zip(paths, documents, strict=True) if count]
        self._counts = [count for count in documents if count]
        self._starts: Indices = np.cumsum([0, *self._counts], dtype=np.int64)
        self._mapped = lru_cache(OPEN_SIGNATURES)(self._map)

    def __len__(self) -> int:
        """The number of documents."""
        return int(self._starts[-1])

    @property
    def bands(self) -> int:
        return self.method.slots // self.method.rows

    def _map(self, piece: int) -> Signature:
        return np.memmap(self._paths[piece], np.uint32, "r", shape=(self._counts[piece], self.method.slots))

    def keys(self, band: int) -> Iterator[tuple[int, Keys]]:
        """A band's keys, piece by piece: (first document, shape (documents,))."""
        for path, start, count in zip(self._paths, self._starts.tolist(), self._counts, strict=False):
            yield start, np.fromfile(keys_path(path), np.uint64, count, offset=8 * band * count)

    def rows(self, documents: Indices) -> Signature:
        """Signatures of some documents. Shapes (n,), (n, slots)."""
        pieces = np.searchsorted(self._starts, documents, side="right") - 1
        rows = np.empty((len(documents), self.method.slots), dtype=np.uint32)
        order = np.argsort(pieces, kind="stable")
        for places in np.split(order, np.flatnonzero(np.diff(pieces[order])) + 1):
            if len(places):
                piece = int(pieces[places[0]])
                rows[places] = self._mapped(piece)[documents[places] - self._starts[piece]]
        return rows


def write_signatures(path: Path, signatures: Iterable[Signature], method: Method) -> int:
    """Write the signatures of a piece's documents, and the keys of their bands beside.

    Memory: that of `DOCUMENTS_AT_ONCE` documents.

    Returns:
        The number of documents.

    Raises:
        OSError: the files can't be written.
    """
    count = 0
    with open(path, "wb") as file:
        for signature in signatures:
            file.write(signature.tobytes())
            count += 1
    if not count:
        return 0
    rows = np.memmap(path, np.uint32, "r", shape=(count, method.slots))
    keys = np.memmap(keys_path(path), np.uint64, "w+", shape=(method.slots // method.rows, count))
    for start in range(0, count, DOCUMENTS_AT_ONCE):
        some = slice(start, start + DOCUMENTS_AT_ONCE)
        keys[:, some] = band_keys(rows[some], method.rows)
    keys.flush()
    return count


def keys_path(path: Path) -> Path:
    """Where the keys of the bands of a file of signatures are."""
    return path.with_name(path.name + ".keys")


def first_equals(files: SignatureFiles, at_once: int = KEYS_AT_ONCE) -> Indices:
    """For each document the first one of those that it is linked with: itself where it stays. Shape (documents,).

    Memory: 32 bytes a document, and what `at_once` documents take.

    Args:
        files: their signatures.
        at_once: documents whose bands are sorted at a time; no effect on the result.
    """
    firsts = np.arange(len(files), dtype=np.int64)
    shares = -(-len(files) // at_once)
    for band in range(files.bands):
        for share in range(shares):
            for left, right in _neighbours(files, band, share, shares):
                for start in range(0, len(left), PAIRS_AT_ONCE):
                    pairs = slice(start, start + PAIRS_AT_ONCE)
                    _link(firsts, files, left[pairs], right[pairs])
    return _roots(firsts, np.arange(len(files)))


def _neighbours(files: SignatureFiles, band: int, share: int, shares: int) -> Iterator[tuple[Indices, Indices]]:
    """Pairs of documents with an equal band: each with the next ones that have it. Only the keys of one share."""
    some_keys, some_documents = [], []
    for start, piece in files.keys(band):
        mine = np.flatnonzero(piece % np.uint64(shares) == share)
        some_keys.append(piece[mine])
        some_documents.append(mine + start)
    keys, documents = np.concatenate(some_keys), np.concatenate(some_documents)
    order = np.argsort(keys, kind="stable")
    keys, documents = keys[order], documents[order]
    for distance in range(1, NEIGHBOURS + 1):
        equal = np.flatnonzero(keys[distance:] == keys[:-distance])
        if not len(equal):
            return
        yield documents[equal], documents[equal + distance]


def _link(firsts: Indices, files: SignatureFiles, left: Indices, right: Indices) -> None:
    """Link the pairs that are duplicates; those that are linked already need no look."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    apart = _roots(firsts, left) != _roots(firsts, right)
    left, right = left[apart], right[apart]
    similar = np.count_nonzero(files.rows(left) == files.rows(right), axis=1) >= files.method.least
    ends = np.stack([firsts[left[similar]], firsts[right[similar]]])  # (2, links), all of them roots
    roots, places = np.unique(ends, return_inverse=True)
    rows, columns = places.reshape(ends.shape)
    links = coo_array((np.ones(len(rows), dtype=np.int8), (rows, columns)), shape=(len(roots), len(roots)))
    _, labels = connected_components(links, directed=False)
    _, smallest = np.unique(labels, return_index=True)  # roots ascend, so the first of a label is its smallest
    firsts[roots] = roots[smallest[labels]]


def _roots(firsts: Indices, documents: Indices) -> Indices:
    """Follow `firsts` to the end from each of some documents, and shorten their ways. Shapes (n,), (n,)."""
    roots = firsts[documents]
    while np.any((further := firsts[roots]) != roots):
        roots = further
    firsts[documents] = roots
    return roots
