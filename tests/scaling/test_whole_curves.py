"""Run folders in, a schedule that no run had out."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megamup.errors import MegamupError
from megamup.scaling.analysis import analyse_reduced
from megamup.scaling.curves import Curve
from megamup.scaling.fit import fit_law
from megamup.scaling.fit_file import load_result, save_result
from megamup.scaling.laws.annealing import ANNEALING, CurveLaw, predict_curve
from megamup.scaling.laws.base import FloatArray
from megamup.scaling.laws.examples import SCHEDULES, example
from megamup.scaling.laws.schedules import Schedules
from megamup.scaling.reduction import reduce_runs
from megamup.scaling.runs import Ladder, Point
from megamup.scaling.whole_curves import whole_curves

TRUTH = example("annealing").truth
EVERY = 10


def losses(schedule: FloatArray, steps: FloatArray) -> FloatArray:
    law = replace(ANNEALING, schedules=Schedules([schedule]))
    return law.predict(TRUTH, np.column_stack([np.ones_like(steps), steps]))


@pytest.fixture
def curves(make_run: Callable[..., Path]) -> list[tuple[Point, Curve]]:
    """A cosine and a constant rate, logged at every tenth step."""
    found = []
    for name, schedule in (("cosine", SCHEDULES.rates[0]), ("constant", SCHEDULES.rates[2])):
        folder = make_run(name)
        steps = np.arange(EVERY, len(schedule) + 1, EVERY).astype(np.float64)
        loss = losses(schedule, steps)
        lines = [
            json.dumps({"step": int(s), "lr": schedule[int(s) - 1], "loss": x})
            for s, x in zip(steps, loss, strict=True)
        ]
        Path(folder, "metrics.jsonl").write_text("\n".join(lines) + "\n")
        curve = Curve(steps, steps * 1e6, steps * np.nan, loss)
        found.append((Point(name, {"N": 1e6}, float(loss[-1]), folder), curve))
    return found


def test_a_schedule_that_no_run_had(curves: list[tuple[Point, Curve]]) -> None:
    ladder, law = whole_curves(curves, ANNEALING, convention={"loss": "train"})
    assert ladder.convention == {"loss": "train"}
    assert set(ladder.columns(["curve"])[:, 0]) == {1.0, 2.0}
    assert set(ladder.runs.tolist()) == {0, 1}
    # Points come after the warm-up of the cosine's first 100 steps, and 5% of either run.
    assert ladder.columns(["step"]).min() >= 200
    fit = fit_law(law, ladder.columns(["curve", "step"]), ladder.losses, starts=8)
    wsd = SCHEDULES.rates[1]
    steps, predicted = predict_curve(law, fit.parameters, wsd)
    # Between logged steps rates and losses are interpolated.
    np.testing.assert_allclose(predicted, losses(wsd, steps), rtol=2e-4)


def test_what_is_missing_is_said(curves: list[tuple[Point, Curve]]) -> None:
    (point, curve), _ = curves
    with pytest.raises(MegamupError, match="cosine: no `lr` is logged by step"):
        whole_curves([(replace(point, source=None), curve)], ANNEALING)
    with pytest.raises(MegamupError, match="cosine has no steps along its curve"):
        whole_curves([(point, replace(curve, step=curve.step * np.nan))], ANNEALING)


def test_the_reduction_gives_the_law_its_schedules(curves: list[tuple[Point, Curve]]) -> None:
    reduced = reduce_runs("multi-power", Ladder((), {"loss": "train"}), lambda: curves)
    ((law, ladder),) = reduced.parts
    assert isinstance(law, CurveLaw)
    assert len(law.known.rates) == 2
    assert ladder.convention == {"loss": "train"}


def test_a_fit_file_keeps_the_schedules(curves: list[tuple[Point, Curve]], tmp_path: Path) -> None:
    result = analyse_reduced("annealing", Ladder((), {"loss": "train"}), lambda: curves, objective="log")
    save_result(result, tmp_path / "fit.json")
    loaded = load_result(tmp_path / "fit.json")
    at = np.array([[1.0, 3000.0], [2.0, 4000.0]])
    np.testing.assert_allclose(loaded.fit.at(at), result.fit.at(at), rtol=1e-9)
    assert loaded.fit.parameters == pytest.approx(result.fit.parameters, rel=1e-9)
