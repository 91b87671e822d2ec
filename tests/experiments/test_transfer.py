"""What U-curves say of transfer: optima are recovered, edges are not interpolated, and the page shows the table."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from megamup.errors import MegamupError
from megamup.experiments.transfer import Claim, Curve, Point, Transfer, analyse, conclusions, lines, markdown, number
from megamup.experiments.transfer_page import figure, html

RATES = [2.0**power for power in range(-12, -1)]
WIDTHS = (64, 128, 256, 512)


def bowl(optimum: float) -> Callable[[float], float]:
    """Loss against log2(rate): a parabola that turns at ``optimum``, 0.1 nats up a doubling away."""
    return lambda power: 3.0 + 0.1 * (power - optimum) ** 2


def trials(group: str, size: float, optimum: float, rates: Sequence[float] = RATES, seed: int = 0) -> list[Point]:
    return [Point(group, size, rate, bowl(optimum)(math.log2(rate)), seed) for rate in rates]


def only_curve(points: Sequence[Point]) -> Curve:
    ((curve,),) = (group.curves for group in analyse(points, "width").groups)
    return curve


@pytest.fixture(scope="module")
def experiment() -> Transfer:
    """mup stays at 2^-5.3; sp follows 1/width and diverges far above its optimum."""
    points = []
    for size in WIDTHS:
        doublings = math.log2(size / 64)
        points += trials("mup", size, -5.3)
        points += [
            point if math.log2(point.rate) < -2.5 - doublings else Point("sp", size, point.rate, math.inf)
            for point in trials("sp", size, -5.3 - doublings)
        ]
    return analyse(points, "width")


@pytest.mark.parametrize("optimum", [-6.0, -5.5, -5.3, -4.73])
@pytest.mark.parametrize("step", [0.5, 1.0, 1.4])
def test_the_optimum_of_a_parabola_is_exact(optimum: float, step: float) -> None:
    rates = [2.0 ** (-9 + step * index) for index in range(int(7 / step))]
    curve = only_curve(trials("mup", 64, optimum, rates))
    assert curve.optimum is not None
    assert math.log2(curve.optimum.rate) == pytest.approx(optimum, abs=1e-9)
    assert curve.optimum.loss == pytest.approx(3.0)
    assert curve.optimum.standard_error is None
    assert not curve.at_edge


def test_mup_stays_and_sp_moves_one_doubling_for_each_of_width(experiment: Transfer) -> None:
    mup, sp = experiment.groups
    assert (mup.name, sp.name) == ("mup", "sp")
    assert [curve.shift for curve in mup.curves] == pytest.approx([0, 0, 0, 0], abs=1e-9)
    assert [curve.shift for curve in sp.curves] == pytest.approx([0, -1, -2, -3])
    assert (mup.shift, mup.slope) == pytest.approx((0, 0), abs=1e-9)
    assert (sp.shift, sp.slope) == pytest.approx((-3, -1))


def test_loss_lost_is_that_of_the_base_best_rate(experiment: Transfer) -> None:
    mup, sp = experiment.groups
    assert [curve.lost for curve in mup.curves] == [0, 0, 0, 0]
    # The base's best rate is 2^-5, 0.3 above the optimum: 1.3 and 2.3 doublings above it at the next widths.
    found = [curve.lost for curve in sp.curves]
    assert found[:3] == pytest.approx([0, 0.1 * (1.3**2 - 0.3**2), 0.1 * (2.3**2 - 0.3**2)])


def test_a_base_rate_that_diverges_loses_everything_and_one_not_run_is_not_known() -> None:
    base = trials("sp", 64, -5)
    diverges = [Point("sp", 128, p.rate, p.loss if p.rate < 2**-6 else math.inf) for p in trials("sp", 128, -8)]
    not_run = trials("sp", 256, -9, RATES[:5])
    all_diverge = [Point("sp", 512, rate, math.nan) for rate in RATES]
    curves = analyse([*base, *diverges, *not_run, *all_diverge], "width").groups[0].curves
    assert [curve.lost for curve in curves] == [0, math.inf, None, math.inf]
    text = "\n".join(lines(analyse([*base, *diverges], "width")))
    assert "diverges at width 128" in text


@pytest.mark.parametrize(
    ("optimum", "edge", "shown"), [(-14, "lowest", "≤ 0.0002441"), (0, "highest", "≥ 0.25"), (-4, None, "0.0625")]
)
def test_an_optimum_at_the_edge_is_only_a_bound(optimum: float, edge: str | None, shown: str) -> None:
    points = trials("mup", 64, -5) + trials("mup", 128, -5.5) + trials("mup", 256, optimum)
    (group,) = analyse(points, "width").groups
    *_, curve = group.curves
    assert curve.edge == edge
    assert curve.at_edge == (edge is not None) == (curve.optimum is None) == (curve.shift is None)
    assert f" {shown} " in "\n".join(lines(analyse(points, "width")))
    if edge:
        assert group.shift is None
        assert group.slope == pytest.approx(-0.5)  # of the two sizes that are known
        assert "does not resolve the optimum at width 256" in markdown(analyse(points, "width"))


@pytest.mark.parametrize("fallen", [math.inf, math.nan, 9.0])
def test_nothing_is_interpolated_beside_a_cliff(fallen: float) -> None:
    """Diverged or finite: a parabola through the cliff would put the optimum half a step below the best rate."""
    points = [Point("mup", 64, p.rate, p.loss if p.rate < 2**-5 else fallen) for p in trials("mup", 64, -5.8)]
    curve = only_curve(points)
    assert curve.best is not None
    assert (curve.best.rate, curve.edge, curve.optimum) == (2**-6, "cliff", None)


def test_one_size_or_one_rate_says_nothing_of_transfer() -> None:
    transfer = analyse(trials("mup", 64, -5), "width")
    (group,) = transfer.groups
    assert (group.shift, group.slope) == (None, None)
    assert "one width only (64)" in markdown(transfer)
    assert only_curve([Point("mup", 64, 0.01, 3.0)]).edge == "only"
    every = only_curve([Point("mup", 64, rate, math.inf) for rate in RATES])
    assert (every.best, every.optimum, every.at_edge) == (None, None, False)


def test_seeds_are_averaged_and_their_spread_is_kept() -> None:
    low, high = trials("mup", 64, -5.4, seed=1), trials("mup", 64, -5.0, seed=2)
    curve = only_curve([*low, *high])
    pairs = [(a.loss, b.loss) for a, b in zip(low, high, strict=True)]
    assert [point.loss for point in curve.points] == pytest.approx([np.mean(pair) for pair in pairs])
    assert [point.std for point in curve.points] == pytest.approx([np.std(pair, ddof=1) for pair in pairs])
    assert curve.optimum is not None
    assert math.log2(curve.optimum.rate) == pytest.approx(-5.2)
    assert curve.optimum.standard_error == pytest.approx(0.2)  # of a mean of two: half their distance


def test_a_seed_that_shifts_all_rates_alike_leaves_the_optimum_certain() -> None:
    lifted = [Point("mup", 64, p.rate, p.loss + 0.3, 1) for p in trials("mup", 64, -5.2)]
    curve = only_curve([*trials("mup", 64, -5.2), *lifted])
    assert curve.optimum is not None
    assert curve.optimum.standard_error == pytest.approx(0, abs=1e-9)


def test_one_diverged_seed_rules_a_rate_out_and_unequal_seeds_give_no_error() -> None:
    points = trials("mup", 64, -5.2) + trials("mup", 64, -5.2, RATES[3:], seed=1)
    points[-1] = Point("mup", 64, RATES[-1], math.inf, 1)
    curve = only_curve(points)
    assert curve.points[-1].loss == math.inf
    assert (curve.points[-1].seeds, curve.points[-1].diverged) == (2, 1)
    missing = [point for point in points if (point.rate, point.seed) != (2**-6, 1)]
    for given, known in ((points, True), (missing, False)):
        optimum = only_curve(given).optimum
        assert optimum is not None
        assert (optimum.standard_error is not None) == known


def test_on_a_fine_grid_noise_moves_the_optimum_less_than_through_three_points() -> None:
    rng, errors, errors_of_three = np.random.default_rng(0), [], []
    for _ in range(200):
        powers = np.arange(-8, -2, 0.5) + rng.uniform(0, 0.5)
        losses = np.array([bowl(-5)(power) for power in powers]) + rng.normal(0, 0.014, len(powers))
        curve = only_curve([Point("mup", 64, 2.0**x, y) for x, y in zip(powers, losses, strict=True)])
        at = int(np.argmin(losses))
        a, b, _ = np.polyfit(powers[at - 1 : at + 2], losses[at - 1 : at + 2], 2)
        assert curve.optimum is not None
        errors.append(math.log2(curve.optimum.rate) + 5)
        errors_of_three.append(5 - b / (2 * a))
    assert np.std(errors) < 0.75 * np.std(errors_of_three)


def test_claims_hold_fail_or_are_not_known(experiment: Transfer) -> None:
    found = conclusions(
        experiment,
        [
            Claim("mup", "|shift|", "<", 0.5),
            Claim("sp", "|shift|", "<", 0.5),
            Claim("sp", "shift", "<", -1.9, sizes=(64, 256)),
            Claim("sp", "slope", ">", -0.5),
            Claim("sp", "lost", ">", 0.1, sizes=(256, 512)),
        ],
    )
    assert [conclusion.holds for conclusion in found] == [True, False, True, False, True]
    assert [conclusion.value for conclusion in found] == pytest.approx([0, 3, -2, -1, 0.16], abs=1e-9)
    assert found[1].claim == "sp: |shift| from width 64 to 512 < 0.5 doublings"
    edge = analyse(trials("mup", 64, -5) + trials("mup", 128, 0), "width")
    (unknown,) = conclusions(edge, [Claim("mup", "|shift|", "<", 0.5)])
    assert (unknown.value, unknown.holds) == (None, None)


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        (Claim("mpu", "slope", "<", 1), "group mpu: not in this experiment; expected one of mup, sp"),
        (Claim("mup", "slope", "<", 1, (64, 96)), "mup: width 96: not run; expected one of 64, 128, 256, 512"),
    ],
)
def test_a_claim_about_what_was_not_run_is_an_error(experiment: Transfer, claim: Claim, message: str) -> None:
    with pytest.raises(MegamupError, match=message):
        conclusions(experiment, [claim])


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "points: none given"),
        ([Point("mup", 64, 0.0, 3.0)], "mup: rate=0.0: expected a positive number"),
        ([Point("mup", -1, 0.1, 3.0)], "mup: size=-1: expected a positive number"),
        ([Point("mup", 64, 0.1, 3.0), Point("mup", 64, 0.1, 3.1)], "seed 0: given twice"),
    ],
)
def test_points_that_mean_nothing_are_errors(points: list[Point], message: str) -> None:
    with pytest.raises(MegamupError, match=message):
        analyse(points, "width")


def test_json_has_no_infinity(experiment: Transfer) -> None:
    found = json.loads(json.dumps(experiment.as_json(), allow_nan=False))
    sp = found["groups"][1]
    assert sp["curves"][-1]["points"][-1]["loss"] == "diverged"
    assert sp["slope"] == pytest.approx(-1)


@pytest.mark.parametrize(("value", "shown"), [(256, "256"), (524288, "524288"), (2e9, "2e+09"), (0.5, "0.5")])
def test_sizes_are_whole_where_short(value: float, shown: str) -> None:
    assert number(value) == shown


class Words(HTMLParser):
    """Collects the text, checks that every element is closed, and notes what is fetched from outside."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.figures = 0
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img")
        self.figures += tag == "svg"
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.cells.append(data.strip())


def test_the_page_parses_and_holds_claims_figures_and_tables(experiment: Transfer) -> None:
    claims = conclusions(experiment, [Claim("mup", "|shift|", "<", 0.5), Claim("sp", "|shift|", "<", 0.5)])
    depth = analyse(trials("a<b>", 2, -5) + trials("a<b>", 4, -6), "depth")
    page = Words(html([experiment, depth], "Does it transfer?", {"torch": "2.13.0"}, claims))
    assert page.figures == 2
    for transfer in (experiment, depth):
        rows = [line for line in markdown(transfer).splitlines() if line.startswith("|") and "---" not in line]
        cells = [cell.strip() for row in rows for cell in row.strip("|").split("|") if ": " not in cell]
        assert len(cells) > 10
        assert set(cells) <= set(page.cells)
    assert {"holds", "does not hold", claims[0].claim, "torch", "2.13.0", "a<b>"} <= set(page.cells)


def test_a_figure_is_written_whatever_the_points(experiment: Transfer, tmp_path: Path) -> None:
    lone = analyse([Point("mup", 64, 0.01, 3.0)], "width")
    nothing = analyse([Point("mup", 64, rate, math.inf) for rate in RATES], "tokens")
    for name, transfer in {"experiment": experiment, "lone": lone, "nothing": nothing}.items():
        path = tmp_path / f"{name}.png"
        figure(transfer, path)
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert int.from_bytes(data[16:20], "big") == 1260  # pixels wide
        assert len(data) > 5_000
