#!/usr/bin/env python3
"""What a config means, without training: ``tools/plan.py CONFIG... [a.b=c ...] [--ranks N] [--fit F] [--json]``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megamup.cli import report_errors
from megamup.config import load_config, micro_batches, split_arguments
from megamup.errors import MegamupError
from megamup.plan import plan, plan_lines
from megamup.scaling.forecast import read_forecast


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", nargs="+", help="YAML files, merged left to right, then a.b=c overrides")
    parser.add_argument("--ranks", type=int, help="ranks to plan for (default: one replica)")
    parser.add_argument("--fit", type=Path, metavar="fit.json", help="a fitted scaling law: the final loss it predicts")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    return report_errors(lambda: show(arguments))


def show(arguments: argparse.Namespace) -> None:
    config = load_config(*split_arguments(arguments.config))
    if arguments.ranks is not None and arguments.ranks < 1:
        raise MegamupError(f"--ranks {arguments.ranks}: expected at least 1")
    ranks = arguments.ranks or config.parallel.tensor * config.parallel.pipeline
    micro_batches(config, ranks)
    forecast = read_forecast(arguments.fit, config, "--fit") if arguments.fit else None
    if arguments.json:
        known = {} if forecast is None else {"predicted": forecast.as_json()}
        print(json.dumps(plan(config, ranks) | known))
        return
    print("\n".join(plan_lines(config, ranks)), flush=True)
    if forecast is not None:
        print("\n".join([f"predicted {forecast}", *(f"warning: {text}" for text in forecast.warnings)]))


if __name__ == "__main__":
    sys.exit(main())
