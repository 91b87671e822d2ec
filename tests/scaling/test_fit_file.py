"""A fit file gives back the fit it was made from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megamup.errors import MegamupError
from megamup.scaling.analysis import Result, analyse
from megamup.scaling.fit_file import load_result, save_result
from megamup.scaling.laws.loss import power
from megamup.scaling.runs import load_runs
from megamup.scaling.uncertainty import parameter_intervals


@pytest.fixture
def result(ladder: list[Path]) -> Result:
    return analyse(load_runs(ladder).sorted_by("C"), [power("C")], objective="loss", provenance={"command": "fit"})


def test_a_loaded_fit_predicts_as_the_saved_one(result: Result, tmp_path: Path) -> None:
    path = tmp_path / "fits" / "fit.json"
    save_result(result, path)
    loaded = load_result(path)
    assert loaded.fit.parameters == pytest.approx(result.fit.parameters, rel=1e-13)
    before, after = result.predict(np.array([[1e22]])), loaded.predict(np.array([[1e22]]))
    for end in ("loss", "low", "high"):
        np.testing.assert_allclose(getattr(after, end), getattr(before, end), rtol=1e-9)
    for name, ends in parameter_intervals(loaded.fit).items():
        assert ends == pytest.approx(result.intervals[name], rel=1e-7)
    assert loaded.fit.diagnostics == result.fit.diagnostics
    assert loaded.ladder.convention == result.ladder.convention
    assert loaded.warnings == result.warnings
    assert loaded.backtest == result.backtest
    assert loaded.tried == result.tried
    assert loaded.provenance == result.provenance


def test_points_that_were_changed_are_noticed(result: Result, tmp_path: Path) -> None:
    path = tmp_path / "fit.json"
    save_result(result, path)
    content = json.loads(path.read_text())
    content["points"][0]["loss"] += 1e-6
    path.write_text(json.dumps(content))
    with pytest.raises(MegamupError, match="its points are not those that it was fitted to"):
        load_result(path)


def test_run_folders_are_stored_relative_to_the_file(result: Result, tmp_path: Path) -> None:
    path = tmp_path / "fits" / "fit.json"
    save_result(result, path)
    content = json.loads(path.read_text())
    assert content["points"][0]["source"] == "../w64"
    source = load_result(path).ladder.points[0].source
    assert source is not None
    assert source.resolve() == (tmp_path / "w64").resolve()


def test_nothing_is_left_beside_the_file(result: Result, tmp_path: Path) -> None:
    save_result(result, tmp_path / "fits" / "fit.json")
    save_result(result, tmp_path / "fits" / "fit.json")
    assert [path.name for path in (tmp_path / "fits").iterdir()] == ["fit.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", r"is not JSON"),
        ("[]", r"format is None; expected 2"),
        ('{"format": 99}', r"format is 99; expected 2: make it again"),
        ('{"format": 2, "law": "power"}', r"is incomplete; make it again"),
        ('{"format": 2, "law": "cubic"}', r"is incomplete"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "fit.json"
    path.write_text(text)
    with pytest.raises(MegamupError, match=message):
        load_result(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MegamupError, match=r"fit\.json is no file; expected what `scaling\.py fit --output"):
        load_result(tmp_path / "fit.json")


def test_three_points_are_warned_of(ladder: list[Path]) -> None:
    result = analyse(load_runs(ladder[:3]), [power("N")], objective="loss")
    assert any("no intervals: 3 points determine 3 parameters" in warning for warning in result.warnings)
