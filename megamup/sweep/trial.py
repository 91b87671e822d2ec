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
from megamup.sweep.study import Study

Record = dict[str, Any]


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
    """Every point of the grid as a checked config, in the order of the file.

    Raises:
        MegamupError: a point is no valid config; all are checked before any is run.
    """
    found = []
    for point in itertools.product(*study.grid.values()):
        overrides: dict[str, Any] = {}
        names = []
        for axis, value in zip(study.grid, point, strict=True):
            setting: dict[str, Any] = value if isinstance(value, dict) else {axis: value}
            overrides |= setting
            names.append(label(setting, study.grid[axis]))
        found.append(make_trial(study.name, base, ",".join(names), overrides))
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
