"""What the abc-table is for: updates keep their size, and the residual stream its own, in width and in depth."""

from __future__ import annotations

from math import log
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megamup.config import Config, config_from
from megamup.models.blocks import Block
from megamup.models.build import build_network
from megamup.models.network import Network
from megamup.train.optim import adamw, parameter_groups

WIDTHS = (32, 64, 128, 256)
TOKENS_SEEN = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(0))


def coordinates(net: Network) -> tuple[Tensor, Tensor, Tensor]:
    """The logits, what the last MLP adds, and what all blocks add to the stream."""
    seen: dict[str, Tensor] = {}
    blocks = [layer for layer in net.layers if isinstance(layer, Block)]
    hooks = [
        blocks[0].register_forward_hook(lambda _, inputs, output: seen.update(embedded=inputs[0])),
        blocks[-1].mlp.register_forward_hook(lambda _, inputs, output: seen.update(mlp=output)),
        blocks[-1].register_forward_hook(lambda _, inputs, output: seen.update(stream=output)),
    ]
    with torch.no_grad():
        seen["logits"] = net({"tokens": TOKENS_SEEN[:, :-1]})
    for hook in hooks:
        hook.remove()
    return seen["logits"], seen["mlp"], seen["stream"] - seen["embedded"]


def small(width: int, layers: int, seed: int = 1, **mup: Any) -> Config:
    shape = {"d_model": width, "n_layers": layers, "d_ff": 3 * width, "n_heads": width // 16, "d_head": 16}
    return config_from(
        {
            "model": {"arch": "llama", "vocab_size": 64, "max_seq_len": 16, **shape},
            "mup": {
                "base": {"d_model": 32, "n_heads": 2, "n_layers": 2},
                "sigma": {"embedding": 0.5, "hidden": 0.18, "residual_out": 0.18},
                **mup,
            },
            "data": {"train": "shard"},
            "optim": {"lr": 0.01, "weight_decay": 0.0},
            "train": {"steps": 4},
            "run": {"seed": seed},
        }
    )


def changes(config: Config) -> Tensor:
    """RMS of the coordinates' changes over 4 steps of AdamW."""
    net = build_network(config)
    optimizer = adamw(parameter_groups(net, config))
    before = coordinates(net)
    for _ in range(config.train.steps):
        optimizer.zero_grad()
        F.cross_entropy(net({"tokens": TOKENS_SEEN[:, :-1]}).flatten(0, 1), TOKENS_SEEN[:, 1:].flatten()).backward()
        optimizer.step()
    return torch.stack([rms(y - x) for x, y in zip(before, coordinates(net), strict=True)])


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def test_updates_keep_their_size_with_width_under_mup_alone() -> None:
    """Mean over seeds, of the logits and of an MLP's output: flat under μP, growing under sp."""

    def mean_changes(kind: str, width: int) -> Tensor:
        runs = [small(width, 2, seed, parametrization=kind, zero_init={"readout": True}) for seed in (1, 2, 3)]
        return torch.stack([changes(run) for run in runs]).mean(0)[:2]

    mup, sp = (torch.stack([mean_changes(kind, width) for width in WIDTHS]) for kind in ("mup", "sp"))
    assert (mup.amax(0) / mup.amin(0) < 2).all(), mup  # (width, coordinate)
    assert (sp[-1] / sp[0] > 2).all(), sp


DEPTHS = (2, 4, 8, 16)


def test_updates_keep_their_size_with_depth_under_its_rules_alone() -> None:
    """What all branches add to the stream, from zero: flat under depth-μP and CompleteP, growing without a rule."""
    none, sqrt_, completep = (
        [float(changes(small(32, layers, depth=rule, zero_init={"residual_out": True}))[2]) for layers in DEPTHS]
        for rule in ("none", "sqrt", "completep")
    )
    assert max(completep) / min(completep) < 1.25, completep
    assert max(sqrt_) / min(sqrt_) < 1.4, sqrt_
    assert none[-1] / none[0] > 2.5, none


@pytest.mark.parametrize(("rule", "slope"), [("none", 0.0), ("sqrt", 0.0), ("completep", -0.5)])
def test_growth_of_the_stream_at_init(rule: str, slope: float) -> None:
    """L independent branches over ℓ^a add L^½·ℓ^-a; without a rule GPT-2's initial weights have the L^-½."""
    added = [float(rms(coordinates(build_network(small(32, layers, depth=rule)))[2])) for layers in DEPTHS]
    measured = log(added[-1] / added[0]) / log(DEPTHS[-1] / DEPTHS[0])
    assert measured == pytest.approx(slope, abs=0.1), added
