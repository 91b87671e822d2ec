"""Seconds of a matrix product, of memory traffic and of a collective on a cluster's devices.

The constants here are all that the model has beside the data sheet's figures and the share of the peak in
configs/clusters/. They are the same for every device, model and layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megamup.cluster import Cluster
from megamup.errors import MegamupError
from megamup.plan.layout import Layout

OP_SECONDS = 5.7e-6
"""Added to every operation: launch, filling and draining. Fitted, with the share of the peak (0.776), to 43 products of
256 to 4096 rows on an H100 (XLA's matmul_interpolator_data.h, sm_90, bf16); 7% off, root mean square. That makes small
products less efficient than large ones."""
MEMORY_SHARE = 0.85
"""Of the memory's bandwidth that streaming operations reach (BabelStream on A100 and H100: 0.85 to 0.92)."""
RUNNING_SHARE = 0.86
"""Of the rates that products, attention and streaming reach alone, what they reach within a training step, where clocks
fall under the power limit and kernels wait for each other and the host: the geometric mean over MosaicML's runs of MPT
(llm-foundry, scripts/train/benchmarking) on 8 A100 with 3B parameters or more and at most 2048 positions, ten from 0.77
to 0.95. tests/plan/test_plan_published.py computes it; none of the runs that the model is held to there went in."""
LINK_SHARE = 0.8
"""Of a link's bandwidth that NCCL's large all-reduces reach (nccl-tests on 8 A100: 235 of 300 GB/s)."""
HOP_SECONDS = 5e-6
"""Latency of a message to another node, for each level of a tree."""
FLASH_SHARE = 0.75
"""Of what large products reach: FlashAttention, forward and backward, long sequences. Dao 2023: up to 73% of an A100's
peak forward and 63% backward; Shah et al. 2024: 75% of an H100's forward. Both are 0.75 of these devices' products."""
FLASH_HALF = 512
"""Positions at which it reaches half of that, as the mask's blocks are coarse (Dao 2023, figure 4, causal, by eye)."""


@dataclass(frozen=True)
class Rates:
    """What one device of a cluster does within a training step, at a layout's precision."""

    flops: float
    """FLOP/s of large products."""
    fast_flops: float
    """The same of the blocks' linear layers, which may be in 8-bit floats."""
    memory: float
    """Bytes/s of streaming operations."""
    node: float
    """Bytes/s to others of the node, as collectives reach it."""
    network: float
    """Bytes/s to other nodes, likewise."""
    devices_per_node: int
    op: float
    """Seconds of an operation, however small."""

    def product(self, m: int, n: int, k: int, element: int, batch: int = 1, fast: bool = False) -> float:
        """Seconds of ``batch`` products (m, k) x (k, n), by whichever of compute and memory takes longer."""
        compute = 2.0 * batch * m * n * k / (self.fast_flops if fast else self.flops)
        traffic = batch * element * (m * k + k * n + m * n) / self.memory
        return self.op + max(compute, traffic)

    def flash(self, flops: float, seq_len: int) -> float:
        """Seconds of a fused attention kernel that computes ``flops``."""
        return self.op + flops / (self.flops * FLASH_SHARE * seq_len / (seq_len + FLASH_HALF))

    def stream(self, size: float, ops: int = 1) -> float:
        """Seconds of ``ops`` operations that read and write ``size`` bytes in all."""
        return ops * self.op + size / self.memory

    def bandwidth(self, size: int, stride: int) -> float:
        """Bytes/s at which one rank of a ring takes part: ranks of a group of ``size``, ``stride`` apart.

        A ring that leaves the node does so once, through the adapters of all of the group's ranks there.
        """
        here = min(size, max(1, self.devices_per_node // stride))
        return self.node if here == size else min(self.node, here * self.network)

    def latency(self, size: int, stride: int) -> float:
        inside = stride * size <= self.devices_per_node
        return self.op + (0.0 if inside else math.ceil(math.log2(size)) * HOP_SECONDS)

    def gather(self, size_bytes: float, size: int, stride: int) -> float:
        """Seconds of an all-gather to, or reduce-scatter of, ``size_bytes`` on each rank (a ring: (n-1)/n of them)."""
        if size == 1:
            return 0.0
        return self.latency(size, stride) + size_bytes * (size - 1) / size / self.bandwidth(size, stride)

    def all_reduce(self, size_bytes: float, size: int, stride: int) -> float:
        """Seconds of an all-reduce: a reduce-scatter and an all-gather."""
        return 2 * self.gather(size_bytes, size, stride)

    def exchange(self, size_bytes: float, size: int, stride: int) -> float:
        """Seconds of an all-to-all of ``size_bytes`` on each rank, whose own adapter takes what goes to other nodes."""
        if size == 1:
            return 0.0
        here = min(size, max(1, self.devices_per_node // stride))
        inside, outside = size_bytes * (here - 1) / size, size_bytes * (size - here) / size
        return self.latency(size, stride) + max(inside / self.node, outside / self.network)

    def send(self, size_bytes: float, stride: int) -> float:
        """Seconds of a message to the rank ``stride`` further."""
        inside = stride < self.devices_per_node
        return self.op + (0.0 if inside else HOP_SECONDS) + size_bytes / (self.node if inside else self.network)


def rates_of(cluster: Cluster, layout: Layout) -> Rates:
    """Rates of a cluster's devices for a layout.

    Raises:
        MegamupError: a figure that the time rests on is missing.
    """
    peak = cluster.peak if layout.precision == "bf16" else known(cluster, "fp32_peak")
    flops = peak * known(cluster, "matmul") * RUNNING_SHARE
    fast = known(cluster, "fp8_peak") * known(cluster, "fp8_matmul") * RUNNING_SHARE if layout.fp8 else flops
    per_node = int(known(cluster, "devices_per_node")) if layout.ranks > 1 else 1
    return Rates(
        flops=flops,
        fast_flops=fast,
        memory=known(cluster, "memory_bandwidth") * MEMORY_SHARE * RUNNING_SHARE,
        node=known(cluster, "node_bandwidth") * LINK_SHARE if layout.ranks > 1 else math.inf,
        network=known(cluster, "network_bandwidth") * LINK_SHARE if layout.ranks > per_node else math.inf,
        devices_per_node=per_node,
        op=OP_SECONDS if cluster.op_seconds is None else cluster.op_seconds,
    )


def known(cluster: Cluster, key: str) -> float:
    value: float | None = getattr(cluster, key)
    if value is None:
        raise MegamupError(
            f"cluster.{key}: missing, and a step's time rests on it; add {key}=VALUE (configs/clusters/h100.yaml shows "
            "every key), or leave --cluster out"
        )
    return value
