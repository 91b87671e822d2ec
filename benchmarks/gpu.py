#!/usr/bin/env python3
"""Everything that needs a GPU, in one command with a time limit: the tests marked gpu, the bench, a profile.

    ./dev gpu [--minutes 9] [--parts megamup tests ...] [--wheels DIR] [--dry-run] [--output F.md] [a.b=c ...]

The bench trains configs/llama_1p3b_bench.yaml (1.3B parameters, bf16, sequence 4096; a.b=c changes it) with `megamup`,
which is `launch/pretrain.py` as a user starts it, then transformers, litgpt and a bare PyTorch loop over megamup's
layers: the same weights, batches, optimizer and clipping, each block compiled, flash attention (flash-attn where it is
installed, else torch's). MFU is PaLM's, of the device's data sheet, or of a measured matrix product where none is
known. Whole models compiled are tried last, where time is left; a contestant is judged by its fastest form.

Each part has a limit of its own within the whole; what fails or finds no time is reported, and the rest goes on. The
page goes to benchmarks/results/gpu-DEVICE-DATE.md, with a .json beside it.

`--wheels DIR` needs no network: it takes the machine's own python3 with its torch, and the rest from wheels that `./dev
wheels DIR` collected elsewhere. `--dry-run` runs every part on the CPU with a toy, to see that they work; the tests are
only collected, and no page is written unless `--output` says where.

Exit code 0: all parts ran, and ours is ahead of transformers and litgpt, at 55% MFU on an H100 or H200; 1: a bound
doesn't hold; 2: a part failed, or one but the last two (whole models
compiled) found no time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

from machine import device_name, headline
from race import (
    OURS,
    ROOT,
    Race,
    RaceError,
    Result,
    bounded,
    check_same_work,
    end_children_too,
    litgpt_site,
    litgpt_version,
    prepare,
    run_other,
    run_ours,
)

from megamup.config import load_config
from megamup.errors import MegamupError
from megamup.flops import known_peak, mfu_percent

CONFIG = ROOT / "configs" / "llama_1p3b_bench.yaml"
TOY = (
    "model.d_model=64",
    "model.n_layers=2",
    "model.n_heads=2",
    "model.d_ff=96",
    "model.vocab_size=256",
    "model.max_seq_len=64",
    "mup.base={d_model: 32, d_ff: 48, n_heads: 1}",
    "batch.global_sequences=4",
    "batch.micro_sequences=2",
)
BOUND_MFU = {"H100": 55.0, "H200": 55.0}
"""Percent, by a part of the device's name."""
WARM = 5


@dataclass(frozen=True)
class Part:
    """One thing to do, in at most `limit_s`."""

    name: str
    limit_s: float
    run: Callable[[float], Any]
    """(seconds that it may take) -> what came out; RaceError where it failed."""
    optional: bool = False
    """That it finds no time is no failure."""


@dataclass(frozen=True)
class Outcome:
    name: str
    state: str
    """``done``, ``failed`` or ``no time``."""
    seconds: float = 0.0
    value: Any = None
    message: str = ""


def run_parts(parts: Sequence[Part], budget_s: float, least_s: float = 20.0) -> list[Outcome]:
    """Run parts one after another until the budget is spent; each gets its own limit or what is left.

    A part is not started with less than `least_s` left, since it could only fail.
    """
    outcomes, end = [], time.monotonic() + budget_s
    for part in parts:
        left = end - time.monotonic()
        if left < least_s:
            outcomes.append(Outcome(part.name, "no time", message=f"{max(left, 0):.0f} s were left"))
            continue
        begun = time.monotonic()
        print(f"{part.name}: at most {min(part.limit_s, left):.0f} s", flush=True)
        try:
            value = part.run(min(part.limit_s, left))
            outcome = Outcome(part.name, "done", time.monotonic() - begun, value)
        except (RaceError, MegamupError, OSError) as error:
            outcome = Outcome(part.name, "failed", time.monotonic() - begun, message=str(error))
        print(f"{part.name}: {outcome.state} in {outcome.seconds:.0f} s {outcome.message[-1500:]}", flush=True)
        outcomes.append(outcome)
    return outcomes


@dataclass
class Bench:
    """The race, prepared when its first part runs, and what it needs."""

    overrides: Sequence[str]
    folder: Path
    made: Race | None = field(default=None)

    def race(self, limit_s: float) -> Race:
        if self.made is None:
            config = load_config([CONFIG], self.overrides)
            values = config.model_dump(mode="json", exclude={"data", "run"})
            self.made = prepare(values, self.folder, WARM, None)
        return replace(self.made, timeout_s=limit_s)

    def ours(self, limit_s: float) -> Result:
        return run_ours(self.race(limit_s), "race")

    def other(self, name: str, mode: str, limit_s: float) -> Result:
        begun = time.monotonic()
        site = litgpt_site() if name == "litgpt" else None
        race = replace(self.race(limit_s), site=site)
        return run_other(replace(race, timeout_s=limit_s - (time.monotonic() - begun)), name, mode, mode)

    def profile(self, limit_s: float) -> str:
        """The summary that ``train.profile`` writes for three steady steps."""
        label = "profile"
        run_ours(self.race(limit_s), label, [f"train.profile=[{WARM + 1}, {WARM + 3}]", f"train.steps={WARM + 5}"])
        summary = self.folder / f"{OURS}-{label}" / "profile" / "summary.md"
        return summary.read_text(encoding="utf-8")

    def environment(self) -> dict[str, Any]:
        """What ours wrote of the machine; empty before it ran."""
        path = self.folder / f"{OURS}-race" / "environment.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def run_tests(limit_s: float, collect_only: bool) -> str:
    """pytest's last line; raises RaceError where a test fails or none was found.

    Only files with such tests are collected: others may import what a GPU machine lacks.
    """
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    forking = [path for path in files if "run_ranks" in path.read_text("utf-8")]
    began, lines = time.monotonic(), []
    # Ranks can't be forked from a process that has started CUDA, as tests of kernels do: a process for each kind.
    for part in (forking, [path for path in files if path not in forking]):
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--durations=5"]
        command += ["--collect-only"] if collect_only else ["-vv"]  # names: one of them may hang
        command += [str(path) for path in part]
        environment = dict(os.environ) | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}  # asks for a GPU without starting CUDA
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as sink:
            code = bounded(command, sink, environment, limit_s - (time.monotonic() - began))
            sink.seek(0)
            text = sink.read()
        if code != 0:
            what = f"not done after {limit_s:.0f} s" if code is None else f"exit code {code}"
            raise RaceError(f"tests: {what}\n{text[-6000:]}")
        lines.append(text.strip().splitlines()[-1])
    return "; ".join(lines)


def parts_of(bench: Bench, dry_run: bool) -> list[Part]:
    """In order of worth: what comes last may find no time."""

    def contestant(name: str, mode: str) -> Callable[[float], Result]:
        return lambda limit_s: bench.other(name, mode, limit_s)

    return [
        Part(OURS, 150, bench.ours),
        Part("transformers", 120, contestant("transformers", "blocks")),
        Part("tests", 180, lambda limit_s: run_tests(limit_s, dry_run)),
        Part("litgpt", 120, contestant("litgpt", "blocks")),
        Part("profile", 90, bench.profile),
        Part("bare", 90, contestant("bare", "blocks")),
        Part("transformers whole", 150, contestant("transformers", "model"), optional=True),
        Part("litgpt whole", 150, contestant("litgpt", "model"), optional=True),
    ]


def results_of(outcomes: Sequence[Outcome]) -> list[Result]:
    return [outcome.value for outcome in outcomes if isinstance(outcome.value, Result)]


def best_of(results: Sequence[Result], name: str) -> Result | None:
    found = [result for result in results if result.contestant == name]
    return max(found, key=lambda result: result.tokens_per_s) if found else None


def bench_table(results: Sequence[Result], bench: Bench, peak_flops: float) -> list[str]:
    """One line a run; empty where nothing ran."""
    if not results:
        return []
    config, ours = bench.race(0).config, best_of(results, OURS)
    lines = [
        "| contestant | compiled | first loss | last | peak GiB | whole run s | tokens/s | MFU % | ours over it |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        mfu = mfu_percent(result.tokens_per_s, config.model, config.lengths, peak_flops)
        ratio = f"{ours.tokens_per_s / result.tokens_per_s:.3f}" if ours and result.contestant != OURS else ""
        mode = ("blocks" if config.kernels.compile else "eager") if result.contestant == OURS else result.mode
        lines.append(
            f"| {result.contestant} | {mode} | {result.losses[1]:.4f} | {result.losses[max(result.losses)]:.4f} "
            f"| {result.memory_peak_gib:.2f} | {result.span.wall_s:.0f} | {result.tokens_per_s:,.0f} | {mfu:.1f} "
            f"| {ratio} |"
        )
    return lines


def missed(results: Sequence[Result], bench: Bench, peak_flops: float, device: str) -> list[str]:
    """Bounds that don't hold, in words, among what ran."""
    found, ours = [], best_of(results, OURS)
    try:
        check_same_work(results, rtol=2e-3, curve_rtol=1e-2)  # bf16: the cast of weights and of activations differ
    except RaceError as error:
        found.append(f"missed: {error}")
    for name in ("transformers", "litgpt"):
        other = best_of(results, name)
        if ours and other and ours.tokens_per_s < other.tokens_per_s:
            ratio = ours.tokens_per_s / other.tokens_per_s
            found.append(f"missed: {OURS} at {ratio:.3f} of {name} ({other.mode}), expected at least 1")
    bound = next((percent for part, percent in BOUND_MFU.items() if part in device), None)
    if ours and bound is not None:
        config = bench.race(0).config
        mfu = mfu_percent(ours.tokens_per_s, config.model, config.lengths, peak_flops)
        if mfu < bound:
            found.append(f"missed: MFU {mfu:.1f}%, expected at least {bound:g}% on {device}")
    return found


def page_of(outcomes: Sequence[Outcome], bench: Bench, command: str, device: str) -> tuple[str, list[str]]:
    """The report as Markdown, and the bounds that don't hold."""
    results, known = results_of(outcomes), bench.environment()
    precision = bench.made.config.precision if bench.made else ""
    peak = known.get("peak_flops") or known_peak(device, precision)
    basis = known.get("peak_basis") or f"data sheet of {device}"
    packages = ("torch", "triton", "deepspeed", "transformers", "flash-attn", "liger-kernel")
    lines = [
        f"# On {device}",
        "",
        headline(command, *packages, also=litgpt_version()),
        "",
        "| part | state | seconds |",
        "|---|---|---|",
    ]
    lines += [f"| {outcome.name} | {outcome.state} | {outcome.seconds:.0f} |" for outcome in outcomes]
    failures = missed(results, bench, peak, device) if results and peak else []
    if results and peak:
        lines += ["", f"## Training, {results[0].parameters / 1e9:.3g}B parameters, {precision}", ""]
        lines += [*bench_table(results, bench, peak), ""]
        lines += [f"MFU is PaLM's, of {peak / 1e12:,.4g} TFLOP/s: {basis}.", ""]
        lines += [f"Kernels: {known['kernels']}."] if "kernels" in known else []
    lines += ["", *failures] if failures else []
    for outcome in outcomes:
        if outcome.message:
            lines += ["", f"## {outcome.name}: {outcome.state}", "", "```", outcome.message.strip()[-4000:], "```"]
        elif isinstance(outcome.value, str):
            text = re.sub(r"^#", "##", outcome.value.strip(), flags=re.MULTILINE)  # below this page's headings
            lines += ["", f"## {outcome.name}", "", re.sub(r"^!\[.*\n?", "", text, flags=re.MULTILINE).strip()]
    return "\n".join(lines) + "\n", failures


def default_output(device: str) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return ROOT / "benchmarks" / "results" / f"gpu-{slug}-{date.today()}.md"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="a.b=c: of the bench's config")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together")
    parser.add_argument("--parts", nargs="+", help="only these")
    parser.add_argument("--wheels", help="folder of wheels; ./dev gpu installs them before this program starts")
    parser.add_argument("--dry-run", action="store_true", help="a toy on the CPU")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/gpu-DEVICE-DATE.md")
    options = parser.parse_args(argv)
    end_children_too()
    begun = time.monotonic()
    if options.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks
    import torch

    if not torch.cuda.is_available() and not options.dry_run:
        print("error: no CUDA device; --dry-run tries every part on the CPU", file=sys.stderr)
        return 2
    device = device_name()
    command = " ".join(["./dev gpu", *(sys.argv[1:] if argv is None else argv)])
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench([*(TOY if options.dry_run else ()), *options.overrides], Path(folder))
        parts = parts_of(bench, options.dry_run)
        unknown = set(options.parts or ()) - {part.name for part in parts}
        if unknown:
            print(f"error: --parts {sorted(unknown)}; known are {[part.name for part in parts]}", file=sys.stderr)
            return 2
        parts = [part for part in parts if options.parts is None or part.name in options.parts]
        outcomes = run_parts(parts, 60 * options.minutes - (time.monotonic() - begun))
        text, failures = page_of(outcomes, bench, command, device)
    print(text, flush=True)
    output = options.output or (None if options.dry_run else default_output(device))
    if output is not None:
        output.write_text(text, encoding="utf-8")
        found = {"device": device, "outcomes": [asdict(outcome) for outcome in outcomes], "missed": failures}
        output.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    spared = {part.name for part in parts if part.optional}
    if not all(one.state == "done" or (one.state == "no time" and one.name in spared) for one in outcomes):
        return 2
    return 1 if failures and not options.dry_run else 0


if __name__ == "__main__":
    sys.exit(main())
