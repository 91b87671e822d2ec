#!/usr/bin/env python3
"""Does the best learning rate of the base width stay the best at 8x, under ``mup``, and does it move under ``sp``?

Trains a grid of learning rates (factor 2) x widths (32 to 256) x parametrizations on the demo's shards (made here
where they are missing) and writes the table to benchmarks/results/mup_transfer.md. Interrupted, it goes on.

    ./dev bench mup_transfer [--steps 240]
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from megamup.config import merge, read_yaml
from megamup.sweep import Study, Trial, run_study, trials

ROOT = Path(__file__).resolve().parents[1]
BASE = 32
WIDTHS = (32, 64, 128, 256)
RATES = tuple(2.0**-power for power in range(9, 3, -1))  # 0.00195 to 0.0625
RESULTS = ROOT / "benchmarks" / "results" / "mup_transfer.md"


def width(d_model: int) -> dict[str, int]:
    """Keys of one width: heads of 16, MLP of 3 d_model."""
    return {"model.d_model": d_model, "model.n_heads": d_model // 16, "model.d_ff": 3 * d_model}


def plan_trials(parametrization: str, steps: int) -> tuple[Study, list[Trial]]:
    study = Study(
        name=f"mup_transfer/{parametrization}-{steps}",
        configs=("configs/demo.yaml",),
        grid={"width": tuple(width(d) for d in reversed(WIDTHS)), "optim.lr": RATES},
    )
    base: dict[str, Any] = read_yaml(ROOT / "configs" / "demo.yaml")
    merge(base, {"mup": {"parametrization": parametrization}, "train": {"steps": steps}})
    for split in ("train", "valid"):
        base["data"][split] = str(ROOT / "demo" / f"python_{split}")
    base["run"] = {"dir": str(ROOT / "runs")}
    return study, trials(study, base)


Losses = dict[int, list[float]]


def losses(planned: Sequence[Trial]) -> Losses:
    """{width: validation loss by rate}; infinite where a run diverged."""
    found: Losses = {d: [] for d in WIDTHS}
    for trial in sorted(planned, key=lambda t: t.config.optim.lr):
        found[trial.config.model.d_model].append(trial.value("valid_loss"))
    return found


def best_index(row: Sequence[float]) -> int:
    return min(range(len(row)), key=row.__getitem__)


def table(name: str, found: Losses) -> list[str]:
    lines = [f"| {name}: width | " + " | ".join(f"lr {rate:.4g}" for rate in RATES) + " | lost by transferring |"]
    lines.append("|---" * (len(RATES) + 2) + "|")
    transferred = best_index(found[BASE])
    for d, row in found.items():
        best = best_index(row)
        cells = [f"**{loss:.3f}**" if index == best else f"{loss:.3f}" for index, loss in enumerate(row)]
        lines.append(f"| {d} | " + " | ".join(cells) + f" | {row[transferred] - row[best]:+.3f} |")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240, help="steps of each run, of 2,048 tokens")
    arguments = parser.parse_args(argv)
    subprocess.run([sys.executable, str(ROOT / "tools" / "demo.py"), "--shards-only"], check=True)
    found: dict[str, Losses] = {}
    for parametrization in ("mup", "sp"):
        study, planned = plan_trials(parametrization, arguments.steps)
        run_study(study, planned)
        found[parametrization] = losses(planned)

    moved = {name: [best_index(row) - best_index(rows[BASE]) for row in rows.values()] for name, rows in found.items()}
    tokens = arguments.steps * 2048
    lines = [
        f"Validation loss after {arguments.steps} steps ({tokens:,} tokens), the best of each width in bold.",
        f"{date.today()}, {platform.machine()} CPU, torch {torch.__version__}, `./dev bench mup_transfer`.",
        "",
        *table("mup", found["mup"]),
        "",
        *table("sp", found["sp"]),
        "",
        *(f"{name}: the best rate moves by {steps} grid points over widths {WIDTHS}." for name, steps in moved.items()),
    ]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    RESULTS.with_suffix(".json").write_text(json.dumps({"rates": RATES, **found}, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 0 if not any(moved["mup"]) and any(moved["sp"]) else 1


if __name__ == "__main__":
    sys.exit(main())
