"""A study as its file says it, checked before anything runs."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from megamup.config import describe, merge, parse_override, read_yaml
from megamup.errors import MegamupError
from megamup.fields import NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section
from megamup.sweep.ladder import KINDS, AnyLadder

Scalar = str | int | float | bool | None
GridValue = Annotated[dict[str, Any], Field(min_length=1)] | Scalar | list[Any]
Axis = Annotated[tuple[GridValue, ...], Field(min_length=1)]

SAMPLERS = ("random", "qmc", "tpe", "gp")


class Range(Section):
    low: float
    high: float
    log: bool = False
    """Drawn evenly in the logarithm. Integers are drawn where the config key takes nothing else."""

    @model_validator(mode="after")
    def check_order(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"low={self.low:g} is not below high={self.high:g}; swap them, or give a list of values")
        if self.log and self.low <= 0:
            raise ValueError(f"low={self.low:g} has no logarithm; give a low above 0, or leave out log")
        return self


Dimension = Annotated[
    Annotated[Range, Tag("range")] | Annotated[Axis, Tag("choices")],
    Discriminator(lambda value: "range" if isinstance(value, dict | Range) else "choices"),
]
TAGS = ("range", "choices", *KINDS)


class Search(Section):
    sampler: str = "tpe"
    """``random``; ``qmc``: Sobol's sequence, which fills the space more evenly (Bousquet et al. 2017); ``tpe``: Parzen
    estimators of good and bad trials (Bergstra et al. 2011; Watanabe 2023); ``gp``: a Gaussian process. By Optuna."""
    trials: Positive
    """May be raised later: the study goes on with what is missing."""
    seed: NonNegative = 0
    """Trial i draws from (seed, i), whichever worker takes it."""
    space: dict[str, Dimension] = Field(min_length=1)
    """Axis -> ``{low, high, log}`` of a config key, or a list of values as in a grid."""

    @field_validator("sampler")
    @classmethod
    def check_sampler(cls, name: str) -> str:
        if name not in SAMPLERS:
            near = difflib.get_close_matches(name, SAMPLERS, n=1, cutoff=0)
            raise ValueError(f"{name!r} is no sampler ({', '.join(SAMPLERS)}); did you mean {near[0]}?")
        return name


class Prune(Section):
    """A run is stopped whose logged training loss says for ``patience`` logged steps in a row, after warm-up, that it
    won't come back: above ``uniform`` times what guessing all tokens alike costs, ln(vocab_size), or more than ``rise``
    nats above its own lowest value."""

    uniform: Annotated[float, Field(ge=1)] = 1.1
    rise: PositiveFloat = 1.0
    patience: Positive = 5


class Stability(Section):
    """Which trials are stable, and how much an unstable one must win by to be the best (megamup/sweep/stability.py)."""

    max_spikes: NonNegativeFloat = 0.01
    """Largest share of logged losses, and of gradient norms, that may be spikes."""
    tolerance: NonNegativeFloat = 0.01
    """An unstable trial is the best only if its metric is lower by more than this share of the best stable one's."""


class Promote(Section):
    """A second stage: the best trials again in another config, usually an intermediate width."""

    top: Positive
    overrides: dict[str, Any] = Field(default={})
    """Config keys of the second stage, over what the trial sets; best.yaml leaves them out."""
    steps: Positive | None = None
    """``train.steps`` of the second stage; default as before."""

    @property
    def settings(self) -> dict[str, Any]:
        return self.overrides | ({} if self.steps is None else {"train.steps": self.steps})


class Curves(Section):
    """The study as a transfer experiment: loss against the learning rate, one U-curve a size."""

    size: str
    """Config key (or ``batch_tokens``, ``tokens``) whose growth the rate is to survive."""
    group: str
    """Config key whose values are drawn side by side."""
    rate: str = "optim.lr"
    axis: str | None = None
    """What to call the sizes; default: the last part of ``size``."""


class Study(Section):
    name: str
    """Folder of the trials, below ``run.dir``."""
    configs: tuple[str, ...]
    """Run configs, merged left to right; paths as the command sees them."""
    overrides: dict[str, Any] = Field(default={})
    """Config keys that all trials share (the base width, say); they are no finding, so best.yaml leaves them out."""
    grid: dict[str, Axis] = Field(default={})
    """Axis -> values. An axis is a config key, or any name whose values are ``{key: value, ...}`` set together."""
    search: Search | None = None
    """Instead of a grid: trials that a sampler draws."""
    ladder: AnyLadder | None = None
    """Runs for a scaling law, sized from a budget (megamup/sweep/ladder.py); with a ``grid``, each at every point."""
    tune: dict[str, Axis] = Field(default={})
    """Axis -> values: a grid at the ladder's smallest model first, whose best all its runs take (Yao et al. 2023)."""
    metric: str = "valid_loss"
    """Key of metrics.jsonl whose last value is minimised."""
    ranks: Positive = 1
    """Ranks of a trial."""
    jobs: Positive | None = None
    """Trials at once; default: as many as fit the cores at one rank each (one, with a GPU)."""
    launch: str | None = None
    """Launcher command of a trial, such as ``deepspeed --num_gpus 8``; default: forked ranks on this host."""
    prune: Prune | None = Prune()
    """When a diverging run is stopped; null: never, short of an infinite loss."""
    stability: Stability = Stability()
    promote: Promote | None = None
    curves: Curves | None = None
    """Write curves.json, .png and .html, and print how far the best rate moves."""
    lease_s: PositiveFloat = 120
    """Seconds after which a trial whose worker on another host gave no sign of life is another worker's."""

    @model_validator(mode="after")
    def check_one_kind(self) -> Study:
        if self.ladder is None and bool(self.grid) == (self.search is not None):
            found = "both" if self.grid else "neither"
            raise ValueError(f"grid, search: found {found}; give `grid` (axis: values) or `search` (sampler, space)")
        if self.ladder is not None and (self.search or self.promote or self.curves):
            raise ValueError("ladder: goes with grid and tune alone; leave out search, promote and curves")
        if self.tune and self.ladder is None:
            raise ValueError("tune: is a ladder's first step; give `ladder`, or call it `grid`")
        return self


def load_study(path: Path, overrides: Sequence[str] = (), budget: float | None = None) -> tuple[Study, dict[str, Any]]:
    """Read a study file and its run configs; overrides go on top of these, ``budget`` in place of the ladder's.

    Raises:
        MegamupError: a wrong key or value, one line each.
    """
    values = read_yaml(path)
    if budget is not None:
        if not isinstance(values.get("ladder"), dict):
            raise MegamupError(f"--budget: {path} has no ladder, whose budget it would be; leave it out")
        values["ladder"]["budget"] = budget
    try:
        study = Study.model_validate(values)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            place = tuple(part for part in problem["loc"] if part not in TAGS)
            lines.append(f"{path}: {describe({**problem, 'loc': place})}")
        raise MegamupError("\n".join(lines)) from None
    merged: dict[str, Any] = {}
    for file in study.configs:
        merge(merged, read_yaml(Path(file)))
    for override in [*(f"{key}={json.dumps(value)}" for key, value in study.overrides.items()), *overrides]:
        merge(merged, parse_override(override))
    return study, merged
