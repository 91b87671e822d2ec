"""What ./dev gpu does with its time, and what it reports."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import gpu
import pytest
from gpu import Bench, Outcome, Part, missed, page_of, parts_of, run_parts
from race import RaceError, Result, Span


def part(name: str, seconds: float = 0.0, limit_s: float = 100.0, error: Exception | None = None) -> Part:
    def run(allowed: float) -> Any:
        time.sleep(seconds)
        if error is not None:
            raise error
        return allowed

    return Part(name, limit_s, run)


def result(name: str, tokens_per_s: float, mode: str = "blocks") -> Result:
    return Result(name, mode, 1000, {1: 5.0, 20: 4.0}, tokens_per_s, 1.0, Span(10.0, 0.0))


def bench(folder: Path) -> Bench:
    made = Bench([*gpu.TOY, "train.steps=6"], folder)
    made.race(1.0)
    return made


def test_a_part_that_fails_is_reported_and_the_rest_goes_on() -> None:
    outcomes = run_parts([part("a"), part("b", error=RaceError("broke")), part("c")], budget_s=50)
    assert [(outcome.name, outcome.state) for outcome in outcomes] == [("a", "done"), ("b", "failed"), ("c", "done")]
    assert outcomes[1].message == "broke"


def test_a_fault_of_the_program_itself_is_not_a_part_that_failed() -> None:
    with pytest.raises(ZeroDivisionError):
        run_parts([part("a", error=ZeroDivisionError())], budget_s=50)


def test_a_part_gets_its_limit_or_what_is_left() -> None:
    outcomes = run_parts([part("short", seconds=0.3, limit_s=5.0), part("long", limit_s=100.0)], 30.0)
    assert outcomes[0].value == 5.0
    assert 28.0 < outcomes[1].value <= 29.7


def test_what_finds_no_time_is_not_started() -> None:
    outcomes = run_parts([part("a", seconds=0.4), part("b")], budget_s=0.6, least_s=0.5)
    assert [outcome.state for outcome in outcomes] == ["done", "no time"]


def test_limits_of_what_matters_fit_nine_minutes() -> None:
    parts = parts_of(Bench((), Path()), dry_run=False)
    names = [each.name for each in parts]
    assert names[:3] == ["megamup", "transformers", "tests"]
    assert sum(each.limit_s for each in parts[:3]) <= 9 * 60 - 60


def test_bounds_are_of_the_fastest_form_and_of_known_devices(tmp_path: Path) -> None:
    made = bench(tmp_path)
    results = [result("megamup", 100), result("transformers", 90), result("transformers", 110, "model")]
    assert missed(results, made, 1e12, "Some GPU") == [
        "missed: megamup at 0.909 of transformers (model), expected at least 1"
    ]
    [line] = missed(results[:2], made, 1e12, "NVIDIA H100 80GB HBM3")
    assert line.endswith("expected at least 55% on NVIDIA H100 80GB HBM3")
    other = Result("litgpt", "blocks", 1000, {1: 5.2}, 1.0, 1.0, Span(1.0, 0.0))
    assert "first loss of litgpt is 5.2" in missed([result("megamup", 100), other], made, 1e12, "Some GPU")[0]


def test_the_page_has_every_part_and_what_failed(tmp_path: Path) -> None:
    outcomes = [
        Outcome("megamup", "done", 20.0, result("megamup", 100.0)),
        Outcome("transformers", "done", 20.0, result("transformers", 80.0)),
        Outcome("tests", "failed", 5.0, message="exit code 1\n1 failed, 3 passed"),
        Outcome("profile", "done", 5.0, "# Where time goes\n\n| matrix products | 71% |\n\n![memory](memory.svg)\n"),
        Outcome("litgpt", "no time", message="3 s were left"),
    ]
    page, failures = page_of(outcomes, bench(tmp_path), "./dev gpu", "NVIDIA A100")
    assert failures == []
    assert "| tests | failed | 5 |" in page
    assert "1 failed, 3 passed" in page
    assert "\n## Where time goes\n\n| matrix products | 71% |\n" in page
    assert "memory.svg" not in page
    assert "3 s were left" in page
    assert "| 1.250 |" in page
    assert "312 TFLOP/s: data sheet of NVIDIA A100" in page
