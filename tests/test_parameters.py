"""The inventory against transformers' models and against what the decoder builds."""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import Any

import pytest

from megamup.config import config_from
from megamup.model import Model
from megamup.models.build import build_network
from megamup.parallel.layers import spec_of
from megamup.parameters import count, parameters

LLAMA = Model(
    arch="llama", d_model=48, n_layers=3, n_heads=6, n_kv_heads=2, d_head=16, d_ff=80, vocab_size=100, max_seq_len=24
)
GPT = Model(arch="gpt", d_model=48, n_layers=3, n_heads=6, d_ff=80, vocab_size=100, max_seq_len=24)


def theirs(model: Model) -> dict[str, tuple[int, ...]]:
    """Shapes of transformers' parameters; GPT-2 stores its matrices transposed and its qkv as one."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if model.arch == "gpt":
        net: Any = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=model.vocab_size,
                n_positions=model.max_seq_len,
                n_embd=model.d_model,
                n_layer=model.n_layers,
                n_head=model.n_heads,
                n_inner=model.d_ff,
            )
        )
    else:
        net = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=model.vocab_size,
                hidden_size=model.d_model,
                intermediate_size=model.d_ff,
                num_hidden_layers=model.n_layers,
                num_attention_heads=model.n_heads,
                num_key_value_heads=model.n_kv_heads,
                head_dim=model.d_head,
                tie_word_embeddings=model.tie_embeddings,
            )
        )
    return {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
def test_llama_is_transformers_llama(tied: bool) -> None:
    model = LLAMA.model_copy(update={"tie_embeddings": tied})
    found = theirs(model)
    assert Counter(parameter.shape for parameter in parameters(model).values()) == Counter(found.values())
    assert count(model)["total"] == sum(map(prod, found.values()))


def test_gpt_is_transformers_gpt2() -> None:
    found = theirs(GPT)
    split = Counter[tuple[int, ...]]()
    for name, shape in found.items():
        if "c_attn" in name:
            split[(GPT.d_model, *reversed(shape[:-1]))] += 3
        else:
            split[shape if "wte" in name or "wpe" in name else tuple(reversed(shape))] += 1
    assert Counter(parameter.shape for parameter in parameters(GPT).values()) == split
    assert count(GPT)["total"] == sum(map(prod, found.values()))


def test_counts_by_hand() -> None:
    block = 48 * 96 * 2 + 48 * 32 * 2 + 3 * 48 * 80 + 2 * 48
    assert count(LLAMA) == {"total": 3 * block + 48 + 2 * 100 * 48, "non_embedding": 3 * block + 48}
    assert count(GPT)["total"] - count(GPT)["non_embedding"] == (100 + 24) * 48


@pytest.mark.parametrize("model", [LLAMA, GPT, LLAMA.model_copy(update={"tie_embeddings": True, "bias": True})])
def test_the_decoder_builds_the_inventory_and_nothing_else(model: Model) -> None:
    net = build_network(config_from({"model": model, "data": {"train": "shard"}, "train": {"steps": 1}}))
    built = {spec_of(shard).name: (spec_of(shard), tuple(shard.shape)) for shard in net.parameters()}
    assert built == {name: (parameter, parameter.shape) for name, parameter in parameters(model).items()}
    assert len(built) == len(list(net.parameters()))
