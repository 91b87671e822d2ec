"""Where each tensor of a Hugging Face class comes from, by global name: one table a class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megamup.model import Model
from megamup.parameters import Parameter


@dataclass(frozen=True)
class Entry:
    theirs: str
    ours: tuple[str, ...]
    """Global names; several are joined along their outputs."""
    transposed: bool = False
    """Inputs first: GPT-2's Conv1D, T5's biases."""
    expert: int | None = None
    """Which one of the experts that ours stacks."""


Inventory = Mapping[str, Parameter]
BOTH = ("weight", "bias")
VOCABULARY = ("embedding.token", "readout.weight", "readout.bias")
"""What has a row a token: rows may be cut off at the end, or added."""


def shape(entry: Entry, inventory: Inventory) -> tuple[int, ...]:
    """Of theirs."""
    shapes = [inventory[name].shape for name in entry.ours]
    if entry.expert is not None:
        return shapes[0][1:]
    whole = (sum(each[0] for each in shapes), *shapes[0][1:])
    return whole[::-1] if entry.transposed else whole


def linears(inventory: Inventory, names: Mapping[str, tuple[str, ...]], transposed: bool = False) -> list[Entry]:
    """Weights, and biases where ours are there, of linear layers (whose weights may be transposed) or norms."""
    found = []
    for theirs, ours in names.items():
        for kind in BOTH:
            wanted = tuple(f"{name}.{kind}" for name in ours)
            if all(name in inventory for name in wanted):
                found.append(Entry(f"{theirs}.{kind}", wanted, transposed and kind == "weight"))
    return found


def readout(model: Model) -> list[Entry]:
    return [] if model.tie_embeddings else [Entry("lm_head.weight", ("readout.weight",))]


# ----------------------------------------------------------------------------- decoders


def gpt2(model: Model, inventory: Inventory) -> list[Entry]:
    found = [Entry("transformer.wte.weight", ("embedding.token",))]
    found.append(Entry("transformer.wpe.weight", ("embedding.position",)))
    for layer in range(model.n_layers):
        ours, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
        norms = {f"{theirs}.ln_1": (f"{ours}.attention_norm",), f"{theirs}.ln_2": (f"{ours}.mlp_norm",)}
        joined = tuple(f"{ours}.attention.{part}" for part in ("query", "key", "value"))
        layers = {
            f"{theirs}.attn.c_attn": joined,
            f"{theirs}.attn.c_proj": (f"{ours}.attention.output",),
            f"{theirs}.mlp.c_fc": (f"{ours}.mlp.up",),
            f"{theirs}.mlp.c_proj": (f"{ours}.mlp.down",),
        }
        found += linears(inventory, norms) + linears(inventory, layers, transposed=True)
    return [*found, *linears(inventory, {"transformer.ln_f": ("final_norm",)}), *readout(model)]


def llama(model: Model, inventory: Inventory) -> list[Entry]:
    """Of Mistral, Qwen 2 and 3 and Mixtral, too."""
    found = [Entry("model.embed_tokens.weight", ("embedding.token",))]
    for layer in range(model.n_layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        found += linears(
            inventory,
            {
                f"{theirs}.input_layernorm": (f"{ours}.attention_norm",),
                f"{theirs}.self_attn.q_proj": (f"{ours}.attention.query",),
                f"{theirs}.self_attn.k_proj": (f"{ours}.attention.key",),
                f"{theirs}.self_attn.v_proj": (f"{ours}.attention.value",),
                f"{theirs}.self_attn.q_norm": (f"{ours}.attention.query_norm",),
                f"{theirs}.self_attn.k_norm": (f"{ours}.attention.key_norm",),
                f"{theirs}.self_attn.o_proj": (f"{ours}.attention.output",),
                f"{theirs}.post_attention_layernorm": (f"{ours}.mlp_norm",),
                f"{theirs}.mlp.gate_proj": (f"{ours}.mlp.gate",),
                f"{theirs}.mlp.up_proj": (f"{ours}.mlp.up",),
                f"{theirs}.mlp.down_proj": (f"{ours}.mlp.down",),
                f"{theirs}.block_sparse_moe.gate": (f"{ours}.moe.router",),
            },
        )
        found += experts(model, f"{ours}.moe.experts", f"{theirs}.block_sparse_moe.experts")
    return [*found, *linears(inventory, {"model.norm": ("final_norm",)}), *readout(model)]


def experts(model: Model, ours: str, theirs: str) -> list[Entry]:
    parts = {"gate": "w1", "down": "w2", "up": "w3"}
    return [
        Entry(f"{theirs}.{number}.{name}.weight", (f"{ours}.{part}",), expert=number)
        for part, name in parts.items()
        for number in range(model.moe.experts if model.moe else 0)
    ]


def qwen2(model: Model, inventory: Inventory) -> list[Entry]:
    """Biases of queries, keys and values alone."""
    return without_biases(llama(model, inventory), (".o_proj.", ".mlp."))


def qwen3(model: Model, inventory: Inventory) -> list[Entry]:
    """Biases of attention alone."""
    return without_biases(llama(model, inventory), (".mlp.",))


def without_biases(entries: list[Entry], of: tuple[str, ...]) -> list[Entry]:
    return [entry for entry in entries if not (entry.theirs.endswith(".bias") and any(p in entry.theirs for p in of))]


# ----------------------------------------------------------------------------- bert


def bert(model: Model, inventory: Inventory) -> list[Entry]:
    embeddings = {"word": "token", "position": "position", "token_type": "type"}
    found = [Entry(f"bert.embeddings.{k}_embeddings.weight", (f"embedding.{v}",)) for k, v in embeddings.items()]
    found += linears(inventory, {"bert.embeddings.LayerNorm": ("embedding_norm",)})
    for layer in range(model.n_layers):
        ours, theirs = f"blocks.{layer}", f"bert.encoder.layer.{layer}"
        found += linears(
            inventory,
            {
                f"{theirs}.attention.self.query": (f"{ours}.attention.query",),
                f"{theirs}.attention.self.key": (f"{ours}.attention.key",),
                f"{theirs}.attention.self.value": (f"{ours}.attention.value",),
                f"{theirs}.attention.output.dense": (f"{ours}.attention.output",),
                f"{theirs}.attention.output.LayerNorm": (f"{ours}.attention_norm",),
                f"{theirs}.intermediate.dense": (f"{ours}.mlp.up",),
                f"{theirs}.output.dense": (f"{ours}.mlp.down",),
                f"{theirs}.output.LayerNorm": (f"{ours}.mlp_norm",),
            },
        )
    heads = {
        "cls.predictions.transform.dense": ("transform",),
        "cls.predictions.transform.LayerNorm": ("transform_norm",),
        "bert.pooler.dense": ("pooler",),
        "cls.seq_relationship": ("pair",),
    }
    found += linears(inventory, heads)
    if not model.tie_embeddings:  # then its bias isn't tied either, and the class adds this one
        found += [Entry(f"cls.predictions.decoder.{kind}", (f"readout.{kind}",)) for kind in BOTH]
    return [*found, Entry("cls.predictions.bias", ("readout.bias",))]


# ----------------------------------------------------------------------------- t5


def t5(model: Model, inventory: Inventory) -> list[Entry]:
    assert model.n_decoder_layers is not None
    found = [Entry("shared.weight", ("embedding.token",))]
    for stack, layers in (("encoder", model.n_layers), ("decoder", model.n_decoder_layers)):
        table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        found.append(Entry(table, (f"{stack}.relative.weight",), transposed=True))
        for layer in range(layers):
            found += linears(inventory, t5_block(stack, layer, model.gated))
        found += linears(inventory, {f"{stack}.final_layer_norm": (f"{stack}.final_norm",)})
    return found + readout(model)


def t5_block(stack: str, layer: int, gated: bool) -> dict[str, tuple[str, ...]]:
    ours, theirs = f"{stack}.blocks.{layer}", f"{stack}.block.{layer}.layer"
    branches = [("attention", "SelfAttention")]
    if stack == "decoder":
        branches.append(("cross", "EncDecAttention"))
    found: dict[str, tuple[str, ...]] = {}
    for place, (name, their_name) in enumerate(branches):
        for part in ("query", "key", "value", "output"):
            found[f"{theirs}.{place}.{their_name}.{part[0]}"] = (f"{ours}.{name}.{part}",)
        found[f"{theirs}.{place}.layer_norm"] = (f"{ours}.{name}_norm",)
    mlp = {"wi_0": "gate", "wi_1": "up", "wo": "down"} if gated else {"wi": "up", "wo": "down"}
    for their_name, name in mlp.items():
        found[f"{theirs}.{len(branches)}.DenseReluDense.{their_name}"] = (f"{ours}.mlp.{name}",)
    return found | {f"{theirs}.{len(branches)}.layer_norm": (f"{ours}.mlp_norm",)}
