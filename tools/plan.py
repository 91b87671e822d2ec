#!/usr/bin/env python3
"""What a config means, without training: ``tools/plan.py CONFIG... [a.b=c ...] [--ranks N] [--json]``."""

from __future__ import annotations

import argparse
import json
import sys

from megamup.cli import report_errors
from megamup.config import load_config, micro_batches, split_arguments
from megamup.errors import MegamupError
from megamup.plan import plan, plan_lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", nargs="+", help="YAML files, merged left to right, then a.b=c overrides")
    parser.add_argument("--ranks", type=int, help="ranks to plan for (default: one replica)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    return report_errors(lambda: show(arguments))


def show(arguments: argparse.Namespace) -> None:
    config = load_config(*split_arguments(arguments.config))
    if arguments.ranks is not None and arguments.ranks < 1:
        raise MegamupError(f"--ranks {arguments.ranks}: expected at least 1")
    ranks = arguments.ranks or config.parallel.tensor * config.parallel.pipeline
    micro_batches(config, ranks)
    if arguments.json:
        print(json.dumps(plan(config, ranks)))
    else:
        print("\n".join(plan_lines(config, ranks)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
