"""metrics.jsonl first; the progress bar, wandb and TensorBoard are copies of it."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import sys
import time
from typing import Any, Literal, TextIO

import torch
import torch.distributed as dist
from tqdm import tqdm

from megamup.config import Config
from megamup.errors import OneRankError
from megamup.flops import flops_per_token, known_peak, mfu_percent
from megamup.parallel.mesh import SINGLE, Mesh
from megamup.train.compile import Compiled
from megamup.train.copies import Copies
from megamup.train.outlook import Outlook

PauseCause = Literal["evaluation", "saving", "profile"]


def peak_flops(config: Config, device: torch.device) -> dict[str, Any]:
    """Peak FLOP/s of all ranks together, and what it rests on: a data sheet or a measurement. Collective."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    known = known_peak(name, config.precision)
    if known is not None:
        basis = f"data sheet of {name}, dense bf16"
        if config.kernels.matmul == "fp8":
            basis += ", though some products are in fp8, whose peak is higher"
        return {"peak_flops": known * dist.get_world_size(), "peak_basis": basis}
    dist.barrier()  # ranks that share a processor measure what they get of it
    total = torch.tensor(measured_flops(torch.bfloat16 if config.precision == "bf16" else torch.float32, device))
    total = total.to(device)
    dist.all_reduce(total)
    basis = f"measured: {config.precision} matrix product of 1024 on all ranks at once ({name})"
    return {"peak_flops": float(total), "peak_basis": basis}


def measured_flops(dtype: torch.dtype, device: torch.device, size: int = 1024, seconds: float = 0.3) -> float:
    """FLOP/s of the fastest of repeated (size, size) matrix products."""
    a = torch.randn(size, size, device=device).to(dtype)
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def memory_peak_gib(device: torch.device) -> float:
    """Most memory that this rank held: the CUDA allocator's, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / 2**20


class Recorder:
    """Writes what rank 0 knows of each logged step. On other ranks every method does nothing."""

    def __init__(
        self,
        config: Config,
        peak: float,
        start_step: int,
        writes: bool,
        device: torch.device,
        outlook: Outlook | None = None,
        mesh: Mesh = SINGLE,
    ) -> None:
        self.outlook, self.mesh = outlook, mesh
        self.config, self.peak, self.writes, self.device = config, peak, writes, device
        self.last_step, self.last_time = start_step, time.perf_counter()
        self.paused: dict[str, float] = {}
        self.compiled_s = self.compiling()
        self.step_flops = config.batch_tokens * flops_per_token(
            config.model, config.lengths, config.train.flops_convention
        )
        if not writes:
            return
        self.file: TextIO = open(config.run.folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self.copies = Copies(config)
        wide = sys.stderr.isatty() and shutil.get_terminal_size((0, 0)).columns >= 60  # else plain lines
        shape = "{percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        self.bar = tqdm(total=config.train.steps, initial=start_step, disable=not wide, bar_format=shape)
        self.started, self.first_step = self.last_time, start_step

    def pause(self, cause: PauseCause) -> Pause:
        """``with recorder.pause("saving"):`` keeps what is no training step out of the throughput.

        The next record has the seconds that it took, as ``saving_s``.
        """
        return Pause(self, cause)

    def step(self, step: int, **values: float) -> dict[str, float]:
        """Record the step that was just finished."""
        self.leave_compiling_out()
        now, tokens = time.perf_counter(), self.config.batch_tokens
        tokens_per_s = (step - self.last_step) * tokens / max(now - self.last_time, 1e-9)
        self.last_step, self.last_time = step, now
        record = {
            "step": step,
            "tokens": step * tokens,
            "flops": step * self.step_flops,
            **values,
            "tokens_per_s": tokens_per_s,
            "mfu_percent": mfu_percent(tokens_per_s, self.config.model, self.config.lengths, self.peak),
            "memory_peak_gib": memory_peak_gib(self.device),
            "time_unix_s": time.time(),
            **{f"{cause}_s": seconds for cause, seconds in self.paused.items()},
        }
        self.paused.clear()
        if self.outlook is not None:
            record |= self.outlook.watch(record)
        self.write(record)
        if self.outlook is not None and step == self.config.train.steps:
            self.end(self.outlook.verdict(record))
        return record

    def leave_compiling_out(self) -> None:
        """Time that went into compiling isn't the training steps': ``compile_s`` of the next record has it."""
        before, self.compiled_s = self.compiled_s, self.compiling()
        if self.compiled_s > before:
            self.last_time += self.compiled_s - before
            self.paused["compile"] = self.compiled_s - before
            if self.writes:
                self.say(str(Compiled.now()))

    def compiling(self) -> float:
        """Seconds that went into compiling so far. Collective under a pipeline, whose stages wait for each other's."""
        stages = self.mesh.pipeline
        if not self.config.kernels.compile or stages.group is None:
            return Compiled.now().seconds if self.config.kernels.compile else 0.0
        seconds = torch.zeros(stages.size, dtype=torch.float64, device=self.device)
        seconds[stages.rank] = Compiled.now().seconds
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return float(seconds.sum())

    def end(self, verdict: str | None) -> None:
        """Say how the forecast came out."""
        if verdict:
            self.say(verdict)

    def say(self, line: str) -> None:
        """A line above the bar."""
        self.bar.write(line) if not self.bar.disable else print(line, flush=True)

    def write(self, record: dict[str, float]) -> None:
        """One line to the file, and copies of it. Raises OneRankError where the file can't be written."""
        if not self.writes:
            return
        try:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        except OSError as error:
            raise OneRankError(
                f"{self.file.name}: cannot be written ({error.strerror}); free space on that disk and start the same "
                "command again"
            ) from error
        self.copies(record)
        self.show(record)

    def show(self, record: dict[str, float]) -> None:
        shown = {"loss": f"{record['loss']:.4f}", "tok/s": f"{record['tokens_per_s']:,.0f}"}
        shown["mfu"] = f"{record['mfu_percent']:.3g}%"
        if "valid_loss" in record:
            shown["valid"] = f"{record['valid_loss']:.4f}"
        if self.outlook is not None:
            shown["predicted final"] = f"{self.outlook.forecast.loss:.4f}"
        if not self.bar.disable:
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(int(record["step"]) - self.bar.n)
            return
        done, total = int(record["step"]), self.config.train.steps
        rate = (done - self.first_step) / max(time.perf_counter() - self.started, 1e-9)
        left = tqdm.format_interval((total - done) / rate) if rate > 0 else "?"
        print(f"step {done}/{total}  " + "  ".join(f"{k} {v}" for k, v in shown.items()) + f"  left {left}", flush=True)

    def close(self) -> None:
        if self.writes:
            self.bar.close()
            with contextlib.suppress(OSError):  # a line that a full disk left in the buffer, reported before
                self.file.close()


class Pause:
    """Time inside is not the training steps'."""

    def __init__(self, recorder: Recorder, cause: PauseCause) -> None:
        self.recorder, self.cause = recorder, cause

    def __enter__(self) -> None:
        self.start, self.compiled_s = time.perf_counter(), self.recorder.compiling()

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        if failed is not None:
            return  # one rank's error: the others don't come to a collective
        # An evaluation's graph is compiled too: `leave_compiling_out` has those seconds.
        seconds = time.perf_counter() - self.start - (self.recorder.compiling() - self.compiled_s)
        self.recorder.last_time += seconds
        self.recorder.paused[self.cause] = self.recorder.paused.get(self.cause, 0.0) + seconds
