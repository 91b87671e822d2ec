"""Samples of fixed length out of a corpus, and their order.

A corpus is one stream of documents, each ended by the end-of-document token. Sample i of the packed form is the
seq_len + 1 tokens from position i * seq_len on: inputs are all but the last, targets all but the first, so neighbouring
samples share one token and no target is seen twice. The order is a pure function of (seed, content hash, index):
nothing is shuffled in memory, nothing is stored, any rank can compute any sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megamup.data.corpus import Corpus
from megamup.data.permutation import InBlocks, Indices, Permutation
from megamup.data.tokenizer import Ids
from megamup.errors import MegamupError

Row = npt.NDArray[np.int64]
"""Where a sample goes: inputs and targets in one piece. Shape (seq_len + 1,)."""


class SampleSource(Protocol):
    """Samples by index, for any index >= 0."""

    seq_len: int

    def __len__(self) -> int:
        """Samples in one pass over the data."""

    def read(self, indices: Indices, rows: Sequence[Row]) -> None:
        """Write the samples at `indices` into `rows`, one each."""

    def n_targets(self, indices: Indices) -> Indices:
        """How many targets of each sample count, from its start; the others are padding. Shape (indices,)."""


class PackedSamples:
    """Training samples: every epoch is a new permutation of the packed samples of a corpus, or of a part of them.

    The last tokens of the corpus, fewer than seq_len, are in no sample.

    Args:
        corpus: the tokens.
        seq_len: targets of a sample.
        seed: of the order of each epoch.
        vocab_size: the model's; a token at or above it is an error.
        fraction: train on this share of the samples, 0 < fraction <= 1, rounded down. Which they are is a function of
            the content alone: every seed trains on the same ones, and a smaller fraction's are among a larger one's.

    Raises:
        MegamupError: no whole sample is there; from `read`, a token outside the vocabulary.
    """

    def __init__(self, corpus: Corpus, seq_len: int, seed: int, vocab_size: int, fraction: float = 1.0) -> None:
        self.corpus, self.seq_len, self.seed, self.vocab_size = corpus, seq_len, seed, vocab_size
        self._all = (corpus.n_tokens - 1) // seq_len
        if self._all == 0:
            raise MegamupError(
                f"corpus {corpus.prefix!r} holds {corpus.n_tokens:,} tokens; a sample needs {seq_len + 1:,} "
                "(data.seq_len, or the text that the objective makes one of, and one more)"
            )
        self._used = math.floor(self._all * Fraction(str(fraction)))  # the decimal that was written, not its float
        if self._used == 0:
            raise MegamupError(
                f"corpus {corpus.prefix!r}: fraction={fraction} of its {self._all:,} samples of {seq_len} tokens is "
                f"less than one; expected at least {math.ceil(1e6 / self._all) / 1e6:g}"
            )
        check_vocabulary(corpus, vocab_size)
        self._content = corpus.content_hash
        self._subset = Permutation(self._all, repr(("fraction", self._content)))
        self.locate = InBlocks(self._locate)
        """(epoch, sample of the corpus) at each of some indices. Shape (indices,) each."""

    def __len__(self) -> int:
        return self._used

    def _locate(self, indices: Indices) -> tuple[Indices, Indices]:
        epochs, places = np.divmod(indices, self._used)
        samples = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            samples[here] = Permutation(self._used, repr((self.seed, self._content, epoch)))(places[here])
        if self._used < self._all:
            samples = self._subset(samples)
        return epochs, samples

    def read(self, indices: Indices, rows: Sequence[Row]) -> None:
        _, samples = self.locate(indices)
        for start, row in zip((samples * self.seq_len).tolist(), rows, strict=True):
            row[:] = read_tokens(self.corpus, start, start + self.seq_len + 1, self.vocab_size)

    def n_targets(self, indices: Indices) -> Indices:
        return np.full_like(indices, self.seq_len)


class SequentialSamples:
    """Evaluation samples: every token of the corpus is a target exactly once, in order.

    The stream is read as if an end-of-document token stood before it, so that the first token has a context, like the
    first token of every other document. The last sample is padded, and samples past the end are padding throughout, so
    that batches may be of any size.

    Raises:
        MegamupError: from `read`, a token outside the vocabulary.
    """

    def __init__(self, corpus: Corpus, seq_len: int, vocab_size: int) -> None:
        self.corpus, self.seq_len, self.vocab_size = corpus, seq_len, vocab_size
        self._eod = eod_of(corpus)
        check_vocabulary(corpus, vocab_size)

    def __len__(self) -> int:
        return math.ceil(self.corpus.n_tokens / self.seq_len)

    def read(self, indices: Indices, rows: Sequence[Row]) -> None:
        counts = self.n_targets(indices).tolist()
        for index, count, row in zip(indices.tolist(), counts, rows, strict=True):
            start = min(index * self.seq_len, self.corpus.n_tokens)
            tokens = read_tokens(self.corpus, max(start - 1, 0), start + count, self.vocab_size)
            first = 0 if start else 1
            row[:] = self._eod
            row[first : first + len(tokens)] = tokens

    def n_targets(self, indices: Indices) -> Indices:
        return np.clip(self.corpus.n_tokens - indices * self.seq_len, 0, self.seq_len)


def eod_of(corpus: Corpus) -> int:
    """The token that ends documents. A corpus without a manifest comes from Megatron, whose --append-eod ends it so."""
    if corpus.eod_id is not None:
        return corpus.eod_id
    return int(corpus.tokens(corpus.n_tokens - 1, corpus.n_tokens)[0])


def check_vocabulary(corpus: Corpus, vocab_size: int) -> None:
    """Find a corpus made for a larger vocabulary before training starts, where its manifest tells."""
    manifest = corpus.manifest
    if manifest and manifest.max_id >= vocab_size:
        raise MegamupError(
            f"corpus {corpus.prefix!r} holds token id {manifest.max_id:,}, outside model.vocab_size={vocab_size:,}; "
            f"its tokenizer {manifest.tokenizer.name!r} has {manifest.vocab_size:,}"
        )


def read_tokens(corpus: Corpus, start: int, stop: int, vocab_size: int) -> Ids:
    """`corpus.tokens(start, stop)`, each checked to be in the model's vocabulary.

    Raises:
        MegamupError: names corpus, position and id of the first that isn't.
    """
    tokens = corpus.tokens(start, stop)
    # Read as unsigned, negative ids are large ones: one pass finds both.
    if len(tokens) and tokens.view(f"u{tokens.itemsize}").max() >= vocab_size:
        place = int(np.argmax((tokens < 0) | (tokens >= vocab_size)))
        raise MegamupError(
            f"corpus {corpus.prefix!r}: token {start + place:,} has id {tokens[place]:,}, outside "
            f"model.vocab_size={vocab_size:,}; was the corpus made with another tokenizer?"
        )
    return tokens
