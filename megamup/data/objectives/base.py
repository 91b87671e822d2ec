"""What every objective is: a collator over samples of token shards, with fixed shapes."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megamup.data.permutation import Indices
from megamup.data.samples import SampleSource

Window = npt.NDArray[np.int64]
"""Shape (batch, width): what a step reads of some samples, in one piece."""
Flags = npt.NDArray[np.bool_]
NOT_COUNTED = -1
"""A target that doesn't count."""


class Objective(Protocol):
    """What becomes of a sample's text: a pure function of (key, index of the sample), into fixed columns.

    Columns, each (batch, length): ``tokens``, what the model reads; ``targets``, below 0 where none counts; and where
    there are any ``documents``, the document of each of the tokens, by number from the window's start on;
    ``token_types``; ``pair`` (length 1), the label of two stretches; and of an encoder-decoder ``decoder_tokens`` and
    ``decoder_documents``.
    """

    @property
    def raw_len(self) -> int:
        """The `seq_len` of sources that it takes."""

    @property
    def width(self) -> int:
        """Of a window."""

    @property
    def columns(self) -> Mapping[str, slice]:
        """Where they are in a window; tokens and targets of a causal objective are the same but for one place."""

    def fill(self, source: SampleSource, indices: Indices, window: Window) -> Indices:
        """Write the samples at `indices` of `source` into `window`, one a row; returns how many targets of each count.

        Raises:
            MegamupError: a token outside the vocabulary.
        """


def in_a_row(**lengths: int) -> dict[str, slice]:
    """Columns one after the other, of those lengths; those of length 0 aren't there."""
    ends = list(accumulate(lengths.values(), initial=0))
    return {name: slice(*place) for name, place in zip(lengths, pairwise(ends), strict=True) if lengths[name]}


def width_of(columns: Mapping[str, slice]) -> int:
    return max(int(place.stop) for place in columns.values())


def read_text(source: SampleSource, indices: Indices, padding: int = NOT_COUNTED) -> Window:
    """The targets of samples: each token of a corpus is in one of them. Shape (indices, seq_len).

    What is past the end of an evaluation's corpus is `padding`.
    """
    rows = np.empty((len(indices), source.seq_len + 1), np.int64)
    source.read(indices, list(rows))
    text: Window = rows[:, 1:]
    counts = source.n_targets(indices)
    if counts.min(initial=source.seq_len) < source.seq_len:
        text[np.arange(source.seq_len) >= counts[:, None]] = padding
    return text


def documents_of(tokens: Window, eod_id: int) -> Window:
    """How many end-of-document tokens stand before each; one belongs to the document that it ends. Shape of tokens."""
    ends = tokens == eod_id
    return np.asarray(np.cumsum(ends, axis=1, dtype=np.int64) - ends)


def count(targets: Window) -> Indices:
    """Targets that count in each row. Shape (batch,)."""
    return np.asarray(np.count_nonzero(targets >= 0, axis=1), np.int64)
