"""What all figures share: ticks that have room, labels, groups of points, numbers, and files."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from megamup.page import RAMP
from megamup.scaling.analysis import analyse
from megamup.scaling.figures.drawing import (
    Drawing,
    add_legend,
    axis_label,
    log_label,
    log_scale,
    name_axes,
    new_figure,
    plain,
    save_figures,
    shades,
)
from megamup.scaling.figures.frontier import optimum_drawing
from megamup.scaling.figures.groups import MOST, groups_of
from megamup.scaling.figures.isoflop import isoflop_drawing, vertex_interval
from megamup.scaling.figures.loss import loss_drawings
from megamup.scaling.isoflop import isoflop
from megamup.scaling.laws.kaplan import D_OPT, N_OPT
from megamup.scaling.laws.loss import CHINCHILLA
from megamup.scaling.runs import Ladder, Point


@pytest.mark.parametrize(
    ("low", "high"),
    [(1.4, 3.0), (2.7, 3.4), (8e11, 6e12), (4e4, 4e5), (2.6e4, 8.5e5), (1e8, 3e10), (1e15, 1e24), (0.01, 1.4)],
)
def test_labels_of_a_log_axis_are_several_and_do_not_touch(low: float, high: float) -> None:
    figure, (axes, _) = new_figure(2)
    log_scale(axes, "x")
    axes.plot([low, high], [1, 2])
    axes.set_xlim(low, high)
    figure.draw(FigureCanvasAgg(figure).get_renderer())  # type: ignore[no-untyped-call]
    ticks = [tick for tick in axes.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    boxes = sorted((tick.label1.get_window_extent() for tick in ticks), key=lambda box: box.x0)
    assert 2 <= len(boxes) <= 12
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    assert not any(text.get_text() for text in axes.xaxis.get_minorticklabels())


def test_labels_of_ticks_are_numbers_or_powers_of_ten() -> None:
    assert [log_label(x) for x in (0.02, 1.5, 500.0)] == ["0.02", "1.5", "500"]
    assert log_label(1e12) == r"$\mathdefault{10^{12}}$"
    assert log_label(5e-7) == r"$\mathdefault{5·10^{-7}}$"


def test_labels_say_how_a_quantity_was_counted() -> None:
    assert axis_label("N", {"parameters": "total"}) == "N, parameters (total)"
    assert axis_label("C", {"flops": "none"}) == axis_label("C", {}) == "C, training compute (FLOPs)"
    assert axis_label("column", {}) == "column"


def test_dollars_in_names_are_no_formula() -> None:
    figure, (axes,) = new_figure()
    axes.plot([1, 2], [1, 2], label=r"run$\frac$")
    name_axes(axes, r"$\bad", "y")
    add_legend(axes)
    figure.draw(FigureCanvasAgg(figure).get_renderer())  # type: ignore[no-untyped-call]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [r"run$\frac$"]


def test_shades_follow_the_log_and_equal_values_share_one() -> None:
    assert shades([1.0, 10.0, 100.0]) == [RAMP[0], RAMP[round(0.5 * (len(RAMP) - 1))], RAMP[-1]]
    assert set(shades([3.0, 3.0])) == {RAMP[0]}


def test_groups_hold_every_point_once_and_likes_together() -> None:
    n = np.repeat([1e6, 1.05e6, 1e7, 1e8], 3)
    groups = groups_of(["N"], n[:, np.newaxis])
    assert [len(group.rows) for group in groups] == [6, 3, 3]  # 5% apart are alike
    assert groups[0].at["N"] == pytest.approx(math.sqrt(1e6 * 1.05e6))
    many = groups_of(["N"], np.geomspace(1e6, 1e9, 40)[:, np.newaxis])
    assert len(many) == MOST
    assert sorted(row for group in many for row in group.rows) == list(range(40))
    (all_of_them,) = groups_of([], np.ones((5, 0)))
    assert all_of_them.label == ""


def test_plain_is_json_without_nan() -> None:
    found = plain({"a": np.array([1.0, np.nan]), "b": (np.int64(3), math.inf), 4: None, "c": np.bool_(True)})
    assert found == {"a": [1.0, None], "b": [3, None], "4": None, "c": True}


def test_vertices_of_exact_parabolas_are_drawn_where_they_are() -> None:
    best = {1e18: 2e7, 1e19: 7e7}
    points = [
        Point(f"{c}-{n}", {"C": c, "N": n, "D": c / 6 / n}, 3.0 + 0.1 * math.log(n / top) ** 2)
        for c, top in best.items()
        for n in (top * np.geomspace(0.3, 2, 5)).tolist()
    ]
    found = isoflop(Ladder(tuple(points), {"flops": "6N", "parameters": "total", "loss": "x"}))
    rows = isoflop_drawing(found).numbers["budgets"]
    assert [row["N_opt"] for row in rows] == pytest.approx(list(best.values()))
    for budget, row in zip(found.budgets, rows, strict=True):
        low, high = vertex_interval(budget)
        assert low is not None
        assert high is not None
        assert low <= row["N_opt"] <= high


def test_the_frontier_is_the_envelope_of_the_lines_however_flops_are_counted() -> None:
    def loss(n: float, d: float) -> float:
        return float(1.69 + 406.4 / n**0.34 + 410.7 / d**0.28)

    flops_per_product = 9.0
    sizes = [(n, d) for n in np.geomspace(1e7, 1e9, 5).tolist() for d in np.geomspace(1e9, 1e11, 4).tolist()]
    points = (Point(f"{n}-{d}", {"C": flops_per_product * n * d, "N": n, "D": d}, loss(n, d)) for n, d in sizes)
    ladder = Ladder(tuple(points), {"flops": "palm", "parameters": "total", "loss": "x"})
    result = analyse(ladder, [CHINCHILLA], objective="log")
    (drawing,) = (drawing for drawing in loss_drawings(result, (), "law") if drawing.name == "law-L-C")
    frontier = drawing.numbers["frontier"]
    for c, least in zip(frontier["x"], frontier["law"], strict=True):
        n = np.geomspace(1e5, 1e12, 4000)
        assert least == pytest.approx(min(loss(a, c / flops_per_product / a) for a in n.tolist()), rel=1e-5)
    optimum = optimum_drawing([result], None, None)
    assert optimum is not None
    n, d = (np.array(optimum.numbers[f"{key}_opt"]["approach 3: chinchilla"][key]) for key in "ND")
    assert flops_per_product * n * d == pytest.approx(np.array(optimum.numbers["C"]))


def test_figures_are_written_as_png_and_svg(tmp_path: Path) -> None:
    drawings = []
    for name in ("one", "two"):
        figure, (axes,) = new_figure()
        axes.plot([1, 2], [1, 2])
        drawings.append(Drawing(name, "title", "caption", figure, {}))
    written = save_figures(drawings, tmp_path / "figures")
    assert {path.name for path in written} == {"one.png", "one.svg", "two.png", "two.svg"}
    for path in written:
        start = path.read_bytes()[:100]
        assert start.startswith(b"\x89PNG") if path.suffix == ".png" else b"<?xml" in start


def test_published_slopes_cross_the_power_law_far_beyond_the_budgets_it_was_fitted_to() -> None:
    points = tuple(
        Point(
            f"{c:g} {x}", {"C": c, "N": c**0.5 * x, "D": c**0.5 / 6 / x}, 3 - 0.1 * np.log10(c / 1e17) + np.log(x) ** 2
        )
        for c in (1e17, 1e18, 1e19)
        for x in (0.5, 0.8, 1.25, 2.0)
    )
    runs = Ladder(points, {"flops": "6N", "parameters": "total", "loss": "valid_loss"})
    found = isoflop(runs)
    laws = [analyse(found.ladder, [law]) for law in (N_OPT, D_OPT)]
    drawing = optimum_drawing(laws, None, found, budgets=[1e24])
    assert drawing is not None
    for axes in drawing.figure.axes:
        lines = {str(line.get_label()): np.asarray(line.get_ydata(), dtype=np.float64) for line in axes.get_lines()}
        law = lines["its power law"]
        slopes = [values for label, values in lines.items() if label.startswith("slope of")]
        assert len(slopes) == 2
        # Off the law to both sides, or on it all along.
        assert all(np.allclose(values, law) or (values[0] - law[0]) * (values[-1] - law[-1]) < 0 for values in slopes)


def test_every_line_has_its_own_shade() -> None:
    points = tuple(
        Point(f"{n:g} {d:g}", {"N": n, "D": d}, 1.7 + 400 / n**0.34 + 2000 / d**0.37 + 0.001 * np.sin(i))
        for i, (n, d) in enumerate((n, d) for n in np.geomspace(1e6, 1e8, MOST) for d in (1e8, 1e9, 1e10))
    )
    result = analyse(
        Ladder(points, {"flops": "6N", "parameters": "total", "loss": "valid_loss"}), [CHINCHILLA], objective="log"
    )
    by_data = next(d for d in loss_drawings(result, (), "x") if d.numbers["x"] == "D")
    lines = [line for line in by_data.figure.axes[0].get_lines() if str(line.get_label()).startswith("N = ")]
    assert [line.get_color() for line in lines] == list(RAMP)
