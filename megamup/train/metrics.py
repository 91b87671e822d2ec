"""metrics.jsonl first; the progress bar, wandb and TensorBoard are copies of it."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from tqdm import tqdm

from megamup.config import Config
from megamup.flops import flops_per_token, known_peak, mfu_percent


def peak_flops(config: Config, device: torch.device) -> dict[str, Any]:
    """Peak FLOP/s of all ranks together, and what it rests on: a data sheet or a measurement. Collective."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    known = known_peak(name, config.precision)
    if known is not None:
        return {"peak_flops": known * dist.get_world_size(), "peak_basis": f"data sheet of {name}, dense bf16"}
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

    def __init__(self, config: Config, peak: float, start_step: int, writes: bool, device: torch.device) -> None:
        self.config, self.peak, self.writes, self.device = config, peak, writes, device
        self.last_step, self.last_time = start_step, time.perf_counter()
        self.step_flops = config.batch_tokens * flops_per_token(
            config.model, config.seq_len, config.train.flops_convention
        )
        if not writes:
            return
        self.file: TextIO = open(config.run.folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self.copies = [copy for copy in (open_wandb(config), open_tensorboard(config)) if copy is not None]
        steps = config.train.steps
        self.bar = tqdm(total=steps, initial=start_step, unit="step", disable=not sys.stderr.isatty())
        self.started, self.first_step = self.last_time, start_step

    def pause(self) -> Pause:
        """``with recorder.pause():`` keeps evaluation and saving out of the throughput."""
        return Pause(self)

    def step(self, step: int, **values: float) -> dict[str, float]:
        """Record the step that was just finished."""
        now, tokens = time.perf_counter(), self.config.batch_tokens
        tokens_per_s = (step - self.last_step) * tokens / max(now - self.last_time, 1e-9)
        self.last_step, self.last_time = step, now
        record = {
            "step": step,
            "tokens": step * tokens,
            "flops": step * self.step_flops,
            **values,
            "tokens_per_s": tokens_per_s,
            "mfu_percent": mfu_percent(tokens_per_s, self.config.model, self.config.seq_len, self.peak),
            "memory_peak_gib": memory_peak_gib(self.device),
        }
        self.write(record)
        return record

    def write(self, record: dict[str, float]) -> None:
        if not self.writes:
            return
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        for copy in self.copies:
            copy(record)
        self.show(record)

    def show(self, record: dict[str, float]) -> None:
        shown: dict[str, str] = {
            key: f"{record[key]:.4g}" for key in ("loss", "valid_loss", "lr", "mfu_percent") if key in record
        }
        if "tokens_per_s" in record:
            shown["tok/s"] = f"{record['tokens_per_s']:,.0f}"
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
            self.file.close()


class Pause:
    """Time inside is not the training steps'."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.recorder.last_time += time.perf_counter() - self.start


def open_wandb(config: Config) -> Any:
    """A function that copies a record to Weights & Biases, or None. A wandb that fails never stops training."""
    if not config.log.wandb:
        return None
    try:
        import wandb

        keyed = bool(os.environ.get("WANDB_API_KEY")) or (Path.home() / ".netrc").is_file()
        run = wandb.init(
            project="megamup",
            name=config.run.name,
            dir=config.run.folder,
            config=config.model_dump(mode="json"),
            mode=None if keyed else "offline",
        )
        return lambda record: run.log(record, step=int(record["step"]))
    except Exception as error:  # an optional copy
        print(f"wandb: not logging there ({type(error).__name__}: {error}); metrics.jsonl is written", file=sys.stderr)
        return None


def open_tensorboard(config: Config) -> Any:
    if not config.log.tensorboard:
        return None
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(config.run.folder / "tensorboard"))

    def copy(record: dict[str, float]) -> None:
        for key, value in record.items():
            writer.add_scalar(key, value, int(record["step"]))
        writer.flush()

    return copy
