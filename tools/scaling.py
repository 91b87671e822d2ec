#!/usr/bin/env python3
"""Fit scaling laws to runs, predict the loss of a larger run, and report: fit, predict, report."""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from megamup.cli import report_errors
from megamup.errors import MegamupError
from megamup.files import write_text_atomic
from megamup.scaling.fit import OBJECTIVES, fit_law
from megamup.scaling.fit_file import Result, load_result, make_result, save_result, to_json
from megamup.scaling.laws import LAWS, Law
from megamup.scaling.report import judge, make_report
from megamup.scaling.runs import LOSSES, PARAMETER_COUNTS, Ladder, load_csv, load_holdout, load_runs
from megamup.scaling.uncertainty import no_interval_reason, predict


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; an error in what the user gave is one line on stderr and exit code 2."""
    arguments = _parser().parse_args(argv)
    arguments.command = shlex.join(["tools/scaling.py", *(sys.argv[1:] if argv is None else argv)])
    verb = {"fit": _fit, "predict": _predict, "report": _report}[arguments.verb]
    return report_errors(lambda: verb(arguments))


def _fit(arguments: argparse.Namespace) -> None:
    law = LAWS[arguments.law]
    ladder = _ladder(arguments)
    x = _input_of(law, ladder, arguments.x)
    ladder = ladder.sorted_by(x)
    inputs = [point.inputs[x] for point in ladder.points]
    fit = fit_law(law, inputs, [point.loss for point in ladder.points], objective=arguments.objective)
    result = make_result(fit, x, ladder, arguments.command)
    if arguments.output:
        save_result(result, arguments.output)
    if arguments.json:
        print(json.dumps(to_json(result, (arguments.output or Path("fit.json")).parent), ensure_ascii=False))
    else:
        _print_fit(result)


def _predict(arguments: argparse.Namespace) -> None:
    result = load_result(arguments.fit)
    at = _pairs(arguments.at, "--at", "C=1e15")
    if set(at) != {result.x}:
        raise MegamupError(f"--at: {arguments.at!r} given; the law takes {result.x}: give {result.x}=NUMBER")
    x = _positive(at[result.x], f"--at {result.x}")
    prediction = predict(result.fit, [x])
    low, high = float(prediction.low[0]), float(prediction.high[0])
    reason = no_interval_reason(result.fit)
    beyond = x / max(point.inputs[result.x] for point in result.ladder.points)
    if arguments.json:
        answer = {
            "law": result.fit.law.name,
            "at": {result.x: x},
            "loss": float(prediction.loss[0]),
            "low": None if reason else low,
            "high": None if reason else high,
            "interval_note": reason or "95% prediction interval of one new run, noise included",
            "over_largest_x": beyond,
            "convention": result.ladder.convention,
            "warnings": result.warnings,
        }
        print(json.dumps(answer, ensure_ascii=False))
        return
    print(f"loss {prediction.loss[0]:.4f} at {result.x} = {x:.4g}, {beyond:.3g} times the largest fitted run")
    print(f"no interval: {reason}" if reason else f"one new run is within {low:.4f} to {high:.4f} (95%)")
    _print_warnings(result.warnings)


def _report(arguments: argparse.Namespace) -> None:
    result = load_result(arguments.fit)
    held = load_holdout(arguments.holdout, result.ladder) if arguments.holdout else ()
    write_text_atomic(arguments.output, make_report(result, held, arguments.command))
    for verdict in judge(result, held):
        state = {True: "inside", False: "outside", None: "no"}[verdict.inside]
        print(
            f"{verdict.point.name}: predicted {verdict.predicted:.4f}, measured {verdict.point.loss:.4f}, "
            f"error {verdict.error_percent:+.2f}%, {state} 95% interval"
        )
    print(f"wrote {arguments.output}")


def _ladder(arguments: argparse.Namespace) -> Ladder:
    if arguments.runs:
        if arguments.columns:
            raise MegamupError(f"--columns: {arguments.columns!r} goes with --data; run folders need none: drop it")
        return load_runs(
            arguments.runs, loss=arguments.loss, parameters=arguments.parameters, exclude=arguments.exclude
        )
    if not arguments.columns:
        raise MegamupError("--columns: missing; --data needs its columns named: add --columns C=COLUMN,L=COLUMN")
    return load_csv(arguments.data, _pairs(arguments.columns, "--columns", "C=flops,L=loss"), exclude=arguments.exclude)


def _input_of(law: Law, ladder: Ladder, asked: str | None) -> str:
    known = [key for key in ladder.points[0].inputs if key in law.choices] if ladder.points else list(law.choices)
    if asked is None:
        if not known:
            raise MegamupError(f"--columns: none of {', '.join(law.choices)} given; the law {law.name} needs one")
        return "C" if "C" in known else known[0]
    if asked not in known:
        raise MegamupError(f"--x: {asked} is not among the columns given; expected one of {', '.join(known)}")
    return asked


def _pairs(text: str, option: str, example: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not (key.strip() and equals and value.strip()):
            raise MegamupError(f"{option}: {part!r} is no KEY=VALUE; expected such as {example}")
        if key.strip() in pairs:
            raise MegamupError(f"{option}: {key.strip()} is given twice, {pairs[key.strip()]} and {value.strip()}")
        pairs[key.strip()] = value.strip()
    return pairs


def _positive(text: str, where: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise MegamupError(f"{where} is {text!r}; expected a finite number above 0, such as 1e15")
    return number


def _print_fit(result: Result) -> None:
    fit, convention = result.fit, result.ladder.convention
    counted = convention["parameters" if result.x == "N" else "flops"]
    print(f"law        {fit.law.formula.format(x=result.x)}   ({fit.law.source})")
    print(f"{result.x}          {counted}")
    print(f"loss       {convention['loss']}")
    print(f"objective  {OBJECTIVES[fit.objective]}: {fit.objective_value:.4g}\n")
    rows = [("parameter", "value", "95% low", "95% high")]
    for parameter, value in fit.parameters.items():
        low, high = ("-" if end is None else f"{end:.6g}" for end in result.intervals[parameter])
        rows.append((parameter, f"{value:.6g}", low, high))
    _print_table(rows)
    points = [("run", result.x, "loss", "law", "residual %")]
    for point, fitted in zip(result.ladder.points, fit.fitted, strict=True):
        residual = f"{100 * (point.loss / fitted - 1):+.2f}"
        points.append((point.name, f"{point.inputs[result.x]:.4g}", f"{point.loss:.4f}", f"{fitted:.4f}", residual))
    _print_table(points)
    diagnostics = fit.diagnostics
    std = "-" if fit.residual_std is None else f"{fit.residual_std:.3g}"
    print(
        f"residual std {std}, starts at the optimum {diagnostics.share_of_starts_at_optimum:.0%}, "
        f"gradient norm {diagnostics.gradient_norm:.1e}, condition number {diagnostics.condition_number:.3g}"
    )
    _print_warnings(result.warnings)


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        figures = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        print("  ".join([row[0].ljust(widths[0]), *figures]))
    print()


def _print_warnings(warnings: Sequence[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)

    fit = verbs.add_parser("fit", help="fit a law to finished runs or to a table")
    fit.add_argument("--law", required=True, choices=list(LAWS), help="the form of the law")
    choices = sorted({choice for law in LAWS.values() for choice in law.choices})
    fit.add_argument("--x", choices=choices, help="what the law is in: C, FLOPs (default), or N, parameters")
    data = fit.add_mutually_exclusive_group(required=True)
    data.add_argument("--runs", nargs="+", type=Path, metavar="DIR", help="run folders")
    data.add_argument("--data", type=Path, metavar="F.csv", help="a table with a header line")
    fit.add_argument("--columns", metavar="C=col,L=col", help="columns of --data: L, and N, C, D, name")
    fit.add_argument("--exclude", nargs="+", default=[], metavar="NAME", help="runs to leave out, by name")
    fit.add_argument("--loss", choices=LOSSES, default="valid_loss", help="which loss of a run (default valid_loss)")
    fit.add_argument(
        "--parameters", choices=PARAMETER_COUNTS, default="non_embedding", help="what N counts in run folders"
    )
    fit.add_argument("--objective", choices=OBJECTIVES, default="loss", help="what is least (default loss)")
    fit.add_argument("--output", type=Path, metavar="fit.json", help="write the fit file")
    fit.add_argument("--json", action="store_true", help="print one JSON object instead of tables")

    prediction = verbs.add_parser("predict", help="the loss of a new run, with its 95%% interval")
    prediction.add_argument("--fit", required=True, type=Path, metavar="fit.json")
    prediction.add_argument("--at", required=True, metavar="C=1e15", help="the new run's size")
    prediction.add_argument("--json", action="store_true", help="print one JSON object")

    report = verbs.add_parser("report", help="a self-contained HTML page")
    report.add_argument("--fit", required=True, type=Path, metavar="fit.json")
    report.add_argument("--holdout", nargs="+", type=Path, default=[], metavar="RUN_DIR", help="runs not fitted")
    report.add_argument("--output", required=True, type=Path, metavar="report.html")
    return parser


if __name__ == "__main__":
    sys.exit(main())
