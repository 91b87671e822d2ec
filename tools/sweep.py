#!/usr/bin/env python3
"""Run a study: ``tools/sweep.py STUDY.yaml [a.b=c ...]``. Finished trials are not run again.

A study is a grid, a search, or a ladder: runs for a scaling law, sized together from a budget of FLOPs (--plan shows
them first). Trials are run folders below run.dir/STUDY; beside them come results.json and, but for a ladder, best.yaml,
which holds what the best trial sets and can be merged after the study's configs. The same command started several
times, also on other hosts that share the folder, shares the trials; those of a killed worker are taken over.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megamup.cli import report_errors
from megamup.errors import MegamupError
from megamup.files import write_json_atomic, write_text_atomic
from megamup.sweep import (
    Study,
    Trial,
    complete,
    known_trials,
    load_study,
    plan_lines,
    table_lines,
    trials,
    tuning_trials,
    write_results,
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="study file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="config keys for every trial")
    parser.add_argument(
        "--budget", type=positive_float, metavar="FLOPS", help="in place of ladder.budget, such as 1e15"
    )
    parser.add_argument("--plan", action="store_true", help="print the trials with N, D, C and time, and run nothing")
    parser.add_argument("--flops-per-s", type=positive_float, metavar="F", help="--plan: what a trial sustains")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.flops_per_s and not arguments.plan:
        parser.error("--flops-per-s goes with --plan")
    again = "interrupted; the same command goes on with the trials that are not finished"
    return report_errors(lambda: run(arguments), again)


def positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: expected a number above 0, such as 1e15")
    return value


def run(arguments: argparse.Namespace) -> None:
    study, base = load_study(arguments.study, arguments.overrides, arguments.budget)
    if arguments.plan:
        print_plan(study, base, arguments.flops_per_s)
    else:
        search(study, base)


def print_plan(study: Study, base: dict[str, Any], flops_per_s: float | None) -> None:
    if study.search is not None:
        raise MegamupError("--plan: a search draws its trials as it goes; expected a study with a grid or a ladder")
    print("\n".join(plan_lines(study, tuning_trials(study, base), trials(study, base), flops_per_s)))


def search(study: Study, base: dict[str, Any]) -> None:
    if study.curves is not None:
        from megamup.experiments.curves import point_of

        point_of(study.curves, known_trials(study, base)[0].config, loss=0.0)  # a wrong key now, not after hours
    planned, promoted = complete(study, base)
    path = write_results(study, planned, promoted)
    for line in table_lines(study, planned, promoted):
        print(line)
    print(f"{path.name}: {path}")
    if study.curves is not None:
        draw_curves(study, planned, path.parent)


def draw_curves(study: Study, planned: Sequence[Trial], folder: Path) -> None:
    """Read the study as a transfer experiment, print its table and write curves.json, .png and .html."""
    from megamup.experiments.curves import transfer_of
    from megamup.experiments.transfer import lines
    from megamup.experiments.transfer_page import figure, html

    assert study.curves is not None
    found = transfer_of(study.curves, planned, study.metric)
    write_json_atomic(folder / "curves.json", found.as_json())
    figure(found, folder / "curves.png")
    write_text_atomic(folder / "curves.html", html([found], study.name, {"study": study.name}))
    print("\n".join(["", *lines(found)]))
    print(f"written: {folder}/curves.json, .png and .html")


if __name__ == "__main__":
    sys.exit(main())
