"""Which trial is best: by the metric, and by how smoothly it got there.

Some configs reach a low loss through spikes, and don't reach it at the target's size; the next best that trained
smoothly is the better bet. So the best is the best *stable* trial, unless an unstable one beats it clearly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megamup.config import merge, parse_override
from megamup.errors import MegamupError
from megamup.files import write_json_atomic, write_text_atomic
from megamup.sweep.stability import spike_scores
from megamup.sweep.study import Study
from megamup.sweep.trial import Trial


@dataclass(frozen=True)
class Row:
    trial: Trial
    value: float
    """The metric; infinite where the run diverged."""
    spikes: dict[str, float | None]
    """Spike scores; None where too few steps were logged to tell."""
    stable: bool

    def entry(self, metric: str) -> dict[str, Any]:
        return {metric: None if math.isinf(self.value) else self.value, **self.spikes, "stable": self.stable}


def ranked(study: Study, planned: Sequence[Trial]) -> list[Row]:
    """Trials by metric, best first."""
    rows = []
    for trial in planned:
        spikes = spike_scores(trial.records(), trial.config)
        value = trial.value(study.metric)
        smooth = all(score is None or score <= study.stability.max_spikes for score in spikes.values())
        rows.append(Row(trial, value, spikes, smooth and not math.isinf(value)))
    return sorted(rows, key=lambda row: row.value)


def choose(study: Study, rows: Sequence[Row]) -> tuple[Row, str]:
    """The best of ranked trials, and what there is to say of its stability (nothing, if there is nothing).

    Raises:
        MegamupError: every trial diverged.
    """
    lowest, metric, tolerance = rows[0], study.metric, study.stability.tolerance
    if math.isinf(lowest.value):
        where = "grid" if study.search is None else "search"
        raise MegamupError(f"{study.name}: every trial diverged; lower optim.lr in the {where}")
    if lowest.stable:
        return lowest, ""
    stable = next((row for row in rows if row.stable), None)
    if stable is None:
        return lowest, "unstable (its curves have spikes), as is every trial"
    if lowest.value < stable.value - tolerance * abs(stable.value):
        return lowest, (
            f"unstable (its curves have spikes), but more than {tolerance:.2%} better than the best stable trial, "
            f"{stable.trial.name}: {metric} {stable.value:.5f}"
        )
    return stable, (
        f"{lowest.trial.name} has {metric} {lowest.value:.5f}, but spikes in its curves, and isn't more than "
        f"{tolerance:.2%} better"
    )


def table_lines(study: Study, planned: Sequence[Trial], promoted: Sequence[Trial] = ()) -> Iterator[str]:
    """The study as text, best first; where trials were promoted, both stages with the rank in the other one."""
    first, second = ranked(study, planned), ranked(study, promoted)
    best, remark = choose(study, second or first)
    if study.ladder is not None:  # of models of many sizes none is the best
        yield from stage_lines(study, first, None)
        return
    if second:
        yield from stage_lines(study, first, None, "promoted", second)
        yield ""
        yield from stage_lines(study, second, best, "searched", first)
    else:
        yield from stage_lines(study, first, best)
    if remark:
        yield f"best: {remark}"


def stage_lines(
    study: Study, rows: Sequence[Row], best: Row | None, title: str = "", others: Sequence[Row] = ()
) -> Iterator[str]:
    width = max(len("trial"), *(len(row.trial.name) for row in rows))
    ranks = {row.trial.name: position for position, row in enumerate(others, start=1)}
    yield f"{'trial':<{width}}  {study.metric:>10}  loss spikes  grad spikes" + (f"  {title}" if others else "")
    for row in rows:
        scores = "".join(f"  {'-' if score is None else format(score, '.2%'):>11}" for score in row.spikes.values())
        rank = f"  {ranks.get(row.trial.name, '-'):>{len(title)}}" if others else ""
        mark = (
            "  <- best"
            if row is best
            else ""
            if row.stable
            else "  diverged"
            if math.isinf(row.value)
            else "  unstable"
        )
        yield f"{row.trial.name:<{width}}  {row.value:>{max(10, len(study.metric))}.5f}{scores}{rank}{mark}"


def write_results(study: Study, planned: Sequence[Trial], promoted: Sequence[Trial] = ()) -> Path:
    """Write ``results.json`` and ``best.yaml`` (what the best trial sets, ready to be merged after its configs).

    Every worker of a study writes the same, whole. Returns the path of best.yaml; a ladder, whose trials are no rivals,
    has none, and returns that of results.json.

    Raises:
        MegamupError: every trial diverged.
    """
    first, second = ranked(study, planned), ranked(study, promoted)
    best, remark = choose(study, second or first)
    folder = first[0].trial.folder.parent
    again = {row.trial.name: {"rank": rank, **row.entry(study.metric)} for rank, row in enumerate(second, start=1)}
    results = []
    for row in first:
        entry = {"trial": row.trial.name, **row.entry(study.metric), **row.trial.overrides}
        results.append(entry | ({"promoted": again[row.trial.name]} if row.trial.name in again else {}))
    write_json_atomic(folder / "results.json", results)
    if study.ladder is not None:
        return folder / "results.json"
    nested: dict[str, Any] = {}
    for key, value in best.trial.overrides.items():
        merge(nested, parse_override(f"{key}={json.dumps(value)}"))
    kind = f"{len(second)} promoted of {len(first)} trials" if second else f"{len(first)} trials"
    comment = f"# best of {kind}: {study.metric} {best.value:.5f}\n" + (f"# {remark}\n" if remark else "")
    path = folder / "best.yaml"
    write_text_atomic(path, comment + yaml.safe_dump(nested))
    return path
