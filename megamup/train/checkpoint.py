"""Checkpoints that are whole or not there: written beside, synced, listed in a manifest, renamed.

A folder ``checkpoints/step-N`` holds DeepSpeed's files of all ranks and ``manifest.json`` (layout, and the size of
every file). Exact resumption is for the same layout; the order of samples needs no state, being a function of the step.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megamup.config import Config
from megamup.errors import MegamupError, OneRankError
from megamup.files import write_json_atomic
from megamup.train import experts
from megamup.train.engine import Engine

TAG = "state"
"""DeepSpeed's name for the only state in a checkpoint folder."""


def layout(config: Config, world_size: int) -> dict[str, Any]:
    """What a checkpoint's files depend on."""
    return {
        "world_size": world_size,
        "tensor": config.parallel.tensor,
        "pipeline": config.parallel.pipeline,
        "expert": config.parallel.expert,
        "zero_stage": config.zero_stage,
        "precision": config.precision,
    }


def by_step(folder: Path) -> dict[int, Path]:
    """The whole checkpoints below ``folder``."""
    steps = {}
    for path in folder.glob("step-*"):
        if match := re.fullmatch(r"step-(\d+)", path.name):
            steps[int(match[1])] = path
    return steps


def newest(folder: Path) -> tuple[int, Path] | None:
    """The last whole checkpoint below ``folder`` as (step, path), or None."""
    steps = by_step(folder)
    return max(steps.items()) if steps else None


def named(run: str) -> tuple[Path, int, Path]:
    """The folder of a run that is named as ``RUN`` (its last checkpoint) or ``RUN@STEP``, with step and path of the
    checkpoint.

    Raises:
        MegamupError: no such run or step; names those that are there.
    """
    match = re.fullmatch(r"(.+)@(\d+)", run)
    folder, wanted = (Path(match[1]), int(match[2])) if match and not Path(run).is_dir() else (Path(run), None)
    if not (folder / "config.yaml").is_file():
        raise MegamupError(f"{folder}: no config.yaml there; expected the folder of a run")
    steps = by_step(folder / "checkpoints")
    if not steps:
        raise MegamupError(f"{folder}: no checkpoint there; train with train.save_every")
    step = max(steps) if wanted is None else wanted
    if step not in steps:
        raise MegamupError(f"{folder}: no checkpoint of step {step}; there are {', '.join(map(str, sorted(steps)))}")
    return folder, step, steps[step]


def save(engine: Engine, folder: Path, step: int, config: Config) -> Path:
    """Write the state after ``step`` updates to ``folder/step-N``. Collective.

    Raises:
        OneRankError: the disk is full or can't be written; earlier checkpoints are untouched.
    """
    final, beside = folder / f"step-{step:08d}", folder / f".step-{step:08d}.partial"
    first = dist.get_rank() == 0
    try:
        if first:
            for leftover in folder.glob(".step-*.partial"):  # of a run that was killed while saving
                shutil.rmtree(leftover)
            beside.mkdir(parents=True)
        dist.barrier()
        experts.save(engine.deepspeed, engine.mesh, beside)
        engine.deepspeed.save_checkpoint(str(beside), tag=TAG, client_state={"step": step}, save_latest=False)
        if first:
            publish(beside, final, step, layout(config, dist.get_world_size()))
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError when the disk is full
        if first:
            shutil.rmtree(beside, ignore_errors=True)
        kept = newest(folder)
        raise OneRankError(
            f"{final}: the checkpoint could not be written ({str(error).splitlines()[0]}); free space on that disk and "
            f"start the same command again: it resumes from " + (f"step {kept[0]}" if kept else "step 0")
        ) from error
    dist.barrier()
    return final


def publish(beside: Path, final: Path, step: int, written_by: dict[str, Any]) -> None:
    """Sync every file, list them, and give the folder its name."""
    files = sorted(path for path in beside.rglob("*") if path.is_file())
    for path in [*files, *{path.parent for path in files}]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    sizes = {str(path.relative_to(beside)): path.stat().st_size for path in files}
    write_json_atomic(beside / "manifest.json", {"step": step, "layout": written_by, "files": sizes})
    if final.exists():  # the same step again, after a resumption from an earlier one
        shutil.rmtree(final)
    os.replace(beside, final)
    handle = os.open(final.parent, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def check(path: Path, config: Config, world_size: int) -> None:
    """Refuse a checkpoint that is cut short or of another layout; needs no process group.

    Raises:
        MegamupError: says which file or which part of the layout, and what to do.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        files, saved_layout = dict(manifest["files"]), dict(manifest["layout"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MegamupError(
            f"{path}: no readable manifest.json ({error}); remove this folder to resume earlier"
        ) from None
    for name, size in files.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            raise MegamupError(
                f"{path / name}: expected {size} bytes, found {'no file' if found is None else found}; "
                "remove this checkpoint's folder to resume from an earlier one"
            )
    wanted = layout(config, world_size)
    saved_layout.setdefault("expert", 1)  # not written before there were experts
    different = {key for key in wanted if saved_layout.get(key) != wanted[key]}
    if different:
        saved = ", ".join(f"{key}={saved_layout.get(key)}" for key in sorted(different))
        now = ", ".join(f"{key}={wanted[key]}" for key in sorted(different))
        raise MegamupError(f"{path} was written with {saved}, this run has {now}; resume with the saved layout")


def load(engine: Engine, path: Path) -> int:
    """Restore a checked checkpoint and return its step. Collective."""
    _, state = engine.deepspeed.load_checkpoint(str(path), tag=TAG)
    experts.load(engine.deepspeed, engine.mesh, path)
    return int(state["step"])
