"""Initial weights as a function of (seed, global parameter name) alone: the same bits in every layout.

A tensor is drawn in fixed slices along its partition dim, each from its own counter-based generator; a rank draws
the slices that its shard touches and never the whole. NumPy's Philox and ziggurat are the same on every machine,
which torch's vectorized CPU normals are not.
"""

from __future__ import annotations

import hashlib
import itertools
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megamup.parallel.mesh import ALONE, Axis
from megamup.parameters import Parameter
from megamup.scales import Scales

SLICES = 64
"""Slices of a tensor along its partition dim; more would cost time, fewer would be drawn in vain at the edges."""


class Source(Protocol):
    """Where initial weights come from that aren't drawn."""

    def shard(self, parameter: Parameter, axis: Axis) -> Tensor:
        """As `initial_shard`."""


def generator(seed: int, name: str, slice_index: int) -> np.random.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}/{slice_index}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def shard_bounds(parameter: Parameter, axis: Axis) -> tuple[int, int]:
    """Rows ``[start, stop)`` along the partition dim that this rank of the axis holds."""
    size = parameter.shape[parameter.partition_dim or 0]
    if parameter.partition_dim is None:
        return 0, size
    return axis.rank * size // axis.size, (axis.rank + 1) * size // axis.size


def own_experts(parameter: Parameter, experts: Axis) -> slice:
    """Of a parameter's first dim what this rank of the axis holds: all but where it is experts'."""
    if not parameter.of_experts:
        return slice(0, parameter.shape[0])
    each = parameter.shape[0] // experts.size
    return slice(experts.rank * each, (experts.rank + 1) * each)


def initial_shard(parameter: Parameter, scales: Scales, seed: int, axis: Axis, experts: Axis = ALONE) -> Tensor:
    """This rank's shard of a parameter's initial value, fp32; logical shape but for the partition dim, and for the
    first where that is experts'."""
    dim = parameter.partition_dim or 0
    start, stop = shard_bounds(parameter, axis)
    shape = [*parameter.shape]
    shape[dim] = stop - start
    own = own_experts(parameter, experts)
    if parameter.of_experts:
        shape[0] = own.stop - own.start
    if scales.init_std == 0.0:
        return torch.full(shape, scales.init_mean)
    total = parameter.shape[dim]
    edges = [total * i // min(SLICES, total) for i in range(min(SLICES, total) + 1)]
    pieces = []
    for index, (low, high) in enumerate(itertools.pairwise(edges)):
        if high <= start or low >= stop:
            continue
        draw = generator(seed, parameter.name, index)
        rest = parameter.shape[:dim] + parameter.shape[dim + 1 :]
        slab = draw.standard_normal((high - low, *rest), dtype=np.float32)  # (rows of the slice, rest)
        rows = slab[max(start - low, 0) : stop - low]
        pieces.append(rows[:, own].copy() if parameter.of_experts else rows)
    values = np.moveaxis(np.concatenate(pieces), 0, dim) * np.float32(scales.init_std)
    return torch.from_numpy(np.ascontiguousarray(values))
