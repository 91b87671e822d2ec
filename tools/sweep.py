#!/usr/bin/env python3
"""Run a study, a grid or a search: ``tools/sweep.py STUDY.yaml [a.b=c ...]``. Finished trials are not run again.

Trials are run folders below run.dir/STUDY; beside them come results.json and best.yaml, which holds what the best
trial sets and can be merged after the study's configs. The same command started several times, also on other hosts
that share the folder, shares the trials; those of a worker that was killed are taken over.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megamup.cli import report_errors
from megamup.files import write_json_atomic, write_text_atomic
from megamup.sweep import Study, Trial, complete, known_trials, load_study, table_lines, write_results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="study file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="config keys for every trial")
    arguments = parser.parse_args(argv)
    again = "interrupted; the same command goes on with the trials that are not finished"
    return report_errors(lambda: search(arguments.study, arguments.overrides), again)


def search(path: Path, overrides: list[str]) -> None:
    study, base = load_study(path, overrides)
    if study.curves is not None:
        from megamup.experiments.curves import point_of

        point_of(study.curves, known_trials(study, base)[0].config, loss=0.0)  # a wrong key now, not after hours
    planned, promoted = complete(study, base)
    best = write_results(study, planned, promoted)
    for line in table_lines(study, planned, promoted):
        print(line)
    print(f"best.yaml: {best}")
    if study.curves is not None:
        draw_curves(study, planned, best.parent)


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
