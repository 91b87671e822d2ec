"""The decoder against transformers' Llama and GPT-2 with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megamup.config import Config, config_from
from megamup.models.build import build_network
from megamup.models.network import Network
from megamup.parallel.layers import spec_of

LLAMA = {"arch": "llama", "d_model": 48, "n_layers": 2, "n_heads": 6, "n_kv_heads": 2, "d_head": 16, "d_ff": 80}
GPT = {"arch": "gpt", "d_model": 48, "n_layers": 2, "n_heads": 4, "d_ff": 80}
SIZES = {"vocab_size": 100, "max_seq_len": 24}


def build(model: dict[str, Any], **sections: Any) -> tuple[Config, Network, dict[str, Tensor]]:
    """A decoder whose biases and gains are no zeros and ones, and its weights by global name."""
    sigma = {"embedding": 0.5, "hidden": 0.2, "residual_out": 0.2, "readout": 0.2}
    values = {"model": model | SIZES, "mup": {"sigma": sigma}, "data": {"train": "shard"}, "train": {"steps": 1}}
    config = config_from(values | sections)
    net = build_network(config)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for shard in net.parameters():
            if shard.dim() == 1:
                shard.add_(torch.randn(shard.shape, generator=draw), alpha=0.2)
    return config, net, {spec_of(shard).name: shard.detach() for shard in net.parameters()}


def token_ids() -> Tensor:
    return torch.randint(SIZES["vocab_size"], (3, SIZES["max_seq_len"]), generator=torch.Generator().manual_seed(5))


def assert_same_logits(ours: Network, theirs: Any) -> None:
    with torch.no_grad():
        expected = theirs.eval()(token_ids()).logits
        assert expected.std() > 0.3  # not all alike
        torch.testing.assert_close(ours({"tokens": token_ids()}), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("theta", [10_000.0, 500.0])
def test_logits_equal_transformers_llama(tied: bool, theta: float) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config, ours, weights = build(LLAMA | {"tie_embeddings": tied, "rope_theta": theta})
    model = config.model
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.d_model,
            intermediate_size=model.d_ff,
            num_hidden_layers=model.n_layers,
            num_attention_heads=model.n_heads,
            num_key_value_heads=model.n_kv_heads,
            head_dim=model.d_head,
            max_position_embeddings=model.max_seq_len,
            rms_norm_eps=model.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": theta},
            tie_word_embeddings=tied,
        )
    )
    state = {"model.embed_tokens.weight": weights["embedding.token"], "model.norm.weight": weights["final_norm.weight"]}
    state["lm_head.weight"] = weights["embedding.token" if tied else "readout.weight"]
    names = {
        "attention_norm": "input_layernorm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    }
    for layer in range(model.n_layers):
        for mine, other in names.items():
            state[f"model.layers.{layer}.{other}.weight"] = weights[f"blocks.{layer}.{mine}.weight"]
    theirs.load_state_dict(state)
    assert_same_logits(ours, theirs)


def test_logits_equal_transformers_gpt2() -> None:
    """GPT-2 stores its matrices transposed and query, key and value as one."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config, ours, weights = build(GPT)
    model = config.model
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=model.vocab_size,
            n_positions=model.max_seq_len,
            n_embd=model.d_model,
            n_layer=model.n_layers,
            n_head=model.n_heads,
            n_inner=model.d_ff,
            activation_function="gelu",
            layer_norm_epsilon=model.norm_eps,
        )
    )
    token = weights["embedding.token"]
    state = {"transformer.wte.weight": token, "transformer.wpe.weight": weights["embedding.position"]}
    state["lm_head.weight"] = token
    names = {"attention.output": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
    for kind in ("weight", "bias"):
        state[f"transformer.ln_f.{kind}"] = weights[f"final_norm.{kind}"]
        for layer in range(model.n_layers):
            mine, other = f"blocks.{layer}", f"transformer.h.{layer}"
            state[f"{other}.ln_1.{kind}"] = weights[f"{mine}.attention_norm.{kind}"]
            state[f"{other}.ln_2.{kind}"] = weights[f"{mine}.mlp_norm.{kind}"]
            qkv = torch.cat([weights[f"{mine}.attention.{part}.{kind}"] for part in ("query", "key", "value")])
            state[f"{other}.attn.c_attn.{kind}"] = qkv.t() if kind == "weight" else qkv
            for name, their_name in names.items():
                value = weights[f"{mine}.{name}.{kind}"]
                state[f"{other}.{their_name}.{kind}"] = value.t() if kind == "weight" else value
    theirs.load_state_dict(state)
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("model", [LLAMA, GPT])
@pytest.mark.parametrize("changed", [0, 11, 23])
def test_a_token_changes_no_logits_before_it(model: dict[str, Any], changed: int) -> None:
    _, net, _ = build(model)
    before = token_ids()
    after = before.clone()
    after[:, changed] = (after[:, changed] + 1) % SIZES["vocab_size"]
    with torch.no_grad():
        difference = (net({"tokens": after}) - net({"tokens": before})).abs().amax(dim=(0, 2))  # (seq)
    assert (difference[:changed] < 1e-6).all()
    assert (difference[changed:] > 1e-4).all()


@pytest.mark.parametrize("model", [LLAMA | {"tie_embeddings": True}, GPT])
def test_a_tied_model_has_one_token_weight(model: dict[str, Any]) -> None:
    _, net, weights = build(model)
    assert "readout.weight" not in weights
    assert sum(shard.shape == (SIZES["vocab_size"], 48) for shard in net.parameters()) == 1


@pytest.mark.parametrize("model", [LLAMA | {"tie_embeddings": True}, LLAMA, GPT])
def test_the_readout_multiplier_reaches_the_logits(model: dict[str, Any]) -> None:
    _, plain, _ = build(model)
    sigma = {"embedding": 0.5, "hidden": 0.2, "residual_out": 0.2, "readout": 0.2}
    _, scaled, _ = build(model, mup={"sigma": sigma, "alpha": {"readout": 4.0}})
    with torch.no_grad():
        torch.testing.assert_close(scaled({"tokens": token_ids()}), 4 * plain({"tokens": token_ids()}))


@pytest.mark.parametrize("model", [LLAMA, GPT])
def test_bf16_is_fp32_to_its_precision(model: dict[str, Any]) -> None:
    _, fp32, _ = build(model)
    _, bf16, _ = build(model, precision="bf16")
    with torch.no_grad():
        expected, found = fp32({"tokens": token_ids()}), bf16({"tokens": token_ids()})
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).square().mean().sqrt() < 0.05 * expected.std()
