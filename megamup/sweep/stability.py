"""What a run's curve says beyond its last value: is it coming back, and was it smooth?

The spike score is that of OLMo 2 (Walsh et al. 2025, section 3): the share of values at least seven standard deviations
from a rolling mean of up to 1000. A proxy logs tens or hundreds of values. Among so few, a spike raises mean and
deviation so much that it hides itself (of n values none is further than (n - 1)/√n deviations from their mean, so below
52 no spike exists), and the fall of the loss hides it again. Here therefore:

    center      median of the 16 values before
    deviation   1.4826 · median |d - median d| / √2 over the changes d between the 128 values before: the noise
                without the trend (a rolling median absolute deviation), at least a share of the center

which a few spikes don't move; upward only, since a loss is meant to fall; and after warm-up, in which the level of the
gradient norm changes by design. Only logged steps are seen: a smaller ``train.log_every`` sees more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from megamup.config import Config
from megamup.sweep.study import Prune

DEVIATIONS = 7.0
RECENT, WINDOW = 16, 128
SMALLEST = {"loss": 0.01, "grad_norm": 0.05}
"""Least deviation as a share of the center: a loss 7% up, or a norm 35% up, is a spike of a curve without noise."""
NORMAL = 1.4826 / math.sqrt(2)
"""Deviation of a value over the median absolute deviation of changes, of normal noise."""

Records = Sequence[dict[str, Any]]


def after_warmup(records: Records, key: str, config: Config) -> list[float]:
    return [float(r[key]) for r in records if key in r and r["step"] > config.schedule.warmup_steps]


def spike_scores(records: Records, config: Config) -> dict[str, float | None]:
    return {
        f"{key}_spikes": spike_score(after_warmup(records, key, config), smallest) for key, smallest in SMALLEST.items()
    }


def spike_score(values: Sequence[float], smallest: float) -> float | None:
    """Share of values that stand at least seven deviations above those before them; None with too few to tell."""
    spikes = [spike(values[max(0, i - WINDOW) : i], values[i], smallest) for i in range(RECENT, len(values))]
    return sum(spikes) / len(spikes) if spikes else None


def spike(before: Sequence[float], value: float, smallest: float) -> bool:
    known = [other for other in before if math.isfinite(other)]
    if not math.isfinite(value) or len(known) < RECENT // 2:
        return not math.isfinite(value)
    center = median(known[-RECENT:])
    changes = [after - first for first, after in itertools.pairwise(known)]
    typical = median(changes)
    deviation = max(NORMAL * median(abs(change - typical) for change in changes), smallest * abs(center))
    return value - center >= DEVIATIONS * deviation


def diverging(records: Records, config: Config, prune: Prune) -> str | None:
    """Why a run should be stopped (see `Prune`), or None."""
    losses = after_warmup(records, "loss", config)
    recent = losses[-prune.patience :]
    if len(recent) < prune.patience:
        return None
    step, after = records[-1]["step"], f"for {prune.patience} logged steps"
    ceiling = prune.uniform * math.log(config.model.vocab_size)
    if min(recent) > ceiling:
        return f"stopped at step {step}: the loss was above {ceiling:.3f}, {prune.uniform:g} ln(vocab_size), {after}"
    floor = min(losses) + prune.rise
    if min(recent) > floor:
        return f"stopped at step {step}: the loss was above {floor:.3f}, its lowest + {prune.rise:g} nats, {after}"
    return None
