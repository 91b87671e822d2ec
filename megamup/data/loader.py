"""Batches as torch tensors: which samples a rank sees at a step, fetched one step ahead."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import torch

from megamup.data.blend import Blend, Chain
from megamup.data.collate import collate
from megamup.data.samples import PackedSamples, SampleSource, SequentialSamples
from megamup.data.shards import Shard
from megamup.errors import MegamupError


class TensorBatch(NamedTuple):
    tokens: torch.Tensor  # (batch, seq) int64
    targets: torch.Tensor  # (batch, seq) int64, the tokens one place on
    mask: torch.Tensor  # (batch, seq) float32, 1 where the target counts


class WeightedPrefix(Protocol):
    """An entry of the list form of `data.train`."""

    @property
    def prefix(self) -> str: ...

    @property
    def weight(self) -> float: ...


def open_sources(
    sources: str | Sequence[WeightedPrefix], *, seq_len: int, vocab_size: int, seed: int, shuffle: bool
) -> SampleSource:
    """The stream of samples that `data.train` (shuffle) or `data.valid` (no shuffle) names.

    Args:
        sources: a shard prefix, or several with weights: shares of the training samples.
        seq_len: targets of a sample.
        vocab_size: the model's.
        seed: of the order; not used without `shuffle`.
        shuffle: True for an endless blend of shuffled epochs; False for one pass in which every token of
            every shard is a target once.

    Raises:
        MegamupError: a shard is missing, broken, too short or of another vocabulary; weights that can't be
            met.
    """
    if isinstance(sources, str):
        prefixes, weights = [sources], [1.0]
    else:
        prefixes, weights = [source.prefix for source in sources], [source.weight for source in sources]
    if not prefixes:
        raise MegamupError("data.train, data.valid: the list of sources is empty; expected a shard prefix")
    shards = [Shard(prefix) for prefix in prefixes]
    if shuffle:
        # The position in the list, not the path: data may move between a run and its resumption.
        packed = [
            PackedSamples(shard, seq_len, seed, vocab_size, name=str(position)) for position, shard in enumerate(shards)
        ]
        return packed[0] if len(packed) == 1 else Blend(packed, weights)
    if len(set(weights)) > 1:
        raise MegamupError(
            f"data.valid: weights {weights}: every held-out token counts once, so all weights must be equal"
        )
    return Chain([SequentialSamples(shard, seq_len, vocab_size) for shard in shards])


class BatchStream:
    """The micro batches of one data rank, step by step.

    The global batch of step s is samples [s G, (s + 1) G) of the source, whatever the number of ranks and the
    size of micro batches. Data rank r takes the r-th of `data_size` equal parts, and splits it in order.

    Args:
        source: where samples come from.
        global_sequences: G, samples of a step over all ranks.
        micro_sequences: samples of one micro batch of one rank.
        data_rank: this rank's place on the data axis.
        data_size: length of the data axis.

    Raises:
        MegamupError: G isn't a multiple of micro_sequences * data_size.
    """

    def __init__(
        self,
        source: SampleSource,
        global_sequences: int,
        micro_sequences: int,
        data_rank: int = 0,
        data_size: int = 1,
    ) -> None:
        if global_sequences % (micro_sequences * data_size):
            raise MegamupError(
                f"batch.global_sequences={global_sequences} isn't a multiple of batch.micro_sequences="
                f"{micro_sequences} times {data_size} data ranks"
            )
        self.source = source
        self.global_sequences = global_sequences
        self.micro_sequences = micro_sequences
        self._rank_sequences = global_sequences // data_size
        self._rank_start = data_rank * self._rank_sequences
        self._thread: ThreadPoolExecutor | None = None  # started by the first call, so that forks before are safe
        self._ahead: tuple[int, Future[list[TensorBatch]]] | None = None

    def __len__(self) -> int:
        """Steps that see all of the source once; the last may hold padding (evaluation) or the next epoch."""
        return math.ceil(len(self.source) / self.global_sequences)

    def micro_batches(self, step: int) -> list[TensorBatch]:
        """This rank's micro batches of step `step` >= 0: a pure function of the step.

        While the caller computes, a thread reads the next step.

        Raises:
            MegamupError: a token outside the vocabulary.
        """
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="megamup-data")
        ahead, self._ahead = self._ahead, None
        batches = ahead[1].result() if ahead and ahead[0] == step else self._read(step)
        self._ahead = (step + 1, self._thread.submit(self._read, step + 1))
        return batches

    def _read(self, step: int) -> list[TensorBatch]:
        first = step * self.global_sequences + self._rank_start
        batches = []
        for start in range(first, first + self._rank_sequences, self.micro_sequences):
            batch = collate(self.source, range(start, start + self.micro_sequences))
            batches.append(TensorBatch(*map(torch.from_numpy, batch)))
        return batches
