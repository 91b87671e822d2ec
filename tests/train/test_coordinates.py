"""Coordinates are those of the whole model in every layout, right by hand, and without a trace in the training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megamup.config import Config
from megamup.data.mixture import open_run_data
from megamup.kernels.attention import reference
from megamup.kernels.rotary import Rotation, rotate
from megamup.models.attention import CoreAttention
from megamup.models.blocks import Block
from megamup.mup import attention_scale
from megamup.parallel.mesh import build_mesh
from megamup.parameters import parameters
from megamup.scales import BlockScales
from megamup.train import distributed
from megamup.train.batches import read, training_batches
from megamup.train.coordinates import Coordinate, Probe, Share, attention_logits, coordinates, in_order, total
from megamup.train.engine import MicroBatch, build_engine, weigh
from megamup.train.fork import run_ranks

MakeConfig = Callable[..., Config]
Pairs = list[dict[str, tuple[float, float]]]

# (tensor, pipeline, data, ZeRO stage)
LAYOUTS = [(2, 1, 1, 0), (1, 2, 1, 0), (1, 1, 2, 0), (2, 2, 1, 0), (2, 1, 1, 3), (1, 1, 2, 3)]
ARCHS = ["llama", "gpt"]  # untied, without biases; tied, with them. Both with GQA.
SHORT = ("train.steps=2", "optim.lr=0.003")


def pairs(config: Config, world_size: int) -> Pairs:
    """[{module: (RMS, change)}] as every one of the ranks has it."""
    ranks = run_ranks(coordinates, world_size, config)
    assert all(rank == ranks[0] for rank in ranks), "ranks disagree"
    return [{name: (found.rms, found.change) for name, found in step.items()} for step in ranks[0]]


# --------------------------------------------------------------------------- layouts


@pytest.fixture(scope="module")
def references() -> dict[str, Pairs]:
    return {}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("tensor", "pipeline", "data", "zero"), LAYOUTS)
def test_every_layout_has_the_coordinates_of_one_rank(
    make_config: MakeConfig,
    references: dict[str, Pairs],
    arch: str,
    tensor: int,
    pipeline: int,
    data: int,
    zero: int,
) -> None:
    """Of all modules, in the same order, at initialization and after each step."""
    if arch not in references:
        references[arch] = pairs(make_config(f"model.arch={arch}", *SHORT), 1)
    config = make_config(
        f"model.arch={arch}",
        *SHORT,
        f"parallel.tensor={tensor}",
        f"parallel.pipeline={pipeline}",
        f"deepspeed=ds_configs/zero{zero}.json",
    )
    found = pairs(config, tensor * pipeline * data)
    assert len(found) == config.train.steps + 1
    for step, (here, alone) in enumerate(zip(found, references[arch], strict=True)):
        assert list(here) == list(alone) == expected_names(config)
        for name in here:
            assert here[name] == pytest.approx(alone[name], rel=1e-4), (step, name)
        assert all((change > 0) == (step > 0) for _, change in here.values())


def expected_names(config: Config) -> list[str]:
    """Every module with parameters, and what has none: blocks, the mix of values, attention logits and logits."""
    names = {name.rsplit(".", 1)[0] for name in parameters(config.model) if not name.startswith("embedding.")}
    names |= {name for name in parameters(config.model) if name.startswith("embedding.")} | {"readout"}
    for layer in range(config.model.n_layers):
        names |= {f"blocks.{layer}", f"blocks.{layer}.attention.core", f"blocks.{layer}.attention.logits"}
    return sorted(names, key=in_order)


def test_order_is_that_of_the_forward_pass() -> None:
    names = ["readout", "final_norm", "blocks.10", "blocks.2.mlp.up", "blocks.2", "embedding.token"]
    assert sorted(names, key=in_order) == names[::-1]


def test_shares_of_different_sizes_weigh_by_their_elements() -> None:
    whole = total([Share(squares=30.0, change_squares=3.0, count=3, sharded=True), Share(10.0, 1.0, 1, True)])
    assert whole == Coordinate(rms=sqrt(10), change=1.0)


# --------------------------------------------------------------------------- by hand


@pytest.mark.parametrize("arch", ARCHS)
def test_coordinates_equal_those_by_hand(make_config: MakeConfig, arch: str) -> None:
    """From the weights and all of the batch's sequences at once, before and after a step; and over all modules."""
    config = make_config(f"model.arch={arch}", "mup.base.d_head=4")
    found, expected = run_ranks(one_step_by_hand, 1, config)[0]
    for step in range(2):
        for name, pair in expected[step].items():
            assert found[step][name] == pytest.approx(pair, rel=1e-5), (step, name)


def one_step_by_hand(config: Config) -> tuple[Pairs, Pairs]:
    probe = make_probe(config)
    found, outputs = [], []
    for _ in range(2):
        found.append({name: (at.rms, at.change) for name, at in probe.measure().items()})
        outputs.append(forward_by_hand(config, probe.engine.deepspeed.module, probe.batch))
        probe.engine.train_batch(probe.batch, config.optim.lr)
    by_hand = [
        {name: (rms(output), rms(output - outputs[0][name])) for name, output in step.items()} for step in outputs
    ]
    return found, by_hand


def make_probe(config: Config) -> Probe:
    world_size, device = distributed.world_size(), distributed.join()
    mesh = build_mesh(config.parallel)
    data = training_batches(open_run_data(config), config, mesh.data.rank, world_size)
    batch, _ = weigh(read(data, 0), mesh, device)
    return Probe(build_engine(config, mesh, world_size), mesh, batch)


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@torch.no_grad()
def forward_by_hand(config: Config, net: nn.Module, batch: Sequence[MicroBatch]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    tokens = x = torch.cat([micro.inputs["tokens"] for micro in batch])
    for layer in net.layers:  # type: ignore[union-attr]
        if layer.name == "readout":
            continue
        if isinstance(layer, Block):
            found |= inside(config, layer, x)
        found[layer.name] = x = layer(x)
    weight = net.layers[0].weight if config.model.tie_embeddings else net.layers[-1].weight  # type: ignore[index,union-attr]
    return found | {"readout": F.linear(x, weight) * 32 / 64, "embedding.token": net.layers[0](tokens)}  # type: ignore[index,operator]


def inside(config: Config, block: Block, x: Tensor) -> dict[str, Tensor]:
    """Some of a block's outputs from its weights; attention logits are of the pairs that the mask leaves."""
    model, name, attention = config.model, block.name, block.attention
    x = block.attention_norm(x)
    query, key = (F.linear(x, part.weight, part.bias) for part in (attention.query, attention.key))
    found = {f"{name}.attention_norm": x, f"{name}.attention.query": query, f"{name}.attention.key": key}
    query, key = query.unflatten(-1, (model.n_heads, -1)), key.unflatten(-1, (model.n_kv_heads, -1))
    if model.arch == "llama":
        query, key = (rotate(part.transpose(1, 2), Rotation(model.rope_theta)).transpose(1, 2) for part in (query, key))
    key = key.repeat_interleave(model.n_heads // model.n_kv_heads, dim=2)
    logits = attention_scale(config) * torch.einsum("bqhd,bkhd->bhqk", query, key)
    rows, columns = torch.tril_indices(config.seq_len, config.seq_len)
    return found | {f"{name}.attention.logits": logits[..., rows, columns]}


def test_attention_logits_are_those_of_causal_pairs() -> None:
    """GQA's heads meet their own keys, one pair at a time."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, 5, 8, generator=generator) for heads in (6, 2))
    found = attention_logits(CoreAttention("core", BlockScales(attention_logits=-0.3), reference), query, key)
    pairs = [(at, past) for at in range(5) for past in range(at + 1)]
    expected = torch.stack(
        [-0.3 * (query[:, :, at] * key[:, [0, 0, 0, 1, 1, 1], past]).sum(-1) for at, past in pairs], -1
    )
    torch.testing.assert_close(found, expected)


# --------------------------------------------------------------------------- no trace


@pytest.mark.parametrize(("tensor", "pipeline", "zero"), [(1, 1, 0), (1, 2, 1), (1, 1, 3)])
def test_measuring_leaves_training_as_it_is(make_config: MakeConfig, tensor: int, pipeline: int, zero: int) -> None:
    """Losses and gradient norms to the bit; no hook stays behind."""
    config = make_config(
        f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}", f"deepspeed=ds_configs/zero{zero}.json"
    )
    watched, plain = (run_ranks(train_some, tensor * pipeline, config, every)[0] for every in (1, 10))
    assert watched == plain
    assert watched[-1][0] < watched[0][0]


def train_some(config: Config, every: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of three steps, with coordinates measured before each that ``every`` divides."""
    probe, found = make_probe(config), []
    for step in range(1, 4):
        if step % every == 0:
            probe.measure()
        kept = {name: len(parts) for name, parts in probe.outputs.items()}
        result = probe.engine.train_batch(probe.batch, config.optim.lr)
        assert {name: len(parts) for name, parts in probe.outputs.items()} == kept, "a hook is left"
        found.append((result.loss, result.grad_norm))
    return found
