"""The page holds what it should, and needs nothing from outside."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megamup.scaling.fit import fit_law
from megamup.scaling.fit_file import Result, make_result
from megamup.scaling.laws import POWER
from megamup.scaling.report import judge, make_report
from megamup.scaling.runs import Ladder, Point, load_holdout, load_runs

MakeRun = Callable[..., Path]


def result_of(runs: Ladder) -> Result:
    inputs = [point.inputs["C"] for point in runs.points]
    fit = fit_law(POWER, inputs, [point.loss for point in runs.points])
    return make_result(fit, "C", runs, "tools/scaling.py fit")


@pytest.fixture
def result(ladder: list[Path]) -> Result:
    return result_of(load_runs(ladder[:-1]))


@pytest.fixture
def page(result: Result, ladder: list[Path]) -> str:
    return make_report(result, load_holdout(ladder[-1:], result.ladder), "tools/scaling.py report")


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
    page = make_report(result, held, "")
    for text in ("w2048", f"{verdict.predicted:.4f}", f"{verdict.point.loss:.4f}", "inside the interval"):
        assert text in page
    assert f"{verdict.error_percent:+.2f}%".replace("-", "−") in page


def test_a_run_off_the_law_is_outside(result: Result) -> None:
    (verdict,) = judge(result, [Point("worse", {"C": 1e20}, 3.0)])
    assert verdict.inside is False
    assert "outside the interval" in make_report(result, [verdict.point], "")


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


def test_three_figures_with_titles_units_and_page_colours(page: str) -> None:
    assert page.count('<svg role="img" aria-label="') == 3
    for text in ("FLOPs, convention: 6N", "loss (nats per token)", "measured − fitted (%)", "offset c"):
        assert text in page
    for color in ("#1f2328", "#0b63ce"):
        # Left in the page's own style sheet, and nowhere in the drawings.
        assert color not in page[page.index("</style>") :]
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_names_are_escaped(make_run: MakeRun) -> None:
    runs = [make_run(f"<b>{i}&$_", parameters=10 ** (6 + i / 2)) for i in range(5)]
    result = result_of(load_runs(runs))
    page = make_report(result, [], "fit '<script>'")
    assert "<b>" not in page
    assert "<script>" not in page
    assert "&lt;b&gt;0&amp;$_" in page
    assert Elements(page).open == []


def test_without_held_out_runs_the_page_says_so(result: Result) -> None:
    assert "No run was held out" in make_report(result, [], "")


def test_a_lost_curve_is_a_warning(result: Result, ladder: list[Path]) -> None:
    ladder[0].joinpath("metrics.jsonl").unlink()
    page = make_report(result, [], "")
    assert "the training curve of w64 is not shown" in page
    assert page.count("<svg") == 3


def test_points_without_folders_have_no_curves(result: Result) -> None:
    points = tuple(Point(point.name, point.inputs, point.loss) for point in result.ladder.points)
    page = make_report(result_of(Ladder(points, result.ladder.convention)), [], "")
    assert page.count("<svg") == 2


def test_three_points_are_drawn_without_a_band(ladder: list[Path]) -> None:
    result = result_of(load_runs(ladder[:3]))
    held = load_holdout(ladder[-1:], result.ladder)
    page = make_report(result, held, "")
    assert "no interval" in page
    assert "95% interval of one new run" not in page
    assert not re.search(r"\bnan\b", page, re.IGNORECASE)
