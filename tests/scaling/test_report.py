"""The page holds what it should, and needs nothing from outside."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megamup.scaling.allocation import parse_cluster
from megamup.scaling.analysis import Result, analyse, analyse_reduced
from megamup.scaling.curves import Curve
from megamup.scaling.figures.drawing import save_figures
from megamup.scaling.laws.loss import CHINCHILLA, power
from megamup.scaling.report import make_report
from megamup.scaling.report.verdict import judge
from megamup.scaling.runs import Ladder, Point, load_holdout, load_runs

MakeRun = Callable[..., Path]
CONVENTION = {"flops": "6N", "parameters": "total", "loss": "valid_loss at the final step"}


def result_of(runs: Ladder) -> Result:
    return analyse(runs.sorted_by("C"), [power("C")], objective="loss", provenance={"command": "fit", "date": "today"})


def html_of(result: Result, held: Any = (), command: str = "") -> str:
    return make_report([result], held, command=command).html


@pytest.fixture
def result(ladder: list[Path]) -> Result:
    return result_of(load_runs(ladder[:-1]))


@pytest.fixture
def page(result: Result, ladder: list[Path]) -> str:
    return html_of(result, load_holdout(ladder[-1:], result.ladder), "tools/scaling.py report")


def loss_of(n: float, d: float) -> float:
    return float(1.69 + 406.4 / n**0.34 + 410.7 / d**0.28)


@pytest.fixture(scope="module")
def iso_points() -> Ladder:
    """Four budgets of six sizes each, with noise."""
    random = np.random.default_rng(0)
    points = []
    for c in np.geomspace(1e18, 1e21, 4):
        for n in 0.1 * c**0.5 * np.geomspace(0.3, 3, 6):
            d = float(c / 6 / n)
            loss = loss_of(float(n), d) * math.exp(0.001 * random.standard_normal())
            points.append(Point(f"{c:.3g}-{n:.3g}", {"C": float(c), "N": float(n), "D": d}, loss))
    return Ladder(tuple(points), CONVENTION)


def batch_curves() -> list[tuple[Point, Curve]]:
    """Five batches by three rates, S = S_min (1 + B_crit / B), that reach the same losses."""
    runs = []
    for batch in 2.0 ** np.arange(9, 14):
        for rate, slower in ((0.5, 1.3), (1.0, 1.0), (2.0, 1.2)):
            loss = np.geomspace(6.0, 3.0, 60)
            steps = 20 * (6.2 / loss) ** 4 * (1 + 3e5 * loss**-4 / batch) * slower
            inputs = {"N": 1e6, "B": float(batch), "lr": rate}
            runs.append((Point(f"{batch}-{rate}", inputs, 3.0), Curve(steps, steps * batch, steps * batch * 6e6, loss)))
    return runs


class Elements(HTMLParser):
    """Collects ids and checks that every element is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for key, value in attrs if key == "id" and value]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for key, value in attrs if key == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_headline_states_prediction_measurement_error_and_interval(result: Result, ladder: list[Path]) -> None:
    held = load_holdout(ladder[-1:], result.ladder)
    (verdict,) = judge(result, held)
    assert verdict.error_percent == pytest.approx(100 * (verdict.predicted - held[0].loss) / held[0].loss)
    assert verdict.inside is True
    page = html_of(result, held)
    for text in ("w2048", f"{verdict.predicted:.4f}", f"{verdict.point.loss:.4f}", "inside the interval"):
        assert text in page
    assert f"{verdict.error_percent:+.2f}%".replace("-", "−") in page


def test_a_run_off_the_law_is_outside(result: Result) -> None:
    (verdict,) = judge(result, [Point("worse", {"C": 1e20}, 3.0)])
    assert verdict.inside is False
    assert "outside the interval" in html_of(result, [verdict.point])


def test_nothing_comes_from_outside(page: str) -> None:
    assert not re.findall(r"<script|<link|<img|@import|@font-face", page)
    linked = re.findall(r'(?:href|src)="([^"]*)"|url\(([^)]*)\)', page)
    assert linked
    assert all((href or url).startswith("#") for href, url in linked)


def test_html_is_well_formed_with_unique_ids_that_references_meet(page: str) -> None:
    elements = Elements(page)
    assert elements.open == []
    assert len(elements.ids) == len(set(elements.ids))
    references = re.findall(r'(?:href="|url\()#([^")]*)', page)
    assert set(references) <= set(elements.ids)


def drawn(result: Result) -> set[str]:
    """Names of the figures, without the law's."""
    return {drawing.name.removeprefix("power-C-") for drawing in make_report([result]).drawings}


def test_figures_have_titles_units_and_page_colours(page: str) -> None:
    assert page.count('<svg role="img" aria-label="') == 6
    for text in ("FLOPs, convention: 6N", "loss (nats per token)", "measured over fitted, less 1 (%)", "offset c"):
        assert text in page
    for color in ("#1f2328", "#0b63ce"):
        # Left in the page's own style sheet, and nowhere in the drawings.
        assert color not in page[page.index("</style>") :]
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_names_are_escaped(make_run: MakeRun) -> None:
    runs = [make_run(f"<b>{i}&$_", parameters=10 ** (6 + i / 2)) for i in range(5)]
    result = result_of(load_runs(runs))
    page = html_of(result, [], "fit '<script>'")
    assert "<b>" not in page
    assert "<script>" not in page
    assert "&lt;b&gt;0&amp;$_" in page
    assert Elements(page).open == []


def test_without_held_out_runs_the_page_says_so(result: Result) -> None:
    assert "No run was held out" in html_of(result)


def test_a_lost_curve_is_a_warning(result: Result, ladder: list[Path]) -> None:
    ladder[0].joinpath("metrics.jsonl").unlink()
    assert "the training curve of w64 is not shown" in html_of(result)
    assert "curves" in drawn(result)


def test_what_has_no_data_is_left_out(result: Result) -> None:
    assert drawn(result) == {"L-C", "residuals", "influence", "backtest", "curves", "mfu"}
    points = tuple(Point(point.name, point.inputs, point.loss) for point in result.ladder.points)
    without = drawn(result_of(Ladder(points, result.ladder.convention)))
    assert without == {"L-C", "residuals", "influence", "backtest"}


def test_three_points_are_drawn_without_a_band(ladder: list[Path]) -> None:
    result = result_of(load_runs(ladder[:3]))
    held = load_holdout(ladder[-1:], result.ladder)
    page = html_of(result, held)
    assert "no interval" in page
    assert "95% interval of one new run" not in page
    assert not re.search(r"\bnan\b", page, re.IGNORECASE)


def test_several_laws_share_a_page_with_frontier_target_and_allocation(iso_points: Ladder) -> None:
    results = [analyse_reduced("isoflop", iso_points, list), analyse(iso_points, [CHINCHILLA], objective="log")]
    report = make_report(
        results,
        command="report",
        target={"N": 1e10, "D": 2e11},
        budgets=[1e22],
        cluster=parse_cluster("devices=64,peak=989e12,mfu=40,price=2"),
    )
    assert Elements(report.html).open == []
    names = [drawing.name for drawing in report.drawings]
    assert len(names) == len(set(names))
    for wanted in ("isoflop", "optimum", "contour", "residuals", "backtest"):
        assert any(wanted in name for name in names), names
    (row, *_) = report.numbers["allocation"]
    assert row["flops"] == 1e22
    # The whole budget on this cluster, 64 devices at 40% of their peak.
    assert row["days"] == pytest.approx(1e22 / (64 * 989e12 * 0.4) / 86400, rel=1e-6)
    assert row["cost"] == pytest.approx(row["device_hours"] * 2)
    estimates = {(e["law"], e["name"]): e["value"] for e in report.numbers["target"]["estimates"]}
    assert estimates["chinchilla", "L"] == pytest.approx(loss_of(1e10, 2e11), rel=0.01)


def test_critical_batches_are_drawn_from_their_curves() -> None:
    curves = batch_curves()
    ladder = Ladder(tuple(point for point, _ in curves), CONVENTION)
    result = analyse_reduced("critical-batch", ladder, lambda: curves)
    report = make_report([result], curves=curves)
    assert any("batch" in drawing.name for drawing in report.drawings)
    assert "B_crit" in report.html


def test_numbers_are_json_without_nan(result: Result, ladder: list[Path], iso_points: Ladder) -> None:
    held = load_holdout(ladder[-1:], result.ladder)
    for report in (make_report([result], held), make_report([analyse_reduced("isoflop", iso_points, list)])):
        text = json.dumps(report.numbers, allow_nan=False)
        assert json.loads(text)["figures"].keys() == {drawing.name for drawing in report.drawings}
    three = make_report([result_of(load_runs(ladder[:3]))], held)
    json.dumps(three.numbers, allow_nan=False)


def test_figures_are_written_as_png_and_svg(result: Result, tmp_path: Path) -> None:
    report = make_report([result])
    written = save_figures(report.drawings, tmp_path / "figures")
    assert {path.suffix for path in written} == {".png", ".svg"}
    assert len(written) == 2 * len(report.drawings)
    for path in written:
        start = path.read_bytes()[:100]
        assert start.startswith(b"\x89PNG") if path.suffix == ".png" else b"<?xml" in start
