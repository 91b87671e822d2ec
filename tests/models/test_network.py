"""Layers wired by name: what travels between pipeline stages is what is read later, and no layer notices."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megamup.config import config_from
from megamup.models.build import context, cross_entropy, model_layers
from megamup.models.network import LayerSpec, Network, Wires, inputs, wires
from megamup.parallel.loss import Unread
from megamup.parallel.mesh import SINGLE


def specs(*wiring: tuple[str, str]) -> list[LayerSpec]:
    """Layers that read and write what ``"a b", "c"`` says."""
    return [LayerSpec(nn.Identity, reads=tuple(reads.split()), writes=writes) for reads, writes in wiring]


CHAIN = specs(("tokens", "hidden"), ("hidden", "hidden"), ("hidden", "output"))
ENCODER_DECODER = specs(
    ("tokens", "hidden"),
    ("hidden", "relative"),
    ("hidden relative", "hidden"),
    ("hidden", "memory"),
    ("decoder_tokens", "hidden"),
    ("hidden", "relative"),
    ("hidden memory relative", "hidden"),
    ("hidden", "output"),
)


def test_a_chain_is_plain_tensors() -> None:
    assert all(at.plain for at in wires(CHAIN))
    assert inputs(CHAIN) == ("tokens",)


def test_what_is_read_later_travels_and_nothing_else() -> None:
    assert [set(at.before) for at in wires(ENCODER_DECODER)] == [
        {"tokens", "decoder_tokens"},
        {"hidden", "decoder_tokens"},
        {"hidden", "decoder_tokens", "relative"},
        {"hidden", "decoder_tokens"},  # the encoder's table is read by no decoder
        {"decoder_tokens", "memory"},
        {"hidden", "memory"},
        {"hidden", "memory", "relative"},
        {"hidden"},
    ]
    assert inputs(ENCODER_DECODER) == ("decoder_tokens", "tokens")


def test_wires_of_neighbours_fit() -> None:
    found = wires(ENCODER_DECODER)
    assert all(one.after == other.before for one, other in itertools.pairwise(found))


def test_what_passes_by_keeps_its_value_and_its_gradient() -> None:
    at = Wires(("hidden",), "hidden", before=("hidden", "memory"), after=("hidden", "memory"))
    hidden, memory = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    doubled, passed = at.run(lambda x: 2 * x, (hidden, memory))
    assert torch.equal(doubled, 2 * hidden)
    assert torch.equal(passed, memory)
    assert passed is not memory  # DeepSpeed starts a stage's backward pass from its outputs
    (doubled.sum() + 3 * passed.sum()).backward()
    assert memory.grad is not None
    assert torch.equal(memory.grad, torch.full_like(memory, 3.0))


ARCHS: dict[str, dict[str, Any]] = {
    "gpt": {},
    "llama": {"qk_norm": True, "window": 5},
    "bert": {"tie_embeddings": False},
    "t5": {"n_decoder_layers": 3, "tie_embeddings": True},
}


@pytest.mark.parametrize("arch", ARCHS)
def test_a_list_cut_anywhere_gives_the_network_s_output(arch: str) -> None:
    """Layer by layer through the wires, as pipeline stages do, against the list run as one."""
    model = {"arch": arch, "d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 160, "max_seq_len": 24}
    config = config_from({"model": model | ARCHS[arch], "data": {"train": "shard"}, "train": {"steps": 1}})
    built_from = context(config, SINGLE)
    layers = model_layers(built_from, config, cross_entropy(built_from, config))
    network = Network(layers, cross_entropy(built_from, config))
    draw = torch.Generator().manual_seed(0)
    batch = {name: torch.randint(160, (2, 24), generator=draw) for name in inputs(layers)}
    carried: Any = tuple(batch[name] for name in inputs(layers))
    with torch.no_grad():
        for (call, _), at in zip(network.calls, wires(layers), strict=True):
            carried = at.run(call, carried)
            assert isinstance(carried, Tensor | tuple | Unread)
        assert torch.equal(carried.logits(), network(batch))
