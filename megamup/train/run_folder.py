"""A run's folder: resolved config, environment, metrics, checkpoints; and whether to start, resume or refuse."""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from megamup.config import Config, config_from, dump_config, read_yaml
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
    "log.",
    "run.dir",
)
"""Keys that may differ when a run is resumed: they change what is written, not what is computed."""


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def resume_point(config: Config, world_size: int) -> tuple[int, Path] | None:
    """The checkpoint that this command goes on from, or None for a fresh start; needs no process group.

    Raises:
        MegamupError: the folder holds a run with another config, or a checkpoint that can't be resumed.
    """
    folder = config.run.folder
    if not (folder / "config.yaml").is_file():
        if checkpoint.newest(folder / "checkpoints"):
            raise MegamupError(
                f"{folder} holds checkpoints but no config.yaml that says what they are of; "
                "set run.name to a new name, or remove the folder"
            )
        return None
    try:
        before = flat(config_from(read_yaml(folder / "config.yaml")).model_dump(mode="json"))
    except MegamupError as error:
        raise MegamupError(f"{folder / 'config.yaml'}: {error}") from None
    now = flat(config.model_dump(mode="json"))
    free = FREE_TO_CHANGE + (("train.steps",) if config.schedule.kind == "constant" else ())
    changed = [key for key in now if before.get(key) != now[key] and not key.startswith(free)]
    if changed:
        lines = [f"  {key}: {before.get(key)!r} there, {now[key]!r} now" for key in changed]
        raise MegamupError(
            f"{folder} holds a run with another config; set run.name to a new name, or remove the folder:\n"
            + "\n".join(lines)
        )
    found = checkpoint.newest(folder / "checkpoints")
    if found is not None:
        checkpoint.check(found[1], config, world_size)
    return found


def prepare(config: Config, environment: dict[str, Any], resumed_step: int) -> None:
    """Write config and environment, and cut the metrics back to the step that the run goes on from (rank 0)."""
    folder = config.run.folder
    write_text_atomic(folder / "config.yaml", dump_config(config))
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


def environment(config: Config, layout: dict[str, Any], peak: dict[str, Any]) -> dict[str, Any]:
    """What the figures in metrics.jsonl were measured on."""
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
        "parameters": count(config.model),
        "flops_convention": config.train.flops_convention,
        **peak,
    }


def last_record(config: Config) -> dict[str, float]:
    """The last line of metrics.jsonl."""
    lines = (config.run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return dict(json.loads(lines[-1])) if lines else {}
