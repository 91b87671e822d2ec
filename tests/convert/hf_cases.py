"""Models of ours and of transformers that tests of both ways share."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from megamup.config import Config, config_from
from megamup.models.build import build_network
from megamup.models.network import Network
from megamup.parallel.layers import spec_of

SIZES: dict[str, Any] = {"d_model": 48, "n_layers": 2, "n_heads": 4, "d_ff": 80, "vocab_size": 96, "max_seq_len": 32}
BASE = {"d_model": 16, "n_heads": 2, "d_ff": 40, "n_layers": 1}
ALPHA = {"embedding": 1.7, "hidden": 0.8, "residual_out": 1.3, "readout": 2.5, "attention": 1.4}
SIGMA = {"embedding": 0.5, "hidden": 0.3, "residual_out": 0.3, "readout": 0.3}
MUP = {"base": BASE, "alpha": ALPHA, "sigma": SIGMA, "depth": "completep"}
"""All that μP multiplies in the forward pass differs from 1."""

Trait = dict[str, Any]
LLAMA: Trait = {"arch": "llama", "n_kv_heads": 2}
T5: Trait = {"arch": "t5", "n_decoder_layers": 3}
PAIRS: Trait = {"arch": "bert", "pair_head": True}
YARN = {"kind": "yarn", "factor": 4.0, "original_max_seq_len": 8}
LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_max_seq_len": 16}
MODELS: dict[str, tuple[str, Trait]] = {
    "gpt": ("GPT2LMHeadModel", {"arch": "gpt"}),
    "gpt, untied, without biases": (
        "GPT2LMHeadModel",
        {"arch": "gpt", "tie_embeddings": False, "bias": False, "activation": "gelu_tanh"},
    ),
    "gpt, relu2": ("GPT2LMHeadModel", {"arch": "gpt", "activation": "relu2"}),
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama, tied, with biases": ("LlamaForCausalLM", LLAMA | {"tie_embeddings": True, "bias": True}),
    "llama, geglu": ("LlamaForCausalLM", LLAMA | {"activation": "geglu", "d_head": 8}),
    "llama, yarn": ("LlamaForCausalLM", LLAMA | {"rope_scaling": YARN}),
    "llama, llama3": ("LlamaForCausalLM", LLAMA | {"rope_scaling": LLAMA3, "activation": "geglu_tanh"}),
    "llama, ntk": ("LlamaForCausalLM", LLAMA | {"rope_scaling": YARN | {"kind": "ntk"}}),
    "llama, linear": ("LlamaForCausalLM", LLAMA | {"rope_scaling": YARN | {"kind": "linear"}, "rope_theta": 500.0}),
    "mistral": ("MistralForCausalLM", LLAMA | {"window": 7}),
    "qwen2": ("Qwen2ForCausalLM", LLAMA | {"window": 7, "global_every": 2}),
    "qwen3": ("Qwen3ForCausalLM", LLAMA | {"window": 7, "global_every": 2, "qk_norm": True, "tie_embeddings": True}),
    "mixtral": ("MixtralForCausalLM", LLAMA | {"moe": {"experts": 4, "d_expert": 24}}),
    "bert": ("BertForMaskedLM", {"arch": "bert"}),
    "bert, untied, bare": (
        "BertForMaskedLM",
        {"arch": "bert", "tie_embeddings": False, "bias": False, "token_types": 0},
    ),
    "bert, pairs": ("BertForPreTraining", PAIRS),
    "t5": ("T5ForConditionalGeneration", T5),
    "t5, tied": ("T5ForConditionalGeneration", T5 | {"tie_embeddings": True, "d_head": 8}),
    "t5, relu": ("T5ForConditionalGeneration", T5 | {"activation": "relu", "positions": "none"}),
    "t5, geglu": ("T5ForConditionalGeneration", T5 | {"activation": "geglu", "relative_buckets": 8}),
}
"""Name -> the class, and what the model section has besides `SIZES`."""


def config_of(traits: Trait, **sections: Any) -> Config:
    objective: dict[str, Any] = {"objective": {"pairs": "next_sentence"}} if traits.get("pair_head") else {}
    if traits["arch"] == "t5":
        objective = {"objective": {"sentinels": 8}}
    values: dict[str, Any] = {"model": SIZES | traits, "mup": MUP, "data": {"train": "-"}, "train": {"steps": 1}}
    return config_from(values | objective | sections)


def build(config: Config) -> tuple[Network, dict[str, Tensor]]:
    """A model none of whose parameters is at a special value, and its weights by global name."""
    net = build_network(config)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for shard in net.parameters():
            if spec_of(shard).role in ("gain", "bias"):
                shard.add_(torch.randn(shard.shape, generator=draw), alpha=0.2)
    return net, {spec_of(shard).name: shard.detach() for shard in net.parameters()}


def inputs_of(config: Config, tensor: int = 1) -> dict[str, Tensor]:
    """Random ids by the names that our networks read."""
    draw = torch.Generator().manual_seed(5)

    def ids(high: int, *size: int) -> Tensor:
        return torch.randint(high, (3, *size), generator=draw)

    found = {"tokens": ids(SIZES["vocab_size"], 32)}
    if config.model.arch == "t5":
        found["decoder_tokens"] = ids(SIZES["vocab_size"], 24)
    if config.model.pair_head:
        found |= {"token_types": ids(2, 32), "pair": ids(2, 1)}
    return found


def their_arguments(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"tokens": "input_ids", "decoder_tokens": "decoder_input_ids", "token_types": "token_type_ids"}
    return {names[name]: value for name, value in inputs.items() if name in names}


def their_logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model.eval()(**their_arguments(inputs))
    logits = getattr(found, "prediction_logits", None)
    assert isinstance(found.logits if logits is None else logits, Tensor)
    return found.logits if logits is None else logits  # type: ignore[no-any-return]
