"""Three classic mistakes of μP code, each planted in one function: a check passes without it and fails with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import log
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megamup import mup
from megamup.config import Config, config_from
from megamup.models import heads
from megamup.models.blocks import Block
from megamup.models.build import build_network
from megamup.models.network import Network
from megamup.parallel.layers import spec_of
from megamup.parallel.loss import vocab_parallel_cross_entropy
from megamup.parallel.mesh import SINGLE, Axis, Mesh, build_mesh
from megamup.parameters import Axis as RatioAxis
from megamup.parameters import parameters
from megamup.train import distributed
from megamup.train.fork import run_ranks
from megamup.train.optim import adamw, parameter_groups

VOCAB = 64
SIGMA = {"embedding": 0.5, "hidden": 0.18, "residual_out": 0.18, "readout": 0.18}


def build(model: dict[str, Any], mup: dict[str, Any], **sections: Any) -> Config:
    values = {
        "model": {"n_layers": 1, "vocab_size": VOCAB, "max_seq_len": 16} | model,
        "mup": {"sigma": SIGMA} | mup,
        "data": {"train": "shard"},
        "optim": {"lr": 0.01, "weight_decay": 0.0},
        "train": {"steps": 4},
    }
    return config_from(values | sections)


def token_ids(batch: int, seq: int) -> Tensor:
    return torch.randint(VOCAB, (batch, seq + 1), generator=torch.Generator().manual_seed(0))


def train(net: Network, config: Config, tokens: Tensor, steps: int, axis: Axis = SINGLE.tensor) -> None:
    optimizer = adamw(parameter_groups(net, config))
    for _ in range(steps):
        optimizer.zero_grad()
        vocab_parallel_cross_entropy(net({"tokens": tokens[:, :-1]}), tokens[:, 1:], axis).mean().backward()
        optimizer.step()


# --------------------------------------------------------------------------- fan-in from the shard


Weights = dict[str, Tensor]


def step_of_shards(config: Config, mesh: Mesh) -> tuple[Weights, Weights]:
    """This rank's shards by name: initial weights, and what one step adds to them."""
    net = build_network(config, mesh)
    before = {spec_of(shard).name: shard.detach().clone() for shard in net.parameters()}
    train(net, config, token_ids(4, 16), 1, mesh.tensor)
    return before, {spec_of(shard).name: shard.detach() - before[spec_of(shard).name] for shard in net.parameters()}


def step_of_rank(config: Config) -> tuple[Weights, Weights]:
    distributed.join()
    return step_of_shards(config, build_mesh(config.parallel))


def gathered(config: Config, ranks: list[Weights]) -> Weights:
    found = {}
    for name, spec in parameters(config.model).items():
        pieces = [rank[name] for rank in ranks]
        found[name] = pieces[0] if spec.partition_dim is None else torch.cat(pieces, spec.partition_dim)
    return found


def two_tensor_ranks_are_one() -> dict[str, bool]:
    """What tensor=2 shares with one rank: the table, the initial weights bit for bit, and an update to rounding."""
    model = {"arch": "llama", "d_model": 64, "n_heads": 4, "d_ff": 160}
    one, two = (build(model, {"base": {"d_model": 32, "n_heads": 2}}, parallel={"tensor": tensor}) for tensor in (1, 2))
    initial, update = step_of_shards(one, SINGLE)
    ranks = run_ranks(step_of_rank, 2, two)
    sharded_initial, sharded_update = (gathered(two, [rank[part] for rank in ranks]) for part in (0, 1))
    return {
        "table": mup.table(one) == mup.table(two),
        "initial weights": all(torch.equal(sharded_initial[name], initial[name]) for name in initial),
        "update": all((sharded_update[name] - update[name]).norm() < 1e-3 * update[name].norm() for name in initial),
    }


def ratios_of_shards(honest: Callable[[Config], mup.Ratios], config: Config) -> mup.Ratios:
    """A rank's row-parallel weight has d_ff / tensor columns: read off its shape, n is too small."""
    at, tensor = honest(config), config.parallel.tensor
    whole = at.width
    cut: dict[RatioAxis, float] = {"d_heads": whole["d_heads"] / tensor, "d_ff": whole["d_ff"] / tensor}
    return replace(at, width=whole | cut)


def test_fan_in_taken_from_the_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    assert two_tensor_ranks_are_one() == {"table": True, "initial weights": True, "update": True}
    monkeypatch.setattr(mup, "ratios", partial(ratios_of_shards, mup.ratios))
    assert two_tensor_ranks_are_one() == {"table": False, "initial weights": False, "update": False}


# --------------------------------------------------------------------------- 1/√d left in attention


def attention_logits(net: Network, tokens: Tensor) -> Tensor:
    """(batch, heads, seq, seq) of the first block, before the mask."""
    found: list[Tensor] = []
    core = next(layer for layer in net.layers if isinstance(layer, Block)).attention.core
    hook = core.register_forward_hook(
        lambda module, inputs, _: found.append(module.scale * inputs[0] @ inputs[1].transpose(-2, -1))
    )
    with torch.no_grad():
        net({"tokens": tokens[:, :-1]})
    hook.remove()
    return found[0]


def growth_of_attention_logits() -> float:
    """Exponent of d_head in the RMS change of attention logits over 4 steps, 2 heads of 16 to 128.

    d_model stays and the sequence is one, so that what a step adds to queries is along the keys that it has seen;
    queries start at zero (Tensor Programs V, appendix D.2), or their random products would shrink as d_head^-1/2.
    """
    tokens, sizes = token_ids(1, 8), (16, 32, 64, 128)
    found = torch.zeros(len(sizes))
    for place, d_head in enumerate(sizes):
        for seed in (1, 2, 3):
            model = {"arch": "gpt", "d_model": 32, "n_heads": 2, "d_head": d_head, "d_ff": 96}
            base = {"d_model": 32, "n_heads": 2, "d_head": 16, "d_ff": 96}
            config = build(model, {"base": base, "zero_init": {"query": True}}, run={"seed": seed})
            net = build_network(config)
            before = attention_logits(net, tokens)
            train(net, config, tokens, 4)
            found[place] += (attention_logits(net, tokens) - before).square().mean().sqrt()
    return log(found[-1] / found[0]) / log(sizes[-1] / sizes[0])


def test_root_of_d_left_in_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured: 0.04 with 1/d, 0.46 with 1/√d."""
    assert abs(growth_of_attention_logits()) < 0.15
    monkeypatch.setattr(mup, "attention_scale", lambda config: config.model.d_head**-0.5)
    assert growth_of_attention_logits() > 0.35


# --------------------------------------------------------------------------- readout multiplier twice through tying

N = 4


def logits_over_reference(arch: str) -> Tensor:
    """The tied model's logits over x Wᵀ/n (α is 1) with x what the last norm gives and W the embedding's weight."""
    model = {"arch": arch, "d_model": 32 * N, "n_heads": 2 * N, "tie_embeddings": True}
    net = build_network(build(model, {"base": {"d_model": 32, "n_heads": 2}}))
    embedding = {spec_of(shard).name: shard for shard in net.parameters()}["embedding.token"]
    x = tokens = token_ids(2, 16)[:, :-1]
    with torch.no_grad():
        for call, _ in net.calls[:-1]:
            x = call(x)
        return net({"tokens": tokens}) / (F.linear(x, embedding) / N)  # type: ignore[no-any-return]


@pytest.mark.parametrize("arch", ["llama", "gpt"])
def test_readout_multiplier_twice_through_tying(monkeypatch: pytest.MonkeyPatch, arch: str) -> None:
    ratio = logits_over_reference(arch)
    torch.testing.assert_close(ratio, torch.ones_like(ratio))
    monkeypatch.setattr(heads, "readout_multiplier", lambda config: mup.readout_multiplier(config) ** 2)
    ratio = logits_over_reference(arch)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1 / N))
