"""AdamW's parameter groups from the abc-table, the same on every rank, and the global gradient norm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from megamup.config import Config
from megamup.mup import table
from megamup.parallel.collectives import all_reduce
from megamup.parallel.layers import counted, spec_of
from megamup.parallel.mesh import Mesh
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
    scales = table(config)
    members: dict[GroupKey, list[nn.Parameter]] = {key: [] for key in sorted({group_key(s) for s in scales.values()})}
    for shard in module.parameters():
        members[group_key(scales[spec_of(shard).name])].append(shard)
    for index, shards in enumerate(members.values()):
        if not shards:
            shards.append(placeholder(module, f"placeholder_{index}"))
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
        }
        for (lr_scale, betas, eps, weight_decay), shards in members.items()
    ]


def placeholder(module: nn.Module, name: str) -> nn.Parameter:
    """One zero without a gradient, counted in no norm."""
    zero = nn.Parameter(torch.zeros(1, device=next(module.parameters()).device))
    zero.tensor_model_parallel = zero.model_parallel = False  # type: ignore[attr-defined]
    zero.ds_pipe_replicated = True  # type: ignore[attr-defined]
    module.register_parameter(name, zero)
    return zero


def adamw(groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, fused=True)


def write_lr(groups: Iterable[dict[str, Any]], lr: float) -> None:
    """Set every group's rate from the schedule's, keeping the table's scales."""
    for group in groups:
        group["lr"] = lr * group["lr_scale"]
        if "decay_per_step" in group:  # AdamW multiplies the decay by the rate, which may have reached zero
            group["lr"] = max(group["lr"], 1e-30)
            group["weight_decay"] = group["decay_per_step"] / group["lr"]


class ClipByGlobalNorm:
    """Pre-step hook of a bare optimizer (ZeRO 0 in fp32, where DeepSpeed reports no norm): measure, then clip.

    A replicated parameter counts on tensor rank 0 of its stage, a shard on each tensor rank, a tied weight once.
    """

    def __init__(self, mesh: Mesh, max_norm: float) -> None:
        self.mesh, self.max_norm = mesh, max_norm
        self.norm = 0.0

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        shards = [shard for group in optimizer.param_groups for shard in group["params"] if shard.grad is not None]
        mine = [shard.grad.float() for shard in shards if counted(shard)]
        norms = torch.stack(torch._foreach_norm(mine)) if mine else torch.zeros(1, device=shards[0].device)
        self.norm = float(all_reduce(norms.square().sum(), self.mesh.model).sqrt())
        if 0 < self.max_norm < self.norm + 1e-6:
            torch._foreach_mul_([shard.grad for shard in shards], self.max_norm / (self.norm + 1e-6))
