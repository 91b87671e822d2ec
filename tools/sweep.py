#!/usr/bin/env python3
"""Run a study, a grid or a search: ``tools/sweep.py STUDY.yaml [a.b=c ...]``. Finished trials are not run again.

Trials are run folders below run.dir/STUDY; beside them come results.json and best.yaml, which holds what the best
trial sets and can be merged after the study's configs. The same command started several times, also on other hosts
that share the folder, shares the trials; those of a worker that was killed are taken over.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megamup.cli import report_errors
from megamup.sweep import complete, load_study, table_lines, write_results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="study file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="config keys for every trial")
    arguments = parser.parse_args(argv)
    again = "interrupted; the same command goes on with the trials that are not finished"
    return report_errors(lambda: search(arguments.study, arguments.overrides), again)


def search(path: Path, overrides: list[str]) -> None:
    study, base = load_study(path, overrides)
    planned, promoted = complete(study, base)
    best = write_results(study, planned, promoted)
    for line in table_lines(study, planned, promoted):
        print(line)
    print(f"best.yaml: {best}")


if __name__ == "__main__":
    sys.exit(main())
