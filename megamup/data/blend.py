"""Several sources as one: blended by weight for training, one after the other for evaluation."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from megamup.data.permutation import InBlocks, Indices
from megamup.data.samples import Row, SampleSource
from megamup.errors import MegamupError


class Node(NamedTuple):
    """One source (a leaf), or two nodes that share a stream by their weights."""

    weight: int
    source: int = -1
    children: tuple[Node, Node] | None = None


def exact_weights(weights: Sequence[float]) -> list[int]:
    """Integers in the proportions of `weights`, as the decimals that they were written as (0.1 is a tenth).

    Raises:
        MegamupError: a weight isn't positive and finite.
    """
    for position, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight > 0):
            raise MegamupError(f"weight {weight} of source {position}: expected a positive number")
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    return [int(weight * scale) for weight in exact]


def huffman_tree(weights: Sequence[int]) -> Node:
    """The two lightest nodes become one, until one is left; the earlier among equals."""
    heap = [(weight, source, Node(weight, source)) for source, weight in enumerate(weights)]
    heapq.heapify(heap)
    for order in range(len(weights), 2 * len(weights) - 1):
        (light, _, left), (heavy, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (light + heavy, order, Node(light + heavy, children=(left, right))))
    return heap[0][2]


def share(counts: Indices, part: int, whole: int) -> Indices:
    """counts * part / whole to the nearest integer, halves up: exact, with integers of any size inside."""
    return ((counts.astype(object) * (2 * part) + whole) // (2 * whole)).astype(np.int64)


class Blend:
    """A stream of samples from several sources, in the proportions of their weights.

    Of the first p samples, source i has w_i p up to 1.68 (w_i its share of the weights), for every p: no period, no
    smallest weight. Position p is a pure O(1) function of p: no state, the same on every rank and after a restart.

    How: the sources are the leaves of a Huffman tree. Of the q samples that reach a node, its left child has q w_left/w
    to the nearest integer, the right one the others. So a child's count is off by 1/2 at most, plus its parent's error
    times w_child/w_parent; for a leaf of weight w_0 under nodes of w_1, w_2, ... that makes (1 + w_0/w_1 + w_0/w_2 +
    ...)/2. In a Huffman tree w_(k+2) >= w_(k+1) + w_k, since the sibling of node k+1 was not lighter than node k when
    that was taken: the weights grow like Fibonacci's numbers, and the sum of their reciprocals, 1 + 1 + 1/2 + 1/3 + 1/5
    + ..., is 3.36.

    Raises:
        MegamupError: see `exact_weights`.
    """

    def __init__(self, sources: Sequence[SampleSource], weights: Sequence[float]) -> None:
        self.sources = list(sources)
        self.seq_len = sources[0].seq_len
        self._tree = huffman_tree(exact_weights(weights))
        self.locate = InBlocks(self._locate)
        """(source, index in that source) at each of some positions of the stream. Shape (positions,) each."""

    def __len__(self) -> int:
        """Samples of all sources together."""
        return sum(map(len, self.sources))

    def _locate(self, positions: Indices) -> tuple[Indices, Indices]:
        which, indices = np.empty_like(positions), np.empty_like(positions)

        def descend(node: Node, rows: Indices, counts: Indices) -> None:
            """`counts`: how many samples reached the node before each of those at `rows`, which reach it."""
            if node.children is None:
                which[rows], indices[rows] = node.source, counts
            elif len(rows):
                left, right = node.children
                before = share(counts, left.weight, node.weight)
                goes_left = share(counts + 1, left.weight, node.weight) > before
                descend(left, rows[goes_left], before[goes_left])
                descend(right, rows[~goes_left], (counts - before)[~goes_left])

        descend(self._tree, np.arange(len(positions)), positions)
        return which, indices

    def consumed(self, n_samples: int) -> list[int]:
        """How many of the first `n_samples` of the stream are of each source."""
        counts = [0] * len(self.sources)

        def descend(node: Node, count: int) -> None:
            if node.children is None:
                counts[node.source] = count
            else:
                left, right = node.children
                taken = int(share(np.array([count]), left.weight, node.weight)[0])
                descend(left, taken)
                descend(right, count - taken)

        descend(self._tree, n_samples)
        return counts

    def read(self, indices: Indices, rows: Sequence[Row]) -> None:
        read_from(self.sources, *self.locate(indices), rows)

    def n_targets(self, indices: Indices) -> Indices:
        return np.full_like(indices, self.seq_len)  # samples to train on are whole


class Chain:
    """Sources one after the other, each once; past the end comes the last source's padding."""

    def __init__(self, sources: Sequence[SampleSource]) -> None:
        self.sources = list(sources)
        self.seq_len = sources[0].seq_len
        self._starts = np.array(list(accumulate(map(len, sources), initial=0)))  # (sources + 1,)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def locate(self, positions: Indices) -> tuple[Indices, Indices]:
        """(source, index in that source) at each of `positions`. Shape (positions,) each."""
        which = np.searchsorted(self._starts[1:-1], positions, side="right")
        return which, positions - self._starts[which]

    def read(self, indices: Indices, rows: Sequence[Row]) -> None:
        read_from(self.sources, *self.locate(indices), rows)

    def n_targets(self, indices: Indices) -> Indices:
        return targets_of(self.sources, *self.locate(indices))


def read_from(sources: Sequence[SampleSource], which: Indices, indices: Indices, rows: Sequence[Row]) -> None:
    """Write sample `indices[i]` of source `which[i]` into `rows[i]`."""
    for source in np.unique(which).tolist():
        places = np.flatnonzero(which == source)
        sources[source].read(indices[places], [rows[place] for place in places.tolist()])


def targets_of(sources: Sequence[SampleSource], which: Indices, indices: Indices) -> Indices:
    """`n_targets` of sample `indices[i]` of source `which[i]`."""
    counts = np.empty_like(indices)
    for source in np.unique(which).tolist():
        here = which == source
        counts[here] = sources[source].n_targets(indices[here])
    return counts
