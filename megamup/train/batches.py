"""What a rank reads of a run's data: the micro batches of training, and of each held-out set."""

from __future__ import annotations

from dataclasses import dataclass

from torch.profiler import record_function

from megamup.config import Config, micro_batches
from megamup.data.loader import BatchStream, TensorBatch
from megamup.data.mixture import RunData, ValidData, ValidSet
from megamup.data.objectives import Objective
from megamup.data.samples import SampleSource
from megamup.errors import MegamupError, OneRankError
from megamup.train.trace import DATA


@dataclass(frozen=True)
class HeldOut:
    """A held-out set, as batches."""

    data: ValidSet
    batches: BatchStream


def read(data: BatchStream, step: int) -> list[TensorBatch]:
    """This rank's micro batches. Raises OneRankError where they hold a token that the model doesn't have."""
    try:
        with record_function(DATA):
            return data.micro_batches(step)
    except MegamupError as error:
        raise OneRankError(str(error)) from error


def training_batches(data: RunData, config: Config, data_rank: int, world_size: int) -> BatchStream:
    """The stream of a data rank's training batches."""
    return batch_stream(data.train.stream, data.objective, config, data_rank, world_size)


def held_out_batches(
    data: ValidData, objective: Objective, config: Config, data_rank: int, world_size: int
) -> list[HeldOut]:
    """A data rank's streams of held-out batches, one a set."""
    return [HeldOut(each, batch_stream(each.stream, objective, config, data_rank, world_size)) for each in data.sets]


def batch_stream(
    source: SampleSource, objective: Objective, config: Config, data_rank: int, world_size: int
) -> BatchStream:
    micro, _ = micro_batches(config, world_size)
    sequences, ahead = config.batch.global_sequences, config.data.prefetch
    data_size = config.parallel.data(world_size)
    return BatchStream(source, sequences, micro, data_rank, data_size, prefetch=ahead, objective=objective)
