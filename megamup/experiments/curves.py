"""A study's trials as a transfer experiment: which config key is the size, and which tells the groups apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megamup.config import Config
from megamup.errors import MegamupError
from megamup.experiments.transfer import Point, Transfer, analyse
from megamup.sweep.study import Curves
from megamup.sweep.trial import Trial


def transfer_of(curves: Curves, planned: Sequence[Trial], metric: str) -> Transfer:
    """Read the finished trials of a study; several seeds of a point are averaged.

    Raises:
        MegamupError: a key is no key of a run's config, or its value is no number.
    """
    points = [point_of(curves, trial.config, trial.value(metric)) for trial in planned]
    return analyse(points, curves.axis or curves.size.rsplit(".", 1)[-1])


def point_of(curves: Curves, config: Config, loss: float) -> Point:
    return Point(
        group=str(value_of(config, curves.group)),
        size=number_of(config, curves.size),
        rate=number_of(config, curves.rate),
        loss=loss,
        seed=config.run.seed,
    )


def value_of(config: Config, key: str) -> Any:
    """The value of a dotted key, or of a property such as ``batch_tokens``."""
    found: Any = config
    for part in key.split("."):
        if not hasattr(found, part):
            raise MegamupError(f"curves: {key}: no key of a run's config, such as model.d_model or batch_tokens")
        found = getattr(found, part)
    return found


def number_of(config: Config, key: str) -> float:
    value = value_of(config, key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MegamupError(f"curves: {key}={value!r}: expected a number, to be compared in doublings")
    return float(value)
