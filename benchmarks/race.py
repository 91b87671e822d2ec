"""Races of training programs: the same model on the same batches, one process after another, in turns.

Ours is `launch/pretrain.py` as a user starts it, at its defaults for everything but the shape; its speed is read from
its metrics.jsonl. The others are `contestants.py`. In the first turn those of others run in every mode of
torch.compile, and each keeps its fastest: who is beaten is beaten at its best.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, TextIO

import numpy as np

from megamup.config import Config, config_from, dump_config
from megamup.data.loader import BatchStream
from megamup.data.mixture import open_run_data
from megamup.data.writer import write_corpus
from megamup.flops import mfu_percent

ROOT = Path(__file__).resolve().parents[1]
LITGPT_SITE = ROOT / ".bench" / "litgpt"
LITGPT = ROOT / "benchmarks" / "litgpt.txt"
OURS, BARE = "megamup", "bare"


class RaceError(RuntimeError):
    """A contestant failed, or does other work than the rest."""


@dataclass(frozen=True)
class Span:
    """What one process took."""

    wall_s: float
    """Interpreter, imports, compilation and all steps."""
    others: float
    """Share of the machine's cores that other processes took meanwhile; 0 where the system doesn't say."""


@dataclass(frozen=True)
class Result:
    """One contestant's run."""

    contestant: str
    mode: str
    parameters: int
    losses: dict[int, float]
    """By step, the first is 1."""
    tokens_per_s: float
    memory_peak_gib: float
    span: Span


@dataclass(frozen=True)
class Race:
    """One shape, on one machine, prepared."""

    config: Config
    folder: Path
    warm: int
    """Steps that aren't timed."""
    threads: int | None
    """CPU threads of a contestant; None: torch's choice."""
    site: Path | None = None
    """Folder with litgpt."""
    timeout_s: float = 3600.0

    @property
    def windows(self) -> Path:
        return self.folder / "windows.npy"

    @property
    def config_file(self) -> Path:
        return self.folder / "race.yaml"


def prepare(values: dict[str, Any], folder: Path, warm: int, threads: int | None, **settings: Any) -> Race:
    """Write tokens, config and batches for a race to ``folder``. Tokens are Zipf's: there is a little to learn."""
    model, train = values["model"], values["train"]
    seq_len = model["max_seq_len"]
    wanted = values["batch"]["global_sequences"] * seq_len * train["steps"]
    ranks = np.random.default_rng(0).zipf(1.2, size=wanted + seq_len + 1)
    prefix = str(folder / "tokens")
    write_corpus(prefix, [ranks % model["vocab_size"]], model["vocab_size"], eod_id=0)
    placed = {"data": {"train": prefix}, "run": {"dir": str(folder)}}
    config = config_from(values | placed)
    race = Race(config, folder, warm, threads, **settings)
    race.config_file.write_text(dump_config(config), encoding="utf-8")
    np.save(race.windows, batches(config))
    return race


def batches(config: Config) -> np.ndarray[Any, Any]:
    """What the run trains on: (steps, sequences, seq + 1) int64."""
    sequences = config.batch.global_sequences
    stream = BatchStream(open_run_data(config).train.stream, sequences, sequences)
    return np.stack([stream.micro_batches(step)[0].window.numpy() for step in range(config.train.steps)])


def environment(race: Race) -> dict[str, str]:
    """The environment of every contestant: its threads, and no rank of a launcher."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    threads = {} if race.threads is None else {"OMP_NUM_THREADS": str(race.threads)}
    kept["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    return kept | threads | {"TOKENIZERS_PARALLELISM": "false"}


def busy_s() -> float:
    """Processor seconds of the whole machine since it started (Linux), without idling and waiting."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    ticks = [int(number) for number in stat.read_text().split("\n", 1)[0].split()[1:]]
    return (sum(ticks[:8]) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def execute(race: Race, name: str, command: Sequence[str]) -> Span:
    """Run a contestant; raises RaceError with the end of what it said."""
    begun, busy, used = time.perf_counter(), busy_s(), children_s()
    log = race.folder / f"{name}.log"
    with open(log, "w", encoding="utf-8") as sink:
        code = bounded(command, sink, environment(race), race.timeout_s)
    if code != 0:
        what = f"not done after {race.timeout_s:.0f} s" if code is None else f"exit code {code}"
        raise RaceError(f"{name}: {what}\n{tail(log)}")
    wall = time.perf_counter() - begun
    others = max(0.0, busy_s() - busy - (children_s() - used)) / (wall * (os.cpu_count() or 1))
    return Span(wall, others)


def bounded(command: Sequence[str], sink: TextIO, environment: dict[str, str], limit_s: float) -> int | None:
    """Run a command from the checkout's root and return its exit code, or None where it took too long: then it and
    all that it started, ranks that hold a device's memory among them, are killed."""
    process = subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL, start_new_session=True
    )
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:  # interrupted, too
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def end_children_too() -> None:
    """Let a SIGTERM end this process as Ctrl-C does, so that `bounded` takes what it started with it."""

    def end(*_: object) -> None:
        sys.exit(143)

    signal.signal(signal.SIGTERM, end)


def tail(log: Path, characters: int = 2000) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-characters:]


def run_ours(race: Race, label: str, overrides: Sequence[str] = (), launcher: Sequence[str] = ()) -> Result:
    """``launch/pretrain.py`` on the race's config, timed from its own records."""
    name = f"{OURS}-{label}"
    program = list(launcher) or [sys.executable]
    command = [*program, str(ROOT / "launch" / "pretrain.py"), str(race.config_file), f"run.name={name}", *overrides]
    span = execute(race, name, command)
    folder = race.folder / name
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    known = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    return Result(
        OURS,
        " ".join(overrides) or "eager",
        known["parameters"]["total"],
        {int(record["step"]): record["loss"] for record in records},
        steady_tokens_per_s(records, race.warm),
        records[-1]["memory_peak_gib"],
        span,
    )


def steady_tokens_per_s(records: Sequence[dict[str, Any]], warm: int) -> float:
    """Tokens over time from the record of step ``warm`` to the last, by the clock; pauses for evaluation, saving
    and a profile are not the steps'.

    Raises:
        RaceError: no record at ``warm``, or none after it.
    """
    first = next((record for record in records if record["step"] == warm), None)
    last = records[-1] if records else None
    if first is None or last is None or last["step"] == warm:
        raise RaceError(f"no records at step {warm} and after; set train.log_every to a divisor of {warm}")
    later = [record for record in records if record["step"] > warm]
    paused = sum(record.get(f"{cause}_s", 0.0) for record in later for cause in ("evaluation", "saving", "profile"))
    return float((last["tokens"] - first["tokens"]) / (last["time_unix_s"] - first["time_unix_s"] - paused))


def run_other(race: Race, name: str, mode: str, label: str) -> Result:
    """One of contestants.py."""
    output = race.folder / f"{name}-{label}.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "contestants.py"), name, str(race.config_file)]
    command += ["--windows", str(race.windows), "--warm", str(race.warm), "--mode", mode, "--output", str(output)]
    if name == "litgpt" and race.site is not None:
        command += ["--site", str(race.site)]
    span = execute(race, f"{name}-{label}", command)
    found = json.loads(output.read_text(encoding="utf-8"))
    losses = dict(enumerate(found["losses"], 1))
    return Result(name, mode, found["parameters"], losses, found["tokens_per_s"], found["memory_peak_gib"], span)


def fastest(results: Sequence[Result]) -> Result:
    return max(results, key=lambda result: result.tokens_per_s)


def check_same_work(results: Sequence[Result], rtol: float = 1e-4, curve_rtol: float = 1e-3) -> None:
    """Raise RaceError unless all have the same number of parameters and the same first loss, and ours the bare loop's
    whole curve."""
    reference = results[0]
    for result in results[1:]:
        if result.parameters != reference.parameters:
            raise RaceError(
                f"{result.contestant} has {result.parameters:,} parameters, {reference.contestant} "
                f"{reference.parameters:,}"
            )
        if abs(result.losses[1] / reference.losses[1] - 1) > rtol:
            raise RaceError(
                f"first loss of {result.contestant} is {result.losses[1]:.6f}, of {reference.contestant} "
                f"{reference.losses[1]:.6f}: they are to agree within {rtol:g}"
            )
    ours = next((result for result in results if result.contestant == OURS), None)
    bare = next((result for result in results if result.contestant == BARE), None)
    for step in ours.losses if ours and bare else ():
        mine, other = ours.losses[step], bare.losses[step]  # type: ignore[union-attr]
        if abs(mine / other - 1) > curve_rtol:
            raise RaceError(f"step {step}: loss {mine:.6f} of {OURS}, {other:.6f} of the bare loop")


@dataclass
class Standings:
    """What came out of all turns."""

    race: Race
    peak_flops: float
    turns: list[dict[str, Result]] = field(default_factory=list)

    def tokens_per_s(self, name: str) -> float:
        return median(turn[name].tokens_per_s for turn in self.turns)

    def ratios(self, name: str) -> list[float]:
        """Ours over ``name``, turn by turn."""
        return [turn[OURS].tokens_per_s / turn[name].tokens_per_s for turn in self.turns]

    def mfu(self, name: str) -> float:
        return mfu_percent(self.tokens_per_s(name), self.race.config.model, self.race.config.lengths, self.peak_flops)

    def table(self) -> list[str]:
        lines = [
            "| contestant | compiled | first loss | last | peak GiB | whole run s | tokens/s | MFU % "
            "| ours over it (range) |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for name in self.turns[0]:
            results = [turn[name] for turn in self.turns]
            one, ratios = results[-1], self.ratios(name)
            ratio = "" if name == OURS else f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
            lines.append(
                f"| {name} | {one.mode} | {one.losses[1]:.5f} | {one.losses[max(one.losses)]:.5f} "
                f"| {one.memory_peak_gib:.2f} | {median(r.span.wall_s for r in results):.0f} "
                f"| {self.tokens_per_s(name):,.0f} | {self.mfu(name):.1f} | {ratio} |"
            )
        return lines

    @property
    def disturbed(self) -> float:
        """Largest share of the machine's cores that other processes had during a run."""
        return max(result.span.others for turn in self.turns for result in turn.values())

    def missed(self, bounds: dict[str, float]) -> list[str]:
        """The bounds (least median ratio of ours to a contestant) that don't hold, in words."""
        found = []
        for name, bound in bounds.items():
            ratio = median(self.ratios(name)) if name in self.turns[0] else None
            if ratio is not None and ratio < bound:
                found.append(f"missed: {OURS} at {ratio:.3f} of {name}, expected at least {bound:g}")
        return found

    def summary(self) -> dict[str, Any]:
        """For reuse by a program."""
        return {
            "model": self.race.config.model.model_dump(mode="json"),
            "peak_flops": self.peak_flops,
            "tokens_per_s": {name: self.tokens_per_s(name) for name in self.turns[0]},
            "mfu_percent": {name: self.mfu(name) for name in self.turns[0]},
            "ours_over": {name: self.ratios(name) for name in self.turns[0] if name != OURS},
            "modes": {name: result.mode for name, result in self.turns[0].items()},
        }


@contextmanager
def said(what: str) -> Iterator[None]:
    """A line on stderr while something runs."""
    print(f"  {what} ...", end="", file=sys.stderr, flush=True)
    begun = time.perf_counter()
    try:
        yield
    finally:
        print(f" {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)


def litgpt_version() -> str:
    """``litgpt X``, as pinned."""
    pins = [line for line in LITGPT.read_text(encoding="utf-8").splitlines() if line.startswith("litgpt==")]
    return pins[0].replace("==", " ")


def litgpt_site() -> Path | None:
    """The folder with litgpt, installed there once; None where litgpt is in the environment.

    Raises:
        RaceError: pip can't install it.
    """
    if importlib.util.find_spec("litgpt") is not None:
        return None
    ready, want = LITGPT_SITE / ".ready", LITGPT.read_text(encoding="utf-8")
    if ready.is_file() and ready.read_text(encoding="utf-8") == want:
        return LITGPT_SITE
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*command, "--upgrade", "--target", str(LITGPT_SITE), "-r", str(LITGPT)], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RaceError(f"pip could not install litgpt to {LITGPT_SITE}:\n{done.stderr[-1500:]}")
    ready.write_text(want, encoding="utf-8")
    return LITGPT_SITE
