"""The training loop: what happens between a checked config and a trained model, the same for every layout."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megamup.config import Config, micro_batches
from megamup.data import consumed
from megamup.data.loader import BatchStream
from megamup.data.mixture import RunData, open_run_data
from megamup.errors import MegamupError, OneRankError
from megamup.kernels.choice import choose
from megamup.models.build import stored_weights
from megamup.mup import table
from megamup.parallel.mesh import Mesh, build_mesh
from megamup.train import checkpoint, distributed, run_folder
from megamup.train.batches import HeldOut, held_out_batches, read, training_batches
from megamup.train.engine import Engine, build_engine, weigh
from megamup.train.evaluate import evaluate, together, valid_metrics
from megamup.train.metrics import Recorder, peak_flops
from megamup.train.monitor import Monitor
from megamup.train.optim import adamw_backend
from megamup.train.outlook import Outlook, read_outlook
from megamup.train.profile import Profiler
from megamup.train.schedule import lr_factor


class DivergedError(MegamupError):
    """The loss left the finite numbers; the run's weights are lost from that step on."""

    LABEL = "the loss diverged"


@dataclass
class Training:
    """Everything that a step needs."""

    config: Config
    mesh: Mesh
    device: torch.device
    engine: Engine
    data: RunData
    train_data: BatchStream
    held_out: list[HeldOut]
    recorder: Recorder
    monitor: Monitor
    profiler: Profiler


def train(config: Config) -> dict[str, float]:
    """Train as ``config`` says, resuming from the run's last checkpoint. Every rank calls it; returns the last metrics.

    Raises:
        MegamupError: before the process group exists, where anything in config, data or run folder is wrong.
        DivergedError: the loss became infinite or NaN.
    """
    world_size = distributed.world_size()
    micro_batches(config, world_size)
    table(config)
    read_outlook(config)  # a wrong file now, not once the ranks have met
    device_type = "cuda" if distributed.has_cuda() else "cpu"
    adamw_backend(config, device_type)  # what can't run here, likewise
    choose(config, device_type)
    stored_weights(config)
    data = open_run_data(config)
    resumed = run_folder.resume_point(config, world_size, consumed.record(config, data))
    consumed.check_files(config.run.folder, data)
    if resumed is not None and resumed[0] >= config.train.steps:
        return already_done(config, resumed[1])
    run = start(config, world_size, resumed)
    step, record = resumed[0] if resumed else 0, {}
    try:
        while step < config.train.steps:
            record = train_step(run, step)
            step += 1
    finally:
        run.recorder.close()
    dist.barrier()
    return record


def train_step(run: Training, step: int) -> dict[str, float]:
    """One optimizer update and what is due after it; returns the metrics of the step."""
    config, due = run.config, Due(run.config, step + 1)
    lr = config.optim.lr * lr_factor(config.schedule, step, config.train.steps)
    with run.profiler.step(step + 1):
        batch, _ = weigh(read(run.train_data, step), run.mesh, run.device)
        with run.monitor.watching(due.monitor):
            result = run.engine.train_batch(batch, lr)
    finite(result.loss, step + 1, config)
    if not (due.log or due.evaluation or due.save):
        return {}
    values = {"loss": result.loss, "lr": lr, "grad_norm": result.grad_norm}
    values |= run.data.train.metrics((step + 1) * config.batch.global_sequences)
    if due.monitor:
        values |= run.monitor.values()
    if due.evaluation:
        with run.recorder.pause("evaluation"):
            losses = evaluate(run.held_out, run.engine, config, run.mesh, run.device)
        finite(together(losses).loss, step + 1, config)
        values |= valid_metrics(losses)
    record = run.recorder.step(step + 1, **values)
    if (
        due.save
    ):  # after the record: a resumption cuts the metrics back to its checkpoint, and can't add what is missing
        with run.recorder.pause("saving"):
            checkpoint.save(run.engine, config.run.folder / "checkpoints", step + 1, config)
    return record


def finite(loss: float, step: int, config: Config) -> float:
    """The loss, or DivergedError."""
    if not math.isfinite(loss):
        raise DivergedError(f"{DivergedError.LABEL} at step {step}: {loss}; lower optim.lr={config.optim.lr}")
    return loss


class Due:
    """What is due after ``step`` updates; the last step is always logged, and evaluated and saved if ever."""

    def __init__(self, config: Config, step: int) -> None:
        train, last = config.train, step == config.train.steps
        self.monitor = bool(train.monitor_every) and step % train.monitor_every == 0
        self.log = last or step % train.log_every == 0 or step == 1 or self.monitor
        self.evaluation = config.data.valid is not None and (
            last or (bool(train.eval_every) and step % train.eval_every == 0)
        )
        self.save = bool(train.save_every) and (last or step % train.save_every == 0)


def start(config: Config, world_size: int, resumed: tuple[int, Path] | None) -> Training:
    """Join the process group, build this rank's part and restore a checkpoint. Collective."""
    began = time.time()
    device = distributed.join()
    mesh = build_mesh(config.parallel)
    data = open_run_data(config)
    identity = consumed.identity(consumed.record(config, data))
    if not distributed.all_equal(identity, device):
        raise OneRankError(
            f"ranks read different data (here {identity[:12]}, of what data.train and data.valid hold): copy the "
            "same corpora to every machine"
        )
    train_data = training_batches(data, config, mesh.data.rank, world_size)
    held_out: list[HeldOut] = []
    if data.valid:
        held_out = held_out_batches(data.valid, data.valid_objective, config, mesh.data.rank, world_size)
    engine = build_engine(config, mesh, world_size)
    peak = peak_flops(config, device)
    step = checkpoint.load(engine, resumed[1]) if resumed else 0
    first = distributed.rank() == 0
    if first:
        layout = checkpoint.layout(config, world_size)
        step_work = run_folder.step_work(config, world_size)
        environment = run_folder.environment(config, layout, peak, engine.backends) | step_work
        run_folder.prepare(config, consumed.record(config, data), environment, step)
        run_folder.record_start(config, step, began)
        if resumed:
            print(f"resuming from {resumed[1]}", flush=True)
        print("\n".join(data.summary(config.train.steps * config.batch.global_sequences)), flush=True)
        print(run_folder.step_line(step_work), flush=True)
    recorder = Recorder(config, peak["peak_flops"], step, first, device, outlook(config) if first else None, mesh)
    monitor = Monitor(config, mesh, engine, device)
    profiler = Profiler(config, mesh, engine, recorder, step)
    return Training(config, mesh, device, engine, data, train_data, held_out, recorder, monitor, profiler)


def outlook(config: Config) -> Outlook | None:
    """What ``log.forecast`` predicts of the run, said on the console."""
    forecast = read_outlook(config)
    if forecast is None:
        return None
    found = Outlook(config, forecast)
    found.replay(config.run.folder / "metrics.jsonl")
    print("\n".join(found.lines), flush=True)
    return found


def already_done(config: Config, path: Path) -> dict[str, float]:
    if distributed.rank() == 0:
        print(f"{config.run.folder}: all {config.train.steps} steps are done ({path.name}); nothing to do", flush=True)
    return run_folder.last_record(config)
