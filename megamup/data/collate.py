"""Samples to batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from megamup.data.objectives import Causal, Objective
from megamup.data.objectives.base import Window
from megamup.data.permutation import Indices
from megamup.data.samples import SampleSource

PART = 1 << 15
"""Tokens that are worked on at once where that takes arrays besides the window: what a core's cache holds."""


class Batch(NamedTuple):
    window: Window  # (batch, width) all that the model and its loss read of each sample
    columns: Mapping[str, slice]  # what is where; see `Objective`
    n_targets: Indices  # (batch,) how many targets of each row count; the others are below 0


def collate(
    source: SampleSource, indices: Indices, window: Window | None = None, objective: Objective | None = None
) -> Batch:
    """The samples at `indices` of `source`, in that order, as one batch.

    Args:
        source: where they come from.
        indices: shape (batch,).
        window: where they go, shape (batch, width); default a new array.
        objective: what becomes of them; default: the next token.
    """
    used = objective or Causal(source.seq_len)
    if window is None:
        window = np.empty((len(indices), used.width), np.int64)
    rows = max(len(indices) if isinstance(used, Causal) else PART // used.raw_len, 1)
    places = [slice(start, start + rows) for start in range(0, len(indices), rows)]
    counts = [used.fill(source, indices[place], window[place]) for place in places]
    return Batch(window, used.columns, np.concatenate([np.empty(0, np.int64), *counts]))
