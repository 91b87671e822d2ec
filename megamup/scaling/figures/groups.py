"""Points in groups of like inputs: a law of several inputs is drawn as one line for each group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megamup.scaling.laws import FloatArray

MOST = 8
"""Lines that a figure can hold, and shades that the eye tells apart."""
LIKE = 1.1
"""Values within 10% are one."""


@dataclass(frozen=True)
class Group:
    """Points whose inputs, but for the one on the axis, are alike."""

    rows: NDArray[np.int64]
    """Which points."""
    at: dict[str, float]
    """Geometric mean of each of these inputs."""

    @property
    def label(self) -> str:
        """The inputs in words; empty without any."""
        return ", ".join(f"{key} = {value:.3g}" for key, value in self.at.items())


def groups_of(keys: Sequence[str], columns: FloatArray) -> list[Group]:
    """At most `MOST` groups of points by their inputs `columns` (n, k), ordered by them.

    Where more are different, they are cut into stretches of equal length in the log of the first input that varies.
    """
    index = np.stack([_clusters(column) for column in columns.T], axis=-1) if keys else np.zeros((len(columns), 1))
    _, group = np.unique(index, axis=0, return_inverse=True)
    group = group.reshape(-1)
    if group.max() >= MOST:
        first = int(np.argmax(np.ptp(np.log(columns), axis=0) > np.log(LIKE)))
        logs = np.log(columns[:, first])
        edges = np.linspace(logs.min(), logs.max(), MOST + 1)[1:-1]
        group = np.digitize(logs, edges)
    found = []
    for one in np.unique(group):
        rows = np.flatnonzero(group == one)
        means = np.exp(np.log(columns[rows]).mean(axis=0)) if keys else []
        found.append(Group(rows, dict(zip(keys, map(float, means), strict=True))))
    return found


def _clusters(values: FloatArray) -> NDArray[np.int64]:
    """Index (n,) of the cluster of each value > 0; a cluster ends where a value is 10% above its least."""
    order = np.argsort(values, kind="stable")
    index = np.zeros(len(values), np.int64)
    first, count = float(values[order[0]]), 0
    for row in order:
        if values[row] > LIKE * first:
            first, count = float(values[row]), count + 1
        index[row] = count
    return index
