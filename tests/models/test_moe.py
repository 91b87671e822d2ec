"""Experts against a loop over tokens, against transformers' Mixtral, and in every layout against one rank."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megamup.config import Config, config_from
from megamup.errors import MegamupError
from megamup.models.build import context
from megamup.models.moe import Experts
from megamup.mup import block_scales, table
from megamup.parallel.auxiliary import inject
from megamup.parallel.collectives import all_reduce
from megamup.parallel.layers import spec_of
from megamup.parallel.mesh import SINGLE, Mesh, build_mesh
from megamup.train import distributed
from megamup.train.fork import run_ranks
from tests.parallel.test_layers import gather, joined, stretch

Outcome = dict[str, Tensor]
EXPERTS = 8
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "gelu": F.gelu,
    "relu2": lambda x: F.relu(x).square(),
}
NAME = "blocks.0.moe"


def make(moe: dict[str, Any], model: dict[str, Any] | None = None, **sections: Any) -> Config:
    """One block of experts, whose router says something at the start and whose multipliers aren't 1."""
    sizes = {"arch": "llama", "d_model": 48, "n_layers": 2, "n_heads": 4, "d_ff": 40, "vocab_size": 64}
    values: dict[str, Any] = {
        "model": sizes | {"max_seq_len": 16, "moe": {"experts": EXPERTS, "d_expert": 24} | moe} | (model or {}),
        "mup": {
            "base": {"d_model": 24, "n_heads": 2},
            "sigma": {"hidden": 0.3, "residual_out": 0.5, "readout": 0.6},
            "alpha": {"hidden": 1.3, "residual_out": 0.8},
        },
        "data": {"train": "shard"},
        "train": {"steps": 1},
    }
    return config_from(values | sections)


def build(config: Config, mesh: Mesh = SINGLE) -> Experts:
    return Experts(context(config, mesh), config.model, NAME, block_scales(config, 0))


def hidden(config: Config, batch: int = 4) -> Tensor:
    shape = (batch, config.model.max_seq_len, config.model.d_model)
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def weights_of(module: Experts) -> Outcome:
    """By short name, in float64, with a gradient."""
    found = {spec_of(shard).name.removeprefix(f"{NAME}."): shard for shard in module.parameters()}
    return {name: shard.detach().double().requires_grad_() for name, shard in found.items()}


def looped(config: Config, weights: Outcome, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the experts put out, token by token, and the auxiliary loss: the mean of every sequence's."""
    moe, scales = config.model.moe, table(config)
    assert moe is not None

    def times(part: str) -> float:
        return scales[f"{NAME}.{part}"].multiplier

    def mlp(kind: str, number: int, token: Tensor) -> Tensor:
        first, *up = [
            times(f"{kind}.{part}") * weights[f"{kind}.{part}"][number] @ token
            for part in ("gate", "up")
            if f"{kind}.{part}" in weights
        ]
        inner = ACTIVATIONS[config.model.activation](first)
        return times(f"{kind}.down") * weights[f"{kind}.down"][number] @ (inner * up[0] if up else inner)

    rows, losses = [], []
    for sequence in x:
        logits = times("router.weight") * sequence @ weights["router.weight"].t()
        counts, mean = torch.zeros(moe.experts, dtype=x.dtype), torch.zeros(moe.experts, dtype=x.dtype)
        for token, of_token in zip(sequence, logits, strict=True):
            probabilities = of_token.exp() / of_token.exp().sum()
            mean = mean + probabilities / len(sequence)
            best = sorted(range(moe.experts), key=(-probabilities.detach()).tolist().__getitem__)[: moe.top_k]
            total = sum(probabilities[e] for e in best) if moe.normalize else 1.0
            y = sum((probabilities[e] / total * mlp("experts", e, token) for e in best), torch.zeros_like(token))
            rows.append(y + sum((mlp("shared", e, token) for e in range(moe.shared)), torch.zeros_like(token)))
            counts[best] += 1
        balance = (moe.experts * counts / (moe.top_k * len(sequence)) * mean).sum()
        z = logits.exp().sum(-1).log().square().mean()
        losses.append(moe.balance * balance + moe.router_z * z)
    return torch.stack(rows).view_as(x), torch.stack(losses).mean()


@pytest.mark.parametrize(
    ("moe", "activation"),
    [
        ({}, "swiglu"),
        ({"shared": 2, "top_k": 3}, "swiglu"),
        ({"normalize": False, "top_k": 1}, "gelu"),
        ({"normalize": False, "shared": 1, "balance": 0.0, "router_z": 0.0}, "relu2"),
        ({"top_k": 8}, "gelu"),
    ],
)
def test_experts_are_a_loop_over_tokens(moe: dict[str, Any], activation: str) -> None:
    """Output, and gradients of the output's loss and of the auxiliary ones, which are strong here."""
    config = make({"balance": 5.0, "router_z": 3.0} | moe, {"activation": activation})
    module, x = build(config), hidden(config).requires_grad_()
    exact, inputs = weights_of(module), x.detach().double().requires_grad_()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(8))

    y = module(x)
    (y * direction).sum().backward()
    expected, loss = looped(config, exact, inputs)
    ((expected * direction).sum() + loss).backward()

    assert y.std() > 0.1
    torch.testing.assert_close(y, expected.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad, inputs.grad.float(), rtol=1e-4, atol=1e-4)  # type: ignore[union-attr]
    for shard in module.parameters():
        name = spec_of(shard).name.removeprefix(f"{NAME}.")
        torch.testing.assert_close(shard.grad, exact[name].grad.float(), rtol=1e-4, atol=1e-4, msg=name)  # type: ignore[union-attr]


def test_experts_are_transformers_mixtral() -> None:
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral", reason="transformers is not there")
    from transformers import MixtralConfig

    config = make({"balance": 0.0, "router_z": 0.0}, mup={"parametrization": "sp", "sigma": {"hidden": 0.3}})
    module, model = build(config), config.model
    theirs = modeling.MixtralSparseMoeBlock(
        MixtralConfig(hidden_size=48, intermediate_size=24, num_local_experts=EXPERTS, num_experts_per_tok=2)
    )
    mine = {name: weight.float().detach() for name, weight in weights_of(module).items()}
    state = {
        "gate.weight": mine["router.weight"],
        "experts.gate_up_proj": torch.cat((mine["experts.gate"], mine["experts.up"]), 1),
        "experts.down_proj": mine["experts.down"],
    }
    theirs.load_state_dict(state)
    x = hidden(config)
    with torch.no_grad():
        expected = theirs.eval()(x)
        assert expected.shape == (4, 16, model.d_model)
        torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------- layouts


def gradients(config: Config, micro_batches: int) -> Outcome:
    """Output, input's and weights' gradients of a global batch, whole: the sum of ``y · direction``, weighted so that
    averaging over replicas leaves it what it is (as `megamup.train.engine.weigh` does), and the auxiliary losses."""
    distributed.join()
    mesh = build_mesh(config.parallel)
    module = build(config, mesh)
    x = hidden(config).chunk(mesh.data.size)[mesh.data.rank]
    direction = torch.randn(hidden(config).shape, generator=torch.Generator().manual_seed(8))
    direction = mesh.replicas.size * direction.chunk(mesh.data.size)[mesh.data.rank]
    outputs, inputs = [], []
    for part, at in zip(x.chunk(micro_batches), direction.chunk(micro_batches), strict=True):
        mine = stretch(part, mesh).clone().requires_grad_()
        y = module(mine)
        (y * stretch(at, mesh)).sum().backward()
        assert mine.grad is not None
        outputs.append(joined(y.detach(), mesh))
        inputs.append(joined(mine.grad, mesh) / mesh.replicas.size)
    found = {"y": gather(torch.cat(outputs), 0, mesh.data), "x": gather(torch.cat(inputs), 0, mesh.data)}
    for shard in module.parameters():
        spec, grad = spec_of(shard), all_reduce(shard.grad, mesh.replicas) / mesh.replicas.size  # type: ignore[arg-type]
        found[spec.name] = grad if spec.partition_dim is None else gather(grad, spec.partition_dim, mesh.tensor)
    return found


LAYOUTS: list[tuple[int, int, dict[str, Any]]] = [
    (2, 1, {"tensor": 2}),
    (2, 1, {"tensor": 2, "sequence": True}),
    (2, 1, {"context": 2}),
    (2, 1, {}),
    (1, 4, {}),
    (2, 2, {}),
    (4, 1, {"tensor": 2, "sequence": True, "context": 2}),
    (4, 2, {"tensor": 2}),
]


@pytest.mark.parametrize(("ranks", "micro_batches", "parallel"), LAYOUTS)
def test_layouts_give_the_gradients_of_one_rank(ranks: int, micro_batches: int, parallel: dict[str, Any]) -> None:
    """With auxiliary losses as strong as the other: each layout's injected gradients are of the same mean."""
    moe = {"shared": 1, "balance": 500.0, "router_z": 30.0}
    whole = run_ranks(gradients, 1, make(moe, batch={"global_sequences": 4}), 1)[0]
    without = run_ranks(gradients, 1, make(moe | {"balance": 0.0}, batch={"global_sequences": 4}), 1)[0]
    router = f"{NAME}.router.weight"
    assert (whole[router] - without[router]).norm() > 0.1 * whole[router].norm(), "the balance loss would not be seen"
    batch = {"global_sequences": 4, "micro_sequences": 4 * parallel.get("tensor", 1) * parallel.get("context", 1)}
    batch["micro_sequences"] //= ranks * micro_batches
    for rank in run_ranks(gradients, ranks, make(moe, parallel=parallel, batch=batch), micro_batches):
        assert rank.keys() == whole.keys()
        for name, value in whole.items():
            torch.testing.assert_close(rank[name], value, rtol=1e-4, atol=1e-4, msg=name)


# ------------------------------------------------------------------- what the losses are for


def train(module: Experts, x: Tensor, steps: int, lr: float) -> list[tuple[float, float]]:
    """(balance, z) before each step on the auxiliary losses alone: the output is multiplied by zero."""
    optimizer = torch.optim.Adam(module.parameters(), lr=lr)
    found: list[tuple[float, float]] = []
    for _ in range(steps):
        with torch.no_grad():
            logits = module.router(x)
            losses = module.router.losses(logits, *module.router.choose(logits)[1:])
            found.append((float(losses.balance), float(losses.z)))
        optimizer.zero_grad()
        (module(x) * 0.0).sum().backward()
        optimizer.step()
    return found


def test_balance_and_logits_fall_when_trained() -> None:
    """A router that sends all tokens to the same two of eight experts comes to use all: 4 is the worst, 1 is even."""
    config = make({"balance": 1.0, "router_z": 0.01})
    module, x = build(config), hidden(config)
    with torch.no_grad():
        module.router.weight[:2] += 2 * x.mean((0, 1))
        x += 5 * x.mean((0, 1)).sign()
    found = train(module, x, 200, 0.02)
    assert found[0][0] > 3.0
    assert found[-1][0] < 1.2
    assert found[-1][1] < 0.5 * found[0][1]


def test_even_routing_has_a_balance_of_one_and_z_of_log_experts() -> None:
    config = make({})
    module, x = build(config), hidden(config)
    with torch.no_grad():
        module.router.weight.zero_()
        logits = module.router(x)
        losses = module.router.losses(logits, *module.router.choose(logits)[1:])
    assert float(losses.balance) == pytest.approx(1.0)
    assert float(losses.z) == pytest.approx(log(EXPERTS) ** 2)


def test_injected_loss_has_its_own_gradient() -> None:
    x, loss = torch.ones(3, requires_grad=True), torch.ones((), requires_grad=True)
    y = inject(x, loss, 0.25)
    (10 * y).sum().backward()
    assert torch.equal(y.detach(), x.detach())
    assert torch.equal(x.grad, torch.full((3,), 10.0))  # type: ignore[arg-type]
    assert float(loss.grad) == 0.25  # type: ignore[arg-type]


@pytest.mark.parametrize("part", ["router", "output"])
def test_updates_are_flat_in_width(part: str) -> None:
    """Adam's first steps move router logits and experts' outputs as far at width 1024 as at 64; under sp they grow."""
    slopes = {name: slope(part, name) for name in ("mup", "sp")}
    assert abs(slopes["mup"]) < 0.15
    assert slopes["sp"] > 0.4


def slope(part: str, parametrization: str) -> float:
    """Of log RMS change on log width, after 3 steps at the table's rates towards a fixed output."""
    changes = []
    for width in (64, 256, 1024):
        sizes = {"d_model": width, "d_ff": width // 2, "n_heads": width // 16}
        base = {"parametrization": parametrization}
        if parametrization == "mup":
            base |= {"base": {"d_model": 64, "n_heads": 4}}  # type: ignore[dict-item]
        config = make({"d_expert": width // 2, "shared": 1}, sizes, mup=base)
        module, scales = build(config), table(config)
        groups = [{"params": [p], "lr": 0.01 * scales[spec_of(p).name].lr_scale} for p in module.parameters()]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        x = F.layer_norm(hidden(config, 1), (width,))
        seen: list[Tensor] = []
        watched: nn.Module = module.router if part == "router" else module
        watched.register_forward_hook(lambda _, inputs, output, seen=seen: seen.append(output.detach()))
        for _ in range(4):
            optimizer.zero_grad()
            (module(x) - x).square().mean().backward()
            optimizer.step()
        changes.append(float((seen[-1] - seen[0]).square().mean().sqrt()))
    return log(changes[-1] / changes[0]) / log(1024 / 64)


@pytest.mark.parametrize("setting", ["compile", "selective", "full"])
def test_compiled_and_recomputed_experts_are_the_same(setting: str) -> None:
    """As one graph (``fullgraph``): no shape depends on where tokens go."""
    from megamup.models.recompute import recompute

    config = make({"shared": 1})
    found = []
    for again in (False, True):
        module, x = build(config), hidden(config).requires_grad_()
        if not again:
            y = module(x)
        elif setting == "compile":
            y = torch.compile(module, fullgraph=True, dynamic=False, backend="aot_eager")(x)
        else:
            y = recompute(setting, 0)(module, x)  # type: ignore[arg-type]
        y.square().sum().backward()
        found.append([y.detach(), x.grad, *(shard.grad for shard in module.parameters())])
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-4)


def test_one_expert_with_a_normalized_weight_is_refused() -> None:
    with pytest.raises(MegamupError, match="normalize"):
        make({"top_k": 1})
