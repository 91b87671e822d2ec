"""What a config means, as one JSON object and as text: parameters, FLOPs, bytes, step time, the abc-table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, get_args

from megamup.cluster import Cluster
from megamup.config import Config
from megamup.flops import Convention, flops_per_token
from megamup.model import Model
from megamup.mup import block_scales, ratios, readout_multiplier, table
from megamup.parameters import Parameter, count, parameters, stacks
from megamup.plan.layout import layout_of
from megamup.plan.memory import memory, state_bytes
from megamup.plan.scope import unplanned
from megamup.plan.search import HEADROOM
from megamup.plan.setting import Device
from megamup.plan.state import stage_parameters
from megamup.plan.time import StepTime, step_time
from megamup.scales import Scales


def base_model(config: Config) -> Model:
    """The proxy that ``mup.base`` describes; what it leaves out is the model's own."""
    model, base, at = config.model, config.mup.base, ratios(config)
    d_model = base.d_model or model.d_model
    n_heads = base.n_heads or max(1, round(model.n_heads * d_model / model.d_model))
    changed: dict[str, Any] = {
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": base.n_kv_heads or max(1, n_heads * model.n_kv_heads // model.n_heads),
        "d_head": at.d_head_base,
        "d_ff": base.d_ff or round(model.d_ff * d_model / model.d_model),
        "n_layers": base.n_layers or model.n_layers,
    }
    if model.n_decoder_layers is not None:
        changed["n_decoder_layers"] = max(1, round(model.n_decoder_layers * changed["n_layers"] / model.n_layers))
    if model.moe is not None and model.moe.d_expert is not None:
        inner = max(1, round(model.moe.d_expert * changed["d_ff"] / model.d_ff))
        changed["moe"] = model.moe.model_dump() | {"d_expert": inner}
    return Model.model_validate(model.model_dump() | changed)


def plan(config: Config, world_size: int, cluster: Cluster | None = None) -> dict[str, Any]:
    """Everything that the config settles, as one JSON object; with a cluster also what a step takes there.

    What isn't predicted is None, and ``unplanned`` says why.
    """
    conventions: tuple[Convention, ...] = get_args(Convention)
    per_token = {name: flops_per_token(config.model, config.lengths, name) for name in conventions}
    tokens = config.tokens
    at, missing = ratios(config), unplanned(config)
    device: Device = "cuda" if cluster is None else cluster.kind
    return {
        "parameters": count(config.model),
        "base_parameters": count(base_model(config)),
        "ranks": {
            "world": world_size,
            "tensor": config.parallel.tensor,
            "pipeline": config.parallel.pipeline,
            "context": config.parallel.context,
            "data": config.parallel.data(world_size),
        },
        "batch_tokens": config.batch_tokens,
        "tokens": tokens,
        "flops_per_token": per_token,
        "flops": per_token[config.train.flops_convention] * tokens,
        "flops_convention": config.train.flops_convention,
        "state_bytes_per_rank": state_bytes(config, world_size),
        "memory_bytes_per_rank": None if missing else asdict(memory(config, world_size, device)),
        "unplanned": missing,
        "ratios": {**at.width, "depth": at.depth, "batch": at.batch, "tokens": at.tokens},
        "attention_scale": block_scales(config, 0).attention_logits,
        "residual_branch": block_scales(config, 0).mlp.branch,
        "readout_multiplier": readout_multiplier(config),
        "table": {name: asdict(scales) for name, scales in table(config).items()},
        **({} if cluster is None else timed(config, world_size, cluster, missing)),
    }


def timed(config: Config, world_size: int, cluster: Cluster, missing: list[str]) -> dict[str, Any]:
    if missing:
        return {"step": None, "run": None, "device_memory_bytes": cluster.memory}
    return run_json(config, predicted(config, world_size, cluster), cluster)


def predicted(config: Config, world_size: int, cluster: Cluster) -> StepTime:
    """The config's step on ``world_size`` devices of the cluster."""
    layout = layout_of(config, world_size, cluster.kind)
    return step_time(config.model, config.lengths, layout, cluster, tuple(stage_parameters(config)))


def run_json(config: Config, step: StepTime, cluster: Cluster) -> dict[str, Any]:
    """A step and the run: time that trains, without evaluation, saving, restarts."""
    hours = config.train.steps * step.seconds / 3600
    cost = None if cluster.price is None else hours * step.devices * cluster.price
    return {
        "step": step.as_json(),
        "run": {"days": hours / 24, "device_hours": hours * step.devices, "cost": cost},
        "device_memory_bytes": cluster.memory,
    }


def plan_lines(config: Config, world_size: int, cluster: Cluster | None = None) -> Iterator[str]:
    """The plan as text; parameters of blocks that share a row of the table stand once."""
    found = plan(config, world_size, cluster)
    total, base = found["parameters"], found["base_parameters"]
    active = f"; {total['active']:,} active" if "active" in total else ""
    yield f"parameters        {total['total']:,} ({total['non_embedding']:,} without embeddings and readout{active})"
    yield f"base parameters   {base['total']:,} ({base['non_embedding']:,})"
    yield f"tokens            {found['tokens']:,} = {config.train.steps:,} steps x {found['batch_tokens']:,}"
    for name, flops in found["flops_per_token"].items():
        yield f"FLOPs {name:<24} {flops:.4g} a token, {flops * found['tokens']:.4g} in all"
    for reason in found["unplanned"]:
        yield f"not planned       activations and step time: {reason}"
    if found["memory_bytes_per_rank"] is not None:
        yield from memory_lines(found["memory_bytes_per_rank"], cluster)
    if cluster is not None and found["step"] is not None:
        yield from step_lines(config, found, world_size, cluster)
    yield f"ratios to base    {', '.join(f'{name} {value:g}' for name, value in found['ratios'].items())}"
    yield f"attention scale   {found['attention_scale']:.6g}"
    if found["residual_branch"] != 1:
        yield f"residual branches x {found['residual_branch']:.6g} (the first MLP's)"
    yield f"readout           x {found['readout_multiplier']:.6g}" + (" (tied)" if config.model.tie_embeddings else "")
    yield ""
    yield from table_lines(config)


def memory_lines(found: dict[str, int], cluster: Cluster | None) -> Iterator[str]:
    parts = ", ".join(f"{name} {size / 2**20:,.1f}" for name, size in found.items() if name != "total")
    yield f"memory per rank   {found['total'] / 2**20:,.1f} MiB at its peak"
    yield f"  of which        {parts}"
    if cluster is not None and cluster.memory is not None:
        share = found["total"] / cluster.memory
        verdict = "fits in" if share <= HEADROOM else "does not fit in"
        yield f"  {verdict:<16}{HEADROOM:.0%} of a device's {cluster.memory / 1e9:g} GB: it is {share:.0%}"


def step_lines(config: Config, found: dict[str, Any], world_size: int, cluster: Cluster) -> Iterator[str]:
    step, run = found["step"], found["run"]
    seconds, device = step["seconds"], cluster.device or "devices"
    yield (
        f"step              {seconds:.4g} s on {world_size:,} x {device}: {step['tokens_per_s']:,.0f} tokens/s, MFU "
        f"{step['mfu_percent']:.1f}% (PaLM), HFU {step['hfu_percent']:.1f}%"
    )
    for name, value in sorted(step["terms"].items(), key=lambda term: -term[1]):
        yield f"  {name:<16}{value:.4g} s, {value / seconds:.1%}"
    yield f"  bound by        {step['bound']}"
    cost = "" if run["cost"] is None else f", cost {run['cost']:,.0f}"
    yield (
        f"run               {run['days']:.3g} days of training, {run['device_hours']:,.0f} device-hours{cost}, without "
        "evaluation, saving and restarts"
    )


def table_lines(config: Config) -> Iterator[str]:
    inventory, scales = parameters(config.model), table(config)
    named = {name: shown_name(name, config.model) for name in inventory}
    wide = max(34, *(len(said) + 1 for said in named.values() if said is not None))
    columns = f"{'shape':>16}{'role':>14}{'init std':>11}{'x':>10}{'lr':>11}{'eps':>10}{'decay':>10}"
    yield f"{'parameter':<{wide}}{columns}"
    for name, parameter in inventory.items():
        if (said := named[name]) is not None:
            yield f"{said:<{wide}}{row(parameter, scales[name], config.optim.lr)}"
    first = next(iter(scales.values()))
    yield f"betas {first.betas[0]:g}, {first.betas[1]:g}"


def shown_name(name: str, model: Model) -> str | None:
    """Of all blocks of a stack that have such a parameter, which share a row; None where an earlier block has it."""
    for stack in stacks(model):
        before, marker, rest = name.partition("blocks.")
        if marker and before == stack.prefix:
            number, _, part = rest.partition(".")
            with_it = [layer for layer in range(stack.layers) if has(model, layer, part)]
            if int(number) != with_it[0]:
                return None
            step = "" if len(with_it) in (1, with_it[-1] - with_it[0] + 1) else f" of {len(with_it)}"
            return f"{before}blocks.{with_it[0]}-{with_it[-1]}{step}.{part}"
    return name


def has(model: Model, layer: int, part: str) -> bool:
    """Blocks have experts or an MLP."""
    if part.startswith("moe."):
        return model.has_experts(layer)
    return not (part.startswith("mlp.") and model.has_experts(layer))


def row(parameter: Parameter, scales: Scales, lr: float) -> str:
    shape = " x ".join(map(str, parameter.shape))
    init = f"{scales.init_std:.4g}" if parameter.role not in ("gain", "bias") else f"= {scales.init_mean:g}"
    return (
        f"{shape:>16}{parameter.role:>14}{init:>11}{scales.multiplier:>10.4g}{lr * scales.lr_scale:>11.4g}"
        f"{scales.eps:>10.3g}{scales.weight_decay:>10.4g}"
    )
