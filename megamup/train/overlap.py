"""Gradients averaged over the replicas while the backward pass goes on, where DeepSpeed would only begin after it.

At ZeRO 1-3 DeepSpeed does so itself (``overlap_comm``; not at ZeRO 1 in bf16, and not under a pipeline). At ZeRO 0 its
engine reduces after the backward pass; this takes its place: buckets in the order in which gradients come, reduced by
the group's own thread or stream (Li et al. 2020, PyTorch Distributed, section 3.2.3).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from megamup.parallel.mesh import Axis

BUCKET = 25_000_000
"""Elements: 100 MB in fp32, enough to fill a network, and few enough that the last one, which nothing hides, is soon
done."""
IN_FLIGHT = 2
"""Buckets that are copied and on their way at a time."""


@dataclass(eq=False)
class Bucket:
    shards: list[nn.Parameter]
    missing: int = 0
    """Gradients that this backward pass hasn't computed yet."""


@dataclass(frozen=True)
class Started:
    work: dist.Work
    flat: Tensor
    grads: list[Tensor]


class OverlappedReduction:
    """``with reduction.during(last): ...backward...``: afterwards gradients are the replicas' means, if ``last``."""

    def __init__(
        self,
        shards: Iterable[nn.Parameter],
        axis: Axis,
        dtype: torch.dtype = torch.float32,
        elements: int = BUCKET,
        share: float | None = None,
    ) -> None:
        """
        Args:
            shards: this rank's parameters, in the order of the forward pass; the same on each rank of ``axis``.
            axis: the replicas.
            dtype: what is sent.
            elements: of a bucket, at most, where it holds several parameters.
            share: what each rank's gradients count for; default 1/ranks, which gives their means.
        """
        self.axis, self.dtype = axis, dtype
        self.share = 1 / axis.size if share is None else share
        self.buckets = buckets(reversed(list(shards)), elements)
        self.started: list[Started] = []
        self.next: int | None = None
        """The bucket that is to be sent next, in the same order on every rank; None outside a last backward pass."""
        for bucket in self.buckets:
            for shard in bucket.shards:
                shard.register_post_accumulate_grad_hook(lambda _, bucket=bucket: self.ready(bucket))

    @contextlib.contextmanager
    def during(self, last: bool) -> Iterator[None]:
        """Reduce during the backward pass inside, of the step's last micro batch: gradients are complete there."""
        if not last:
            yield
            return
        if self.axis.group is None:
            yield
            self.scale_alone()
            return
        for bucket in self.buckets:
            bucket.missing = len(bucket.shards)
        self.next = 0
        try:
            yield
            for bucket in self.buckets[self.next :]:  # with a parameter that took no part
                self.start(bucket)
        finally:
            self.next = None
        while self.started:
            self.finish()

    def ready(self, bucket: Bucket) -> None:
        """A gradient of the bucket has its last contribution."""
        if self.next is None:
            return
        bucket.missing -= 1
        while self.next < len(self.buckets) and self.buckets[self.next].missing == 0:
            self.start(self.buckets[self.next])
            self.next += 1

    def start(self, bucket: Bucket) -> None:
        grads = [shard.grad for shard in bucket.shards if shard.grad is not None]
        if not grads:
            return
        alone = len(grads) == 1 and grads[0].dtype == self.dtype and grads[0].is_contiguous()
        flat = grads[0] if alone else _flatten_dense_tensors(grads).to(self.dtype)
        flat.mul_(self.share)
        work = dist.all_reduce(flat, group=self.axis.group, async_op=True)
        assert work is not None
        self.started.append(Started(work, flat, [] if alone else grads))
        if len(self.started) > IN_FLIGHT:
            self.finish()

    def scale_alone(self) -> None:
        """On an axis of one rank there is nothing to send."""
        grads = [shard.grad for bucket in self.buckets for shard in bucket.shards if shard.grad is not None]
        if self.share != 1 and grads:
            torch._foreach_mul_(grads, self.share)

    def finish(self) -> None:
        """Wait for the oldest (on a GPU: have the stream wait) and hand the means out."""
        oldest = self.started.pop(0)
        oldest.work.wait()
        if oldest.grads:
            torch._foreach_copy_(oldest.grads, list(_unflatten_dense_tensors(oldest.flat, oldest.grads)))


def buckets(shards: Iterable[nn.Parameter], elements: int) -> list[Bucket]:
    """In order, together as long as they have at most ``elements``; all of a bucket have one dtype."""
    found: list[Bucket] = []
    size = 0
    for shard in shards:
        fits = found and size + shard.numel() <= elements and found[-1].shards[0].dtype == shard.dtype
        if not fits:
            found.append(Bucket([]))
            size = 0
        found[-1].shards.append(shard)
        size += shard.numel()
    return found
