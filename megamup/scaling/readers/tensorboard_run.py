"""TensorBoard's event files: scalars by step."""

from __future__ import annotations

from pathlib import Path

from megamup.errors import MegamupError
from megamup.scaling.readers.log import Record, RunLog, by_step

PATTERN = "*events.out.tfevents*"


def is_tensorboard(path: Path) -> bool:
    """Whether `path` is an event file, or a folder that has one directly in it."""
    return "events.out.tfevents" in path.name if path.is_file() else any(path.glob(PATTERN))


def read_tensorboard_run(name: str, path: Path) -> RunLog:
    """The scalars of one folder, or file, of events; single precision, as TensorBoard keeps them.

    Raises:
        MegamupError: the tensorboard package is missing, or there are no scalars.
    """
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from tensorboard.util import tensor_util
    except ImportError as error:
        raise MegamupError(f"{path}: reading it takes the tensorboard package; pip install 'megamup[log]'") from error
    # 0: keep all, where the default is a sample of them.
    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    tags = events.Tags()
    records: list[Record] = [
        {tag: event.value, "step": event.step} for tag in tags["scalars"] for event in events.Scalars(tag)
    ]
    for tag in tags["tensors"]:  # where TensorFlow 2 and its kin put scalars
        for event in events.Tensors(tag):
            array = tensor_util.make_ndarray(event.tensor_proto)
            if array.size == 1 and array.dtype.kind in "fiu":
                records.append({tag: float(array.reshape(-1)[0]), "step": event.step})
    if not records:
        raise MegamupError(f"{path}: holds no scalars; expected the loss of a run by step: leave it out")
    return RunLog(name, path, by_step(records))
