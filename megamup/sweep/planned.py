"""What a study will cost, before it is run: parameters, tokens, FLOPs and time of each trial."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megamup.flops import flops_per_token
from megamup.parameters import count
from megamup.sweep.study import Study
from megamup.sweep.trial import Trial


@dataclass(frozen=True)
class Cost:
    """A trial's size. Evaluations aren't counted."""

    trial: Trial
    parameters: int
    """Without embeddings and readout."""
    tokens: int
    flops: float
    """By the config's ``train.flops_convention``."""

    @staticmethod
    def of(trial: Trial) -> Cost:
        config = trial.config
        each = flops_per_token(config.model, config.lengths, config.train.flops_convention)
        return Cost(trial, count(config.model)["non_embedding"], config.tokens, each * config.tokens)


def measured_speed(costs: Sequence[Cost]) -> tuple[float, int]:
    """(FLOP/s while training, of how many trials that ran to their last step); (0, 0) where none did."""
    flops = seconds = 0.0
    finished = 0
    for cost in costs:
        records = [record for record in cost.trial.records() if "tokens_per_s" in record]
        if records and records[-1]["step"] == cost.trial.config.train.steps:
            tokens = [0, *(record["tokens"] for record in records)]
            each = [after - before for before, after in itertools.pairwise(tokens)]
            seconds += sum(n / record["tokens_per_s"] for n, record in zip(each, records, strict=True))
            flops += cost.flops
            finished += 1
    return (flops / seconds, finished) if finished else (0.0, 0)


def plan_lines(
    study: Study, tuning: Sequence[Trial], planned: Sequence[Trial], flops_per_s: float | None
) -> Iterator[str]:
    """The trials as a table, those of ``tune`` first.

    Args:
        flops_per_s: what a trial sustains; default: what the study's finished trials did, and without any no time.
    """
    costs = [Cost.of(trial) for trial in (*tuning, *planned)]
    names = [f"tune/{cost.trial.name}" if cost.trial in tuning else cost.trial.name for cost in costs]
    speed, finished = (flops_per_s, 0) if flops_per_s else measured_speed(costs)
    total, width = sum(cost.flops for cost in costs), max(map(len, names))
    yield f"{'trial':<{width}}  {'N':>9}  {'D':>9}  {'D/N':>7}  {'C':>9}  {'steps':>7}  {'share':>6}  {'minutes':>8}"
    for name, cost in zip(names, costs, strict=True):
        minutes = f"{cost.flops / speed / 60:.2f}" if speed else "-"
        yield (
            f"{name:<{width}}  {cost.parameters:>9.3g}  {cost.tokens:>9.3g}  {cost.tokens / cost.parameters:>7.3g}  "
            f"{cost.flops:>9.3g}  {cost.trial.config.train.steps:>7}  {cost.flops / total:>6.1%}  {minutes:>8}"
        )
    convention = costs[0].trial.config.train.flops_convention
    budget = f" of the budget of {study.ladder.budget:.3g}" if study.ladder else ""
    yield f"{len(costs)} trials, {total:.4g} FLOPs ({convention}, without evaluations){budget}"
    yield "N without embeddings and readout; D tokens seen, repeated ones too; C by the convention"
    if not speed:
        yield "no time: no trial is finished whose speed would tell; --flops-per-s says what a trial sustains"
        return
    basis = f"measured in {finished} finished trials" if finished else "as given"
    yield f"{total / speed / 60:.3g} minutes one after another at {speed:.3g} FLOP/s a trial ({basis})"
