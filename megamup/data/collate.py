"""Samples to batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megamup.data.samples import SampleSource


class Batch(NamedTuple):
    tokens: npt.NDArray[np.int64]  # (batch, seq)
    targets: npt.NDArray[np.int64]  # (batch, seq) the tokens one place on
    mask: npt.NDArray[np.float32]  # (batch, seq) 1 where the target counts, 0 on padding


def collate(source: SampleSource, indices: Sequence[int]) -> Batch:
    """The samples at `indices` of `source`, in that order, as one batch."""
    samples = np.stack([source.sample(index) for index in indices])  # (batch, seq + 1)
    n_targets = np.array([source.n_targets(index) for index in indices])  # (batch,)
    mask = np.arange(source.seq_len) < n_targets[:, None]  # (batch, seq)
    return Batch(samples[:, :-1].astype(np.int64), samples[:, 1:].astype(np.int64), mask.astype(np.float32))
