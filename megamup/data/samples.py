"""Samples of fixed length out of a shard, and their order.

A shard is one stream of documents, each ended by the end-of-document token. Sample i of the packed form is
the seq_len + 1 tokens from position i * seq_len on: inputs are all but the last, targets all but the first,
so neighbouring samples share one token and no target is seen twice. The order is a pure function of (seed,
index): nothing is shuffled in memory, nothing is stored, any rank can compute any sample.
"""

from __future__ import annotations

import hashlib
import math
import struct
from functools import lru_cache
from typing import Protocol

import numpy as np

from megamup.data.shards import Shard
from megamup.data.tokenizer import Ids
from megamup.errors import MegamupError

FEISTEL_ROUNDS = 8  # even; more than a large n needs, so that few samples are shuffled well too
MASK_64 = (1 << 64) - 1


class SampleSource(Protocol):
    """Samples by index."""

    seq_len: int

    def __len__(self) -> int:
        """Samples in one pass over the data."""

    def sample(self, index: int) -> Ids:
        """Inputs and targets in one piece, for any index >= 0. Shape (seq_len + 1,)."""

    def n_targets(self, index: int) -> int:
        """How many targets of the sample count, from its start; the others are padding."""


class Permutation:
    """A pseudo-random bijection of range(n) that computes each value by itself: O(1) time and memory.

    The generalised Feistel cipher with cycle walking of Black and Rogaway, "Ciphers with Arbitrary Finite
    Domains" (CT-RSA 2002): indices are pairs (left, right) in a x b, with ab >= n as small as sqrt(n) allows.
    Each round adds a hash of one half to the other. A value that falls outside range(n) is permuted again
    until it is inside.
    """

    def __init__(self, n: int, key: str) -> None:
        self.n = n
        self._a = math.isqrt(n - 1) + 1
        self._b = math.ceil(n / self._a)
        digest = hashlib.blake2b(key.encode(), digest_size=8 * FEISTEL_ROUNDS).digest()
        self._keys = struct.unpack(f"<{FEISTEL_ROUNDS}Q", digest)

    def __call__(self, index: int) -> int:
        while True:
            index = self._encipher(index)
            if index < self.n:
                return index

    def _encipher(self, index: int) -> int:
        modulus, other = self._a, self._b
        right, left = divmod(index, modulus)
        for key in self._keys:
            left, right = right, (left + _mix(right ^ key)) % modulus
            modulus, other = other, modulus
        return right * self._a + left


def _mix(x: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every input bit changes every output bit."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK_64
    return x ^ (x >> 31)


@lru_cache(maxsize=256)
def _epoch_order(n: int, seed: int, name: str, epoch: int) -> Permutation:
    return Permutation(n, repr((seed, name, epoch)))


class PackedSamples:
    """Training samples: every epoch is a new permutation of the packed samples of one shard.

    The last tokens of the shard, fewer than seq_len, are in no sample.

    Args:
        shard: the tokens.
        seq_len: targets of a sample.
        seed: of the order.
        vocab_size: the model's; a token at or above it is an error.
        name: tells apart sources that share a seed, so that equal shards are not read in equal order.

    Raises:
        MegamupError: the shard has no whole sample; from `sample`, a token outside the vocabulary.
    """

    def __init__(self, shard: Shard, seq_len: int, seed: int, vocab_size: int, name: str = "") -> None:
        self.shard, self.seq_len, self.seed, self.vocab_size, self.name = (
            shard,
            seq_len,
            seed,
            vocab_size,
            name,
        )
        self._samples = (shard.n_tokens - 1) // seq_len
        if self._samples == 0:
            raise MegamupError(
                f"shard {shard.prefix!r} holds {shard.n_tokens:,} tokens; a sample of data.seq_len={seq_len} "
                f"needs {seq_len + 1:,}"
            )
        check_vocabulary(shard, vocab_size)

    def __len__(self) -> int:
        return self._samples

    def sample(self, index: int) -> Ids:
        epoch, place = divmod(index, self._samples)
        start = _epoch_order(self._samples, self.seed, self.name, epoch)(place) * self.seq_len
        return read_tokens(self.shard, start, start + self.seq_len + 1, self.vocab_size)

    def n_targets(self, index: int) -> int:
        return self.seq_len


class SequentialSamples:
    """Evaluation samples: every token of the shard is a target exactly once, in order.

    The stream is read as if an end-of-document token stood before it, so that the first token has a context,
    like the first token of every other document. The last sample is padded, and samples past the end are
    padding throughout, so that batches may be of any size.

    Raises:
        MegamupError: from `sample`, a token outside the vocabulary.
    """

    def __init__(self, shard: Shard, seq_len: int, vocab_size: int) -> None:
        self.shard, self.seq_len, self.vocab_size = shard, seq_len, vocab_size
        # A shard without a manifest comes from Megatron, whose --append-eod ends it with that token.
        last = int(shard.tokens(shard.n_tokens - 1, shard.n_tokens)[0])
        self._eod = shard.manifest.eod_id if shard.manifest else last
        check_vocabulary(shard, vocab_size)

    def __len__(self) -> int:
        return math.ceil(self.shard.n_tokens / self.seq_len)

    def sample(self, index: int) -> Ids:
        start = min(index * self.seq_len, self.shard.n_tokens)
        tokens = read_tokens(self.shard, max(start - 1, 0), start + self.n_targets(index), self.vocab_size)
        padded = np.full(self.seq_len + 1, self._eod, dtype=self.shard.dtype)
        first = 0 if start else 1
        padded[first : first + len(tokens)] = tokens
        return padded

    def n_targets(self, index: int) -> int:
        return min(max(self.shard.n_tokens - index * self.seq_len, 0), self.seq_len)


def check_vocabulary(shard: Shard, vocab_size: int) -> None:
    """Find a shard made for a larger vocabulary before training starts, where its manifest tells."""
    if shard.manifest and shard.manifest.max_id >= vocab_size:
        raise MegamupError(
            f"shard {shard.prefix!r} holds token id {shard.manifest.max_id:,}, outside model.vocab_size="
            f"{vocab_size:,}; its tokenizer {shard.manifest.tokenizer!r} has {shard.manifest.vocab_size:,}"
        )


def read_tokens(shard: Shard, start: int, stop: int, vocab_size: int) -> Ids:
    """`shard.tokens(start, stop)`, each checked to be in the model's vocabulary.

    Raises:
        MegamupError: names shard, position and id of the first that isn't.
    """
    tokens = shard.tokens(start, stop)
    # Read as unsigned, negative ids are large ones: one pass finds both.
    if len(tokens) and tokens.view(f"u{tokens.itemsize}").max() >= vocab_size:
        place = int(np.argmax((tokens < 0) | (tokens >= vocab_size)))
        raise MegamupError(
            f"shard {shard.prefix!r}: token {start + place:,} has id {tokens[place]:,}, outside "
            f"model.vocab_size={vocab_size:,}; was the shard made with another tokenizer?"
        )
    return tokens
