"""`./dev study mup`: what it reads off its experiments, what it doesn't run again, and that refuted claims fail it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megamup.cli import load_program
from megamup.config import Config
from megamup.experiments.coord_check import Check, Rms, Slopes
from megamup.experiments.curves import number_of, value_of
from megamup.experiments.transfer import Point, Transfer, analyse
from megamup.mup import block_scales, table
from megamup.sweep import Study, Trial, load_study, trials

ROOT = Path(__file__).resolve().parents[2]
STUDIES = ROOT / "configs" / "studies" / "mup"
WIDTHS = (64, 128)
Found = dict[str, Any]


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program, with folders of its own and shards that need no making."""
    program = load_program(ROOT / "benchmarks" / "mup_study.py")
    monkeypatch.setattr(program, "OUT", tmp_path / "mup")
    monkeypatch.setattr(program, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(program.subprocess, "run", lambda *_, **__: None)
    return program


# --------------------------------------------------------------------------- coordinate checks


def slopes(rms: list[float | None], change: list[float | None], init: bool = True, judged: str = "flat") -> Found:
    return {"rms": rms, "change": change, "judged_at_init": init, "judged_change": judged, "outside": []}


def test_steepest_is_of_what_is_judged(study: ModuleType) -> None:
    """The start's output and the last step's change; what has no slope is as steep as can be."""
    a, b = slopes([0.01, 0.9], [None, 0.8, -0.07]), slopes([0.5, 0.0], [None, 0.0, 0.02], init=False)
    assert study.steepest({"slopes": {"a": a, "b": b}}) == 0.07
    lazy = slopes([0.02], [None, -3.0], judged="no")
    assert study.steepest({"slopes": {"a": a, "lazy": lazy}}) == 0.07
    assert study.steepest({"slopes": {"a": slopes([0.0], [None, None])}}) == math.inf


def test_apart_is_of_any_module_at_any_step(study: ModuleType) -> None:
    one = {"slopes": {"a": slopes([0.1, 0.2], [None, 0.3]), "b": slopes([0.0, 0.0], [None, 0.0])}}
    other = {"slopes": {"a": slopes([0.1, 0.25], [None, 0.3]), "b": slopes([0.0, 0.0], [None, -0.02])}}
    assert study.apart(one, one) == 0
    undefined = {"slopes": one["slopes"] | {"b": slopes([0.0, 0.0], [None, None])}}
    assert study.apart(one, undefined) == math.inf
    assert study.apart(one, other) == study.apart(other, one) == pytest.approx(0.05)
    with pytest.raises(AssertionError, match="other modules"):
        study.apart(one, {"slopes": {"a": one["slopes"]["a"]}})


def test_a_finished_check_is_not_run_again(study: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless its widths or its config are other ones."""
    ran: list[tuple[int, int, tuple[int, ...]]] = []

    def fake(config: Config, widths: tuple[int, ...], steps: int, tolerance: float) -> Check:
        ran.append((config.parallel.tensor, config.parallel.pipeline, widths))
        rms: dict[int, Rms] = {width: {"a": [(1.0, 0.0)] + [(1.0, 0.5)] * steps} for width in widths}
        flat = Slopes("a", [0.0] * (steps + 1), [None] + [0.01] * steps, True, "flat")
        return Check(config, "width", widths, tolerance, 1, rms, [flat])

    monkeypatch.setattr(study, "check_width", fake)
    layout = study.Layout("gpt", "mup", 2, 1)
    first = study.coordinate_check(layout, WIDTHS)
    again = study.coordinate_check(layout, WIDTHS)
    assert again == json.loads(json.dumps(first))
    assert ran == [(2, 1, WIDTHS)]
    folder = study.OUT / "coordinates" / layout.name
    assert {path.suffix for path in folder.iterdir()} == {".json", ".png", ".html"}
    study.coordinate_check(layout, (64, 128, 256))
    study.coordinate_check(study.Layout("gpt", "mup", 1, 2), WIDTHS)
    assert ran[1:] == [(2, 1, (64, 128, 256)), (1, 2, WIDTHS)]
    monkeypatch.setattr(study, "ARCHS", {"gpt": study.ARCHS["llama"]})
    study.coordinate_check(layout, (64, 128, 256))
    assert len(ran) == 4


# --------------------------------------------------------------------------- claims and exit code


class Fakes:
    """Experiments whose outcome is set: slopes by (parametrization, tensor, pipeline), optima by group."""

    def __init__(self, study: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        self.slopes = dict[tuple[str, int, int], float]()
        self.doublings = {"mup": 0.1, "sp": -1.6}
        monkeypatch.setattr(study, "coordinate_check", self.check)
        monkeypatch.setattr(study, "complete", lambda found, base: (trials(found, base), []))
        monkeypatch.setattr(study, "write_results", lambda *_: None)
        monkeypatch.setattr(study, "transfer_of", self.transfer)
        monkeypatch.setattr(study, "figure", lambda *_: None)

    def check(self, layout: Any, widths: tuple[int, ...]) -> Found:
        usual = 0.02 if layout.parametrization == "mup" else 1.1
        steep = self.slopes.get((layout.parametrization, layout.tensor, layout.pipeline), usual)
        return {"slopes": {"a": slopes([0.0, 0.0], [None, steep])}}

    def transfer(self, curves: object, planned: list[Trial], metric: str) -> Transfer:
        points = []
        for trial in planned:
            config, rate = trial.config, trial.config.optim.lr
            group = config.mup.parametrization
            turn = -7 + self.doublings[group] * math.log2(config.model.d_model / 64) / 3
            points.append(Point(group, config.model.d_model, rate, 3 + 0.1 * (math.log2(rate) - turn) ** 2))
        return analyse(points, "width")


@pytest.fixture
def fakes(study: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return Fakes(study, monkeypatch)


def test_claims_of_every_architecture_and_layout(study: ModuleType, fakes: Fakes) -> None:
    found = study.coordinate_claims(WIDTHS)
    assert all(claim.holds for claim in found)
    for arch in ("llama", "gpt"):
        own = [claim.claim for claim in found if claim.claim.startswith(arch)]
        layouts = [f"{arch}, tensor={tensor}, pipeline={pipeline}: " for tensor, pipeline in study.LAYOUTS]
        assert [sum(claim.startswith(layout) for claim in own) for layout in layouts] == [1, 2, 2, 2]
        assert own[-1] == f"{arch}, sp: not flat over widths 64 to 128"
        assert len(own) == 8


@pytest.mark.parametrize(
    ("broken", "refuted"),
    [
        ({("mup", 1, 2): 0.3}, ["pipeline=2: |slope| <= 0.1", "pipeline=2: slopes differ"]),
        ({("mup", 2, 2): 0.022}, ["tensor=2, pipeline=2: slopes differ"]),
        ({("sp", 1, 1): 0.05}, ["sp: not flat"]),
    ],
)
def test_a_check_can_refute_its_claims(
    study: ModuleType, fakes: Fakes, broken: dict[tuple[str, int, int], float], refuted: list[str]
) -> None:
    fakes.slopes = broken
    claims = [claim.claim for claim in study.coordinate_claims(WIDTHS) if not claim.holds]
    assert len(claims) == 2 * len(refuted)
    for claim, expected in zip(claims, 2 * refuted, strict=True):
        assert expected in claim


def run(study: ModuleType) -> int:
    code: int = study.main(["--largest", "128", "--studies", "width"])
    return code


def test_exit_code_is_0_where_all_claims_hold(
    study: ModuleType, fakes: Fakes, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(study) == 0
    printed = capsys.readouterr().out
    assert "does not hold" not in printed
    assert printed.count("| holds |") == 16 + 2
    page = (study.OUT / "report.html").read_text(encoding="utf-8")
    assert "llama, tensor=2, pipeline=2" in page
    assert "sp: the optimum moves by -1.60 doublings" in page
    assert not study.RESULTS.exists(), "the committed figures are of the whole study only"


@pytest.mark.parametrize(
    ("doublings", "verdict"),
    [
        ({"mup": 0.6, "sp": -1.6}, "| **does not hold** |"),
        ({"mup": 0.1, "sp": -0.5}, "| **does not hold** |"),
        ({"mup": 0.1, "sp": -9.0}, "| not known |"),  # off the grid: the points show neither
    ],
)
def test_exit_code_is_1_where_one_transfer_does_not_hold(
    study: ModuleType, fakes: Fakes, capsys: pytest.CaptureFixture[str], doublings: dict[str, float], verdict: str
) -> None:
    fakes.doublings = doublings
    assert run(study) == 1
    printed = capsys.readouterr().out
    assert printed.count(verdict) == 1
    assert printed.count("| holds |") == 16 + 1


def test_exit_code_is_1_where_one_check_does_not_hold(study: ModuleType, fakes: Fakes) -> None:
    fakes.slopes = {("mup", 2, 1): 0.2}
    assert run(study) == 1


# --------------------------------------------------------------------------- the studies' files


def test_every_study_has_its_file_and_its_claims_are_of_points_that_it_runs(study: ModuleType) -> None:
    assert {path.stem for path in STUDIES.glob("*.yaml")} == set(study.STUDIES)
    for name, claims in study.STUDIES.items():
        _, curves, planned = load(name)
        for claim in claims:
            own = [trial.config for trial in planned if str(value_of(trial.config, curves.group)) == claim.group]
            assert set(claim.sizes) <= {number_of(config, curves.size) for config in own}


def load(name: str) -> tuple[Study, Any, list[Trial]]:
    found, base = load_study(STUDIES / f"{name}.yaml")
    assert found.curves is not None
    return found, found.curves, trials(found, base)


@pytest.mark.parametrize(("name", "base"), [("width", 64), ("depth", 2), ("batch", 2048), ("tokens", 409_600)])
def test_groups_are_one_model_at_the_base_and_nowhere_else(name: str, base: int) -> None:
    """The base is the only size at which the table says the same of both; the rates are the same everywhere."""
    found, curves, planned = load(name)
    assert found.name == f"mup/{name}"
    by_size: dict[float, dict[str, list[Config]]] = {}
    for trial in planned:
        groups = by_size.setdefault(number_of(trial.config, curves.size), {})
        groups.setdefault(str(value_of(trial.config, curves.group)), []).append(trial.config)
    rates = found.grid["optim.lr"]
    for size, groups in by_size.items():
        assert len(groups) == 2
        assert [[config.optim.lr for config in configs] for configs in groups.values()] == [list(rates)] * 2
        for one, other in zip(*groups.values(), strict=True):
            same = (table(one), block_scales(one, 0)) == (table(other), block_scales(other, 0))
            assert same == (size == base), size
    assert base in by_size
    assert len(by_size) >= 3
