"""What a config means, before anything is built: parameters, FLOPs, bytes of training state, the abc-table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, get_args

from megamup.config import Config
from megamup.flops import Convention, flops_per_token
from megamup.mup import block_scales, ratios, readout_multiplier, table
from megamup.parameters import Parameter, count, parameters
from megamup.sections import Model


def state_bytes(config: Config, world_size: int) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state on the rank that holds most, without activations.

    bf16 under ZeRO 1-3 keeps 2-byte weights beside fp32 masters and fp32 accumulated gradients; otherwise all is
    fp32. ZeRO 1 cuts the optimizer over the data axis, 2 the gradients too, 3 the weights too (Rajbhandari et al.
    2020, section 5).
    """
    data, stage = config.parallel.data(world_size), config.zero_stage
    held = max(stage_parameters(config))
    mixed = config.precision == "bf16" and stage > 0
    return {
        "weights": (2 if mixed else 4) * held // (data if stage >= 3 else 1),
        "gradients": 4 * held // (data if stage >= 2 else 1),
        "optimizer": (12 if mixed else 8) * held // (data if stage >= 1 else 1),
    }


def stage_parameters(config: Config) -> list[int]:
    """Parameters that one tensor rank of each pipeline stage holds; blocks are spread as evenly as they go."""
    stages, tensor, layers = config.parallel.pipeline, config.parallel.tensor, config.model.n_layers
    held = [0] * stages
    first_layers = [-(-layers * stage // stages) for stage in range(stages + 1)]
    for parameter in parameters(config.model).values():
        size = parameter.size // (tensor if parameter.partition_dim is not None else 1)
        where = parameter.name.split(".")
        if where[0] == "blocks":
            stage = next(s for s in range(stages) if int(where[1]) < first_layers[s + 1])
        else:
            stage = 0 if where[0] == "embedding" else stages - 1
        held[stage] += size
        if config.model.tie_embeddings and parameter.name == "embedding.token" and stages > 1:
            held[-1] += size  # the tied readout's copy
    return held


def base_model(config: Config) -> Model:
    """The proxy that ``mup.base`` describes; what it leaves out is the model's own."""
    model, base, at = config.model, config.mup.base, ratios(config)
    d_model = base.d_model or model.d_model
    n_heads = base.n_heads or max(1, round(model.n_heads * d_model / model.d_model))
    changed = {
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": base.n_kv_heads or max(1, n_heads * model.n_kv_heads // model.n_heads),
        "d_head": at.d_head_base,
        "d_ff": base.d_ff or round(model.d_ff * d_model / model.d_model),
        "n_layers": base.n_layers or model.n_layers,
    }
    return Model.model_validate(model.model_dump() | changed)


def plan(config: Config, world_size: int) -> dict[str, Any]:
    """Everything that the config settles, as one JSON object."""
    conventions: tuple[Convention, ...] = get_args(Convention)
    per_token = {name: flops_per_token(config.model, config.seq_len, name) for name in conventions}
    tokens = config.tokens
    at = ratios(config)
    return {
        "parameters": count(config.model),
        "base_parameters": count(base_model(config)),
        "ranks": {
            "world": world_size,
            "tensor": config.parallel.tensor,
            "pipeline": config.parallel.pipeline,
            "data": config.parallel.data(world_size),
        },
        "batch_tokens": config.batch_tokens,
        "tokens": tokens,
        "flops_per_token": per_token,
        "flops": per_token[config.train.flops_convention] * tokens,
        "flops_convention": config.train.flops_convention,
        "state_bytes_per_rank": state_bytes(config, world_size),
        "ratios": {**at.width, "depth": at.depth, "batch": at.batch, "tokens": at.tokens},
        "attention_scale": block_scales(config, 0).attention_logits,
        "residual_branch": block_scales(config, 0).mlp.branch,
        "readout_multiplier": readout_multiplier(config),
        "table": {name: asdict(scales) for name, scales in table(config).items()},
    }


def plan_lines(config: Config, world_size: int) -> Iterator[str]:
    """The plan as text; parameters of blocks that share a row of the table stand once."""
    found = plan(config, world_size)
    total, base = found["parameters"], found["base_parameters"]
    yield f"parameters        {total['total']:,} ({total['non_embedding']:,} without embeddings and readout)"
    yield f"base parameters   {base['total']:,} ({base['non_embedding']:,})"
    yield f"tokens            {found['tokens']:,} = {config.train.steps:,} steps x {found['batch_tokens']:,}"
    for name, flops in found["flops_per_token"].items():
        yield f"FLOPs {name:<24} {flops:.4g} a token, {flops * found['tokens']:.4g} in all"
    state = found["state_bytes_per_rank"]
    parts = ", ".join(f"{name} {size / 2**20:,.1f}" for name, size in state.items())
    yield f"state per rank    {sum(state.values()) / 2**20:,.1f} MiB ({parts}), without activations"
    yield f"ratios to base    {', '.join(f'{name} {value:g}' for name, value in found['ratios'].items())}"
    yield f"attention scale   {found['attention_scale']:.6g}"
    if found["residual_branch"] != 1:
        yield f"residual branches x {found['residual_branch']:.6g} (the first MLP's)"
    yield f"readout           x {found['readout_multiplier']:.6g}" + (" (tied)" if config.model.tie_embeddings else "")
    yield ""
    yield from table_lines(config)


def table_lines(config: Config) -> Iterator[str]:
    inventory, scales = parameters(config.model), table(config)
    header = f"{'parameter':<34}{'shape':>16}{'role':>14}{'init std':>11}{'x':>10}{'lr':>11}{'eps':>10}{'decay':>10}"
    yield header
    for name, parameter in inventory.items():
        if name.startswith("blocks.") and not name.startswith("blocks.0."):
            continue  # every block's row is block 0's
        yield row(name.replace("blocks.0.", f"blocks.0-{config.model.n_layers - 1}."), parameter, config)
    first = next(iter(scales.values()))
    yield f"betas {first.betas[0]:g}, {first.betas[1]:g}"


def row(name: str, parameter: Parameter, config: Config) -> str:
    scales = table(config)[parameter.name]
    shape = " x ".join(map(str, parameter.shape))
    init = f"{scales.init_std:.4g}" if parameter.role not in ("gain", "bias") else f"= {scales.init_mean:g}"
    lr = config.optim.lr * scales.lr_scale
    return (
        f"{name:<34}{shape:>16}{parameter.role:>14}{init:>11}{scales.multiplier:>10.4g}{lr:>11.4g}"
        f"{scales.eps:>10.3g}{scales.weight_decay:>10.4g}"
    )
