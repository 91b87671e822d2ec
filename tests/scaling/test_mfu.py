"""Utilization of simulated runs whose every second is known."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from megamup.errors import MegamupError
from megamup.scaling.mfu import CAUSES, as_json, lost_rows, notes, table_rows, utilisation, utilisations
from megamup.scaling.mfu_figure import PANELS, mfu_figure, mfu_page

TOKENS = 1000
"""Of a step, which takes one second: 1000 tokens/s are 40% MFU."""
START = 1_750_000_000.0


@dataclass
class Simulated:
    """A run folder written as the trainer writes it, second by second."""

    folder: Path
    now: float = START
    records: list[dict[str, float]] = field(default_factory=list)
    starts: list[dict[str, float]] = field(default_factory=list)
    paused: dict[str, float] = field(default_factory=dict)

    def start(self, step: int = 0, seconds: float = 0.0) -> None:
        """A start or a resumption, whose first step begins `seconds` later."""
        self.starts.append({"step": step, "time_unix_s": self.now})
        self.records = [record for record in self.records if record["step"] <= step]
        self.paused = {}
        self.now += seconds

    def step(self, seconds: float = 1.0, idle: float = 0.0, saving: float = 0.0, **measured: float) -> None:
        """A step, what nobody accounts for, what the run measures itself, the record, and a save after it."""
        self.now += seconds + idle + sum(measured.values())
        self.paused |= {f"{name}_s": value for name, value in measured.items()}
        step = len(self.records) + 1
        speed = {"tokens_per_s": TOKENS / seconds, "mfu_percent": 40.0 / seconds}
        total = {"step": step, "tokens": step * TOKENS, "loss": 5.0 - 0.01 * step}
        self.records.append({**total, **speed, "time_unix_s": self.now, **self.paused})
        self.paused = {"saving_s": saving} if saving else {}
        self.now += saving

    def steps(self, number: int) -> None:
        for _ in range(number):
            self.step()

    def write(self, without: tuple[str, ...] = ()) -> Path:
        """The folder; `without` are keys that an older program didn't write."""
        self.folder.mkdir()
        records = [{key: value for key, value in r.items() if key not in without} for r in self.records]
        lines = {"metrics.jsonl": records, "starts.jsonl": [] if "starts" in without else self.starts}
        for name, objects in lines.items():
            if objects:
                self.folder.joinpath(name).write_text("".join(json.dumps(line) + "\n" for line in objects))
        peak = {"peak_flops": 8e15, "peak_basis": "data sheet of NVIDIA H100, dense bf16"}
        self.folder.joinpath("environment.json").write_text(json.dumps(peak))
        return self.folder


@pytest.fixture
def run(tmp_path: Path) -> Simulated:
    return Simulated(tmp_path / "run")


@pytest.fixture
def eventful(run: Simulated) -> Simulated:
    """100 steps with all that can befall a run: every cause has seconds of its own."""
    run.start(seconds=20)
    run.steps(9)
    run.step(evaluation=7, compile=13, profile=2)
    run.steps(9)
    run.step(saving=11)  # the checkpoint of step 20
    run.steps(15)  # lost with what follows
    run.now += 100
    run.start(step=20, seconds=30)
    run.step(seconds=4)  # compiled again
    run.steps(19)
    for _ in range(3):
        run.step(seconds=5)
    run.steps(17)
    run.step(idle=50)  # suspended
    run.steps(39)
    return run


def test_every_second_has_its_cause(eventful: Simulated) -> None:
    found = utilisation(eventful.write())
    assert found.lost_s is not None
    # The save of step 20 was recorded with step 21, which the kill took.
    expected = {"restarts": 11 + 15 + 100, "start-up": 20 + 30 + 3, "evaluation": 7, "saving": 0, "stalls": 12 + 50}
    expected |= {"compile": 13, "profile": 2, "other": 0}
    assert found.lost_s == pytest.approx(expected, abs=1e-5)
    assert set(found.lost_s) == set(CAUSES)
    assert found.wall_s == pytest.approx(eventful.now - START)
    assert found.productive_s == pytest.approx(100, abs=1e-5)  # 100 steps that were kept, a second each
    assert found.goodput_percent == pytest.approx(100 * 100 / (eventful.now - START))
    assert found.restarts == 1
    assert "too low" not in notes([found])[0][1]
    assert found.starts_s == pytest.approx((0, 20 + 20 + 7 + 13 + 2 + 11 + 15 + 100))


def test_stalls_are_marked_where_they_were(eventful: Simulated) -> None:
    found = utilisation(eventful.write())
    slow, suspended = found.stalls
    assert (slow.first_step, slow.last_step) == (41, 43)
    assert slow.tokens_per_s == pytest.approx(200)
    assert slow.end_s - slow.begin_s == pytest.approx(15)
    assert (suspended.first_step, suspended.last_step) == (61, 61)
    assert suspended.tokens_per_s == pytest.approx(1000)
    assert suspended.end_s - suspended.begin_s == pytest.approx(51)
    assert found.intervals.stalled.sum() == 4


def test_saving_and_evaluation_are_kept_apart(run: Simulated) -> None:
    run.start()
    for step in range(1, 21):
        run.step(evaluation=2 * (step % 5 == 0), saving=3 * (step % 10 == 0))
    found = utilisation(run.write())
    assert found.lost_s == pytest.approx(dict.fromkeys(CAUSES, 0) | {"evaluation": 8, "saving": 3}, abs=1e-5)
    assert not found.stalls
    assert found.goodput_percent == pytest.approx(100 * 20 / 31)


def test_means_are_over_time(run: Simulated) -> None:
    """Ten steps at 1000 tokens/s and ten at 600: harmonic, as the tokens are over the time; MFU likewise."""
    run.start()
    run.steps(10)
    for _ in range(10):
        run.step(seconds=1 / 0.6)
    found = utilisation(run.write())
    assert found.tokens_per_s == pytest.approx(20_000 / (10 + 10 / 0.6))
    assert found.mfu_percent == pytest.approx(40 * found.tokens_per_s / 1000)
    assert found.wall_mfu_percent == pytest.approx(found.mfu_percent)
    assert not found.stalls


def test_mfu_of_the_wall_time_pays_for_what_was_lost(eventful: Simulated) -> None:
    found = utilisation(eventful.write())
    assert found.wall_s is not None
    assert found.wall_mfu_percent == pytest.approx(40 * 100 / found.wall_s)


def test_rarely_logged_steps_are_weighed(run: Simulated) -> None:
    """Records at steps 1, 10, 20, ...: the first, of one slow step, doesn't move the median."""
    run.start()
    run.step(seconds=9)
    run.steps(99)
    run.records = [record for record in run.records if record["step"] == 1 or record["step"] % 10 == 0]
    found = utilisation(run.write())
    assert found.median_tokens_per_s == 1000
    assert found.productive_s == pytest.approx(100, abs=1e-5)
    assert found.lost_s is not None
    assert found.lost_s["start-up"] == pytest.approx(8, abs=1e-5)


def test_a_run_started_over_counts_from_its_first_start(run: Simulated) -> None:
    run.start(seconds=5)
    run.steps(30)  # no checkpoint: all of it lost
    run.now += 60
    run.start(seconds=5)
    run.steps(40)
    found = utilisation(run.write())
    assert found.lost_s is not None
    assert found.lost_s["restarts"] == pytest.approx(95)
    assert found.lost_s["start-up"] == pytest.approx(5, abs=1e-5)
    assert found.wall_s == pytest.approx(140)


def test_a_later_start_further_back_throws_an_earlier_one_away(run: Simulated) -> None:
    run.start()
    run.steps(20)
    run.start(step=15)
    run.steps(10)
    run.start(step=10)  # the checkpoint of step 15 was damaged
    run.steps(20)
    found = utilisation(run.write())
    assert found.lost_s == pytest.approx(dict.fromkeys(CAUSES, 0) | {"restarts": 20}, abs=1e-5)
    assert found.restarts == 2
    assert found.goodput_percent == pytest.approx(60)


def test_a_start_without_records_yet_counts(run: Simulated) -> None:
    run.start()
    run.steps(10)
    run.now += 10
    run.start(step=10)
    found = utilisation(run.write())
    assert found.wall_s == pytest.approx(20)
    assert found.goodput_percent == pytest.approx(50)


@pytest.mark.parametrize(
    ("without", "reason"),
    [(("time_unix_s",), "have no time_unix_s: they were written before"), (("starts",), "has no starts.jsonl")],
)
def test_an_old_run_has_mfu_but_no_goodput(eventful: Simulated, without: tuple[str, ...], reason: str) -> None:
    found = utilisation(eventful.write(without))
    assert (found.wall_s, found.lost_s, found.productive_s, found.restarts) == (None, None, None, None)
    assert (found.goodput_percent, found.wall_mfu_percent) == (None, None)
    assert found.no_goodput is not None
    assert reason in found.no_goodput
    assert found.mfu_percent == pytest.approx(40 * 100 / (96 + 4 + 15))
    assert [(s.first_step, s.last_step) for s in found.stalls] == [(21, 21), (41, 43)]  # a pause is not to be seen
    assert table_rows([found])[1][5:8] == ("-", "-", "-")
    assert lost_rows([found])[1][1:] == ("-",) * (1 + len(CAUSES))
    assert reason in notes([found])[0][1]
    assert as_json(found)["goodput_percent"] is None
    assert "minutes of training steps" in mfu_page([found])


def test_an_impossible_mfu_casts_doubt_on_the_peak(run: Simulated) -> None:
    run.start()
    run.steps(10)
    run.step(seconds=0.3)
    folder = run.write()
    assert "too low, as MFU reached 133%" in notes([utilisation(folder)])[0][1]


@pytest.mark.parametrize(("set_back", "known"), [(2.0, True), (600.0, False)])
def test_a_clock_that_was_set_back_gives_no_goodput(run: Simulated, set_back: float, known: bool) -> None:
    run.start()
    run.steps(10)
    run.now -= set_back
    run.steps(10)
    found = utilisation(run.write())
    assert (found.goodput_percent is not None) == known
    if not known:
        assert found.no_goodput == "the clock went back by 600 s at step 11"


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("", "lacks the run's first start"),
        ('{"step": 3, "time_unix_s": 1750000000.0}\n', "lacks the run's first start"),
        ("{\n", "has a line without `step` and `time_unix_s`"),
        ("[1]\n", "has a line without `step` and `time_unix_s`"),
    ],
)
def test_broken_starts_give_no_goodput(run: Simulated, lines: str, reason: str) -> None:
    run.start()
    run.steps(10)
    folder = run.write()
    folder.joinpath("starts.jsonl").write_text(lines)
    found = utilisation(folder)
    assert found.goodput_percent is None
    assert found.no_goodput is not None
    assert reason in found.no_goodput


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokens_per_s", 0.0, r"metrics\.jsonl: step 5: tokens_per_s is 0\.0; expected a finite number above 0"),
        ("mfu_percent", None, r"step 5: mfu_percent is None"),
        ("tokens", 4000, r"step 5: tokens 4000 are no more than before"),
    ],
)
def test_a_value_that_cannot_be_is_named(run: Simulated, key: str, value: float, message: str) -> None:
    run.start()
    run.steps(10)
    run.records[4][key] = value
    with pytest.raises(MegamupError, match=message):
        utilisation(run.write())


def test_metrics_without_speed_are_refused(run: Simulated) -> None:
    run.start()
    run.steps(3)
    with pytest.raises(MegamupError, match=r"no record has tokens_per_s; .* leave it out"):
        utilisation(run.write(without=("tokens_per_s",)))


def test_json_and_tables_say_the_same(eventful: Simulated) -> None:
    found = utilisation(eventful.write())
    written = json.loads(json.dumps(as_json(found), allow_nan=False))
    header, row = table_rows([found])
    shown = dict(zip(header, row, strict=True))
    assert shown["run"] == written["run"] == "run"
    assert float(shown["goodput %"]) == pytest.approx(written["goodput_percent"], rel=0.005)
    assert float(shown["MFU %"]) == pytest.approx(written["mfu_percent"], rel=0.005)
    assert (shown["steps"], shown["restarts"], shown["stalls"]) == ("100", "1", "2")
    assert sum(float(cell) for cell in lost_rows([found])[1][1:]) == pytest.approx(100, abs=0.5)
    assert written["peak_basis"] == "data sheet of NVIDIA H100, dense bf16"
    assert len(written["series"]["mfu_percent"]) == len(written["series"]["loss"]) == 100
    assert sum(written["series"]["stalled"]) == 4


def test_runs_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    folders = [tmp_path / study / "seed=1" for study in ("lr=1", "lr=2")]
    for folder in folders:
        folder.parent.mkdir()
        simulated = Simulated(folder)
        simulated.start()
        simulated.steps(3)
        simulated.write()
    assert [run.name for run in utilisations(folders)] == ["lr=1/seed=1", "lr=2/seed=1"]
    assert [run.name for run in utilisations(folders[:1])] == ["seed=1"]
    with pytest.raises(MegamupError, match=r"seed=1: is given twice"):
        utilisations([folders[0], folders[1], tmp_path / "lr=2" / ".." / "lr=1" / "seed=1"])


def test_figure_has_a_panel_a_run_with_what_happened(eventful: Simulated, tmp_path: Path) -> None:
    quiet = Simulated(tmp_path / ("quiet $run$" * 5))
    quiet.start()
    quiet.steps(1000)
    eventful.steps(505)  # more intervals than levels of the line
    runs = [utilisation(eventful.write()), utilisation(quiet.write())]
    eventful_panel, quiet_panel = (axes for axes in mfu_figure(runs).axes if axes.get_visible())
    assert len(eventful_panel.patches) == 2  # the stalls
    assert len(eventful_panel.lines) == 3  # MFU, its mean, the restart
    assert (len(quiet_panel.patches), len(quiet_panel.lines)) == (0, 2)
    minutes, mfu = np.asarray(eventful_panel.lines[0].get_data(), dtype=float)
    assert np.isnan(mfu).sum() == 1  # nothing ran between the last record and the restart
    assert np.nanmax(minutes) == pytest.approx(runs[0].intervals.end_s[-1] / 60)
    assert np.size(quiet_panel.lines[0].get_xdata()) == 600  # thinned


def test_page_stands_alone_and_tells_what_it_leaves_out(eventful: Simulated) -> None:
    run = utilisation(eventful.write())
    html = mfu_page([run] * (PANELS + 1), "scaling.py mfu <runs>")
    assert "The first 12 of 13 runs." in html
    assert "scaling.py mfu &lt;runs&gt;" in html
    assert "The 20 longest of 26 stalls" in html
    assert "src=" not in html
    assert 'href="http' not in html
