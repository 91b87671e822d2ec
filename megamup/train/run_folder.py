"""A run's folder: config, environment, starts, metrics, checkpoints; and whether to start, resume or refuse."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from megamup.config import Config, config_from, dump_config, micro_batches, read_yaml
from megamup.data import consumed
from megamup.errors import MegamupError
from megamup.files import write_json_atomic, write_text_atomic
from megamup.parameters import count
from megamup.train import checkpoint

FREE_TO_CHANGE = (
    "train.log_every",
    "train.eval_every",
    "train.eval_sequences",
    "train.save_every",
    "train.monitor_every",
    "train.profile",
    "train.recompute",
    "kernels.attention",
    "kernels.norm",
    "kernels.mlp",
    "kernels.rotary",
    "kernels.cross_entropy",
    "kernels.compile",
    "log.",
    "run.dir",
    "data.prefetch",
    "data.cache",
)
"""Keys that may differ when a run is resumed: they change what is written or how fast, not what is computed (kernels
but for its rounding)."""
IN_DATA_RECORD = ("data.train", "data.valid", "data.fraction")
"""Keys that data.json says more of: there data that has moved is the same, and other data at its place is not."""


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def resume_point(config: Config, world_size: int, data: dict[str, Any]) -> tuple[int, Path] | None:
    """The checkpoint that this command goes on from, or None for a fresh start; needs no process group.

    Args:
        config: of this command.
        world_size: its ranks.
        data: its `consumed.record`.

    Raises:
        MegamupError: the folder holds a run with another config or other data, or a checkpoint that can't be resumed.
    """
    folder = config.run.folder
    found = checkpoint.newest(folder / "checkpoints")
    for name, what in (("config.yaml", "what they are of"), ("data.json", "in which order they saw which data")):
        if found and not (folder / name).is_file():
            raise MegamupError(
                f"{folder} holds checkpoints but no {name} that says {what}; "
                "set run.name to a new name, or remove the folder"
            )
    refuse(f"{folder} holds a run with another config", config_changes(config))
    refuse(f"{folder} holds a run on other data; restore it", data_changes(config, data))
    if found is not None:
        checkpoint.check(found[1], config, world_size)
    return found


def refuse(what: str, changes: list[str]) -> None:
    if changes:
        raise MegamupError(f"{what}; set run.name to a new name, or remove the folder:\n" + "\n".join(changes))


def config_changes(config: Config) -> list[str]:
    """Keys that the run in the folder had other values of, a line each."""
    path = config.run.folder / "config.yaml"
    if not path.is_file() or not (config.run.folder / "data.json").is_file():  # imported, and not started yet
        return []
    try:
        before = flat(config_from(read_yaml(path)).model_dump(mode="json"))
    except MegamupError as error:
        raise MegamupError(f"{path}: {error}") from None
    now = flat(config.model_dump(mode="json"))
    free = FREE_TO_CHANGE + IN_DATA_RECORD + (("train.steps",) if config.schedule.kind == "constant" else ())
    changed = [key for key in now if before.get(key) != now[key] and not key.startswith(free)]
    return [f"  {key}: {before.get(key)!r} there, {now[key]!r} now" for key in changed]


def data_changes(config: Config, data: dict[str, Any]) -> list[str]:
    """What the run in the folder read other than this command would, a line each."""
    before = consumed.read_record(config.run.folder)
    return [] if before is None else consumed.changes(before, data)


def prepare(config: Config, data: dict[str, Any], environment: dict[str, Any], resumed_step: int) -> None:
    """Write config, data and environment, and cut the metrics back to the step that the run goes on from (rank 0)."""
    folder = config.run.folder
    write_text_atomic(folder / "config.yaml", dump_config(config))
    write_json_atomic(folder / "data.json", data)
    write_json_atomic(folder / "environment.json", environment)
    metrics = folder / "metrics.jsonl"
    kept = []
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines() if metrics.exists() else []:
        try:
            if json.loads(line)["step"] <= resumed_step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue  # the line that a killed run left half-written
    write_text_atomic(metrics, "".join(kept) if resumed_step else "")


def record_start(config: Config, step: int, time_unix_s: float) -> None:
    """Add a line to ``starts.jsonl``: when the run was started or resumed, and from which step (rank 0).

    `metrics.jsonl` is cut back on resumption; this is not, so that time which was lost stays known.
    """
    with open(config.run.folder / "starts.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "time_unix_s": time_unix_s}) + "\n")


def environment(
    config: Config, layout: dict[str, Any], peak: dict[str, Any], backends: Mapping[str, str]
) -> dict[str, Any]:
    """What the figures in metrics.jsonl were measured on, and which backend computes each operation."""
    versions = {}
    for package in ("megamup", "torch", "deepspeed", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed as a package"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "device": device,
        "threads_per_rank": torch.get_num_threads(),
        "layout": layout,
        "kernels": dict(backends),
        "parameters": count(config.model),
        "flops_convention": config.train.flops_convention,
        **peak,
    }


def step_work(config: Config, world_size: int) -> dict[str, float]:
    """How a rank's share of a step is cut into micro batches, and the part of the step that a pipeline of as many
    stages waits: (p - 1) / (m + p - 1) of it, with m micro batches (Narayanan et al. 2021, section 2.2.1)."""
    micro, number = micro_batches(config, world_size)
    waiting = config.parallel.pipeline - 1
    return {
        "micro_sequences": micro,
        "micro_batches": number,
        "pipeline_bubble_percent": 100 * waiting / (number + waiting),
    }


def step_line(work: dict[str, float]) -> str:
    bubble = work["pipeline_bubble_percent"]
    line = f"a step is {work['micro_batches']} micro batches of {work['micro_sequences']} sequences on each rank"
    return line + (f"; the pipeline's bubble is {bubble:.1f}% of it" if bubble else "")


def last_record(config: Config) -> dict[str, float]:
    """The last line of metrics.jsonl."""
    lines = (config.run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return dict(json.loads(lines[-1])) if lines else {}
