"""A trial: one ordinary run folder, and what it says."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamup.config import Config, config_from, merge, parse_override, read_yaml
from megamup.errors import MegamupError
from megamup.sweep.ladder import ScaleD
from megamup.sweep.sizing import Rung, rungs
from megamup.sweep.study import Study

Record = dict[str, Any]
SIZES = ("batch.global_sequences", "data.seq_len", "train.flops_convention", "parallel.tensor")
"""Config keys besides the model's that a ladder's size rests on."""


@dataclass(frozen=True)
class Trial:
    name: str
    overrides: dict[str, Any]
    config: Config

    @property
    def folder(self) -> Path:
        return self.config.run.folder

    def records(self) -> list[Record]:
        """What metrics.jsonl says so far."""
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            return []
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]

    def diverged(self) -> bool:
        return (self.folder / "diverged.json").is_file()

    def finished(self) -> bool:
        """The run is complete, and was run with this very config."""
        if self.diverged():
            return self.same_config()
        records = self.records()
        return bool(records) and records[-1]["step"] == self.config.train.steps and self.same_config()

    def same_config(self) -> bool:
        path = self.folder / "config.yaml"
        return path.is_file() and config_from(read_yaml(path)) == self.config

    def value(self, metric: str) -> float:
        """The last value of the metric; infinite where the run diverged."""
        if self.diverged():
            return math.inf
        found = [record[metric] for record in self.records() if metric in record]
        if not found:
            known = sorted({key for record in self.records() for key in record})
            raise MegamupError(f"metric={metric}: not in {self.folder / 'metrics.jsonl'}, which has {', '.join(known)}")
        return math.inf if math.isnan(found[-1]) else float(found[-1])


def trials(study: Study, base: dict[str, Any]) -> list[Trial]:
    """Every run of the ladder at every point of the grid as a checked config, in the order of the file.

    Raises:
        MegamupError: a point is no valid config, or the ladder's budget is too small; all before any is run.
    """
    found = []
    for rung in study_rungs(study, base):
        for name, overrides in grid_points(study.grid):
            both = [part for part in (rung.name, name) if part]
            found.append(make_trial(study.name, base, ",".join(both), rung.settings | overrides))
    return found


def tuning_study(study: Study) -> Study:
    """A ladder's ``tune`` as a grid study of its own."""
    return study.model_copy(update={"name": f"{study.name}/tune", "ladder": None, "tune": {}, "grid": study.tune})


def tuning_trials(study: Study, base: dict[str, Any]) -> list[Trial]:
    """The grid of ``tune`` at the ladder's last run, the smallest model's; raises as `trials`."""
    smallest, (_, first) = study_rungs(study, base)[-1].settings, grid_points(study.grid)[0]
    return [
        make_trial(tuning_study(study).name, base, name, overrides, smallest | first)
        for name, overrides in (grid_points(study.tune) if study.tune else [])
    ]


def study_rungs(study: Study, base: dict[str, Any]) -> list[Rung]:
    """The ladder's runs, largest model first; without a ladder one that sets nothing.

    Raises:
        MegamupError: see `rungs`; or the grid sets what the ladder does.
    """
    if study.ladder is None:
        return [Rung("", {})]
    try:
        config = config_from(base)
    except MegamupError as error:
        raise MegamupError(f"{study.name}, its configs: {error}") from None
    tuned = grid_points(study.tune) if study.tune else []
    found = rungs(
        study.ladder,
        config,
        copies=len(grid_points(study.grid)),
        tuning=len(tuned),
        corpus_tokens=corpus_tokens(config) if isinstance(study.ladder, ScaleD) else 0,
    )
    for key in sorted({key for _, overrides in [*grid_points(study.grid), *tuned] for key in overrides}):
        if key in found[0].settings or key.startswith("model.") or key in SIZES:
            raise MegamupError(f"{key}: the grid sets what the ladder does, or what its size rests on; leave it to one")
    return found


def corpus_tokens(config: Config) -> int:
    """Tokens of ``data.train``.

    Raises:
        MegamupError: a corpus is missing or broken, or has a share of its own.
    """
    from megamup.data.corpus import Corpus

    if any(source.fraction is not None for source in config.data.train_sources):
        raise MegamupError(
            "data.train: a source's own fraction overrules data.fraction, which scale_D sets: leave it out"
        )
    return sum(Corpus(source.prefix).n_tokens for source in config.data.train_sources)


def grid_points(grid: Mapping[str, Sequence[Any]]) -> list[tuple[str, dict[str, Any]]]:
    """(name, config keys) of every point; of an empty grid one that sets nothing."""
    found = []
    for values in itertools.product(*grid.values()):
        settings: list[dict[str, Any]] = [
            value if isinstance(value, dict) else {axis: value} for axis, value in zip(grid, values, strict=True)
        ]
        names = [label(setting, grid[axis]) for axis, setting in zip(grid, settings, strict=True)]
        found.append((",".join(names), {key: value for setting in settings for key, value in setting.items()}))
    return found


def make_trial(
    study: str, base: dict[str, Any], name: str, overrides: dict[str, Any], over: Mapping[str, Any] | None = None
) -> Trial:
    """The run ``study/name``: ``base``, then the finding ``overrides``, then ``over``, which is none.

    Raises:
        MegamupError: it is no valid config.
    """
    values: dict[str, Any] = json.loads(json.dumps(base))  # a copy: merging below must not reach the base
    for key, value in (overrides | dict(over or {})).items():
        merge(values, parse_override(f"{key}={json.dumps(value)}"))
    values.setdefault("run", {})["name"] = f"{study}/{name}"
    try:
        return Trial(name, overrides, config_from(values))
    except MegamupError as error:
        raise MegamupError(f"trial {name}: {error}") from None


def label(setting: dict[str, Any], alternatives: Sequence[Any]) -> str:
    """What a folder's name says of one value of an axis: its first key, or all where the first doesn't tell."""
    first = next(iter(setting))
    others = [value[first] for value in alternatives if isinstance(value, dict) and first in value]
    shown = setting if others.count(setting[first]) > 1 else {first: setting[first]}
    return ",".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in shown.items()).replace("/", "_")
