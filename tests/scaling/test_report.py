"""The page holds what it should, and needs nothing from outside."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from megamup.cluster import parse_cluster
from megamup.scaling.analysis import Result, analyse, analyse_reduced
from megamup.scaling.curve_fit import analyse_curves
from megamup.scaling.curves import Curve, Smoothing
from megamup.scaling.laws.loss import CHINCHILLA, power
from megamup.scaling.report import Report, make_report
from megamup.scaling.report.verdict import judge
from megamup.scaling.runs import Ladder, Point, Reading, load_holdout, load_runs, load_tracks

MakeRun = Callable[..., Path]
CONVENTION = {"flops": "6N", "parameters": "total", "loss": "valid_loss at the final step"}


def fitted(runs: Ladder) -> Result:
    return analyse(runs.sorted_by("C"), [power("C")], objective="loss", provenance={"command": "fit", "date": "today"})


def on_the_law(name: str, flops: float, noise: float) -> Point:
    return Point(name, {"C": flops, "N": flops**0.5}, (40 * flops**-0.11 + 1.75) * (1 + noise))


HELD = on_the_law("w$_2<b>", 1e20, 0.001)
"""A name that would be markup, or mathtext, were it taken as such."""


@pytest.fixture(scope="module")
def result() -> Result:
    """Seven points with noise of up to 0.3%, one of them with a name like that of `HELD`."""
    noise = (0.002, -0.003, 0.003, -0.001, -0.002, 0.001, 0.002)
    names = ["<i>0&$_", *(f"w{i}" for i in range(1, 7))]
    points = (on_the_law(name, 1e15 * 5**i, e) for i, (name, e) in enumerate(zip(names, noise, strict=True)))
    return fitted(Ladder(tuple(points), CONVENTION))


@pytest.fixture(scope="module")
def report(result: Result) -> Report:
    return make_report([result], [HELD], command="report '<script>'")


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
    """Collects ids and headings, and checks that every element is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.open: list[str] = []
        self.headings: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for key, value in attrs if key == "id" and value]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for key, value in attrs if key == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["h2"]:
            self.headings.append(data)


def headings(report: Report) -> list[str]:
    return Elements(report.html).headings


def drawn(report: Report) -> set[str]:
    """Names of the figures, without the law's."""
    return {drawing.name.removeprefix("power-C-") for drawing in report.drawings}


def test_a_card_states_prediction_measurement_error_and_interval(result: Result, report: Report) -> None:
    (verdict,) = judge(result, [HELD])
    assert verdict.error_percent == pytest.approx(100 * (verdict.predicted - HELD.loss) / HELD.loss)
    assert verdict.inside is True
    for text in (f"{verdict.predicted:.4f}", f"{HELD.loss:.4f}", "inside the interval"):
        assert text in report.html
    assert f"{verdict.error_percent:+.2f}%".replace("-", "−") in report.html
    (row,) = report.numbers["held_out"]
    assert (row["run"], row["predicted"], row["inside"]) == (HELD.name, verdict.predicted, True)


def test_a_run_off_the_law_is_outside_and_three_points_have_no_interval(result: Result) -> None:
    off = Point("worse", {"C": 1e20, "N": 1e10}, 3.0)
    assert judge(result, [off])[0].inside is False
    three = fitted(Ladder(result.ladder.points[:3], CONVENTION))
    report = make_report([three], [off])
    assert "no interval" in report.html
    assert "95% interval of one new run" not in report.html
    assert not re.search(r"\bnan\b", report.html, re.IGNORECASE)
    json.dumps(report.numbers, allow_nan=False)
    assert drawn(report) == {"L-C", "residuals"}  # the held-out run's; three points leave no other


def test_nothing_comes_from_outside(report: Report) -> None:
    assert not re.findall(r"<script|<link|<img|@import|@font-face", report.html)
    linked = re.findall(r'(?:href|src)="([^"]*)"|url\(([^)]*)\)', report.html)
    assert linked
    assert all((href or url).startswith("#") for href, url in linked)


def test_html_is_well_formed_with_unique_ids_that_references_meet(report: Report) -> None:
    elements = Elements(report.html)
    assert elements.open == []
    assert len(elements.ids) == len(set(elements.ids))
    references = re.findall(r'(?:href="|url\()#([^")]*)', report.html)
    assert set(references) <= set(elements.ids)


def test_figures_have_titles_units_and_page_colours(report: Report) -> None:
    assert report.html.count('<svg role="img" aria-label="') == len(report.drawings)
    for text in ("FLOPs, convention: 6N", "loss (nats per token)", "measured over fitted, less 1 (%)", "offset c"):
        assert text in report.html
    for color in ("#1f2328", "#0b63ce"):
        # Left in the page's own style sheet, and nowhere in the drawings.
        assert color not in report.html[report.html.index("</style>") :]
    assert "prefers-color-scheme: dark" in report.html
    assert "@media print" in report.html


def test_names_are_escaped(report: Report) -> None:
    assert "<b>" not in report.html
    assert "<i>" not in report.html
    assert "<script>" not in report.html
    assert "w$_2&lt;b&gt;" in report.html
    assert "&lt;i&gt;0&amp;$_" in report.html


def test_a_decision_comes_before_its_evidence_and_its_tables(report: Report) -> None:
    expected = ["Loss against C", "Larger runs predicted from smaller ones", "Residuals", "Influence of each run"]
    found = headings(report)
    places = [found.index(heading) for heading in [*expected, "Parameters", "Runs", "Diagnostics", "Provenance"]]
    assert places == sorted(places)
    assert report.html.index("inside the interval") < report.html.index("Loss against C")


def test_run_folders_add_curves_and_utilization_and_a_lost_curve_is_a_warning(ladder: list[Path]) -> None:
    result = fitted(load_runs(ladder[:-1]))
    held = load_holdout(ladder[-1:], result.ladder)
    ladder[0].joinpath("metrics.jsonl").unlink()
    report = make_report([result], held)
    assert drawn(report) == {"L-C", "residuals", "influence", "backtest", "curves", "mfu"}
    assert "the training curve of w64 is not shown" in report.html
    runs = [curve["run"] for curve in report.numbers["figures"]["curves"]["curves"]]
    assert runs == ["w128", "w256", "w512", "w1024", "w2048"]
    assert "Utilization" in headings(report)


def test_points_without_folders_have_neither(report: Report) -> None:
    assert drawn(report) == {"L-C", "residuals", "influence", "backtest"}
    assert "Utilization" not in headings(report)


def test_an_outlier_is_flagged() -> None:
    noise = 0.001 * np.random.default_rng(0).standard_normal(14)
    points = [on_the_law(f"w{i}", 1e15 * 2**i, float(e)) for i, e in enumerate(noise)]
    points[6] = on_the_law("spoilt", 1e15 * 2**6, 0.03)
    report = make_report([fitted(Ladder(tuple(points), CONVENTION))])
    assert "Runs to look at" in headings(report)
    assert re.search(r"<li>spoilt: it lies \+?[\d.]+ standard errors off the law of the others", report.html)
    assert "No run was held out" in report.html


def test_several_laws_share_a_page_with_frontier_target_and_allocation(iso_points: Ladder) -> None:
    results = [analyse_reduced("isoflop", iso_points, list), analyse(iso_points, [CHINCHILLA], objective="log")]
    report = make_report(
        results,
        target={"N": 1e10, "D": 2e11},
        budgets=[1e22],
        cluster=parse_cluster("devices=64,peak=989e12,mfu=40,price=2"),
    )
    names = [drawing.name for drawing in report.drawings]
    assert len(names) == len(set(names))
    assert {"isoflop", "optimum", "chinchilla-contours", "chinchilla-L-C", "chinchilla-residuals"} <= set(names)
    found = headings(report)
    assert f"{CHINCHILLA.formula}: residuals" in found  # every title says which law it is about
    assert "Allocation by N = a·C^b (isoflop)" in found
    # Approaches 2 and 3 disagree on the best model by what the noise leaves, and so do their tables.
    of = {row["law"]: row for row in report.numbers["allocation"]}
    assert of.keys() == {CHINCHILLA.formula, "N = a·C^b (isoflop)"}
    row, other = of.values()
    assert row["flops"] == 1e22
    assert other["parameters"] == pytest.approx(row["parameters"], rel=0.3)
    # The whole budget on this cluster, 64 devices at 40% of their peak.
    assert row["days"] == pytest.approx(1e22 / (64 * 989e12 * 0.4) / 86400, rel=1e-6)
    assert row["cost"] == pytest.approx(row["device_hours"] * 2)
    estimates = {(e["law"], e["name"]): e["value"] for e in report.numbers["target"]["estimates"]}
    assert estimates["chinchilla", "L"] == pytest.approx(loss_of(1e10, 2e11), rel=0.01)
    text = json.dumps(report.numbers, allow_nan=False)
    assert json.loads(text)["figures"].keys() == set(names)


def test_critical_batches_are_drawn_from_their_curves_in_one_figure() -> None:
    curves = batch_curves()
    ladder = Ladder(tuple(point for point, _ in curves), CONVENTION)
    result = analyse_reduced("critical-batch", ladder, lambda: curves, objective="log")
    report = make_report([result], curves=curves)
    assert "critical-batch" in drawn(report)
    assert "batch-loss-B-L" not in drawn(report)  # the law of the B_crit alone is in that figure
    levels = report.numbers["figures"]["critical-batch"]["levels"]
    assert [level["B_crit"] for level in levels] == pytest.approx([3e5 * level["loss"] ** -4 for level in levels], 0.05)


def test_a_law_of_whole_curves_shows_schedules_and_no_backtest(make_run: MakeRun) -> None:
    reading = Reading(loss="loss", smoothing=Smoothing("none"))
    runs = [make_run("constant", steps=400), make_run("decayed", steps=400)]
    for folder, decay in zip(runs, (False, True), strict=True):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            step = line["step"]
            line["lr"] = 0.01 * (min(1.0, 2 * (1 - step / 400)) if decay else 1.0) + 1e-4
            if "loss" in line:
                won = 0.15 * max(0.0, 2 * step / 400 - 1) if decay else 0.0
                line["loss"] = 2.0 + 1.5 * (step / 20) ** -0.4 - won + 0.002 * math.sin(step)
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    result = analyse_curves("annealing", *load_tracks(runs, (), reading), objective="log")
    report = make_report([result])
    assert drawn(report) == {"annealing-curves", "curves", "mfu"}
    assert [curve["run"] for curve in report.numbers["figures"]["annealing-curves"]["curves"]] == [
        "constant",
        "decayed",
    ]
    assert "Schedules, fitted and held out" in headings(report)
    assert "--holdout" not in report.html  # which takes runs, not schedules
