"""From a budget to runs: which models, batches and steps a ladder is made of. Pure arithmetic on configs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import geometric_mean
from typing import Any

from megamup.config import Config
from megamup.errors import MegamupError
from megamup.parameters import count
from megamup.sweep.family import Family, Point
from megamup.sweep.ladder import AnyLadder, CriticalBatch, IsoFlop, ScaleD, ScaleN

LEAST_STEPS = 50
"""A shorter run is warm-up and noise."""

Cost = Callable[[Sequence[Point]], float]


@dataclass(frozen=True)
class Rung:
    """One run of a ladder."""

    name: str
    settings: dict[str, Any]
    """Config keys."""


def rungs(ladder: AnyLadder, config: Config, *, copies: int = 1, tuning: int = 0, corpus_tokens: int = 0) -> list[Rung]:
    """The runs of a ladder, largest model first; the last is the smallest model's cheapest.

    Args:
        config: of the smallest model; what the ladder doesn't set holds for all.
        copies: runs of each (seeds, say), which the budget pays for too.
        tuning: further runs like the last.
        corpus_tokens: tokens of ``data.train``; ``scale_D`` takes shares of them.

    Raises:
        MegamupError: a budget that is too small, with the least that isn't; too little data.
    """
    family = Family(config, ladder.tokens_per_parameter, ladder.aspect)

    def order(point: Point) -> tuple[float, ...]:
        return count(point.model)["non_embedding"], family.flops(point), point.epochs or 0

    def cost(points: Sequence[Point]) -> float:
        return copies * sum(map(family.flops, points)) + tuning * family.flops(min(points, key=order))

    def sized(budget: float) -> list[Point] | None:
        if isinstance(ladder, IsoFlop):
            found = isoflop(ladder, family, budget, copies, tuning)
        else:
            found = widest(ladder, family, budget, cost)
        return found if found and min(map(family.steps, found)) >= LEAST_STEPS else None

    points = sized(ladder.budget)
    if points is None:
        enough = least(sized, ladder.budget)
        raise MegamupError(
            f"ladder.budget: {ladder.budget:.3g} FLOPs are too few; expected at least {enough:.2g}, "
            f"for models from the configs' own (width {family.smallest}) on and runs of at least {LEAST_STEPS} steps: "
            "raise it, or lower tokens_per_parameter, span, sizes or batch.global_sequences"
        )
    return [rung(ladder, family, point, corpus_tokens) for point in sorted(points, key=order)][::-1]


def least(sized: Callable[[float], list[Point] | None], too_small: float) -> float:
    """The least budget that is enough, to 1% and rounded up to two digits.

    Raises:
        MegamupError: none is.
    """
    low, high = max(too_small, 1.0), 2 * max(too_small, 1.0)
    while sized(high) is None:
        low, high = high, 2 * high
        if high > 1e32:
            raise MegamupError("ladder: no budget is enough for so many sizes; lower sizes, or raise span")
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if sized(middle) else (middle, high)
    unit = 10.0 ** (math.floor(math.log10(high)) - 1)
    return math.ceil(high / unit) * unit


def widest(ladder: ScaleN | ScaleD | CriticalBatch, family: Family, budget: float, cost: Cost) -> list[Point] | None:
    """The widest ladder of ``tokens_per_parameter`` that the budget pays for, then longer runs with what is left."""
    for width in reversed(family.affordable(budget)):
        points = of_width(ladder, family, width)
        if points is not None and cost(points) <= budget:
            longer = budget / cost(points)
            return [replace(point, tokens=point.tokens * longer) for point in points]
    return None


def of_width(ladder: ScaleN | ScaleD | CriticalBatch, family: Family, width: int) -> list[Point] | None:
    """The runs of a ladder whose largest model has this width; None where its smallest would be too small."""
    match ladder:
        case ScaleN():
            return scale_n(ladder, family, width)
        case ScaleD():
            return scale_d(ladder, family, width)
        case CriticalBatch():
            return critical_batch(ladder, family, width)


def scale_n(ladder: ScaleN, family: Family, width: int) -> list[Point] | None:
    models = family.models(width, ladder.sizes, ladder.span)
    if models is None:
        return None
    sequences, most = family.config.batch.global_sequences, family.tokens(models[-1])
    own = ladder.tokens == "proportional"
    return [Point(model, family.tokens(model) if own else most, sequences) for model in models]


def scale_d(ladder: ScaleD, family: Family, width: int) -> list[Point] | None:
    models = family.models(width, ladder.sizes, ladder.span)
    if models is None:
        return None
    sequences, tokens = family.config.batch.global_sequences, family.tokens(models[-1])
    return [Point(model, tokens, sequences, epochs) for model in models for epochs in ladder.epochs]


def critical_batch(ladder: CriticalBatch, family: Family, width: int) -> list[Point]:
    config, model, middle = family.config, family.model(width), geometric_mean(ladder.batches)
    points = []
    for batch in ladder.batches:
        for rate in ladder.rates:
            lr = rate * config.optim.lr * math.sqrt(batch / config.batch.global_sequences)
            keys = {"batch.global_sequences": batch, "optim.lr": float(f"{lr:.4g}")}
            points.append(Point(model, family.tokens(model) * (1 + batch / middle), batch, settings=keys))
    return points


def isoflop(ladder: IsoFlop, family: Family, budget: float, copies: int, tuning: int) -> list[Point] | None:
    """Sizes around the one that its FLOPs train for ``tokens_per_parameter``, at each of the budgets."""
    shares = [ladder.ratio**i for i in range(ladder.budgets)]
    smallest = budget / (copies * ladder.sizes * sum(shares) + tuning)
    points = []
    for flops in (smallest * share for share in shares):
        center = family.width_for(flops)
        models = center and family.models(center * math.sqrt(ladder.span), ladder.sizes, ladder.span)
        if not models:
            return None
        sequences = family.config.batch.global_sequences
        points += [Point(model, flops / family.flops_per_token(model), sequences) for model in models]
    return points


def rung(ladder: AnyLadder, family: Family, point: Point, corpus_tokens: int) -> Rung:
    steps, model = family.steps(point), point.model
    telling = {"model.d_model": model.d_model, "train.steps": steps, **point.settings}
    if point.epochs is not None:
        telling["data.fraction"] = share(point.tokens, point.epochs, corpus_tokens)
    shape = ("n_layers", "n_heads", "n_kv_heads", "d_head", "d_ff")
    derived = {
        **{f"model.{key}": getattr(model, key) for key in shape},
        **({} if model.n_decoder_layers is None else {"model.n_decoder_layers": model.n_decoder_layers}),
        **({} if model.moe is None or model.moe.d_expert is None else {"model.moe.d_expert": model.moe.d_expert}),
        "train.log_every": max(1, steps // ladder.logs),
        "train.eval_every": max(1, steps // ladder.evaluations) if ladder.evaluations else 0,
        "schedule.warmup_steps": round(ladder.warmup * steps),
    }
    name = ",".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in telling.items())
    return Rung(name, telling | derived)


def share(tokens: float, epochs: float, corpus_tokens: int) -> float:
    """The ``data.fraction`` that a run of ``tokens`` sees ``epochs`` times.

    Raises:
        MegamupError: the corpus has too few tokens.
    """
    unique = tokens / epochs
    if unique > corpus_tokens:
        raise MegamupError(
            f"ladder.epochs: {epochs:g} epochs in a run of {tokens:,.0f} tokens are of {unique:,.0f}, but data.train "
            f"has {corpus_tokens:,}; lower the budget, raise the fewest epochs, or take a larger corpus"
        )
    return float(f"{unique / corpus_tokens:.4g}")
