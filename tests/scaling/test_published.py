"""The power law on published runs: fitted to the small, it holds the large."""

import csv
from pathlib import Path

import pytest

from megamup.scaling.fit import fit_law
from megamup.scaling.laws import POWER
from megamup.scaling.uncertainty import predict


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="") as file:
        return {next(iter(row.values())): row for row in csv.DictReader(file)}


def test_olmo_ladder_at_fixed_tokens_per_parameter_predicts_its_largest_model(published: Path) -> None:
    # Bhagia et al. 2024 (arXiv:2412.04403): 190M to 1.3B at once Chinchilla's tokens, 3.2B held out.
    rows = rows_of(published / "olmo_ladder" / "ladder_losses_final.csv")
    ladder = [rows[f"{size}-1xC"] for size in ("190M", "370M", "760M", "1B")]
    held = rows["3B-1xC"]
    for column in ("N", "flops"):
        fit = fit_law(POWER, [float(row[column]) for row in ladder], [float(row["c4_en"]) for row in ladder])
        prediction = predict(fit, [float(held[column])])
        measured = float(held["c4_en"])
        assert prediction.loss[0] == pytest.approx(measured, rel=0.01)
        assert prediction.low[0] <= measured <= prediction.high[0]


def test_olmo_ladder_by_compute_predicts_7b_and_13b(published: Path) -> None:
    # 20 runs of 190M to 3.2B at 1 to 10 times Chinchilla's tokens; 7B and 13B are 13 and 31 times beyond.
    rows = rows_of(published / "olmo_ladder" / "ladder_losses_final.csv")
    names = [f"{size}-{times}xC" for size in ("190M", "370M", "760M", "1B", "3B") for times in (1, 2, 5, 10)]
    flops = [float(rows[name]["flops"]) for name in names]
    fit = fit_law(POWER, flops, [float(rows[name]["c4_en"]) for name in names])
    assert fit.diagnostics.share_of_starts_at_optimum == 1
    for name, tolerance in (("peteish7_eval_anneal", 0.03), ("peteish13_eval_final", 0.04)):
        prediction = predict(fit, [float(rows[name]["flops"])])
        measured = float(rows[name]["c4_en"])
        assert prediction.loss[0] == pytest.approx(measured, rel=tolerance)
        assert prediction.low[0] <= measured <= prediction.high[0]


def test_gadre_at_twenty_tokens_per_parameter_predicts_7b(published: Path) -> None:
    # Gadre et al. 2024 (arXiv:2403.08540): 11M to 1.4B trained on RedPajama, 6.9B held out.
    rows = rows_of(published / "gadre_overtraining" / "models_104.csv").values()
    runs = [row for row in rows if row["train_dataset"] == "rpj" and float(row["chinchilla_multiplier"]) == 1]
    (held,) = [row for row in runs if row["model"] == "open_lm_7b"]
    runs.remove(held)
    assert len(runs) == 5
    fit = fit_law(POWER, [float(row["N"]) for row in runs], [float(row["loss_c4_val"]) for row in runs])
    prediction = predict(fit, [float(held["N"])])
    measured = float(held["loss_c4_val"])
    assert prediction.loss[0] == pytest.approx(measured, rel=0.03)
    assert prediction.low[0] <= measured <= prediction.high[0]
