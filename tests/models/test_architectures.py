"""Encoders and encoder-decoders: who sees what, and that every parameter of the inventory takes part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megamup.config import Config, config_from
from megamup.models.build import build_network
from megamup.models.embeddings import bucket
from megamup.parallel.layers import spec_of
from megamup.parameters import parameters

VOCAB, SEQ, DECODER = 160, 24, 12
MODEL = {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": VOCAB, "max_seq_len": SEQ}


def build(arch: str, **sections: Any) -> Config:
    model = MODEL | {"arch": arch} | sections.pop("model", {})
    sigma = {"embedding": 0.5, "hidden": 0.3, "residual_out": 0.5, "readout": 0.3}
    values = {"model": model, "data": {"train": "shard"} | sections.pop("data", {}), "train": {"steps": 1}}
    return config_from(values | {"mup": {"sigma": sigma}} | sections)


def batch(arch: str, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    found = {"tokens": torch.randint(VOCAB - 110, (2, SEQ), generator=draw)}
    if arch == "t5":
        found["decoder_tokens"] = torch.randint(VOCAB - 110, (2, DECODER), generator=draw)
    return found


def changes(arch: str, name: str, place: int, **sections: Any) -> Tensor:
    """How much the logits at each position change when the input ``name`` changes at ``place``."""
    net, before = build_network(build(arch, **sections)), batch(arch)
    for shard in net.parameters():  # relative biases and others start at zero
        if shard.dim() == 1 or spec_of(shard).name.endswith("relative.weight"):
            torch.nn.init.normal_(shard, 1.0 * (spec_of(shard).role == "gain"), 0.3)
    after = {key: value.clone() for key, value in before.items()}
    after[name][:, place] = (after[name][:, place] + 1) % (VOCAB - 110)
    with torch.no_grad():
        difference: Tensor = net(after) - net(before)
    return difference.abs().amax(dim=(0, 2))  # (seq)


@pytest.mark.parametrize("place", [0, 11, SEQ - 1])
def test_bert_sees_both_ways(place: int) -> None:
    assert (changes("bert", "tokens", place) > 1e-5).all()


def test_t5_s_decoder_sees_all_of_the_encoder_and_its_own_past() -> None:
    assert (changes("t5", "tokens", SEQ - 1) > 1e-6).all()
    difference = changes("t5", "decoder_tokens", 5)
    assert (difference[:5] == 0).all()
    assert (difference[5:] > 1e-6).all()


@pytest.mark.parametrize("window", [1, 4])
def test_a_window_ends_what_one_block_sees(window: int) -> None:
    """Two blocks of window w reach 2(w - 1) back: logits further on are the same to the bit."""
    difference = changes("llama", "tokens", 3, model={"window": window})
    reach = 3 + 2 * (window - 1)
    assert (difference[:3] == 0).all()
    assert (difference[3 : reach + 1] > 1e-6).all()
    assert (difference[reach + 1 :] == 0).all()


def test_every_k_th_block_sees_all() -> None:
    difference = changes("llama", "tokens", 3, model={"window": 2, "global_every": 2})
    assert (difference[3:] > 1e-7).all()


@pytest.mark.parametrize(
    ("arch", "model"),
    [
        ("gpt", {}),
        ("llama", {"qk_norm": True, "parallel_block": True, "activation": "relu2"}),
        ("llama", {"moe": {"experts": 4, "shared": 1}}),
        ("bert", {}),
        ("bert", {"tie_embeddings": False, "norm_place": "before", "positions": "rotary"}),
        ("t5", {}),
        ("t5", {"tie_embeddings": True, "n_decoder_layers": 3}),
    ],
)
def test_every_parameter_of_the_inventory_is_there_and_learns(arch: str, model: dict[str, Any]) -> None:
    config = build(arch, model=model)
    net, inputs = build_network(config), batch(arch)
    shards = {spec_of(shard).name: shard for shard in net.parameters()}
    assert shards.keys() == parameters(config.model).keys()
    targets = inputs["decoder_tokens" if arch == "t5" else "tokens"]
    net(inputs, (targets, torch.tensor(1 / targets.numel()))).backward()
    idle = [name for name, shard in shards.items() if shard.grad is None or not shard.grad.any()]
    assert not idle


@pytest.mark.parametrize("causal", [True, False])
def test_buckets_are_transformers(causal: bool) -> None:
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5", reason="transformers is not installed")
    queries, keys = (40, 40) if causal else (300, 300)
    ahead = torch.arange(keys) - torch.arange(queries)[:, None]
    expected = modeling.T5Attention._relative_position_bucket(ahead, not causal, num_buckets=32, max_distance=128)
    found = bucket(queries, keys, causal, 32, 128, torch.device("cpu"))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
@pytest.mark.parametrize(("arch", "model"), [("llama", {}), ("llama", {"window": 4}), ("gpt", {}), ("bert", {})])
def test_documents_don_t_see_each_other(arch: str, model: dict[str, Any], attention: str) -> None:
    """Changing one document leaves the logits of the others the same to the bit."""
    config = build(arch, model=model, data={"documents": True}, kernels={"attention": attention})
    net, before = build_network(config), batch(arch)
    lengths = torch.tensor([7, 9, SEQ - 16])
    documents = torch.repeat_interleave(torch.arange(3), lengths).expand(2, SEQ)
    after = before["tokens"].clone()
    after[:, 7:16] = (after[:, 7:16] + 1) % (VOCAB - 110)
    with torch.no_grad():
        first, second = (net({"tokens": tokens, "documents": documents}) for tokens in (before["tokens"], after))
    same = (first == second).all(-1).all(0)  # (seq)
    assert same[:7].all()
    assert same[16:].all()
    assert not same[7:16].any()


def test_t5_s_documents_meet_in_cross_attention_only_where_they_are_the_same() -> None:
    net, before = build_network(build("t5", data={"documents": True})), batch("t5")
    documents = (torch.arange(SEQ) >= 10).long().expand(2, SEQ)
    ours = (torch.arange(DECODER) >= 5).long().expand(2, DECODER)
    after = before["tokens"].clone()
    after[:, :10] = (after[:, :10] + 1) % (VOCAB - 110)
    rest = {"decoder_tokens": before["decoder_tokens"], "documents": documents, "decoder_documents": ours}
    with torch.no_grad():
        first, second = (net({"tokens": tokens, **rest}) for tokens in (before["tokens"], after))
    same = (first == second).all(-1).all(0)
    assert not same[:5].any()
    assert same[5:].all()
