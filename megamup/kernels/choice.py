"""Which backend computes each operation: chosen once, from the config and the machine; never changed afterwards."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from megamup import kernel_rules
from megamup.config import Config
from megamup.errors import MegamupError
from megamup.kernel_rules import BACKENDS
from megamup.kernels import attention, matmul, mlp, norm, rotary

INSTALL = "pip install 'megamup[cuda]'"


@dataclass(frozen=True)
class Kernels:
    attention: attention.Attention
    rms_norm: norm.RmsNorm
    layer_norm: norm.LayerNorm
    activation: mlp.Activation
    """``model.activation``, of (gate, up) where that is gated."""
    rotate: rotary.Rotate
    linear: matmul.Linear
    overlaps: bool
    """Products with tensor-cut weights and the collectives around them are one operator, in which they overlap
    (`megamup.parallel.products`); else `linear` comes before or after a collective."""
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
    return machine_lacks(backend, machine) or kernel_rules.lacks(op, backend, config) or uninstalled(op, backend)


def machine_lacks(backend: str, machine: Machine) -> str | None:
    match backend:
        case "flash_attn":
            return gpu_lacks(machine)
        case "flex" if machine.device_type == "cpu":
            return "it needs CUDA: torch's flex attention has no backward pass on a CPU"
        case "flex":
            return gpu_lacks(machine)
        case "liger" if not interpreted():
            return gpu_lacks(machine)
        case "fp8" if machine.capability is not None and machine.capability < matmul.FIRST_CAPABILITY:
            return f"it needs an Ada or Hopper GPU or later (capability 8.9), this one has {machine.capability}"
    return None


def uninstalled(op: str, backend: str) -> str | None:
    modules = {"flash_attn": "flash_attn", "flex": "triton", "liger": f"liger_kernel.ops.{LIGER.get(op)}"}
    return import_error(modules[backend]) if backend in modules else None


def gpu_lacks(machine: Machine) -> str | None:
    """FlashAttention and Triton are for Ampere and later."""
    if machine.capability is None:
        return "it needs CUDA"
    if machine.capability < (8, 0):
        return f"it needs an Ampere GPU or later (capability 8.0), this one has {machine.capability}"
    return None


def fastest(op: str, config: Config, machine: Machine) -> list[str]:
    """The backends that ``auto`` tries, in this order; the last of each can run anywhere."""
    on_gpu = machine.device_type == "cuda"
    if op == "attention":
        return fastest_attention(config, machine)
    if op == "cross_entropy":
        return ["liger", "fused"] if on_gpu else ["fused"]
    # Compiled, torch's operators are fused with what stands before and after them, which a kernel of Liger's can't be.
    return ["liger", "torch"] if on_gpu and not config.kernels.compile else ["torch"]


def fastest_attention(config: Config, machine: Machine) -> list[str]:
    """Not measured here; on a CPU there is torch's, and the plain one."""
    model = config.model
    anywhere = ["sdpa", "reference"]
    if machine.device_type == "cpu" or (model.positions == "relative" and model.attention_soft_cap is None):
        return anywhere
    if model.window is not None or config.data.documents or model.attention_soft_cap is not None:
        # Both skip what is hidden and have the cap; torch's would read, and keep, a dense mask.
        return ["flash_attn", "flex", *anywhere]
    # On Hopper and later sdpa is cuDNN, ahead of FlashAttention-2, which is written for Ampere (Shah et al. 2024).
    ampere = machine.capability is not None and machine.capability < (9, 0)
    return ["flash_attn", *anywhere] if ampere else anywhere


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
    kernels = kernels_of(names, machine, config.model.activation)
    if names["matmul"] == "fp8" and device_type == "cpu":
        return replace(kernels, names=names | {"matmul": matmul.EMULATED})
    return kernels


def kernels_of(names: Mapping[str, str], machine: Machine, activation: str) -> Kernels:
    hopper = machine.capability is not None and machine.capability >= (9, 0)
    return Kernels(
        attention={
            "flash_attn": attention.flash_attn,
            "sdpa": attention.cudnn_sdpa if hopper else attention.sdpa,
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
        activation={"liger": mlp.LIGER, "torch": mlp.TORCH, "reference": mlp.REFERENCE}[names["mlp"]][activation],
        rotate={"liger": rotary.liger_rotate, "torch": rotary.torch_rotate, "reference": rotary.reference_rotate}[
            names["rotary"]
        ],
        linear={"torch": matmul.torch_linear, "fp8": matmul.fp8_linear}[names["matmul"]],
        overlaps=names["matmul"] == "torch",
        names=names,
    )
