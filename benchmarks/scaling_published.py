#!/usr/bin/env python3
"""Published runs: the small fitted as a user would, the large predicted, with the interval that the backtest widened.

    ./dev bench scaling_published [--output benchmarks/results/scaling_published.md]

Reads ../shared/scaling_data: the OLMo ladder (Bhagia et al. 2024), Gadre et al. 2024's 104 runs, Gemstones (McLeish et
al. 2025). Laws are given; the objective is chosen by held-out error, but for the five points of Gadre et al., whose
published fit is least squares on the loss. Exit code 1 where a held-out run lies outside its interval, or an error is
above what is published or expected of it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from megamup.scaling.analysis import AUTO, Result, analyse
from megamup.scaling.estimate import estimate
from megamup.scaling.laws import Law
from megamup.scaling.laws.loss import CHINCHILLA, OVERTRAINING
from megamup.scaling.runs import Ladder, Point, Reading, load

DATA = Path(__file__).resolve().parents[2] / "shared" / "scaling_data"
OLMO_SIZES, OLMO_TIMES = ("190M", "370M", "760M", "1B"), (1, 2, 5, 10)
GADRE_MODELS = ("d=96_l=8_h=4", "d=512_l=8_h=4", "d=576_l=24_h=8", "d=1024_l=24_h=8")


@dataclass(frozen=True)
class Case:
    """Runs to fit and runs to predict; `most` is the largest error allowed, in percent, of each of these."""

    name: str
    law: Law
    fitted: Sequence[Point]
    held: Sequence[Point]
    most: Sequence[float]
    objective: str = AUTO


def cases() -> Iterator[Case]:
    olmo = {
        point.name: point
        for point in read("olmo_ladder/ladder_losses_final.csv", N="N", D="D", C="flops", L="c4_en", name="run")
    }
    ladder = [olmo[f"{size}-{times}xC"] for size in OLMO_SIZES for times in OLMO_TIMES]
    large = [olmo[name] for name in ("3B-10xC", "peteish7_eval_anneal", "peteish13_eval_final")]
    yield Case("OLMo ladder, 16 runs to 1.3B", CHINCHILLA, ladder, large, (1.0, 1.5, 2.5))
    columns = {"N": "N", "D": "20*chinchilla_multiplier*N", "L": "loss_c4_val", "name": "name"}
    for dataset in ("rpj", "c4_original", "rw_original"):
        points = {
            point.name: point
            for point in read("gadre_overtraining/models_104.csv", {"train_dataset": dataset}, **columns)
        }
        held = [p for name, p in points.items() if "open_lm_7b" in name or name == f"{dataset}-open_lm_1b-32.0"]
        if dataset == "rpj":
            five = [points[f"rpj-{model}-1.0"] for model in GADRE_MODELS] + [points[f"rpj-{GADRE_MODELS[0]}-16.0"]]
            yield Case("Gadre, five points", OVERTRAINING, five, held, (0.7105, 0.7325), "loss")
        small = [point for point in points.values() if point not in held]
        yield Case(f"Gadre, all to 1.4B, {dataset}", OVERTRAINING, small, held, (7.0,) * len(held))
    for phase in ("cool_end", "hot"):
        path = f"gemstones/wandb_df_for_fitting_{phase}.jsonl"
        points_2b = read(path, N="params_active_precise", D="tokens", L="final_loss", run="run_name")
        small = [point for point in points_2b if point.inputs["N"] < 1.5e9]
        held = [point for point in points_2b if point.inputs["N"] > 1.5e9]
        yield Case(f"Gemstones to 1B, {phase}", CHINCHILLA, small, held, (7.0,) * len(held))


def read(path: str, where: dict[str, str] | None = None, **columns: str) -> tuple[Point, ...]:
    conditions = {key: (value,) for key, value in (where or {}).items()}
    return load([], [DATA / path], Reading(columns=columns, where=conditions)).points


def rows(case: Case, result: Result) -> Iterator[tuple[str, ...]]:
    """Each held-out run; of many, the worst and the last."""
    errors = {}
    for point, most in zip(case.held, case.most, strict=True):
        (found,) = estimate(result, {key: point.inputs[key] for key in result.law.inputs})
        error = 100 * (found.value / point.loss - 1)
        inside = found.low is not None and found.high is not None and found.low <= point.loss <= found.high
        ends = "-" if found.low is None or found.high is None else f"{found.low:.3f} to {found.high:.3f}"
        cells = (
            point.name,
            f"{point.loss:.3f}",
            f"{found.value:.3f}",
            f"{error:+.2f}",
            ends,
            "yes" if inside else "NO",
        )
        errors[point.name] = (abs(error), cells, inside and abs(error) <= most)
    shown = sorted(errors.values(), reverse=True)[:3]
    for _, cells, good in shown:
        yield (*cells, "" if good else "FAILS")
    if len(errors) > len(shown):
        inside_all = sum(cells[-1] == "yes" for _, cells, _ in errors.values())
        good = all(good for *_, good in errors.values())
        yield (f"all {len(errors)}", "", "", "", "", f"{inside_all} yes", "" if good else "FAILS")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="also write the tables to this file")
    arguments = parser.parse_args(argv)
    if not DATA.is_dir():
        print(f"{DATA} is not on this machine; nothing to measure", file=sys.stderr)
        return 0
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("numpy", "scipy"))
    lines = [
        f"`./dev bench scaling_published`, {date.today():%Y-%m-%d}, Python {platform.python_version()}, {versions}."
    ]
    failed = False
    for case in cases():
        ladder = Ladder(tuple(case.fitted), {"parameters": "total", "flops": "none", "loss": "C4"})
        result = analyse(ladder, [case.law], objective=case.objective)
        test = result.backtest
        told = "no larger runs to hold out" if not test.trials else f"{test.held:.0%} of {len(test.trials)} inside"
        lines += [
            "",
            f"**{case.name}**: {case.law.name}, {result.fit.objective.meaning}; backtest: {told}, widened by "
            f"{test.inflation:.2f}; {result.fit.diagnostics.share_of_starts_at_optimum:.0%} of starts at the optimum.",
            "",
            "| held out | measured | predicted | error % | 95% interval | inside | |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in rows(case, result):
            failed |= bool(row[-1])
            lines.append(f"| {' | '.join(row)} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
