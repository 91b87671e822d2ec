"""AdamW's parameter groups from the abc-table, the same on every rank, and the global gradient norm."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from megamup.config import Config
from megamup.deepspeed_file import load_deepspeed, offloads_optimizer
from megamup.errors import MegamupError
from megamup.mup import table
from megamup.parallel.collectives import all_reduce
from megamup.parallel.layers import EXPERTS, counted, share_out, shared_out, spec_of
from megamup.parallel.mesh import Mesh
from megamup.parameters import parameters
from megamup.scales import Scales

GroupKey = tuple[float, tuple[float, float], float, float]


def group_key(scales: Scales) -> GroupKey:
    return scales.lr_scale, scales.betas, scales.eps, scales.weight_decay


def parameter_groups(module: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Group this rank's parameters by what the optimizer does with them.

    The groups and their order follow from the table, so every rank has the same ones. A pipeline stage without a
    parameter of some group gets a placeholder there: DeepSpeed drops empty groups and reduces norms group by group,
    so unequal counts would hang (DeepSpeed #1522).
    """
    inventory, shares = parameters(config.model), config.parallel.expert > 1
    # What isn't alike on all replicas is in groups of its own.
    keys = {name: (shares and inventory[name].of_experts, group_key(at)) for name, at in table(config).items()}
    members: dict[tuple[bool, GroupKey], list[nn.Parameter]] = {key: [] for key in sorted(set(keys.values()))}
    for shard in module.parameters():
        members[keys[spec_of(shard).name]].append(shard)
    for index, ((of_experts, _), shards) in enumerate(members.items()):
        if not shards:
            shards.append(placeholder(module, f"placeholder_{index}", of_experts))
    constant = config.optim.decay_mode == "constant"
    return [
        {
            "params": shards,
            "lr_scale": lr_scale,
            "lr": config.optim.lr * lr_scale,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            **({"decay_per_step": weight_decay * config.optim.lr * lr_scale} if constant else {}),
            **({"moe": True, "name": EXPERTS} if of_experts else {}),  # as DeepSpeed has it
        }
        for (of_experts, (lr_scale, betas, eps, weight_decay)), shards in members.items()
    ]


def placeholder(module: nn.Module, name: str, of_experts: bool) -> nn.Parameter:
    """One zero without a gradient, counted in no norm."""
    zero = nn.Parameter(torch.zeros(1, device=next(module.parameters()).device))
    zero.tensor_model_parallel = zero.model_parallel = False  # type: ignore[attr-defined]
    zero.ds_pipe_replicated = True  # type: ignore[attr-defined]
    if of_experts:
        share_out(zero)
    module.register_parameter(name, zero)
    return zero


TORCH, FUSED_ADAM, CPU_ADAM = "torch", "deepspeed FusedAdam", "deepspeed CPUAdam"
"""Implementations of AdamW, each fused; they differ in rounding only."""


def adamw(groups: list[dict[str, Any]], backend: str = TORCH) -> torch.optim.Optimizer:
    """AdamW over `parameter_groups`, each with rate, betas, eps and decay of its own.

    Args:
        groups: of parameters.
        backend: of `adamw_backend`.

    Raises:
        MegamupError: DeepSpeed's can't be built; the first time takes a minute.
    """
    if backend == TORCH:
        return torch.optim.AdamW(groups, fused=True)
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    try:
        if backend == FUSED_ADAM:
            return cast(torch.optim.Optimizer, FusedAdam(groups, adam_w_mode=True))
        return cast(torch.optim.Optimizer, DeepSpeedCPUAdam(groups, adamw_mode=True))
    except (RuntimeError, ImportError, OSError) as error:
        raise MegamupError(
            f"{backend} could not be built: {error.__cause__ or error}; set kernels.optimizer=torch"
        ) from error


def adamw_backend(config: Config, device_type: str) -> str:
    """Which AdamW ``kernels.optimizer`` means on this machine: for ``auto`` torch's, which needs no compiler, but
    DeepSpeed's where ZeRO offloads, since there the step is the processor's work and it takes a third of the time.

    Raises:
        MegamupError: ``deepspeed`` can't run here.
    """
    wanted, offloads = config.kernels.optimizer, offloads_optimizer(load_deepspeed(config.deepspeed))
    backend = CPU_ADAM if offloads or device_type == "cpu" else FUSED_ADAM
    if wanted == "torch" or (wanted == "auto" and not offloads):
        return TORCH
    if (reason := build_lacks(backend)) is None:
        return backend
    if wanted == "auto":
        return TORCH
    raise MegamupError(
        f"kernels.optimizer={wanted}: {backend} can't run here: {reason}; or set kernels.optimizer=torch"
    )


def build_lacks(backend: str) -> str | None:
    """What is missing to load one of DeepSpeed's optimizers, which it compiles when it is first used."""
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder import CPUAdamBuilder, FusedAdamBuilder
    from torch.utils import cpp_extension

    builder = (FusedAdamBuilder if backend == FUSED_ADAM else CPUAdamBuilder)()
    if installed_ops.get(builder.name, False):
        return None
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler}) to build it; install one"
    if not cpp_extension.is_ninja_available():
        return "ninja is not installed, which builds it: pip install ninja"
    if backend == FUSED_ADAM and cpp_extension.CUDA_HOME is None:
        return "there is no CUDA toolkit (nvcc) to build it; install one, or set CUDA_HOME"
    return None if builder.is_compatible() else f"DeepSpeed calls it incompatible: {builder.error_log}"


def write_lr(groups: Iterable[dict[str, Any]], lr: float) -> None:
    """Set every group's rate from the schedule's, keeping the table's scales."""
    for group in groups:
        group["lr"] = lr * group["lr_scale"]
        if "decay_per_step" in group:  # AdamW multiplies the decay by the rate, which may have reached zero
            group["lr"] = max(group["lr"], 1e-30)
            group["weight_decay"] = group["decay_per_step"] / group["lr"]


class ClipByGlobalNorm:
    """Pre-step hook of a bare optimizer (ZeRO 0 in fp32, where DeepSpeed reports no norm): measure, then clip.

    A replicated parameter counts on tensor rank 0 of its stage, a shard on each tensor rank, a tied weight once, and
    an expert on one of the ranks that hold it.
    """

    def __init__(self, mesh: Mesh, max_norm: float) -> None:
        self.mesh, self.max_norm = mesh, max_norm
        self.norm = 0.0

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        shards = [shard for group in optimizer.param_groups for shard in group["params"] if shard.grad is not None]
        mine = [shard for shard in shards if counted(shard)]
        device = shards[0].device
        squares = squared_norm([shard for shard in mine if not shared_out(shard)], device)
        if self.mesh.expert.size > 1:
            own = [shard for shard in mine if shared_out(shard)]
            squares += all_reduce(squared_norm(own, device), self.mesh.expert)
        self.norm = float(all_reduce(squares, self.mesh.model).sqrt())
        if 0 < self.max_norm < self.norm + 1e-6:
            torch._foreach_mul_([shard.grad for shard in shards], self.max_norm / (self.norm + 1e-6))


def squared_norm(shards: list[nn.Parameter], device: torch.device) -> Tensor:
    """Sum of the squares of all gradients: one number, fp32."""
    grads = [shard.grad.float() for shard in shards if shard.grad is not None]
    return torch.stack(torch._foreach_norm(grads)).square().sum() if grads else torch.zeros((), device=device)
