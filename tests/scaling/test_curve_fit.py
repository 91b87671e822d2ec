"""Laws of whole curves through the tool: run folders in, the curve of a schedule that nobody ran out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy.stats import t as student

from megamup.errors import MegamupError
from megamup.scaling.curve_backtest import CurveEvidence, ScheduleTrial
from megamup.scaling.curve_fit import analyse_curves, measure, predict_schedule
from megamup.scaling.curves import Smoothing
from megamup.scaling.figures.curve_law import curve_law_drawing
from megamup.scaling.fit_file import load_result, save_result
from megamup.scaling.laws.annealing import ANNEALING, MULTI_POWER, CurveLaw
from megamup.scaling.laws.base import FloatArray
from megamup.scaling.laws.examples import cosine
from megamup.scaling.laws.schedules import Schedules, schedule_of
from megamup.scaling.runs import Reading, load_tracks
from megamup.sections import Schedule
from megamup.train.schedule import lr_factor

Capture = pytest.CaptureFixture[str]
MakeCurve = Callable[..., Path]

STEPS, EVERY, PEAK = 1000, 10, 0.01
LAW = replace(ANNEALING, decay=0.995)
TRUTH = {"L0": 2.2, "A": 1.9, "alpha": 0.3, "C": 0.15}
KINDS = {
    "constant": Schedule(kind="constant", warmup_steps=50),
    "wsd": Schedule(kind="wsd", warmup_steps=50, decay_fraction=0.3),
    "cosine": Schedule(kind="cosine", warmup_steps=50),
    "linear": Schedule(kind="linear", warmup_steps=50),
}
READING = Reading(loss="loss", smoothing=Smoothing("none"))


def rates_of(kind: str, steps: int = STEPS) -> FloatArray:
    return PEAK * np.array([lr_factor(KINDS[kind], step, steps) for step in range(steps)])


def losses(rates: FloatArray, steps: FloatArray, law: CurveLaw = LAW, truth: dict[str, float] = TRUTH) -> FloatArray:
    bound = replace(law, schedules=Schedules([rates]))
    return bound.predict(np.array(list(truth.values())), np.column_stack([np.ones_like(steps), steps]))


@pytest.fixture
def make_curve(make_run: Callable[..., Path]) -> MakeCurve:
    """A maker of run folders whose losses lie on the law, by the learning rates as they are logged."""

    def make(kind: str, *, name: str | None = None, noise: float = 0.0, key: str = "lr", batch: float = 2048) -> Path:
        folder = make_run(name or kind, steps=STEPS)
        steps = np.arange(EVERY, STEPS + 1, EVERY).astype(np.float64)
        logged = rates_of(kind)[steps.astype(int) - 1]
        loss = losses(schedule_of(steps, logged), steps)
        seed = sum((name or kind).encode())
        loss = loss * np.exp(noise * np.random.default_rng(seed).standard_normal(len(loss)))
        records = [
            {"step": int(s), "tokens": batch * s, "flops": 1e6 * s, "loss": x, key: r}
            for s, x, r in zip(steps, loss.tolist(), logged.tolist(), strict=True)
        ]
        folder.joinpath("metrics.jsonl").write_text("\n".join(json.dumps(record) for record in records) + "\n")
        return folder

    return make


def run(tool: ModuleType, capsys: Capture, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    code = tool.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def fitted(tool: ModuleType, capsys: Capture, runs: Sequence[Path], *more: object) -> dict[str, object]:
    """The object that `fit --json` prints, written to fit.json beside the runs too."""
    output = runs[0].parent / "fit.json"
    code, out, err = run(
        tool, capsys, "fit", "--law", "annealing", "--runs", *runs, "--json", "--output", output, *more
    )
    assert code == 0, err
    return dict(json.loads(out))


def test_noise_free_parameters_and_the_forgetting_are_recovered(
    tool: ModuleType, capsys: Capture, make_curve: MakeCurve
) -> None:
    found = fitted(tool, capsys, [make_curve("constant"), make_curve("wsd"), make_curve("cosine")])
    assert found["parameters"] == pytest.approx(TRUTH, rel=1e-7)
    assert str(found["reason"]).startswith("annealing λ=0.995")
    evidence = found["curve_evidence"]
    assert isinstance(evidence, dict)
    assert evidence["decay"] == 0.995
    # Without the constant rate, or either decay, the others still show one.
    assert [trial["run"] for trial in evidence["trials"]] == ["constant", "wsd", "cosine"]
    assert evidence["rms_error"] < 1e-7


def test_a_config_nobody_ran_is_predicted(tool: ModuleType, capsys: Capture, make_curve: MakeCurve) -> None:
    fitted(tool, capsys, folders := [make_curve("constant"), make_curve("wsd")])
    config = folders[0].parent / "new.yaml"
    config.write_text(
        "model: {arch: llama, d_model: 64, n_layers: 2, n_heads: 4, vocab_size: 512, max_seq_len: 64}\n"
        f"data: {{train: x}}\nbatch: {{global_sequences: 32}}\ntrain: {{steps: {STEPS}}}\n"
        f"optim: {{lr: {PEAK}}}\nschedule: {{kind: wsd, warmup_steps: 50, decay_fraction: 0.3}}\n"
    )
    given = ("predict", "--fit", folders[0].parent / "fit.json", "--schedule", config, "schedule.kind=cosine")
    code, out, _ = run(tool, capsys, *given, "--json")
    answer = json.loads(out)
    assert code == 0
    at = np.array(answer["curve"]["step"])
    assert len(at) <= 200
    assert at[-1] == STEPS == answer["steps"]
    # As close as rates between logged steps are to a straight line.
    np.testing.assert_allclose(answer["curve"]["loss"], losses(rates_of("cosine"), at), rtol=2e-5)
    assert answer["loss"] == answer["curve"]["loss"][-1]
    assert answer["curve"]["lr"] == pytest.approx(rates_of("cosine")[at.astype(int) - 1])
    assert [w for w in answer["warnings"] if w.startswith("N is") and "one model and batch" in w]
    _, text, _ = run(tool, capsys, *given, "--at", "S=500")
    assert text.startswith(f"loss {losses(rates_of('cosine'), np.array([500.0]))[0]:.4f}"[:9])
    assert "at step 500 of 1000" in text


def test_a_run_is_predicted_from_its_schedule_and_measured(
    tool: ModuleType, capsys: Capture, make_curve: MakeCurve
) -> None:
    runs = [make_curve(kind, noise=2e-3) for kind in ("constant", "wsd", "linear")]
    fitted(tool, capsys, runs)
    given = ("predict", "--fit", runs[0].parent / "fit.json", "--schedule", make_curve("cosine", noise=2e-3))
    answer = json.loads(run(tool, capsys, *given, "--json")[1])
    measured = answer["measured"]
    assert abs(measured["final_error"]) < 5e-3
    assert measured["rms_error"] == pytest.approx(2e-3, rel=0.5)
    assert answer["low"] < losses(rates_of("cosine"), np.array([1000.0]))[0] < answer["high"]
    code, text, err = run(tool, capsys, *given)
    assert code == 0
    assert "of one new schedule) at step 1000 of 1000" in text
    assert "along the curve 0." in text
    assert "N is" not in err


def test_the_fit_file_predicts_the_same(make_curve: MakeCurve, tmp_path: Path) -> None:
    tracks = load_tracks([make_curve("cosine", noise=1e-3), make_curve("wsd", noise=1e-3)], (), READING)
    result = analyse_curves("annealing", *tracks)
    save_result(result, tmp_path / "fit.json")
    loaded = load_result(tmp_path / "fit.json")
    before, after = (predict_schedule(one, rates_of("linear", 1500)) for one in (result, loaded))
    np.testing.assert_array_equal(before.loss, after.loss)
    assert before.low is not None
    assert after.low is not None
    np.testing.assert_array_equal(before.low, after.low)
    np.testing.assert_array_equal(result.fit.fitted, loaded.fit.fitted)
    assert before.over_longest == after.over_longest == 1.5
    assert loaded.curve_evidence == result.curve_evidence
    content = json.loads((tmp_path / "fit.json").read_text())
    assert content["schedules"][0]["lr"] == rates_of("cosine")[9::EVERY].tolist()


def test_the_simpler_law_is_taken_where_it_predicts_as_well(make_curve: MakeCurve) -> None:
    tracks = load_tracks([make_curve(kind, noise=1e-3) for kind in ("constant", "wsd", "cosine")], (), READING)
    result = analyse_curves("multi-power,annealing", *tracks, objective="log")
    assert result.law.name == "annealing"
    errors = {row.law: row.rms_error for row in result.tried}
    assert set(errors) == {"multi-power", "annealing λ=0.99", "annealing λ=0.995", "annealing λ=0.999"}
    assert min(errors, key=lambda law: errors[law] or math.inf) in ("annealing λ=0.995", "multi-power")


def test_one_schedule_predicts_but_has_no_interval(make_curve: MakeCurve) -> None:
    result = analyse_curves("annealing", *load_tracks([make_curve("cosine", noise=1e-3)], (), READING))
    evidence = result.curve_evidence
    assert evidence is not None
    assert evidence.held_out == "steps"
    # The first cuts of a cosine show a fall of 10% already.
    assert [trial.run for trial in evidence.trials] == [f"cosine after {share}%" for share in (50, 60, 70, 80, 90)]
    assert predict_schedule(result, rates_of("wsd")).low is None
    assert any("no interval: one schedule" in warning for warning in result.warnings)


def test_intervals_are_students_of_the_errors_held_out() -> None:
    trials = tuple(ScheduleTrial(name, 50, 3.0 * math.exp(e), 3.0, 0.1) for name, e in (("a", 0.003), ("b", -0.004)))
    evidence = CurveEvidence(("a", "b", "c"), trials)
    assert evidence.half_width == pytest.approx(student.ppf(0.975, 2) * math.sqrt((0.003**2 + 0.004**2) / 2))
    assert evidence.rms_error == pytest.approx(0.1)
    assert evidence.warnings() == [
        "intervals rest on 2 held-out of 3 schedules and are wide: add runs with other decays"
    ]
    assert CurveEvidence(("a", "b"), ()).half_width is None


def test_intervals_hold_a_new_schedule(make_curve: MakeCurve) -> None:
    kinds, inside = ("constant", "wsd", "cosine"), []
    for trial in range(12):
        runs = [make_curve(kind, name=f"{kind}{trial}", noise=5e-3) for kind in kinds]
        result = analyse_curves("annealing", *load_tracks(runs, (), READING), objective="log")
        predicted = predict_schedule(result, rates_of("linear"), [STEPS])
        truth = losses(rates_of("linear"), np.array([float(STEPS)]))[0]
        assert predicted.low is not None
        assert predicted.high is not None
        inside.append(predicted.low[0] < truth < predicted.high[0])
    assert sum(inside) >= 10


def test_rates_of_another_name_may_fall_to_zero(make_curve: MakeCurve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "linear", KINDS["linear"].model_copy(update={"min_ratio": 0.0}))
    folder = make_curve("linear", key="rate")
    _, (track,) = load_tracks([folder], (), replace(READING, columns={"lr": "rate"}))
    assert track.rates is not None
    assert track.rates[1][-1] == 0
    assert track.constants["lr"] == pytest.approx(rates_of("linear")[EVERY - 1 :: EVERY].max())
    with pytest.raises(MegamupError, match="linear: has no learning rate by step; expected `lr`"):
        analyse_curves("annealing", *load_tracks([folder], (), READING))


def test_long_schedules_keep_their_shape_in_a_file() -> None:
    rate = cosine(200_000, 3e-4, 1000)
    again = Schedules.from_knots(Schedules([rate]).knots())
    np.testing.assert_allclose(again.rates[0], rate, atol=1e-9 * 3e-4)
    logged = [{"step": [10.0, 20.0, 35.0], "lr": [1e-3, 1e-3, 4e-4]}]
    assert Schedules.from_knots(logged).knots() == logged


def test_what_determines_no_law_is_refused(tool: ModuleType, capsys: Capture, make_curve: MakeCurve) -> None:
    constant, wsd = make_curve("constant"), make_curve("wsd")
    cases = [
        ((constant,), "--law annealing: the learning rate of constant falls by less than 10%"),
        ((wsd, make_curve("cosine", batch=4096)), "B: 2048 tokens a step in wsd, 4096 in cosine"),
        ((wsd, "--at", "final"), "--at: 'final'; a law of whole curves is fitted to all of them"),
    ]
    for given, message in cases:
        code, out, err = run(tool, capsys, "fit", "--law", "annealing", "--runs", *given)
        assert (code, out) == (2, "")
        assert message in err
    code, _, err = run(tool, capsys, "fit", "--law", "annealing,power", "--runs", wsd)
    assert code == 2
    assert "--law: power is no law of whole curves" in err


def test_predict_says_what_it_needs(
    tool: ModuleType, capsys: Capture, make_curve: MakeCurve, ladder: list[Path]
) -> None:
    folders = [make_curve("constant"), make_curve("wsd")]
    fitted(tool, capsys, folders)
    curves, power = folders[0].parent / "fit.json", folders[0].parent / "power.json"
    run(tool, capsys, "fit", "--law", "power", "--runs", *ladder, "--output", power)
    cases = [
        ((curves, "--at", "C=1e15"), "--schedule: missing; expected a config or a run's folder"),
        ((power, "--schedule", folders[0]), "--schedule: the law power has no schedule; expected annealing"),
        ((power,), "--at: missing; expected the new run"),
        ((curves, "--schedule", folders[0], "train.steps=5"), "expected overrides after a config only"),
        ((curves, "--schedule", folders[0], "--at", "S=1001"), "expected S=STEP, a whole number up to"),
        ((curves, "--schedule", folders[0], "--at", "C=1e15"), "expected S=STEP, a whole number up to"),
    ]
    for given, message in cases:
        code, out, err = run(tool, capsys, "predict", "--fit", *given)
        assert (code, out) == (2, "")
        assert message in err


def test_a_loss_below_zero_is_no_prediction(make_curve: MakeCurve) -> None:
    result = analyse_curves("annealing", *load_tracks([make_curve("constant"), make_curve("wsd")], (), READING))
    sharp = np.concatenate([np.full(500, 100 * PEAK), np.full(5000, 1e-6)])
    with pytest.raises(MegamupError, match="would give a loss below 0"):
        predict_schedule(result, sharp)


def test_the_table_has_a_row_for_each_run(tool: ModuleType, capsys: Capture, make_curve: MakeCurve) -> None:
    runs = [make_curve("constant", noise=2e-3), make_curve("wsd", noise=2e-3)]
    code, out, err = run(tool, capsys, "fit", "--law", "annealing", "--runs", *runs)
    assert code == 0
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("run "))
    constant, wsd = (line.split() for line in lines[start + 1 : start + 3])
    assert constant[:2] == ["constant", "1000"]
    # Without the wsd run no decay is left: it can't be held out.
    assert wsd[-2:] == ["-", "-"] != constant[-2:]
    assert "L          loss, mean of each of up to 100 even stretches" in out
    assert "schedules held out: 1 predicted from the rest" in out
    assert "intervals rest on 1 held-out of 2 schedules" in err


def test_the_figure_has_fitted_and_predicted_curves(make_curve: MakeCurve) -> None:
    result = analyse_curves("annealing", *load_tracks([make_curve("constant"), make_curve("wsd")], (), READING))
    _, (track,) = load_tracks([make_curve("cosine")], (), READING)
    rates, measured = measure(result, track)
    drawing = curve_law_drawing(result, [("cosine", predict_schedule(result, rates), measured)])
    curves = drawing.numbers["curves"]
    assert [(curve["run"], curve["predicted"]) for curve in curves] == [
        ("constant", False),
        ("wsd", False),
        ("cosine", True),
    ]
    assert curves[2]["loss"] == measured.loss.tolist()
    above, below = drawing.figure.axes
    assert len(below.lines) == 3
    assert len(above.lines) == 3
    json.dumps(drawing.numbers, allow_nan=False)


def test_multi_power_is_recovered(make_run: Callable[..., Path]) -> None:
    truth = dict(zip(MULTI_POWER.parameters, [2.2, 1.9, 0.3, 40.0, 2.0, 0.6, 0.5], strict=True))
    folders = []
    steps = np.arange(25.0, STEPS + 1, 25)
    for kind in ("wsd", "cosine"):
        folder = make_run(kind, steps=STEPS)
        logged = rates_of(kind)[steps.astype(int) - 1]
        loss = losses(schedule_of(steps, logged), steps, MULTI_POWER, truth)
        records = [
            {"step": int(s), "tokens": 2048 * s, "loss": x, "lr": r}
            for s, x, r in zip(steps, loss.tolist(), logged.tolist(), strict=True)
        ]
        folder.joinpath("metrics.jsonl").write_text("\n".join(json.dumps(record) for record in records) + "\n")
        folders.append(folder)
    result = analyse_curves("multi-power", *load_tracks(folders, (), READING), objective="log")
    assert result.fit.parameters == pytest.approx(truth, rel=1e-4)
