#!/usr/bin/env python3
"""Training speed on a CPU: ours beside a bare PyTorch loop over the same layers, transformers and litgpt.

    ./dev bench train [--shapes llama gpt] [--turns 5] [--threads 2] [--quick] [--no-compile] [--output F.md]

Ten million parameters, sequences of 256 tokens, 2,048 tokens a step, fp32. `megamup` is `launch/pretrain.py` at ZeRO 0,
one process as a user starts it: data stream, DeepSpeed engine, schedule, records. The bare loop is the same layers
with the same compiled blocks, loss, parameter groups and clipping, and nothing else. transformers and litgpt have the
same shape, initial weights, batches, optimizer and clipping in a plain loop; before the first turn every way to compile
them is tried, and they keep their fastest. Every contestant is a process of its own; they take turns, so that whatever
else the machine does meets all; figures are medians over turns, ratios are taken within a turn. Compilation and the
first steps are not timed.

All losses of the first step agree to 1e-4, and ours and the bare loop's all along to 1e-3, or the race is void.
`gpt` has no litgpt: its GPT knows rotary positions only. `llama` runs in μP at four times the base width, `gpt` at
its base width, since GPT-2's tied readout of transformers has no multiplier.

Exit code 1 where a bound doesn't hold: 0.97 of the bare loop, 1.0 of transformers and litgpt.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import cores, headline
from race import (
    BARE,
    OURS,
    Race,
    RaceError,
    Result,
    Standings,
    check_same_work,
    end_children_too,
    fastest,
    litgpt_site,
    litgpt_version,
    prepare,
    run_other,
    run_ours,
    said,
)

SEQ, SEQUENCES = 256, 8
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {
        "model": {
            "arch": "llama",
            "d_model": 256,
            "n_layers": 10,
            "n_heads": 4,
            "d_ff": 688,
            "vocab_size": 4096,
            "max_seq_len": SEQ,
        },
        "mup": {"base": {"d_model": 64, "d_ff": 172, "n_heads": 1}},
    },
    # nanoGPT's train_shakespeare_char.py, its vocabulary rounded up
    "gpt": {
        "model": {
            "arch": "gpt",
            "d_model": 384,
            "n_layers": 6,
            "n_heads": 6,
            "vocab_size": 128,
            "max_seq_len": SEQ,
        },
    },
}
OTHERS = {"llama": ["transformers", "litgpt"], "gpt": ["transformers"]}
BOUNDS = {BARE: 0.97, "transformers": 1.0, "litgpt": 1.0}


def values(shape: str, steps: int) -> dict[str, Any]:
    return SHAPES[shape] | {
        "batch": {"global_sequences": SEQUENCES, "micro_sequences": SEQUENCES},
        "optim": {"lr": 1e-3},
        "schedule": {"kind": "constant"},
        "train": {"steps": steps},
    }


def best_modes(race: Race, names: list[str], compile_too: bool) -> tuple[dict[str, str], list[str]]:
    """The fastest mode of each of the others, and a line that says how fast every one was."""
    modes, lines = {}, []
    for name in names:
        tried = []
        for mode in ("eager", "blocks", "model", "step") if compile_too else ("eager",):
            with said(f"{name}, {mode}"):
                tried.append(run_other(race, name, mode, f"try-{mode}"))
        modes[name] = fastest(tried).mode
        lines.append(f"{name} by mode: " + ", ".join(f"{r.mode} {r.tokens_per_s:,.0f}" for r in tried) + " tokens/s.")
    return modes, lines


def turn(race: Race, number: int, modes: dict[str, str], compile_too: bool) -> dict[str, Result]:
    """Everyone once, ours first."""
    found: dict[str, Result] = {}
    with said(f"turn {number}, {OURS}"):
        found[OURS] = run_ours(race, f"turn-{number}", ["kernels.compile=true"] if compile_too else [])
    for name, mode in modes.items():
        with said(f"turn {number}, {name}"):
            found[name] = run_other(race, name, mode, f"turn-{number}")
    check_same_work(list(found.values()))
    return found


def compete(shape: str, options: argparse.Namespace, folder: Path) -> tuple[Standings, list[str]]:
    warm, steps = (4, 12) if options.quick else (10, 40)
    plan = values(shape, steps)
    plan["train"]["log_every"] = 2 if options.quick else 10  # 10 is the default
    race = prepare(plan, folder, warm, options.threads, site=litgpt_site() if "litgpt" in OTHERS[shape] else None)
    modes, lines = best_modes(race, OTHERS[shape], options.compile)
    modes = {BARE: "blocks" if options.compile else "eager"} | modes  # the same blocks as ours
    peak, turns = 0.0, []
    for number in range(1, options.turns + 1):
        peak = max(peak, measured_peak(options.threads))
        turns.append(turn(race, number, modes, options.compile))
    return Standings(race, peak, turns), lines


def measured_peak(threads: int) -> float:
    import torch
    from machine import matrix_peak

    torch.set_num_threads(threads)
    return matrix_peak()


def basis(standings: Standings, threads: int) -> str:
    return (
        f"MFU is PaLM's, of the machine's measured fp32 matrix peak, {standings.peak_flops / 1e9:.0f} GFLOP/s on "
        f"{threads} threads. Other processes had at most {100 * standings.disturbed:.0f}% of the cores during a run."
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=min(2, cores()))
    parser.add_argument("--quick", action="store_true", help="8 timed steps instead of 30")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="everyone without torch.compile")
    parser.add_argument("--output", type=Path, help="write the tables here as Markdown, and as .json beside it")
    options = parser.parse_args(argv)
    end_children_too()
    command = " ".join(["./dev bench train", *(sys.argv[1:] if argv is None else argv)])
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    page = [
        "# Training speed on a CPU",
        "",
        headline(command, "torch", "deepspeed", "transformers", also=litgpt_version()),
        "",
    ]
    summaries, missed = {}, []
    for shape in options.shapes:
        print(shape, file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            try:
                standings, lines = compete(shape, options, Path(folder))
            except RaceError as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
        count = next(iter(standings.turns[0].values())).parameters
        page += [f"## {shape}, {count / 1e6:.1f}M parameters", "", *standings.table(), ""]
        page += [f"{options.turns} turns; {' '.join(lines)} {basis(standings, options.threads)}"]
        page += ["", *standings.missed(BOUNDS), ""]
        missed += standings.missed(BOUNDS)
        summaries[shape] = standings.summary()
    text = "\n".join(page).rstrip() + "\n"
    print(text)
    print(json.dumps(summaries))
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")
        options.output.with_suffix(".json").write_text(json.dumps(summaries, indent=1) + "\n", encoding="utf-8")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
