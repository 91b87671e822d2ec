"""Laws on published runs: fitted to the small as a user would, they hold the large inside their widened intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from megamup.scaling.analysis import AUTO, Result, analyse
from megamup.scaling.estimate import estimate
from megamup.scaling.laws import Law
from megamup.scaling.laws.loss import CHINCHILLA, OVERTRAINING, power
from megamup.scaling.runs import Ladder, Point, Reading, load

SIZES = ("190M", "370M", "760M", "1B")


def olmo(published: Path) -> dict[str, Point]:
    """Runs of Bhagia et al. 2024 (arXiv:2412.04403) by name; losses on C4."""
    columns = {"N": "N", "D": "D", "C": "flops", "L": "c4_en", "name": "run"}
    path = published / "olmo_ladder" / "ladder_losses_final.csv"
    return {point.name: point for point in load([], [path], Reading(columns=columns)).points}


def gadre(published: Path, dataset: str) -> dict[str, Point]:
    """Runs of Gadre et al. 2024 (arXiv:2403.08540) on one data set, by name; losses on C4."""
    columns = {"N": "N", "D": "20*chinchilla_multiplier*N", "L": "loss_c4_val", "name": "name"}
    path = published / "gadre_overtraining" / "models_104.csv"
    reading = Reading(columns=columns, where={"train_dataset": (dataset,)})
    return {point.name: point for point in load([], [path], reading).points}


def ladder(points: Sequence[Point]) -> Ladder:
    return Ladder(tuple(points), {"parameters": "total", "flops": "none", "loss": "C4"})


def fitted(points: Sequence[Point], law: Law, objective: str = AUTO) -> Result:
    return analyse(ladder(points), [law], objective=objective)


def error_of(result: Result, held: Point) -> float:
    """|predicted / measured - 1| of a held-out run, which lies inside the interval."""
    (found,) = estimate(result, {key: held.inputs[key] for key in result.law.inputs})
    assert found.low is not None
    assert found.high is not None
    assert found.low <= held.loss <= found.high, held.name
    return abs(found.value / held.loss - 1)


def test_olmo_16_points_predict_7b_and_13b(published: Path) -> None:
    runs = olmo(published)
    result = fitted([runs[f"{size}-{times}xC"] for size in SIZES for times in (1, 2, 5, 10)], CHINCHILLA)
    assert error_of(result, runs["peteish7_eval_anneal"]) < 0.015
    assert error_of(result, runs["peteish13_eval_final"]) < 0.025
    assert error_of(result, runs["3B-10xC"]) < 0.01
    assert result.backtest.folds >= 6
    assert [(row.law, row.objective) for row in result.tried] == [("chinchilla", o) for o in ("log", "loss", "huber")]


def test_olmo_at_fixed_tokens_per_parameter(published: Path) -> None:
    """One length a size: L(C) and L(N) of four, the fifth held out."""
    runs = olmo(published)
    for x in ("N", "C"):
        result = fitted([runs[f"{size}-1xC"] for size in SIZES], power(x))
        assert error_of(result, runs["3B-1xC"]) < 0.01


def test_olmo_by_compute_alone(published: Path) -> None:
    runs = olmo(published)
    result = fitted([runs[f"{size}-{times}xC"] for size in (*SIZES, "3B") for times in (1, 2, 5, 10)], power("C"))
    assert result.fit.diagnostics.share_of_starts_at_optimum == 1
    assert error_of(result, runs["peteish7_eval_anneal"]) < 0.03
    assert error_of(result, runs["peteish13_eval_final"]) < 0.04


@pytest.mark.parametrize("law", [CHINCHILLA, OVERTRAINING], ids=lambda law: law.name)
@pytest.mark.parametrize("dataset", ["rpj", "c4_original", "rw_original"])
def test_gadre_all_small_runs_hold_7b(published: Path, dataset: str, law: Law) -> None:
    """33 runs of up to 1.4B, over- and undertrained, with what diverged among them."""
    runs = gadre(published, dataset)
    held = [name for name in runs if "open_lm_7b" in name or name == f"{dataset}-open_lm_1b-32.0"]
    result = fitted([point for name, point in runs.items() if name not in held], law)
    assert all(error_of(result, runs[name]) < 0.07 for name in held)
    assert result.fit.objective.name == "huber"


def test_gadre_five_points_hold_both_extrapolations(published: Path) -> None:
    runs = gadre(published, "rpj")
    models = ("d=96_l=8_h=4", "d=512_l=8_h=4", "d=576_l=24_h=8", "d=1024_l=24_h=8")
    points = [runs[f"rpj-{model}-1.0"] for model in models] + [runs[f"rpj-{models[0]}-16.0"]]
    result = fitted(points, OVERTRAINING, "loss")
    published_parameters = {"E": 1.83665, "a": 166.21, "b": 366.69, "eta": -0.27285}
    assert result.fit.parameters == pytest.approx(published_parameters, rel=2e-5)
    assert 100 * error_of(result, runs["rpj-open_lm_1b-32.0"]) == pytest.approx(0.710, abs=5e-4)
    assert 100 * error_of(result, runs["rpj-open_lm_7b-1.0"]) == pytest.approx(0.732, abs=5e-4)
    assert any("no backtest" in warning for warning in result.warnings)


@pytest.mark.parametrize("phase", ["cool_end", "hot"])
def test_gemstones_below_1b_hold_2b(published: Path, phase: str) -> None:
    """17 shapes with points along their curves (McLeish et al. 2025, arXiv:2502.06857); three of 2B are held out."""
    columns: Mapping[str, str] = {"N": "params_active_precise", "D": "tokens", "L": "final_loss", "run": "run_name"}
    path = published / "gemstones" / f"wandb_df_for_fitting_{phase}.jsonl"
    points = load([], [path], Reading(columns=columns)).points
    result = fitted([point for point in points if point.inputs["N"] < 1.5e9], CHINCHILLA)
    for held in [point for point in points if point.inputs["N"] > 1.5e9]:
        assert error_of(result, held) < 0.07
    assert result.backtest.folds >= 2
