"""The abc-table: every cell against its formula, against Microsoft's `mup` package, and against what it is for."""

from __future__ import annotations

from copy import deepcopy
from math import sqrt
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megamup.config import Config, config_from, merge, parse_override
from megamup.errors import MegamupError
from megamup.models.blocks import Block
from megamup.models.decoder import Decoder, build_decoder
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


def test_betas_that_would_be_negative_are_an_error() -> None:
    with pytest.raises(MegamupError, match=r"optim.betas=\(0.9, 0.95\): a step is 16 times .* = -0.6 < 0"):
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
    assert table(mup) == table(sp)
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
    lr = {
        id(p): group["lr"] for group in package.MuAdamW(net.parameters(), lr=1.0).param_groups for p in group["params"]
    }
    ours = table(
        build(
            "batch.global_sequences=8", "mup.base.tokens=null", *(f"mup.eta.{role}=1" for role in TARGET["mup"]["eta"])
        )
    )  # the widths alone
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


WIDTHS = (32, 64, 128, 256)
TOKENS_SEEN = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(0))


def coordinates(net: Decoder) -> tuple[Tensor, Tensor]:
    """The logits, and what the last MLP adds to the residual stream."""
    added: list[Tensor] = []
    block = [layer for layer in net.layers if isinstance(layer, Block)][-1]
    hook = block.mlp.register_forward_hook(lambda module, inputs, output: added.append(output))
    logits = net(TOKENS_SEEN[:, :-1])
    hook.remove()
    return logits, added[0]


def changes(parametrization: str, width: int, seed: int) -> Tensor:
    """RMS changes of the coordinates after 4 steps of AdamW."""
    shape = {"d_model": width, "n_layers": 2, "d_ff": 3 * width, "n_heads": width // 16, "d_head": 16}
    values = {
        "model": {"arch": "llama", "vocab_size": 64, "max_seq_len": 16, **shape},
        "mup": {
            "parametrization": parametrization,
            "base": {"d_model": 32, "n_heads": 2},
            "sigma": {"embedding": 0.5, "hidden": 0.18, "residual_out": 0.18},
            "zero_init": {"readout": True},
        },
        "data": {"train": "shard"},
        "train": {"steps": 4},
        "run": {"seed": seed},
    }
    config = config_from(values)
    net, scales = build_decoder(config), table(config)
    groups = [{"params": [p], "lr": 0.01 * scales[spec_of(p).name].lr_scale} for p in net.parameters()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    before = [x.detach() for x in coordinates(net)]
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(coordinates(net)[0].flatten(0, 1), TOKENS_SEEN[:, 1:].flatten()).backward()
        optimizer.step()
    after = [x.detach() for x in coordinates(net)]
    return torch.stack([(y - x).square().mean().sqrt() for x, y in zip(before, after, strict=True)])


def test_updates_keep_their_size_with_width_under_mup_alone() -> None:
    """Mean over seeds, of the logits and of an MLP's output: flat under μP, growing under sp."""
    mup, sp = (
        torch.stack([torch.stack([changes(kind, width, seed) for seed in (1, 2, 3)]).mean(0) for width in WIDTHS])
        for kind in ("mup", "sp")
    )  # (width, coordinate)
    assert (mup.amax(0) / mup.amin(0) < 2).all(), mup
    assert (sp[-1] / sp[0] > 2).all(), sp
