#!/usr/bin/env python3
"""The whole path on text that every machine has: the Python standard library's own sources.

Tokenizer, shards, learning rate at the base width, a ladder of widths with everything transferred (one on two tensor
ranks and one on two pipeline stages through the deepspeed launcher), a law fitted to all but the largest, and the
largest's loss predicted beside the loss measured. Everything goes to ./demo; a second call goes on where the first
stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from megamup.cli import programs

OUT = Path("demo")
STUDIES = {
    "search: the learning rate at the base width": "configs/studies/demo_lr.yaml",
    "train on two tensor ranks": "configs/studies/demo_tensor.yaml",
    "train on two pipeline stages": "configs/studies/demo_pipeline.yaml",
    "train the other widths": "configs/studies/demo_ladder.yaml",
    "train the largest width": "configs/studies/demo_target.yaml",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards-only", action="store_true", help="stop once tokenizer and shards are made")
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    try:
        prepare_text()
        if arguments.shards_only:
            return 0
        for title, study in STUDIES.items():
            stage(title, "sweep", study)
        report_prediction()
    except subprocess.CalledProcessError as error:
        print(f"error: this stage failed ({error.returncode}); ./dev demo goes on from here", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; ./dev demo goes on from here", file=sys.stderr)
        return 130
    print(f"{time.monotonic() - started:.0f} s in all")
    return 0


def stage(title: str, program: str, *arguments: str) -> str:
    """Run one of the programs as a user would, its command shown; returns what it printed to stdout."""
    print(f"\n== {title}\n$ tools/{program}.py {shlex.join(arguments)}", flush=True)
    command = [sys.executable, str(programs()[program]), *arguments]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # for the deepspeed launcher
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "PATH": path})
    print(ended.stdout, end="", flush=True)
    return ended.stdout


def prepare_text() -> None:
    sources = ["--input", sysconfig.get_path("stdlib"), "--suffix", ".py"]
    sources += ["--exclude", "site-packages", "dist-packages", "test", "tests"]
    if not (OUT / "tokenizer.model").exists():
        output = ["--vocab-size", "1024", "--output", str(OUT / "tokenizer")]
        stage("tokenizer: 1,024 pieces", "train_tokenizer", *sources, *output)
    if not (OUT / "python_valid.idx").exists():
        output = ["--tokenizer", str(OUT / "tokenizer.model"), "--output-prefix", str(OUT / "python")]
        stage("shards", "preprocess_data", *sources, *output, "--valid-fraction", "0.05")


def report_prediction() -> None:
    """Fit the ladder, predict the target from its compute, and compare with what it measured."""
    rungs = [path for study in ("ladder", "tensor", "pipeline") for path in (OUT / study).glob("d_model=*")]
    fitted = sorted(str(path) for path in rungs)
    (target,) = (OUT / "target").glob("d_model=*")
    fit, report = OUT / "fit.json", OUT / "report.html"
    stage("fit the ladder", "scaling", "fit", "--law", "power", "--x", "C", "--runs", *fitted, "--output", str(fit))
    last = json.loads((target / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    at = f"C={last['flops']:.6g}"
    answer = stage(f"predict {target.name}", "scaling", "predict", "--fit", str(fit), "--at", at, "--json")
    predicted, measured = json.loads(answer), last["valid_loss"]
    stage("report", "scaling", "report", "--fit", str(fit), "--holdout", str(target), "--output", str(report))
    error = 100 * (predicted["loss"] - measured) / measured
    print(
        f"\npredicted loss  {predicted['loss']:.4f}   (95% interval {predicted['low']:.4f} to {predicted['high']:.4f})"
    )
    print(f"measured loss   {measured:.4f}")
    print(f"error           {error:+.2f} %")
    print(f"report          {report.resolve()}")


if __name__ == "__main__":
    sys.exit(main())
