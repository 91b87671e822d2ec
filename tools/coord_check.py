#!/usr/bin/env python3
"""Coordinate check: ``tools/coord_check.py CONFIG... [a.b=c ...] --widths 64,128,256`` (or ``--depths 2,4,8``).

Trains some steps at each width, in the layout that the config names, and fits the slope of log RMS on log width of
every module's output and of its change since initialization. Exit code 1 where one is not flat. With --output DIR also
coord_check.json, .png and .html there. Random parts fall with width, so slopes over few or small widths are noisy: use
four widths or more, few tokens (configs/coord_check.yaml), or --seeds.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from megamup.cli import report_errors
from megamup.config import load_config, split_arguments
from megamup.errors import MegamupError
from megamup.experiments.coord_check import Check, as_json, check_depth, check_width, lines
from megamup.files import write_json_atomic


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="+", metavar="CONFIG|a.b=c", help="run configs, then config keys")
    sizes = parser.add_mutually_exclusive_group(required=True)
    sizes.add_argument("--widths", type=numbers, metavar="W,W,...", help="values of model.d_model")
    sizes.add_argument("--depths", type=numbers, metavar="L,L,...", help="values of model.n_layers")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of each model (default 10)")
    parser.add_argument("--seeds", type=int, default=1, help="initializations to average over (default 1)")
    parser.add_argument("--tolerance", type=float, default=0.1, help="largest slope that counts as flat (default 0.1)")
    parser.add_argument(
        "--grow", choices=("heads", "d_head"), default="heads", help="what fills a width: more heads, or larger ones"
    )
    parser.add_argument("--fixed-kv", action="store_true", help="key-value heads stay as many as the config has")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for coord_check.json, .png and .html")
    arguments = parser.parse_intermixed_args(argv)
    found: list[Check] = []
    code = report_errors(lambda: found.append(check(arguments)))
    return code or int(not found[0].flat)


def check(arguments: argparse.Namespace) -> Check:
    for flag in ("steps", "seeds"):
        if getattr(arguments, flag) < 1:
            raise MegamupError(f"--{flag} {getattr(arguments, flag)}: expected at least 1")
    if not 0 < arguments.tolerance < math.inf:
        raise MegamupError(f"--tolerance {arguments.tolerance}: expected a positive number, such as 0.1")
    if arguments.depths and (arguments.fixed_kv or arguments.grow != "heads"):
        raise MegamupError("--grow and --fixed-kv say how a width is filled; they have no part in --depths")
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
    config = load_config(*split_arguments(arguments.config))
    common = (arguments.steps, arguments.seeds, arguments.tolerance)
    if arguments.widths:
        found = check_width(config, arguments.widths, *common, arguments.grow, arguments.fixed_kv)
    else:
        found = check_depth(config, arguments.depths, *common)
    for line in lines(found):
        print(line)
    if arguments.output is not None:
        from megamup.experiments.coord_page import figure, html
        from megamup.files import write_text_atomic

        write_json_atomic(arguments.output / "coord_check.json", as_json(found))
        figure(found).savefig(arguments.output / "coord_check.png", dpi=130, facecolor="white")
        write_text_atomic(arguments.output / "coord_check.html", html(found))
        print(f"written: {arguments.output}/coord_check.json, .png and .html")
    return found


def numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers with commas, such as 64,128,256") from None


if __name__ == "__main__":
    sys.exit(main())
