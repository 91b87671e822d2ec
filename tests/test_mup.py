"""The abc-table: every cell against its formula, against Microsoft's `mup` package, and against what it is for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple
from math import sqrt
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megamup.config import Config, config_from, merge, parse_override
from megamup.errors import MegamupError
from megamup.models.decoder import build_decoder
from megamup.mup import attention_scale, ratios, readout_multiplier, table
from megamup.parallel.layers import spec_of

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


def build(*overrides: str, values: dict[str, Any] = TARGET) -> Config:
    merged: dict[str, Any] = {key: dict(section) for key, section in values.items()}
    for key in ("base", "zero_init"):
        merged["mup"][key] = dict(merged["mup"].get(key, {}))
    for override in overrides:
        merge(merged, parse_override(override))
    return config_from(merged)


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
    assert attention_scale(build("mup.base.d_head=null")) == pytest.approx(1.5 * sqrt(32 / 2) / 32)
    more_heads = build("mup.base.d_head=null", "mup.base.n_heads=null")  # wider by more heads of the same size
    assert attention_scale(more_heads) == pytest.approx(1.5 / sqrt(32))


def test_a_tied_readout_keeps_its_multiplier() -> None:
    config = build("model.tie_embeddings=true")
    assert "readout.weight" not in table(config)
    assert readout_multiplier(config, ratios(config)) == 7.0 / 4


def test_d_ff_of_the_base_follows_d_model() -> None:
    assert ratios(build("mup.base.d_ff=null")).width["d_ff"] == 4.0


def test_betas_that_would_be_negative_are_an_error() -> None:
    with pytest.raises(MegamupError, match=r"optim.betas=\(0.9, 0.95\): the batch is 16 times .* = -0.6 < 0"):
        table(build("mup.base.batch_tokens=32"))


@pytest.mark.parametrize("name", ["embedding.token", "blocks.0.mlp.down.weight", "readout.weight"])
def test_independent_decay_does_not_depend_on_lr(name: str) -> None:
    """AdamW takes p -= lr·wd·p, so that wd·peak lr is λ for every parameter."""
    for lr in (0.01, 0.3):
        config = build("optim.decay_mode=independent", f"optim.lr={lr}")
        found = table(config)[name]
        assert found.weight_decay * found.lr_scale * lr == pytest.approx(0.1)
        assert table(config)["final_norm.weight"].weight_decay == 0.0


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


AT_BASE = ("mup.base={d_model: 128, d_ff: 240, n_heads: 6, d_head: 32, batch_tokens: 512, tokens: 51200}",)


@pytest.mark.parametrize("overrides", [AT_BASE, (*AT_BASE, "model.arch=gpt", "model.n_kv_heads=6")])
def test_at_the_base_both_parametrizations_are_one(overrides: tuple[str, ...]) -> None:
    mup, sp = build(*overrides), build(*overrides, "mup.parametrization=sp")
    for name, scales in table(mup).items():
        assert astuple(scales) == pytest.approx(astuple(table(sp)[name]), rel=1e-12), name
    assert attention_scale(mup) == pytest.approx(attention_scale(sp))


def test_sp_ignores_the_base() -> None:
    sp = build("mup.parametrization=sp")
    assert table(sp) == table(build("mup.parametrization=sp", *AT_BASE))
    assert table(sp) != table(build())


# --------------------------------------------------------------------------- against Microsoft's package


def test_ratios_equal_those_of_the_mup_package() -> None:
    """MuAdamW divides lr by the width ratio for matrices only; MuReadout divides its input by it."""
    package = pytest.importorskip("mup", reason="Microsoft's mup package is not installed")

    class Net(nn.Module):
        def __init__(self, d_model: int, d_ff: int) -> None:
            super().__init__()
            self.embedding = nn.Embedding(64, d_model)
            self.up, self.down = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)
            self.readout = package.MuReadout(d_model, 64, bias=False, output_mult=7.0)

    net = package.set_base_shapes(Net(128, 240), Net(32, 96), delta=Net(64, 160))
    lr = {id(p): group["lr"] for group in package.MuAdamW(net.parameters(), lr=1.0).param_groups for p in group["params"]}
    plain = ("batch.global_sequences=8", "mup.base.tokens=null", "mup.eta=null")
    values = {**TARGET, "mup": {key: TARGET["mup"][key] for key in ("base", "alpha")}}
    config = build(*plain[:2], values=values)
    ours = table(config)
    for theirs, name in (
        (net.embedding.weight, "embedding.token"),
        (net.up.weight, "blocks.0.mlp.up.weight"),
        (net.up.bias, "blocks.0.mlp.up.bias"),
        (net.down.weight, "blocks.0.mlp.down.weight"),
        (net.readout.weight, "readout.weight"),
    ):
        assert ours[name].lr_scale == pytest.approx(lr[id(theirs)]), name
    assert ours["readout.weight"].multiplier == pytest.approx(net.readout.output_mult / net.readout.width_mult())


# --------------------------------------------------------------------------- what it is for


def logit_changes(parametrization: str) -> Iterator[float]:
    """RMS change of the logits after 4 steps of AdamW, at widths 32 to 256, mean over seeds."""
    tokens = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(0))
    for width in (32, 64, 128, 256):
        changes = []
        for seed in (1, 2, 3):
            config = config_from(
                {
                    "model": {**TARGET["model"], "bias": False, "d_model": width, "n_layers": 2, "d_ff": 3 * width}
                    | {"n_heads": width // 16, "n_kv_heads": width // 16, "d_head": 16},
                    "mup": {
                        "parametrization": parametrization,
                        "base": {"d_model": 32, "n_heads": 2},
                        "sigma": {"embedding": 0.5, "hidden": 0.18, "residual_out": 0.18, "readout": 0.18},
                    },
                    "data": {"train": "shard"},
                    "train": {"steps": 4},
                    "run": {"seed": seed},
                }
            )
            net, scales = build_decoder(config), table(config)
            optimizer = torch.optim.AdamW(
                [{"params": [p], "lr": 0.01 * scales[spec_of(p).name].lr_scale} for p in net.parameters()],
                weight_decay=0.0,
            )
            before = net(tokens[:, :-1]).detach()
            for _ in range(4):
                optimizer.zero_grad()
                F.cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
                optimizer.step()
            changes.append(float((net(tokens[:, :-1]).detach() - before).square().mean().sqrt()))
        yield sum(changes) / len(changes)


def test_updates_of_the_logits_keep_their_size_with_width_under_mup_alone() -> None:
    mup, sp = list(logit_changes("mup")), list(logit_changes("sp"))
    assert max(mup) / min(mup) < 2
    assert sp[-1] / sp[0] > 2
