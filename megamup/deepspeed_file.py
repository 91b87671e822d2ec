"""The DeepSpeed config file of a run: ZeRO keys only, everything else is the run config's."""

from __future__ import annotations

import difflib
import json
from typing import Any

from megamup import shipped

OWNED_KEYS = {
    "train_batch_size": "batch.global_sequences",
    "train_micro_batch_size_per_gpu": "batch.micro_sequences",
    "gradient_accumulation_steps": "batch.micro_sequences",
    "gradient_clipping": "optim.grad_clip",
    "optimizer": "optim",
    "scheduler": "schedule",
    "fp16": "precision",
    "bf16": "precision",
    "data_types": "precision",
    "torch_autocast": "precision",
    "steps_per_print": "train.log_every",
    "wandb": "log.wandb",
    "tensorboard": "log.tensorboard",
}


ALLOWED_KEYS = (
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "communication_data_type",
    "aio",
)


def load_deepspeed(name: str) -> dict[str, Any]:
    """Read a DeepSpeed config: a path, or one of the shipped ds_configs/.

    Raises:
        ValueError: the file is missing or broken, or sets a key that the run config owns.
    """
    path = shipped.find(name)
    if path is None:
        known = ", ".join(shipped.listing("ds_configs", ".json"))
        raise ValueError(f"deepspeed={name}: no such file; shipped: {known}")
    try:
        keys: Any = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"deepspeed={name}: not JSON: {error}") from error
    if not isinstance(keys, dict):
        raise ValueError(f"deepspeed={name}: expected a JSON object, found {type(keys).__name__}")
    for key, owner in OWNED_KEYS.items():
        if key in keys:
            raise ValueError(f"deepspeed={name} sets {key}, which {owner} of the run config sets; remove it there")
    for key in keys:
        if key not in ALLOWED_KEYS:
            near = difflib.get_close_matches(key, ALLOWED_KEYS, n=1)
            raise ValueError(
                f"deepspeed={name}: {key} is no key of ZeRO"
                + (f"; did you mean {near[0]}?" if near else f"; expected {', '.join(ALLOWED_KEYS)}")
            )
    try:
        check_offload(keys, zero_stage(keys))
    except ValueError as error:
        raise ValueError(f"deepspeed={name}: {error}") from None
    return keys


def zero_stage(keys: dict[str, Any]) -> int:
    """The ZeRO stage that a DeepSpeed config asks for, 0 to 3. Raises ValueError where it is something else."""
    section = keys.get("zero_optimization", {})
    stage = section.get("stage", 0) if isinstance(section, dict) else section
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ValueError(f"zero_optimization.stage={stage!r}: expected 0, 1, 2 or 3")
    return int(stage)


def offloads_optimizer(keys: dict[str, Any]) -> bool:
    """Whether the optimizer's state, and with it its step, is on the host."""
    section = keys.get("zero_optimization")
    return isinstance(section, dict) and device_of(section, "offload_optimizer") != "none"


def device_of(section: dict[str, Any], key: str) -> str:
    """Where ``offload_optimizer`` or ``offload_param`` puts it; ``none``: it stays."""
    found = section.get(key)
    return str(found.get("device", "none")) if isinstance(found, dict) else "none"


def check_offload(keys: dict[str, Any], stage: int) -> None:
    """Raises ValueError where DeepSpeed would ignore what is to be offloaded."""
    section = keys.get("zero_optimization")
    for key, least in (("offload_optimizer", 1), ("offload_param", 3)):
        if isinstance(section, dict) and device_of(section, key) != "none" and stage < least:
            raise ValueError(f"zero_optimization.{key} has no effect at stage {stage}; it needs stage {least} or more")
