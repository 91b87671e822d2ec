"""Samples to batches."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megamup.data.permutation import Indices
from megamup.data.samples import SampleSource


class Batch(NamedTuple):
    window: npt.NDArray[np.int64]  # (batch, seq + 1) inputs are all columns but the last, targets all but the first
    n_targets: Indices  # (batch,) how many targets of each row count, from its start; the others are padding


def collate(source: SampleSource, indices: Indices, window: npt.NDArray[np.int64] | None = None) -> Batch:
    """The samples at `indices` of `source`, in that order, as one batch.

    Args:
        source: where they come from.
        indices: shape (batch,).
        window: where they go, shape (batch, seq + 1); default a new array.
    """
    if window is None:
        window = np.empty((len(indices), source.seq_len + 1), np.int64)
    source.read(indices, list(window))
    return Batch(window, source.n_targets(indices))


def target_mask(n_targets: Indices, seq_len: int) -> npt.NDArray[np.bool_]:
    """True where a target counts. Shape (batch, seq)."""
    return np.arange(seq_len) < n_targets[:, None]
