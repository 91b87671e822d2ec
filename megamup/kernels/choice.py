"""Which backend computes each operation: chosen once, from the config and the machine; never changed afterwards."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from megamup.config import Config
from megamup.errors import MegamupError
from megamup.kernels import attention, matmul, mlp, norm, rotary

INSTALL = "pip install 'megamup[cuda]'"


@dataclass(frozen=True)
class Kernels:
    attention: attention.Attention
    rms_norm: norm.RmsNorm
    layer_norm: norm.LayerNorm
    swiglu: mlp.Gated
    geglu: mlp.Gated
    gelu: mlp.Gelu
    rotate: rotary.Rotate
    linear: matmul.Linear
    names: Mapping[str, str]
    """Operation -> backend, for environment.json; ``cross_entropy`` too, which `megamup.parallel.loss` computes."""


@dataclass(frozen=True)
class Machine:
    """What decides which backends can run, besides what is installed."""

    device_type: str
    """``cpu`` or ``cuda``"""
    capability: tuple[int, int] | None
    """Of the CUDA device: (8, 0) for an A100, (9, 0) for an H100."""

    @classmethod
    def of(cls, device_type: str) -> Machine:
        return cls(device_type, torch.cuda.get_device_capability() if device_type == "cuda" else None)


BACKENDS: dict[str, tuple[str, ...]] = {
    "attention": ("flash_attn", "sdpa", "flex", "reference"),
    "norm": ("liger", "torch", "reference"),
    "mlp": ("liger", "torch", "reference"),
    "rotary": ("liger", "torch", "reference"),
    "cross_entropy": ("liger", "fused", "reference"),
    "matmul": ("torch", "fp8"),
}
"""The backends of every operation."""


FLASH_WIDEST_HEAD = 256
FLEX_NARROWEST_HEAD = 16
LIGER_WIDEST_ROW = 65_536  # of a norm or an activation, which a kernel holds in one block
LIGER = {"norm": "rms_norm", "mlp": "swiglu", "rotary": "rope", "cross_entropy": "fused_linear_cross_entropy"}
"""The module of Liger's kernels for an operation."""


def import_error(module: str) -> str | None:
    """Why ``module`` can't be imported here, None if it can. Compiled ones fail in many ways, all of them a reason."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed: {INSTALL}"
    except (ImportError, OSError, RuntimeError) as error:
        first_line, *_ = str(error).split("\n")
        return f"{module} is installed but can't be imported: {first_line}"
    return None


def interpreted() -> bool:
    """Whether Triton's kernels are interpreted, on whatever device: slow, and there for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def available(op: str, backend: str, config: Config, machine: Machine) -> str | None:
    """Why ``backend`` can't serve ``op`` of this model on this machine; None if it can."""
    match backend:
        case "flash_attn":
            return flash_attn_lacks(config, machine)
        case "flex":
            return flex_lacks(config, machine)
        case "liger":
            return liger_lacks(op, config, machine)
        case "fp8":
            return fp8_lacks(config, machine)
    return None


def gpu_lacks(machine: Machine) -> str | None:
    """FlashAttention and Triton are for Ampere and later."""
    if machine.capability is None:
        return "it needs CUDA"
    if machine.capability < (8, 0):
        return f"it needs an Ampere GPU or later (capability 8.0), this one has {machine.capability}"
    return None


def flex_lacks(config: Config, machine: Machine) -> str | None:
    if machine.device_type == "cpu":
        return "it needs CUDA: torch's flex attention has no backward pass on a CPU"
    if config.model.d_head < FLEX_NARROWEST_HEAD:
        return f"it needs model.d_head of {FLEX_NARROWEST_HEAD} or more, which is {config.model.d_head}"
    return gpu_lacks(machine) or import_error("triton")


def flash_attn_lacks(config: Config, machine: Machine) -> str | None:
    if reason := gpu_lacks(machine):
        return reason
    if config.precision != "bf16":
        return f"it computes in 16 bits only: precision is {config.precision}, set precision=bf16"
    if config.model.d_head > FLASH_WIDEST_HEAD:
        return f"it takes model.d_head up to {FLASH_WIDEST_HEAD}, which is {config.model.d_head}"
    return import_error("flash_attn")


def liger_lacks(op: str, config: Config, machine: Machine) -> str | None:
    model, tensor = config.model, config.parallel.tensor
    if (reason := gpu_lacks(machine)) and not interpreted():
        return reason
    if op == "mlp" and model.arch == "gpt":
        return "its GELU is the tanh approximation, model.arch=gpt has the exact one"
    if op == "cross_entropy" and tensor > 1:
        return f"its vocabulary is whole on each rank, parallel.tensor={tensor} cuts it"
    row = {"norm": model.d_model, "mlp": model.d_ff // tensor}.get(op, 0)
    if row > LIGER_WIDEST_ROW:
        return f"it takes rows of up to {LIGER_WIDEST_ROW} elements, these have {row}"
    return import_error(f"liger_kernel.ops.{LIGER[op]}")


def fp8_lacks(config: Config, machine: Machine) -> str | None:
    if machine.capability is not None and machine.capability < matmul.FIRST_CAPABILITY:
        return f"it needs an Ada or Hopper GPU or later (capability 8.9), this one has {machine.capability}"
    model, tensor = config.model, config.parallel.tensor
    sides = {
        "model.d_model": model.d_model,
        "model.n_heads · model.d_head / parallel.tensor": model.n_heads * model.d_head // tensor,
        "model.n_kv_heads · model.d_head / parallel.tensor": model.n_kv_heads * model.d_head // tensor,
        "model.d_ff / parallel.tensor": model.d_ff // tensor,
        "data.seq_len · batch.micro_sequences (1 where it is not set) / parallel.context": config.seq_len
        * (config.batch.micro_sequences or 1)
        // config.parallel.context,
    }
    for key, side in sides.items():
        if side % matmul.MULTIPLE:
            return f"it needs products whose sides are multiples of {matmul.MULTIPLE}: {key} is {side}"
    return None


def fastest(op: str, config: Config, machine: Machine) -> list[str]:
    """The backends that ``auto`` tries, in this order; the last of each can run anywhere."""
    on_gpu = machine.device_type == "cuda"
    if op == "attention":
        # On Hopper and later sdpa is cuDNN, ahead of FlashAttention-2, which is written for Ampere (Shah et al. 2024).
        ampere = machine.capability is not None and machine.capability < (9, 0)
        return ["flash_attn", "sdpa"] if ampere else ["sdpa"]
    if op == "cross_entropy":
        return ["liger", "fused"] if on_gpu else ["fused"]
    # Compiled, torch's operators are fused with what stands before and after them, which a kernel of Liger's can't be.
    return ["liger", "torch"] if on_gpu and not config.kernels.compile else ["torch"]


def chosen(op: str, config: Config, machine: Machine) -> str:
    wanted = str(getattr(config.kernels, op))
    if wanted == "auto":
        return next(backend for backend in fastest(op, config, machine) if not available(op, backend, config, machine))
    reason = available(op, wanted, config, machine)
    if reason is None:
        return wanted
    others = [name for name in BACKENDS[op] if available(op, name, config, machine) is None]
    can = others if op == "matmul" else ["auto", *others]
    raise MegamupError(f"kernels.{op}={wanted} can't run here: {reason}. What can: {', '.join(can)}")


def choose(config: Config, device_type: str) -> Kernels:
    """The kernels of a run.

    Args:
        config: the run's.
        device_type: ``cpu`` or ``cuda``, of the device that this rank trains on.

    Raises:
        MegamupError: a named backend can't run on this machine or can't compute this model.
    """
    machine = Machine.of(device_type)
    names = {op: chosen(op, config, machine) for op in BACKENDS}
    kernels = kernels_of(names, machine)
    if names["matmul"] == "fp8" and device_type == "cpu":
        return replace(kernels, names=names | {"matmul": matmul.EMULATED})
    return kernels


def kernels_of(names: Mapping[str, str], machine: Machine) -> Kernels:
    hopper = machine.capability is not None and machine.capability >= (9, 0)
    sdpa = attention.cudnn_sdpa if hopper else attention.sdpa
    exact = "torch" if names["mlp"] == "liger" else names["mlp"]  # of GELU, which Liger hasn't
    return Kernels(
        attention={
            "flash_attn": attention.flash_attn,
            "sdpa": sdpa,
            "flex": attention.flex,
            "reference": attention.reference,
        }[names["attention"]],
        rms_norm={
            "liger": norm.liger_rms_norm,
            "torch": norm.torch_rms_norm,
            "reference": norm.reference_rms_norm,
        }[names["norm"]],
        layer_norm={
            "liger": norm.liger_layer_norm,
            "torch": norm.torch_layer_norm,
            "reference": norm.reference_layer_norm,
        }[names["norm"]],
        swiglu={"liger": mlp.liger_swiglu, "torch": mlp.torch_swiglu, "reference": mlp.reference_swiglu}[names["mlp"]],
        geglu={"torch": mlp.torch_geglu, "reference": mlp.reference_geglu}[exact],
        gelu={"torch": mlp.torch_gelu, "reference": mlp.reference_gelu}[exact],
        rotate={"liger": rotary.liger_rotate, "torch": rotary.torch_rotate, "reference": rotary.reference_rotate}[
            names["rotary"]
        ],
        linear={"torch": matmul.torch_linear, "fp8": matmul.fp8_linear}[names["matmul"]],
        names=names,
    )
