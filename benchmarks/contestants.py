#!/usr/bin/env python3
"""One contestant of a race (race.py): trains a model of a given shape on given batches, and says how fast.

    benchmarks/contestants.py NAME CONFIG.yaml --windows F.npy --warm 10 --mode blocks --output F.json

All of them start from the weights that megamup draws for CONFIG and see the same batches in the same order: a
contestant whose first loss differs does other work. Each has its fastest form that is still a plain training step:
fused AdamW, gradients set to None, losses read from the device after the last step only, bf16 by autocast over fp32
weights.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megamup.config import Config, load_config, micro_batches
from megamup.models.build import build_network, context, model_layers
from megamup.models.network import Network
from megamup.mup import table
from megamup.parallel.layers import spec_of
from megamup.parallel.loss import CrossEntropy
from megamup.parallel.mesh import SINGLE
from megamup.train.compile import compile_blocks
from megamup.train.optim import adamw, adamw_backend, parameter_groups

MODES = ("eager", "blocks", "model", "step")
"""What torch.compile gets: nothing; each block; the model; the model with its loss."""

LossOf = Callable[[Tensor, Tensor], Tensor]
"""((batch, seq) token ids, (batch, seq) targets) -> mean loss in nats."""


@dataclass(frozen=True)
class Net:
    """A model on its device, ready to train."""

    module: nn.Module
    loss: LossOf
    optimizer: torch.optim.Optimizer


def weights_of(decoder: Network, config: Config) -> dict[str, Tensor]:
    """Initial weights by global name with their forward multipliers in them, for models that know no multipliers."""
    scales = table(config)
    return {(name := spec_of(shard).name): shard.detach() * scales[name].multiplier for shard in decoder.parameters()}


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def plain_adamw(module: nn.Module, config: Config) -> torch.optim.Optimizer:
    optim = config.optim
    return torch.optim.AdamW(
        module.parameters(), optim.lr, optim.betas, optim.eps, weight_decay=optim.weight_decay, fused=True
    )


def compiled(module: nn.Module, logits: Callable[[Tensor], Tensor], loss: LossOf, blocks: Any, mode: str) -> LossOf:
    """``loss(logits(tokens), targets)`` with what ``mode`` names compiled, for fixed shapes."""

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        return loss(logits(tokens), targets)

    if mode == "blocks":
        for block in blocks:
            block.compile(dynamic=False)
    elif mode == "model":
        module.compile(dynamic=False)
    return torch.compile(step, dynamic=False) if mode == "step" else step


def bare(config: Config, device: torch.device, mode: str) -> Net:
    """megamup's own layers, loss and parameter groups without DeepSpeed, loop, data stream and records."""
    built_from = context(config, SINGLE, device.type)
    criterion = CrossEntropy(built_from.kernels.names["cross_entropy"])
    decoder = Network(model_layers(built_from, config, criterion), criterion).to(device)
    if mode == "blocks":
        compile_blocks(decoder, config)

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        return decoder({"tokens": tokens}, (targets, torch.full((), 1 / targets.numel(), device=device)))  # type: ignore[no-any-return]

    return Net(decoder, loss, adamw(parameter_groups(decoder, config), adamw_backend(config, device.type)))


def transformers(config: Config, device: torch.device, mode: str) -> Net:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    model, weights = config.model, weights_of(build_network(config), config)
    attention = "flash_attention_2" if device.type == "cuda" and importlib.util.find_spec("flash_attn") else "sdpa"
    common = {"vocab_size": model.vocab_size, "use_cache": False, "attn_implementation": attention}
    with device:
        if model.arch == "llama":
            net = LlamaForCausalLM(
                LlamaConfig(
                    hidden_size=model.d_model,
                    intermediate_size=model.d_ff,
                    num_hidden_layers=model.n_layers,
                    num_attention_heads=model.n_heads,
                    num_key_value_heads=model.n_kv_heads,
                    head_dim=model.d_head,
                    max_position_embeddings=model.max_seq_len,
                    rms_norm_eps=model.norm_eps,
                    rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
                    tie_word_embeddings=model.tie_embeddings,
                    **common,
                )
            )
            net.load_state_dict(llama_state(config, weights))
            blocks = net.model.layers
        else:
            net = GPT2LMHeadModel(
                GPT2Config(
                    n_positions=model.max_seq_len,
                    n_embd=model.d_model,
                    n_layer=model.n_layers,
                    n_head=model.n_heads,
                    n_inner=model.d_ff,
                    activation_function="gelu",
                    layer_norm_epsilon=model.norm_eps,
                    resid_pdrop=0.0,
                    embd_pdrop=0.0,
                    attn_pdrop=0.0,
                    **common,
                )
            )
            net.load_state_dict(gpt2_state(config, weights))
            blocks = net.transformer.h
    net.train()

    def logits(tokens: Tensor) -> Tensor:
        return net(tokens).logits  # type: ignore[no-any-return]

    return Net(net, compiled(net, logits, cross_entropy, blocks, mode), plain_adamw(net, config))


def llama_state(config: Config, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    token = weights["embedding.token"]
    state = {"model.embed_tokens.weight": token, "model.norm.weight": weights["final_norm.weight"]}
    state["lm_head.weight"] = token if config.model.tie_embeddings else weights["readout.weight"]
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
    for layer in range(config.model.n_layers):
        for mine, other in names.items():
            state[f"model.layers.{layer}.{other}.weight"] = weights[f"blocks.{layer}.{mine}.weight"]
    return state


def gpt2_state(config: Config, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2 stores its matrices transposed, and query, key and value as one."""
    token = weights["embedding.token"]
    state = {"transformer.wte.weight": token, "transformer.wpe.weight": weights["embedding.position"]}
    state["lm_head.weight"] = token
    names = {
        "attention_norm": "ln_1",
        "attention.output": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    }
    for kind in ("weight", "bias"):
        state[f"transformer.ln_f.{kind}"] = weights[f"final_norm.{kind}"]
        for layer in range(config.model.n_layers):
            mine, other = f"blocks.{layer}", f"transformer.h.{layer}"
            qkv = torch.cat([weights[f"{mine}.attention.{part}.{kind}"] for part in ("query", "key", "value")])
            state[f"{other}.attn.c_attn.{kind}"] = transposed(qkv)
            for name, theirs in names.items():
                state[f"{other}.{theirs}.{kind}"] = transposed(weights[f"{mine}.{name}.{kind}"])
    return {name: value.contiguous() for name, value in state.items()}


def transposed(x: Tensor) -> Tensor:
    return x.mT if x.dim() == 2 else x


def litgpt(config: Config, device: torch.device, mode: str) -> Net:
    """litgpt's GPT and its loss, as litgpt/pretrain.py uses them, but the loss in one piece, which is faster. Its
    module is reached through ``--site``."""
    model, weights = config.model, weights_of(build_network(config), config)
    settings = importlib.import_module("litgpt").Config(
        name="llama",
        block_size=model.max_seq_len,
        n_layer=model.n_layers,
        n_embd=model.d_model,
        n_head=model.n_heads,
        n_query_groups=model.n_kv_heads,
        head_size=model.d_head,
        intermediate_size=model.d_ff,
        vocab_size=model.vocab_size,
        padded_vocab_size=model.vocab_size,
        norm_class_name="RMSNorm",
        norm_eps=model.norm_eps,
        mlp_class_name="LLaMAMLP",
        rotary_percentage=1.0,
        rope_base=int(model.rope_theta),
        parallel_residual=False,
        bias=False,
    )
    with device:
        net = importlib.import_module("litgpt").GPT(settings)
    net.max_seq_length = config.seq_len
    net.load_state_dict(litgpt_state(config, weights))
    loss = partial(importlib.import_module("litgpt.utils").chunked_cross_entropy, chunk_size=0)
    return Net(net, compiled(net, net, loss, net.transformer.h, mode), plain_adamw(net, config))


def litgpt_state(config: Config, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {
        "transformer.wte.weight": weights["embedding.token"],
        "transformer.ln_f.weight": weights["final_norm.weight"],
        "lm_head.weight": weights["readout.weight"],
    }
    names = {
        "attention_norm": "norm_1",
        "attention.output": "attn.proj",
        "mlp_norm": "norm_2",
        "mlp.gate": "mlp.fc_1",
        "mlp.up": "mlp.fc_2",
        "mlp.down": "mlp.proj",
    }
    for layer in range(config.model.n_layers):
        mine, other = f"blocks.{layer}", f"transformer.h.{layer}"
        qkv = [weights[f"{mine}.attention.{part}.weight"] for part in ("query", "key", "value")]
        state[f"{other}.attn.qkv.weight"] = torch.cat(qkv)
        for name, theirs in names.items():
            state[f"{other}.{theirs}.weight"] = weights[f"{mine}.{name}.weight"]
    return state


CONTESTANTS: dict[str, Callable[[Config, torch.device, str], Net]] = {
    "bare": bare,
    "transformers": transformers,
    "litgpt": litgpt,
}


@dataclass(frozen=True)
class Timed:
    losses: list[float]
    """Of every step, nats."""
    seconds: float
    """Of the steps after the first ``warm``."""


def train(net: Net, config: Config, windows: np.ndarray[Any, Any], warm: int, device: torch.device) -> Timed:
    """Take one step for each (sequences, seq + 1) of ``windows``; the first ``warm`` aren't timed."""
    micro, parts = micro_batches(config, 1)
    own_casts = isinstance(net.module, Network)
    losses: list[Tensor] = []
    begun = time.perf_counter()
    for step, window in enumerate(windows):
        if step == warm:
            wait(device)
            begun = time.perf_counter()
        batch = torch.from_numpy(window).to(device, non_blocking=True)
        total = torch.zeros((), device=device)
        for part in batch.split(micro):
            with contextlib.nullcontext() if own_casts else autocast(config, device):
                loss = net.loss(part[:, :-1], part[:, 1:]) / parts
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(net.module.parameters(), config.optim.grad_clip)
        net.optimizer.step()
        net.optimizer.zero_grad(set_to_none=True)
        losses.append(total)
    wait(device)
    seconds = time.perf_counter() - begun
    return Timed([float(loss) for loss in losses], seconds)


@contextlib.contextmanager
def autocast(config: Config, device: torch.device) -> Iterator[None]:
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        yield


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_peak_gib(device: torch.device) -> float:
    """Most memory held: the CUDA allocator's, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=CONTESTANTS)
    parser.add_argument("config", nargs="+", help="as launch/pretrain.py's")
    parser.add_argument("--windows", required=True, help="batches, (steps, sequences, seq + 1) int64, .npy")
    parser.add_argument("--warm", type=int, required=True, help="steps before the clock starts")
    parser.add_argument("--mode", choices=MODES, default="eager")
    parser.add_argument("--site", help="folder of packages that are in no other place")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(argv)
    if options.site:
        sys.path.append(options.site)  # last: what is installed comes first
    config = load_config(options.config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("highest")  # TF32 is off at ours too
    windows = np.load(options.windows)
    net = CONTESTANTS[options.name](config, device, options.mode)
    parameters = sum(parameter.numel() for parameter in net.module.parameters())
    timed = train(net, config, windows, options.warm, device)
    result = {
        "parameters": parameters,
        "losses": timed.losses,
        "tokens_per_s": (len(windows) - options.warm) * config.batch_tokens / timed.seconds,
        "memory_peak_gib": memory_peak_gib(device),
        "threads": torch.get_num_threads(),
    }
    options.output.write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
