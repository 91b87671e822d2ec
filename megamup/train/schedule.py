"""The learning rate as a pure function of the step. DeepSpeed's schedulers overwrite the groups' scales: unused."""

from __future__ import annotations

import math

from megamup.sections import Schedule


def lr_factor(schedule: Schedule, step: int, steps: int) -> float:
    """Share of the peak learning rate for update number ``step`` (0-based) of ``steps``.

    Warm-up is linear and reaches the peak at update ``warmup_steps``; every decay reaches ``min_ratio`` at the last.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / (schedule.warmup_steps + 1)
    floor, last = schedule.min_ratio, max(steps - 1, 1)
    if schedule.kind == "constant":
        return 1.0
    start = schedule.warmup_steps
    if schedule.kind == "wsd":  # Hägele et al. 2024: a constant rate, then a short linear cooldown
        start = max(start, steps - round(schedule.decay_fraction * steps) - 1)
    progress = min(max((step - start) / max(last - start, 1), 0.0), 1.0)
    if schedule.kind == "cosine":
        return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
    return floor + (1 - floor) * (1 - progress)
