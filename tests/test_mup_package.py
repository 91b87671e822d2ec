"""The abc-table against Microsoft's `mup` package, parameter by parameter, and where the two differ on purpose."""

from __future__ import annotations

from math import sqrt
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megamup.config import Config, config_from
from megamup.mup import readout_multiplier, table
from megamup.parameters import Parameter, parameters
from megamup.scales import Scales

package = pytest.importorskip("mup", reason="Microsoft's mup package is not installed")

# Width x4, heads·d_head x6 at a fixed d_head, d_ff x2.5; a delta that differs from the base in every width.
BASE = {"d_model": 32, "n_heads": 2, "n_kv_heads": 1, "d_ff": 96}
DELTA = {"d_model": 48, "n_heads": 4, "n_kv_heads": 2, "d_ff": 160}
TARGET = {"d_model": 128, "n_heads": 12, "n_kv_heads": 6, "d_ff": 240}
FIXED = {"d_head": 16, "n_layers": 3, "vocab_size": 64, "max_seq_len": 16}
LR, DECAY = 0.01, 0.1
ARCHS: dict[str, dict[str, Any]] = {"llama": {"arch": "llama", "bias": True}, "gpt": {"arch": "gpt"}}


def build(sizes: dict[str, int], mup: dict[str, Any] | None = None, **model: Any) -> Config:
    """A config over the base, each role with values of its own."""
    values = {
        "base": BASE,
        "sigma": {"embedding": 0.5, "hidden": 0.1, "residual_out": 0.3, "readout": 0.7},
        "alpha": {"readout": 7.0},
        "eta": {"embedding": 1.1, "hidden": 1.2, "residual_out": 1.3, "readout": 1.4, "vector": 1.6},
    }
    return config_from(
        {
            "model": FIXED | sizes | model,
            "mup": values | (mup or {}),
            "data": {"train": "shard"},
            "optim": {"lr": LR, "weight_decay": DECAY, "decay_mode": "width"},
            "train": {"steps": 1},
        }
    )


def plain_module(config: Config) -> nn.Module:
    """The model's parameters, by our names, in torch's modules and the package's: what its user would have."""
    model, inventory = config.model, parameters(config.model)
    net = nn.Module()
    for name, parameter in inventory.items():
        path, _, kind = name.rpartition(".")
        if parameter.role == "embedding":
            put(net, name, nn.Embedding(parameter.shape[0], parameter.shape[1]))
        elif kind == "weight":
            put(net, path, layer(parameter, bias=f"{path}.bias" in inventory))
    if model.tie_embeddings:
        token = net.get_parameter("embedding.token.weight")
        put(net, "readout", package.MuSharedReadout(token, bias=False, output_mult=config.mup.alpha.readout))
    else:
        readout = package.MuReadout(model.d_model, model.vocab_size, False, output_mult=config.mup.alpha.readout)
        put(net, "readout", readout)
    return net


def layer(parameter: Parameter, bias: bool) -> nn.Module:
    if parameter.role == "gain":
        return nn.LayerNorm(parameter.shape, bias=bias)
    return nn.Linear(parameter.shape[1], parameter.shape[0], bias)


def put(net: nn.Module, path: str, module: nn.Module) -> None:
    *inner, last = path.split(".")
    for part in inner:
        if not hasattr(net, part):
            net.add_module(part, nn.Module())
        net = net.get_submodule(part)
    net.add_module(last, module)


def with_base_shapes(
    target: Config, base: Config, delta: Config, **options: Any
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The target's module with the package's shapes on it, and its parameters by our names."""
    net = plain_module(target)
    package.set_base_shapes(net, plain_module(base), delta=plain_module(delta), **options)
    inventory, named = parameters(target.model), net.named_parameters()
    return net, {name if name in inventory else name.removesuffix(".weight"): weight for name, weight in named}


def package_std(weight: Tensor, std: float) -> float:
    """The deviation that the package's own `normal_` draws with, from two draws of one seed."""
    drawn, unit = weight.detach().clone(), torch.empty_like(weight)
    drawn.infshape = weight.infshape  # type: ignore[attr-defined]
    torch.manual_seed(0)
    package.normal_(drawn, std=std)
    torch.manual_seed(0)
    unit.normal_()
    return float((drawn / unit).median())


def package_groups(weights: dict[str, Tensor], at_base: dict[str, Scales]) -> dict[str, dict[str, float]]:
    """What MuAdamW makes of the base's learning rate and decay, parameter by parameter."""
    asked = [
        {
            "params": [weight],
            "name": name,
            "lr": LR * at_base[name].lr_scale,
            "weight_decay": at_base[name].weight_decay,
        }
        for name, weight in weights.items()
    ]
    groups = package.MuAdamW(asked, lr=LR, eps=1e-8).param_groups
    return {group["name"]: group for group in groups if group["params"]}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_every_parameter_scales_as_the_package_says(arch: str, tied: bool) -> None:
    """From the base's values the package derives the target's: initial deviation, rate, decay and multiplier."""
    more: dict[str, Any] = ARCHS[arch] | {"tie_embeddings": tied}
    target, base = build(TARGET, **more), build(BASE, **more)
    net, weights = with_base_shapes(target, base, build(DELTA, **more))
    ours, at_base = table(target), table(base)
    groups = package_groups(weights, at_base)
    assert ours.keys() == weights.keys() == groups.keys()
    for name, weight in weights.items():
        assert weight.shape == parameters(target.model)[name].shape
        assert groups[name]["lr"] == pytest.approx(LR * ours[name].lr_scale), name
        assert groups[name]["weight_decay"] == pytest.approx(ours[name].weight_decay), name
        if weight.dim() == 2:
            assert package_std(weight, at_base[name].init_std) == pytest.approx(ours[name].init_std), name
    readout, x = net.get_submodule("readout"), torch.randn(5, target.model.d_model)
    weight = weights["embedding.token" if tied else "readout.weight"]
    torch.testing.assert_close(readout(x), F.linear(x, weight) * readout_multiplier(target), rtol=1e-5, atol=1e-4)


# --------------------------------------------------------------------------- where we differ on purpose

KEY = "blocks.0.attention.key.weight"
FEW_KEYS = ({**BASE, "n_kv_heads": 2}, {**DELTA, "n_kv_heads": 2}, {**TARGET, "n_kv_heads": 2})


def test_key_heads_of_fixed_number() -> None:
    """The package sees an output of finite size, which belongs to a readout, and refuses it as a plain layer.

    Told to go on, it leaves rate and initial weights alone, so that keys grow with width. We take the spectral
    condition (Yang, Simon & Bernstein 2023): lr/n and a deviation of (n·g)^-1/2, here n = 4, g = 6.
    """
    base, delta, target = (
        build(sizes, {"base": FEW_KEYS[0]}, **ARCHS["llama"], tie_embeddings=False) for sizes in FEW_KEYS
    )
    with pytest.raises(
        AssertionError, match="infinite fan-in and finite fan-out dimensions but is not type `MuReadout`"
    ):
        with_base_shapes(target, base, delta)
    _, weights = with_base_shapes(target, base, delta, do_assert=False)
    at_base, ours = table(base)[KEY], table(target)[KEY]
    assert package_std(weights[KEY], at_base.init_std) == pytest.approx(at_base.init_std) == pytest.approx(0.1)
    assert ours.init_std == pytest.approx(0.1 / sqrt(4 * 6))
    assert package_groups(weights, table(base))[KEY]["lr"] == pytest.approx(LR * at_base.lr_scale)
    assert ours.lr_scale == pytest.approx(at_base.lr_scale / 4)


def test_key_heads_of_fixed_number_are_a_readout_where_heads_grow_with_width() -> None:
    """With g = n ours is the package's MuReadout: multiplier 1/n, moved into the deviation and Adam's rate."""
    sizes = {**FEW_KEYS[2], "n_heads": 8}
    target, base = (build(found, {"base": FEW_KEYS[0]}, **ARCHS["llama"]) for found in (sizes, FEW_KEYS[0]))
    readout = package.MuReadout(128, 32, bias=False)
    package.set_base_shapes(readout, package.MuReadout(32, 32, False), delta=package.MuReadout(48, 32, False))
    rate = package.MuAdamW(readout.parameters(), lr=LR).param_groups[-1]["lr"]
    ours, at_base = table(target)[KEY], table(base)[KEY]
    n = readout.width_mult()
    assert ours.init_std == pytest.approx(package_std(readout.weight, at_base.init_std) / n)
    assert ours.lr_scale / at_base.lr_scale == pytest.approx(rate / LR / n)


def test_eps() -> None:
    """The package leaves Adam's eps, which outgrows the gradients (1/n); ours can follow (Dey et al. 2025, table 1)."""
    more: dict[str, Any] = ARCHS["llama"]
    target, base = build(TARGET, **more), build(BASE, **more)
    _, weights = with_base_shapes(target, base, build(DELTA, **more))
    assert {group["eps"] for group in package_groups(weights, table(base)).values()} == {1e-8}
    assert {scales.eps for scales in table(target).values()} == {1e-8}
    assert {scales.eps for scales in table(build(TARGET, {"scale_eps": True}, **more)).values()} == {1e-8 / 4}


def test_a_tied_readout_leaves_the_embedding_alone() -> None:
    """MuSharedReadout has our scales, but `set_base_shapes` multiplies the weight that it shares by n^1/2.

    It means to undo torch's fan-in initialization of a readout; an embedding's had none. Ours is σ_embedding.
    """
    more: dict[str, Any] = ARCHS["llama"] | {"tie_embeddings": True}
    target, base, delta = (build(sizes, **more) for sizes in (TARGET, BASE, DELTA))
    torch.manual_seed(0)
    before = plain_module(target).get_parameter("embedding.token.weight").detach()
    torch.manual_seed(0)
    _, weights = with_base_shapes(target, base, delta)
    torch.testing.assert_close(weights["embedding.token"].detach(), before * sqrt(4))
    assert table(target)["embedding.token"] == table(base)["embedding.token"]


@pytest.mark.parametrize("name", ["blocks.0.attention.output.weight", "blocks.0.mlp.down.weight"])
def test_depth_in_the_initial_weights(name: str) -> None:
    """The package knows no depth: it takes the base's deviation. Ours has GPT-2's (2L)^-1/2 (Radford et al. 2019)."""
    more: dict[str, Any] = ARCHS["llama"]
    target, base = build(TARGET, **more, n_layers=12), build(BASE, **more, n_layers=3)
    _, weights = with_base_shapes(build(TARGET, **more), base, build(DELTA, **more))
    at_base = table(base)[name].init_std
    assert at_base == pytest.approx(0.3 / sqrt(2 * 3))
    assert table(target)[name].init_std == pytest.approx(package_std(weights[name], at_base) * sqrt(3 / 12))
