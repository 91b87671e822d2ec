"""Batches as torch tensors: which samples a rank sees at a step, read some steps ahead on a thread of their own."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from megamup.data.collate import Batch, collate
from megamup.data.objectives import Causal, Objective
from megamup.data.samples import SampleSource
from megamup.errors import MegamupError


@dataclass(frozen=True)
class TensorBatch:
    """One micro batch, in pinned memory where there is CUDA."""

    window: torch.Tensor
    """(batch, width) int64: inputs and targets in one piece, so that one copy moves them all to a device."""
    columns: Mapping[str, slice]
    """What is where; see `Objective`."""
    n_targets: int
    """How many targets count."""

    @property
    def complete(self) -> bool:
        """Whether all targets count; else the others are below 0."""
        return self.n_targets == self.targets.numel()

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """All but the targets, (batch, length) int64 each, by name: views, but where tokens share their place with
        targets that don't count (they are 0 there)."""
        found = {name: self.window[:, place] for name, place in self.columns.items() if name != "targets"}
        if not self.complete and self.columns["targets"].start < self.columns["tokens"].stop:
            found["tokens"] = found["tokens"].clamp(min=0)
        return found

    @property
    def tokens(self) -> torch.Tensor:
        """What the model reads first, (batch, seq) int64; see `inputs`."""
        return self.inputs["tokens"]

    @property
    def targets(self) -> torch.Tensor:
        """(batch, targets) int64, a view; below 0 where none counts."""
        return self.window[:, self.columns["targets"]]


class BatchStream:
    """The micro batches of one data rank, step by step, of the same shapes all of them.

    The global batch of step s is samples [s G, (s + 1) G) of the source, whatever the number of ranks and the size of
    micro batches. Data rank r takes the r-th of `data_size` equal parts, and splits it in order.

    Every step has memory of its own: a copy to a device that still runs finds its source untouched. (Pinned memory is
    handed out again by torch's allocator only after the copies out of it that it knows of.)

    Args:
        source: where samples come from.
        global_sequences: G, samples of a step over all ranks.
        micro_sequences: samples of one micro batch of one rank.
        data_rank: this rank's place on the data axis.
        data_size: length of the data axis.
        prefetch: steps that are read ahead, at least 1.
        objective: what becomes of samples, a function of their place in the source; default: the next token.

    Raises:
        MegamupError: G isn't a multiple of micro_sequences * data_size, or the source's samples aren't of the length
            that the objective takes.
    """

    def __init__(
        self,
        source: SampleSource,
        global_sequences: int,
        micro_sequences: int,
        data_rank: int = 0,
        data_size: int = 1,
        prefetch: int = 2,
        objective: Objective | None = None,
    ) -> None:
        if global_sequences % (micro_sequences * data_size):
            raise MegamupError(
                f"batch.global_sequences={global_sequences} isn't a multiple of batch.micro_sequences="
                f"{micro_sequences} times {data_size} data ranks"
            )
        used = objective or Causal(source.seq_len)
        if used.raw_len != source.seq_len:
            raise MegamupError(f"samples of {source.seq_len} tokens, where the objective takes {used.raw_len}")
        self.source = source
        self.global_sequences = global_sequences
        self._prefetch = prefetch
        sequences = global_sequences // data_size
        self._read = partial(
            read_step, source, used, global_sequences, data_rank * sequences, sequences, micro_sequences
        )
        self._thread: ThreadPoolExecutor | None = None  # started by the first call, so that forks before are safe
        self._ahead: deque[tuple[int, Future[list[TensorBatch]]]] = deque()

    def __len__(self) -> int:
        """Steps that see all of the source once; the last may hold padding (evaluation) or the next epoch."""
        return math.ceil(len(self.source) / self.global_sequences)

    def micro_batches(self, step: int) -> list[TensorBatch]:
        """This rank's micro batches of step `step` >= 0: a pure function of the step.

        While the caller computes, a thread reads the steps that follow.

        Raises:
            MegamupError: a token outside the vocabulary.
        """
        self._thread = self._thread or start_thread()
        if not self._ahead or self._ahead[0][0] != step:  # the first call, or one out of order
            for _, future in self._ahead:
                future.cancel()
            self._ahead.clear()
        for place in range(step + len(self._ahead), step + self._prefetch + 1):
            self._ahead.append((place, self._thread.submit(self._read, place)))
        return self._ahead.popleft()[1].result()


def start_thread() -> ThreadPoolExecutor:
    """One thread, which ends when the executor is dropped, and at the interpreter's exit.

    It works on the caller's device: pinning memory would else make a CUDA context on the first one for every rank.
    """
    prepare: Callable[[], None] | None = None
    if torch.cuda.is_available():
        prepare = partial(torch.cuda.set_device, torch.cuda.current_device())
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="megamup-data", initializer=prepare)


def read_step(
    source: SampleSource,
    objective: Objective,
    stride: int,
    offset: int,
    sequences: int,
    micro_sequences: int,
    step: int,
) -> list[TensorBatch]:
    """The `sequences` samples from step * stride + offset on, as micro batches.

    No method of `BatchStream`: a stream that is dropped while it reads ahead is then gone, and its thread with it.
    """
    window = torch.empty((sequences, objective.width), dtype=torch.int64, pin_memory=torch.cuda.is_available())
    indices = np.arange(sequences) + (step * stride + offset)
    batch = collate(source, indices, window.numpy(), objective)
    return [tensor_batch(batch, window, slice(i, i + micro_sequences)) for i in range(0, sequences, micro_sequences)]


def tensor_batch(batch: Batch, window: torch.Tensor, rows: slice) -> TensorBatch:
    """Rows of a step's batch; `window` shares the batch's memory."""
    return TensorBatch(window[rows], batch.columns, int(batch.n_targets[rows].sum()))
