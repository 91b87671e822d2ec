"""The abc-table: every cell and every knob against its formula."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict, replace
from math import sqrt
from typing import Any

import pytest
import torch

from megamup.config import Config, config_from, merge, parse_override
from megamup.errors import MegamupError
from megamup.models.build import build_network
from megamup.mup import attention_scale, block_scales, ratios, readout_multiplier, table
from megamup.parallel.layers import spec_of
from megamup.parameters import parameters
from megamup.scales import Branch, Scales
from megamup.train.optim import adamw, parameter_groups, write_lr

# Width x4, attention output x6 (heads·d_head 192 over 32), d_ff x2.5, batch x4 (512 tokens over 128), tokens x8.
BATCH, TOKENS, DEPTH = 4.0, 8.0, (2 * 3) ** -0.5
S = sqrt(BATCH) * TOKENS**-0.12
TARGET: dict[str, Any] = {
    "model": {
        "arch": "llama",
        "d_model": 128,
        "n_layers": 3,
        "n_heads": 6,
        "n_kv_heads": 2,
        "d_head": 32,
        "d_ff": 240,
        "bias": True,
        "vocab_size": 64,
        "max_seq_len": 16,
    },
    "mup": {
        "base": {"d_model": 32, "d_ff": 96, "n_heads": 2, "d_head": 16, "batch_tokens": 128, "tokens": 6400},
        "sigma": {"embedding": 0.5, "hidden": 0.1, "residual_out": 0.3, "readout": 0.7},
        "alpha": {"embedding": 2.0, "hidden": 3.0, "residual_out": 5.0, "readout": 7.0, "attention": 1.5},
        "eta": {"embedding": 1.1, "hidden": 1.2, "residual_out": 1.3, "readout": 1.4, "vector": 1.6},
        "alpha_data": -0.12,
    },
    "data": {"train": "shard"},
    "batch": {"global_sequences": 32},
    "optim": {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1},
    "train": {"steps": 100},
}


def build(*overrides: str) -> Config:
    values = deepcopy(TARGET)
    for override in overrides:
        merge(values, parse_override(override))
    return config_from(values)


CELLS = {  # name: (init std, multiplier, lr scale, weight decay, init mean)
    "embedding.token": (0.5, 2.0, 1.1 * S, 0.1, 0.0),
    "blocks.1.attention.query.weight": (0.1 / sqrt(4), 3.0, 1.2 * S / 4, 0.1, 0.0),
    "blocks.1.attention.key.weight": (0.1 / sqrt(4), 3.0, 1.2 * S / 4, 0.1, 0.0),
    "blocks.1.attention.value.weight": (0.1 / sqrt(4), 3.0, 1.2 * S / 4, 0.1, 0.0),
    "blocks.1.attention.output.weight": (0.3 / sqrt(6) * DEPTH, 5.0, 1.3 * S / 6, 0.1, 0.0),
    "blocks.1.mlp.gate.weight": (0.1 / sqrt(4), 3.0, 1.2 * S / 4, 0.1, 0.0),
    "blocks.1.mlp.up.weight": (0.1 / sqrt(4), 3.0, 1.2 * S / 4, 0.1, 0.0),
    "blocks.1.mlp.down.weight": (0.3 / sqrt(2.5) * DEPTH, 5.0, 1.3 * S / 2.5, 0.1, 0.0),
    "readout.weight": (0.7, 7.0 / 4, 1.4 * S, 0.1, 0.0),
    "blocks.1.mlp_norm.weight": (0.0, 1.0, 1.6 * S, 0.0, 1.0),
    "final_norm.weight": (0.0, 1.0, 1.6 * S, 0.0, 1.0),
    "blocks.1.attention.query.bias": (0.0, 1.0, 1.6 * S, 0.0, 0.0),
    "blocks.1.mlp.down.bias": (0.0, 1.0, 1.6 * S, 0.0, 0.0),
}


@pytest.mark.parametrize("name", CELLS)
def test_cell(name: str) -> None:
    found = table(build())[name]
    at = (found.init_std, found.multiplier, found.lr_scale, found.weight_decay, found.init_mean)
    assert at == pytest.approx(CELLS[name])
    assert found.betas == pytest.approx((1 - 4 * 0.1, 1 - 4 * 0.05))
    assert found.eps == pytest.approx(1e-8 / 2)


def test_gpt_positions_are_an_embedding() -> None:
    found = table(build("model.arch=gpt", "model.n_kv_heads=6"))
    assert found["embedding.position"] == found["embedding.token"]


def test_attention_scale() -> None:
    assert attention_scale(build()) == pytest.approx(1.5 * sqrt(16) / 32)
    assert attention_scale(build("mup.parametrization=sp")) == pytest.approx(1.5 / sqrt(32))
    # 6 heads of 32 don't fill 128: d_head is a choice of its own, and one left out of the base is the model's.
    assert attention_scale(build("mup.base.d_head=null")) == pytest.approx(1.5 / sqrt(32))
    filled = build("mup.base.d_head=null", "model.n_heads=4", "mup.base.n_heads=4")  # 32 / 4 against 128 / 4
    assert attention_scale(filled) == pytest.approx(1.5 * sqrt(8) / 32)
    with pytest.raises(MegamupError, match=r"d_model=32 is not divisible by n_heads=3; set mup\.base\.d_head"):
        table(build("mup.base.d_head=null", "model.n_heads=4", "mup.base.n_heads=3"))
    more_heads = build("mup.base.d_head=null", "mup.base.n_heads=null")  # wider by more heads of the same size
    assert attention_scale(more_heads) == pytest.approx(1.5 / sqrt(32))


def test_a_tied_readout_keeps_its_multiplier() -> None:
    config = build("model.tie_embeddings=true")
    assert "readout.weight" not in table(config)
    assert readout_multiplier(config) == 7.0 / 4


def test_d_ff_of_the_base_follows_d_model() -> None:
    assert ratios(build("mup.base.d_ff=null")).width["d_ff"] == 4.0


# --------------------------------------------------------------------------- one knob at a time


def changed(*overrides: str, base: tuple[str, ...] = ()) -> dict[str, tuple[Scales, Scales]]:
    """{name: (scales before, after)} of the parameters that the overrides change."""
    before, after = table(build(*base)), table(build(*base, *overrides))
    assert before.keys() == after.keys()
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}


def numbers(scales: Scales) -> dict[str, float]:
    first, second = scales.betas
    return asdict(scales) | {"betas": first, "second beta": second}


def names(*roles: str) -> set[str]:
    return {name for name, parameter in parameters(build().model).items() if parameter.role in roles}


ROLES = {
    "embedding": names("embedding"),
    "hidden": names("query", "key_value", "hidden"),
    "residual_out": names("residual_out"),
    "readout": names("readout"),
    "vector": names("gain", "bias"),
}


FIELDS = {"sigma": "init_std", "alpha": "multiplier", "eta": "lr_scale"}


@pytest.mark.parametrize(("section", "role"), [(s, role) for s in FIELDS for role in TARGET["mup"][s] if role in ROLES])
def test_a_value_of_a_role_is_proportional_and_its_own(section: str, role: str) -> None:
    field = FIELDS[section]
    found = changed(f"mup.{section}.{role}={3 * TARGET['mup'][section][role]}")
    assert found.keys() == ROLES[role]
    for before, after in found.values():
        assert getattr(after, field) == pytest.approx(3 * getattr(before, field))
        assert replace(after, **{field: getattr(before, field)}) == before


def test_key_heads_that_stay_as_few_start_smaller() -> None:
    """6 query heads to 2 key heads over a base of 2 to 2: g = 3. A base of 3 to 1 has the target's ratio."""
    keys = names("key_value")
    found = changed("mup.base.n_kv_heads=2")
    assert found.keys() == keys
    for before, after in found.values():
        assert after.init_std == pytest.approx(0.1 / sqrt(4 * 3))
        assert replace(after, init_std=before.init_std) == before
    assert not changed("mup.base.n_kv_heads=1", base=("mup.base.n_heads=3",))


def test_heads_of_a_base_that_names_only_its_key_heads() -> None:
    """Width 128 over 32 with heads of one size: 8 heads over 2, so 8/2 query heads to a key head over 2/2."""
    heads = ("model.n_heads=8", "model.d_head=16", "mup.base.n_heads=null", "mup.base.d_head=null")
    assert ratios(build(*heads, "mup.base.n_kv_heads=2")).group == 4


DEEPER = ("model.n_layers=8", "mup.base.n_layers=2")  # ℓ = 4


@pytest.mark.parametrize(
    ("depth", "layers", "lr", "eps", "branch"),
    [("none", 8, 1.0, 1.0, 1.0), ("sqrt", 2, 1 / 2, 1 / 2, 1 / 2), ("completep", 2, 1.0, 1 / 4, 1 / 4)],
)
def test_depth(depth: str, layers: int, lr: float, eps: float, branch: float) -> None:
    """Table 1 of Dey et al. 2025: lr ℓ^(a-1), eps ℓ^-a, branch ℓ^-a, in blocks alone; L of the init is the base's."""
    flat, config = table(build("model.n_layers=8")), build(*DEEPER, f"mup.depth={depth}")
    found = table(config)
    for name, parameter in parameters(config.model).items():
        expected = flat[name]
        if parameter.in_block:
            std = expected.init_std * (sqrt(8 / layers) if parameter.role == "residual_out" else 1.0)
            expected = replace(expected, init_std=std, lr_scale=expected.lr_scale * lr, eps=expected.eps * eps)
        assert numbers(found[name]) == pytest.approx(numbers(expected)), name
    for layer in (0, 7):
        scales = block_scales(config, layer)
        assert scales.attention == scales.mlp == Branch(skip=1.0, branch=branch)
        assert scales.attention_logits == attention_scale(config)


def test_eps_by_width_is_every_parameters() -> None:
    """Over the ratio of d_model (4), also where the fan-in's ratio is another (Dey et al. 2025, table 1)."""
    found = changed("mup.scale_eps=true")
    assert found.keys() == table(build()).keys()
    for before, after in found.values():
        assert after.eps == pytest.approx(before.eps / 4)
        assert replace(after, eps=before.eps) == before


@pytest.mark.parametrize(("horizon", "kappa"), [("tokens", BATCH), ("run", BATCH / TOKENS)])
def test_horizon(horizon: str, kappa: float) -> None:
    tokens = table(build("optim.decay_mode=width"))
    for name, scales in table(build(f"mup.horizon={horizon}", "optim.decay_mode=width")).items():
        assert scales.betas == pytest.approx((1 - kappa * 0.1, 1 - kappa * 0.05))
        assert scales.eps == pytest.approx(1e-8 / sqrt(kappa))
        assert scales.lr_scale == pytest.approx(tokens[name].lr_scale * sqrt(kappa / BATCH))
        assert scales.weight_decay == tokens[name].weight_decay


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("mup.base.batch_tokens=32",), r"optim\.betas=\(0\.9, 0\.95\): a step is 16 times .* = -0\.6 < 0"),
        (
            ("mup.horizon=run", "mup.base.tokens=102400", "mup.base.batch_tokens=64"),  # 8 batches, half the tokens
            r"optim\.betas=\(0\.9, 0\.95\): a step is 16 times .*mup\.base\.tokens.* = -0\.6 < 0",
        ),
    ],
)
def test_betas_that_would_be_negative_are_an_error(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(MegamupError, match=message):
        table(build(*overrides))


# --------------------------------------------------------------------------- weight decay

DECAYED = ("embedding.token", "blocks.0.attention.query.weight", "blocks.0.mlp.down.weight", "readout.weight")


@pytest.mark.parametrize(("mode", "factors"), [("torch", (1, 1, 1, 1)), ("width", (1, 4, 2.5, 1))])
def test_decay_follows_the_rate_or_not_its_width(mode: str, factors: tuple[float, ...]) -> None:
    """``width`` undoes the table's 1/n, and no other factor of the rate."""
    found = table(build(f"optim.decay_mode={mode}"))
    assert [found[name].weight_decay for name in DECAYED] == pytest.approx([0.1 * factor for factor in factors])
    assert {found[name].weight_decay for name in ROLES["vector"]} == {0.0}


@pytest.mark.parametrize("mode", ["independent", "constant"])
@pytest.mark.parametrize("lr", [0.01, 0.3])
def test_decay_free_of_the_rate(mode: str, lr: float) -> None:
    """AdamW takes p -= lr·wd·p, so that wd·peak lr is λ for every parameter."""
    found = table(build(f"optim.decay_mode={mode}", f"optim.lr={lr}"))
    at_peak = [found[name].weight_decay * found[name].lr_scale * lr for name in DECAYED]
    assert at_peak == pytest.approx([0.1] * len(DECAYED))
    assert {found[name].weight_decay for name in ROLES["vector"]} == {0.0}


@pytest.mark.parametrize(
    ("mode", "shares"),
    [("constant", (1.0, 1.0, 1.0, 1.0)), ("independent", (1.0, 0.25, 1e-6, 0.0))],
)
def test_decay_over_a_schedule(mode: str, shares: tuple[float, ...]) -> None:
    """With zero gradients a step of AdamW is its decay alone: λ a step, or λ·lr(t)/lr_peak."""
    config = build(f"optim.decay_mode={mode}", "model.n_layers=1")
    net = build_network(config)
    optimizer = adamw(parameter_groups(net, config))
    for shard in net.parameters():
        shard.grad = torch.zeros_like(shard)
    for lr_factor, share in zip((1.0, 0.25, 1e-6, 0.0), shares, strict=True):
        before = {spec_of(shard).name: shard.detach().clone() for shard in net.parameters()}
        write_lr(optimizer.param_groups, config.optim.lr * lr_factor)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(config.optim.lr * lr_factor * group["lr_scale"], abs=1e-30)
        optimizer.step()
        for shard in net.parameters():
            name = spec_of(shard).name
            decay = 0.0 if name in ROLES["vector"] else 0.1 * share
            torch.testing.assert_close(shard.detach(), before[name] * (1 - decay), rtol=1e-6, atol=0.0, msg=name)


# --------------------------------------------------------------------------- zeros, controls, errors


@pytest.mark.parametrize(
    ("key", "zeros"),
    [("query", {"query"}), ("residual_out", {"output", "down"}), ("readout", {"readout"})],
)
def test_zero_init(key: str, zeros: set[str]) -> None:
    plain, zeroed = table(build()), table(build(f"mup.zero_init.{key}=true"))
    for name, scales in zeroed.items():
        if name.endswith(".weight") and name.split(".")[-2] in zeros:
            assert (scales.init_std, scales.lr_scale) == (0.0, plain[name].lr_scale)
        else:
            assert scales == plain[name]


AT_BASE = (
    "mup.base={d_model: 128, d_ff: 240, n_heads: 6, n_kv_heads: 2, d_head: 32, n_layers: 3,"
    " batch_tokens: 512, tokens: 51200}"
)
GPT = ("model.arch=gpt", "model.n_kv_heads=6", "mup.base.n_kv_heads=6")
KNOBS = ("mup.scale_eps=true", "mup.horizon=run")


@pytest.mark.parametrize("depth", ["none", "sqrt", "completep"])
@pytest.mark.parametrize("overrides", [(), GPT])
def test_at_the_base_both_parametrizations_are_one(overrides: tuple[str, ...], depth: str) -> None:
    mup = build(AT_BASE, *overrides, *KNOBS, f"mup.depth={depth}")
    sp = build(*overrides, "mup.parametrization=sp")
    assert table(mup) == table(sp)
    assert [block_scales(mup, layer) for layer in range(3)] == [block_scales(sp, layer) for layer in range(3)]


@pytest.mark.parametrize("depth", ["none", "sqrt", "completep"])
def test_sp_ignores_the_base_and_all_rules_of_it(depth: str) -> None:
    plain = build("mup.parametrization=sp")
    told = build("mup.parametrization=sp", *KNOBS, f"mup.depth={depth}", "mup.base.n_layers=1", "mup.base.n_kv_heads=2")
    assert table(told) == table(plain) == table(build(AT_BASE))
    assert block_scales(told, 2) == block_scales(plain, 2)
    assert table(plain) != table(build())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("mup.parametrization=umup", "mup.sigma.hidden=0.5"), "mup: sigma has no effect under parametrization=umup"),
        (("mup.parametrization=umup", "mup.depth=sqrt"), "mup: depth=sqrt has no effect under parametrization=umup"),
        (("mup.parametrization=umup", "mup.scale_eps=true"), "mup: scale_eps has no effect under parametrization=umup"),
        (("mup.alpha.activation=2",), r"mup: alpha\.activation and alpha\.attention_ratio belong to .*umup"),
        (("mup.alpha.attention_ratio=2", "mup.parametrization=sp"), r"mup: alpha\.activation and .* belong to .*umup"),
    ],
)
def test_a_value_without_effect_is_an_error(overrides: tuple[str, ...], message: str) -> None:
    plain = "mup.sigma={embedding: 0.02, hidden: 0.02, residual_out: 0.02, readout: 0.02}"
    with pytest.raises(MegamupError, match=message):
        build(plain, *overrides)
