"""95% intervals of laws hold the truth; `benchmarks/scaling_recovery.py` does it for all of them, over 200 trials."""

import numpy as np
import pytest

from megamup.scaling.fit import fit_law
from megamup.scaling.laws.examples import example
from megamup.scaling.uncertainty import parameter_intervals, predict

TRIALS, NOISE = 40, 0.01


@pytest.mark.parametrize("name", ["kaplan-nd", "critical-batch"])
def test_intervals_hold_parameters_and_new_runs(name: str) -> None:
    known = example(name)
    random = np.random.default_rng(1)
    held, new_held = [], []
    for _ in range(TRIALS):
        measured = known.response * np.exp(NOISE * random.standard_normal(len(known.response)))
        fit = fit_law(known.law, known.inputs, measured, objective="log", starts=4)
        for (low, high), value in zip(parameter_intervals(fit).values(), known.truth.tolist(), strict=True):
            held.append((low is None or low <= value) and (high is None or value <= high))
        new = known.response[-1] * np.exp(NOISE * random.standard_normal())
        prediction = predict(fit, known.inputs[[-1]])
        new_held.append(prediction.low[0] <= new <= prediction.high[0])
    # 40 trials of 95%: 38, give or take 1.4; parameters of one fit go together.
    assert 0.88 <= np.mean(held) <= 0.995
    assert 34 <= sum(new_held) <= 40
