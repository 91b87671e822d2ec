#!/usr/bin/env python3
"""Fit scaling laws to runs, predict, design the next runs, report, and track MFU: fit, predict, design, report, mfu."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from megamup.cli import report_errors
from megamup.cluster import parse_cluster
from megamup.config import load_config, split_arguments
from megamup.errors import MegamupError
from megamup.files import write_json_atomic, write_text_atomic
from megamup.parameters import count
from megamup.scaling.analysis import AUTO, Result, analyse, analyse_reduced, check_names, is_reduced, laws_named
from megamup.scaling.critical_batch import apply_critical_batch
from megamup.scaling.curve_fit import (
    Measured,
    analyse_curves,
    curve_law,
    is_curve_law,
    measure,
    other_model,
    predict_schedule,
    schedule_json,
)
from megamup.scaling.design import propose, run_flops
from megamup.scaling.estimate import Estimate, answers, beyond, estimate, flops_of
from megamup.scaling.fit_file import load_result, provenance, save_result, to_json
from megamup.scaling.laws import NAMES, POWER_INPUTS, REDUCTIONS, FloatArray
from megamup.scaling.mfu import as_json, lost_rows, notes, table_rows, utilisations
from megamup.scaling.objective import OBJECTIVES
from megamup.scaling.readers.columns import parse_pairs
from megamup.scaling.readers.sources import reader_of
from megamup.scaling.run_arguments import add_run_arguments, read_curves, read_ladder, read_tracks
from megamup.scaling.runs import Reading, load_holdout, load_tracks
from megamup.scaling.text import design_lines, estimate_line, fit_lines, schedule_lines, table_lines
from megamup.scaling.uncertainty import LEVEL, METHODS, no_interval_reason


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; an error in what the user gave is one line on stderr and exit code 2."""
    arguments = _parser().parse_args(argv)
    arguments.command = shlex.join(["tools/scaling.py", *(sys.argv[1:] if argv is None else argv)])
    verb = {"fit": _fit, "predict": _predict, "design": _design, "report": _report, "mfu": _mfu}[arguments.verb]
    return report_errors(lambda: verb(arguments))


def _fit(arguments: argparse.Namespace) -> None:
    check_names(arguments.law)
    options = {"objective": arguments.objective, "seed": arguments.seed, "provenance": provenance(arguments.command)}
    several = is_curve_law(arguments.law) or arguments.law in REDUCTIONS
    if arguments.x and several:
        raise MegamupError(f"--x: {arguments.x}: is the input of power, and the law is {arguments.law}: leave it out")
    if is_curve_law(arguments.law):
        if arguments.intervals or arguments.critical_batch:
            raise MegamupError(
                f"--intervals, --critical-batch: {arguments.law} is fitted to whole curves, whose interval comes from "
                "schedules held out; leave them out"
            )
        result = analyse_curves(arguments.law, *read_tracks(arguments), **options)
    else:
        ladder = read_ladder(arguments)
        if arguments.critical_batch:
            ladder = apply_critical_batch(ladder, *_critical_batch(arguments.critical_batch))
        options["method"] = arguments.intervals or METHODS[0]
        if arguments.law in REDUCTIONS and not is_reduced(arguments.law, ladder):
            result = analyse_reduced(arguments.law, ladder, lambda: read_curves(arguments), **options)
        else:
            result = analyse(ladder, laws_named(arguments.law, arguments.x, ladder), **options)
    if arguments.output:
        save_result(result, arguments.output)
    if arguments.json:
        _print_json(to_json(result, (arguments.output or Path("fit.json")).parent))
        return
    for each in (result, *result.companions):
        print("\n".join(fit_lines(each)))
        _print_warnings(each.warnings)


def _critical_batch(path: Path) -> tuple[float, float]:
    """B_star and alpha_B of B_crit = B_star·L^(-1/alpha_B), from the fit that has them."""
    fit = load_result(path).fit
    if not {"B_star", "alpha_B"} <= set(fit.law.parameters):
        raise MegamupError(f"--critical-batch: {path} is of {fit.law.name}; expected critical-batch or batch-loss")
    return fit.parameters["B_star"], fit.parameters["alpha_B"]


def _predict(arguments: argparse.Namespace) -> None:
    result = load_result(arguments.fit)
    if arguments.schedule or result.curve_evidence is not None:
        _predict_schedule(arguments, result)
        return
    if arguments.at is None:
        raise MegamupError("--at: missing; expected the new run, a budget or a loss, such as --at C=1e15")
    at = _numbers(arguments.at, "--at", "C=1e15")
    if arguments.intervals:
        result = replace(result, method=arguments.intervals)
    others = [each for each in result.companions if answers(each, at)]
    found = [one for each in (result, *others) for one in estimate(each, at)]
    times = beyond(result, at)
    if arguments.json:
        _print_json(_prediction_json(result, at, found, times))
        return
    for one in found:
        print(estimate_line(one))
    if times is not None:
        print(f"{times:.3g} times the largest fitted run")
    reason = no_interval_reason(result.fit)
    if reason:
        print(f"no interval: {reason}")
    _print_warnings(result.warnings)


def _prediction_json(
    result: Result, at: dict[str, float], found: Sequence[Estimate], times: float | None
) -> dict[str, Any]:
    loss = next((one for one in found if one.name == "L"), None)
    return {
        "law": result.law.name,
        "at": at,
        "loss": loss and loss.value,
        "low": loss and loss.low,
        "high": loss and loss.high,
        "interval_level": LEVEL,
        "interval_note": no_interval_reason(result.fit)
        or "loss: of one new run, noise included; other quantities: the law's; all widened by what the backtest needed",
        "interval_method": result.method,
        "quantities": {one.name: {"value": one.value, "low": one.low, "high": one.high} for one in found},
        "over_largest_run": times,
        "convention": result.ladder.convention,
        "warnings": result.warnings,
    }


def _predict_schedule(arguments: argparse.Namespace, result: Result) -> None:
    law = curve_law(result)
    if not arguments.schedule:
        raise MegamupError(
            f"--schedule: missing; expected a config or a run's folder, whose curve the law {law.name} predicts"
        )
    rates, measured, constants = _schedule(arguments.schedule, result)
    predicted = predict_schedule(result, rates, _step(arguments.at, len(rates)))
    warnings = [*other_model(result, constants), *result.warnings]
    if arguments.json:
        _print_json(schedule_json(result, predicted, measured) | {"warnings": warnings})
        return
    print("\n".join(schedule_lines(result, predicted, measured)))
    _print_warnings(warnings)


def _schedule(given: Sequence[str], result: Result) -> tuple[FloatArray, Measured | None, dict[str, float]]:
    """Learning rate by step of a config or a run, the run's curve beside its prediction, and N and B."""
    path = Path(given[0])
    if reader_of(path) is not None:
        if len(given) > 1:
            raise MegamupError(f"--schedule: {given[1]!r} after the run {path}; expected overrides after a config only")
        _, (track,) = load_tracks([path], (), Reading.from_text(result.ladder.convention["reading"]))
        return (*measure(result, track), track.constants)
    from megamup.train.schedule import lr_factor  # with it comes torch

    config = load_config(*split_arguments(given))
    steps = config.train.steps
    rates = config.optim.lr * np.array([lr_factor(config.schedule, step, steps) for step in range(steps)])
    constants = {"B": float(config.batch_tokens)}
    counted = count(config.model).get(result.ladder.convention["parameters"])
    return rates, None, constants | ({} if counted is None else {"N": float(counted)})


def _step(text: str | None, last: int) -> list[float] | None:
    """The step of `--at S=STEP`, None where it isn't given."""
    if text is None:
        return None
    at = _numbers(text, "--at", "S=500")
    step = at.get("S", 0.0)
    if set(at) != {"S"} or step != int(step) or step > last:
        raise MegamupError(f"--at: {text!r}; expected S=STEP, a whole number up to the schedule's last, {last}")
    return [step]


def _design(arguments: argparse.Namespace) -> None:
    result = load_result(arguments.fit)
    at = _numbers(arguments.at, "--at", "N=1e9,D=2e10")
    design = propose(
        result.fit,
        at,
        budget=_positive(arguments.budget, "--budget"),
        count=arguments.runs,
        quantity=arguments.quantity,
        flops=run_flops(result.law, result.fit.data, flops_of(result.ladder)),
        noise=arguments.noise,
        widening=result.backtest.inflation,
    )
    if arguments.json:
        _print_json(asdict(design))
        return
    print("\n".join(design_lines(design)))


def _report(arguments: argparse.Namespace) -> None:
    from megamup.scaling.figures.drawing import save_figures
    from megamup.scaling.report import make_report

    results = [load_result(path) for path in arguments.fit]
    held = load_holdout(arguments.holdout, results[0].ladder) if arguments.holdout else ()
    report = make_report(
        results,
        held,
        command=arguments.command,
        target=_numbers(arguments.at, "--at", "N=1e9,D=2e10") if arguments.at else None,
        budgets=[_positive(budget, "--budgets") for budget in arguments.budgets],
        cluster=parse_cluster(arguments.cluster) if arguments.cluster else None,
    )
    write_text_atomic(arguments.output, report.html)
    written = [arguments.output]
    if arguments.numbers:
        write_json_atomic(arguments.numbers, report.numbers)
        written.append(arguments.numbers)
    if arguments.figures:
        save_figures(report.drawings, arguments.figures)
        written.append(arguments.figures)
    for verdict in report.numbers["held_out"]:
        state = {True: "inside", False: "outside", None: "no"}[verdict["inside"]]
        print(
            f"{verdict['run']}: predicted {verdict['predicted']:.4f}, measured {verdict['measured']:.4f}, "
            f"error {verdict['error_percent']:+.2f}%, {state} 95% interval"
        )
    print(f"wrote {', '.join(map(str, written))}")


def _mfu(arguments: argparse.Namespace) -> None:
    runs = utilisations(arguments.runs)
    if arguments.output:
        from megamup.scaling.mfu_figure import mfu_page

        write_text_atomic(arguments.output, mfu_page(runs, arguments.command))
    if arguments.json:
        _print_json([as_json(run) for run in runs])
        return
    print("\n".join([*table_lines(table_rows(runs)), *table_lines(lost_rows(runs))]))
    for name, note in notes(runs):
        print(f"{name}: {note}")
    if arguments.output:
        print(f"wrote {arguments.output}")


def _numbers(text: str, option: str, example: str) -> dict[str, float]:
    """KEY=NUMBER,... as numbers above 0."""
    return {key: _positive(value, f"{option} {key}") for key, value in parse_pairs([text], option, example).items()}


def _positive(text: str, where: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise MegamupError(f"{where} is {text!r}; expected a finite number above 0, such as 1e15")
    return number


def _whole(least: int) -> Callable[[str], int]:
    """For argparse: whole numbers from `least` on."""

    def read(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number from {least} on")
        return int(text)

    return read


def _print_json(content: Any) -> None:
    print(json.dumps(content, ensure_ascii=False, allow_nan=False))


def _print_warnings(warnings: Sequence[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)

    fit = verbs.add_parser("fit", help="fit a law to finished runs or to a table")
    fit.add_argument(
        "--law",
        required=True,
        metavar="LAW[,LAW...]",
        help=f"{', '.join(NAMES)}; several, or auto: the one whose error on larger runs held out is least",
    )
    fit.add_argument("--x", choices=POWER_INPUTS, help="what the law power is in (default C where known, else N, D)")
    add_run_arguments(fit)
    fit.add_argument(
        "--objective",
        default=AUTO,
        help=f"what is least: {', '.join(OBJECTIVES)}, huber:DELTA, published (as the law's source did), or auto "
        "(default): by held-out error",
    )
    fit.add_argument("--seed", type=_whole(0), default=0, help="of the random starts (default 0)")
    fit.add_argument("--intervals", choices=METHODS, help=f"how they are found (default {METHODS[0]})")
    fit.add_argument(
        "--critical-batch",
        type=Path,
        metavar="fit.json",
        help="a fit of critical-batch: gives the runs Cmin and Smin by their batch and loss, for the laws of these",
    )
    fit.add_argument("--output", type=Path, metavar="fit.json", help="write the fit file")
    fit.add_argument("--json", action="store_true", help="print one JSON object instead of tables")

    prediction = verbs.add_parser("predict", help="the loss of a new run, or what a budget or a loss asks for")
    prediction.add_argument("--fit", required=True, type=Path, metavar="fit.json")
    prediction.add_argument(
        "--at",
        metavar="N=1e9,D=2e10",
        help="the new run; or C=BUDGET or L=LOSS, where the law has an optimum; S=STEP with --schedule",
    )
    prediction.add_argument(
        "--schedule",
        nargs="+",
        metavar="CONFIG",
        help="for a law of whole curves: config files and a.b=c overrides, or a run's folder, whose curve is predicted",
    )
    prediction.add_argument("--intervals", choices=METHODS, help="how they are found (default as in the fit)")
    prediction.add_argument("--json", action="store_true", help="print one JSON object")

    design = verbs.add_parser("design", help="the next runs that narrow a prediction most per FLOP")
    design.add_argument("--fit", required=True, type=Path, metavar="fit.json")
    design.add_argument("--at", required=True, metavar="N=1e9,D=2e10", help="what is to be predicted")
    design.add_argument("--budget", required=True, metavar="1e20", help="FLOPs for all new runs")
    design.add_argument("--runs", type=_whole(1), default=5, help="at most so many (default 5)")
    design.add_argument("--quantity", help="which quantity at a budget, such as N_opt (default the loss)")
    design.add_argument(
        "--noise",
        type=float,
        help="standard deviation of one run's loss as a share of it, where runs are too few to tell",
    )
    design.add_argument("--json", action="store_true", help="print one JSON object")

    report = verbs.add_parser("report", help="a self-contained HTML page, with its figures and numbers")
    report.add_argument("--fit", required=True, nargs="+", type=Path, metavar="fit.json", help="one law or several")
    report.add_argument("--holdout", nargs="+", type=Path, default=[], metavar="RUN_DIR", help="runs not fitted")
    report.add_argument("--at", metavar="N=1e9,D=2e10", help="a target to mark and to predict")
    report.add_argument("--budgets", nargs="+", default=[], metavar="1e22", help="FLOPs to allocate to N* and D*")
    report.add_argument("--cluster", metavar="devices=512,peak=989e12,mfu=40,price=2.5", help="for days and cost")
    report.add_argument("--output", required=True, type=Path, metavar="report.html")
    report.add_argument("--figures", type=Path, metavar="DIR", help="write every figure as PNG and SVG too")
    report.add_argument("--numbers", type=Path, metavar="report.json", help="write all that is drawn or tabulated")

    mfu = verbs.add_parser("mfu", help="MFU, tokens/s and goodput of runs over time, with stalls marked")
    mfu.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    mfu.add_argument("--output", type=Path, metavar="mfu.html", help="write a self-contained page")
    mfu.add_argument("--json", action="store_true", help="print one JSON array instead of tables")
    return parser


if __name__ == "__main__":
    sys.exit(main())
