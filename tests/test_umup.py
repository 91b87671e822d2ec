"""u-μP against Graphcore's `unit-scaling`: learning rates, the forward pass, and activations of deviation 1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megamup.config import Config, config_from
from megamup.kernels.attention import CAUSAL
from megamup.kernels.rotary import Rotation, rotate
from megamup.models.blocks import Block
from megamup.models.build import build_network
from megamup.models.mlp import Mlp
from megamup.mup import table
from megamup.parallel.layers import spec_of
from megamup.parameters import parameters

unit_scaling = pytest.importorskip("unit_scaling", reason="Graphcore's unit-scaling is not installed")
U = unit_scaling.functional

LLAMA = {"arch": "llama", "d_model": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "d_head": 32, "d_ff": 176}
GPT = {"arch": "gpt", "d_model": 64, "n_layers": 3, "n_heads": 4}
SIZES = {"vocab_size": 256, "max_seq_len": 48}


def build(model: dict[str, Any], **alpha: float) -> Config:
    mup = {"parametrization": "umup", "alpha": alpha}
    return config_from({"model": SIZES | model, "mup": mup, "data": {"train": "shard"}, "train": {"steps": 1}})


def token_ids() -> Tensor:
    shape = (4, SIZES["max_seq_len"])
    return torch.randint(SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(0))


# --------------------------------------------------------------------------- against unit-scaling

THEIR_TYPE = {"embedding": "weight", "readout": "output", "gain": "norm", "bias": "bias"}


@pytest.mark.parametrize("model", [LLAMA, GPT])
def test_rates_equal_those_of_unit_scaling(model: dict[str, Any]) -> None:
    """Every parameter, tagged as their modules tag it: `DepthSequential` marks the blocks with their number."""
    config = build(model)
    scales = table(config)
    for name, parameter in parameters(config.model).items():
        theirs = unit_scaling.Parameter(
            torch.empty(parameter.shape),
            mup_type=THEIR_TYPE.get(parameter.role, "weight"),
            mup_scaling_depth=config.model.n_layers if name.startswith("blocks.") else None,
        )
        assert scales[name].lr_scale == pytest.approx(unit_scaling.optim.lr_scale_func_adam(theirs)), name


def unit_scaled_llama(config: Config, weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """The same model from their operations alone; ours is the rotation, and the repeated key heads."""
    model, alpha = config.model, config.mup.alpha
    tau = unit_scaling.transformer_residual_scaling_rule(alpha.residual_out, alpha.attention_ratio)

    def norm(x: Tensor, name: str) -> Tensor:
        return U.rms_norm(x, (model.d_model,), weights[f"{name}.weight"], model.norm_eps)  # type: ignore[no-any-return]

    def linear(x: Tensor, name: str) -> Tensor:
        return U.linear(x, weights[f"{name}.weight"], None)  # type: ignore[no-any-return]

    def attention(x: Tensor, block: str) -> Tensor:
        x = norm(x, f"{block}.attention_norm")
        query, key, value = (
            linear(x, f"{block}.attention.{part}").unflatten(-1, (-1, model.d_head)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        query, key = rotate(query, Rotation(model.rope_theta)), rotate(key, Rotation(model.rope_theta))
        key, value = (kv.repeat_interleave(model.n_heads // model.n_kv_heads, dim=1) for kv in (key, value))
        mixed = U.scaled_dot_product_attention(query, key, value, is_causal=True, mult=alpha.attention)
        return linear(mixed.transpose(1, 2).flatten(-2), f"{block}.attention.output")

    def mlp(x: Tensor, block: str) -> Tensor:
        x = norm(x, f"{block}.mlp_norm")
        inner = U.silu_glu(linear(x, f"{block}.mlp.up"), linear(x, f"{block}.mlp.gate"), mult=alpha.activation)
        return linear(inner, f"{block}.mlp.down")

    x = U.embedding(tokens, weights["embedding.token"])
    for layer in range(model.n_layers):
        for index, branch in ((2 * layer, attention), (2 * layer + 1, mlp)):
            x = U.residual_apply(lambda y, f=branch, at=f"blocks.{layer}": f(y, at), x, tau(index, 2 * model.n_layers))
    return alpha.readout * U.linear_readout(norm(x, "final_norm"), weights["readout.weight"], None)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "alpha",
    [
        {},
        {"attention": 4.0},
        {"activation": 0.25},
        {"residual_out": 0.5, "attention_ratio": 0.25},
        {"attention": 0.5, "activation": 3.0, "residual_out": 2.0, "attention_ratio": 3.0, "readout": 5.0},
    ],
)
def test_logits_equal_a_model_of_unit_scaling(alpha: dict[str, float]) -> None:
    config = build(LLAMA, **alpha)
    net = build_network(config)
    weights = {spec_of(shard).name: shard.detach() for shard in net.parameters()}
    with torch.no_grad():
        expected = unit_scaled_llama(config, weights, token_ids())
        assert expected.std() > 0.05
        torch.testing.assert_close(net({"tokens": token_ids()}), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mult", [0.25, 1.0, 3.0])
def test_gelu_equals_that_of_unit_scaling(mult: float) -> None:
    net = build_network(build(GPT, activation=mult))
    block = next(layer for layer in net.layers if isinstance(layer, Block))
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert isinstance(block.mlp, Mlp)
    ours = block.mlp.activated(x)
    torch.testing.assert_close(ours, U.gelu(x, mult=mult))


# --------------------------------------------------------------------------- what it is for


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def rms_by_place(config: Config) -> dict[str, list[float]]:
    """RMS at initialization of the stream into every block, of what its branches compute, and of the logits · √d."""
    net = build_network(config)
    found: dict[str, list[float]] = {"stream": [], "attention": [], "mlp": []}
    for block in net.layers:
        if isinstance(block, Block):
            block.register_forward_hook(lambda _, inputs, output: found["stream"].append(rms(inputs[0])))
            block.attention.register_forward_hook(lambda _, inputs, output: found["attention"].append(rms(output)))
            block.mlp.register_forward_hook(lambda _, inputs, output: found["mlp"].append(rms(output)))
    with torch.no_grad():
        logits = net({"tokens": token_ids()})
    return found | {"logits": [rms(logits) * config.model.d_model**0.5]}


@pytest.mark.parametrize("arch", ["llama", "gpt"])
def test_activations_have_deviation_1_whatever_the_width_and_depth(arch: str) -> None:
    """Attention past the first block is the exception, unit-scaling's too.

    Its factor takes values of different positions for independent, but mixing makes them alike: their common part,
    which averaging doesn't shrink, grows with depth. Bounds hold it, and with it the stream, to what was measured.
    """
    for layers in (2, 8, 24):
        found = []
        for d_model in (64, 128, 256):
            shape = {"arch": arch, "d_model": d_model, "n_layers": layers, "n_heads": d_model // 32}
            found.append(rms_by_place(build(shape)))
            first, *deeper = found[-1]["attention"]
            streams = found[-1]["stream"]
            for unit in (streams[0], first, *found[-1]["mlp"], *found[-1]["logits"]):
                assert 0.7 < unit < 1.4, (d_model, layers, found[-1])
            assert 0.7 < min(deeper) <= max(deeper) < 3.9, (d_model, layers, deeper)
            assert 0.9 < min(streams) <= max(streams) < 2.1, (d_model, layers, streams)
        for place in ("mlp", "stream", "logits"):
            means = [sum(at[place]) / len(at[place]) for at in found]
            assert max(means) / min(means) < 1.15, (layers, place, means)


@pytest.mark.parametrize("seq", [16, 256])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 8.0])
def test_attention_over_independent_values_has_deviation_1(seq: int, temperature: float) -> None:
    config = build(LLAMA | {"max_seq_len": seq}, attention=temperature)
    block = next(layer for layer in build_network(config).layers if isinstance(layer, Block))
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(8, 4, seq, 32, generator=draw) for _ in range(3))
    assert 0.7 < rms(block.attention.core(query, key, value, CAUSAL)) < 1.4
