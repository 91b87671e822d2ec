"""Activation checkpointing: the same gradients, less kept, and computed again only what the setting says."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from megamup.config import Config, config_from
from megamup.models.attention import CoreAttention
from megamup.models.build import build_network
from megamup.parallel.layers import spec_of
from megamup.parallel.mesh import SINGLE, build_mesh
from megamup.sections import Parallel
from megamup.train import distributed
from megamup.train.fork import run_ranks
from megamup.train.monitor import first_forward

BATCH, SEQ, D_MODEL, VOCAB, LAYERS = 2, 16, 32, 64, 4
SIZES = {"d_model": D_MODEL, "n_heads": 4, "d_ff": 80, "vocab_size": VOCAB, "max_seq_len": SEQ}
MODELS: dict[str, dict[str, Any]] = {"llama": {"arch": "llama", "n_kv_heads": 2}, "gpt": {"arch": "gpt"}}
SETTINGS: list[str | int] = ["none", "selective", "full", 2]
PRODUCTS = {"llama": 7, "gpt": 6}
"""Matrix products of a block's forward: query, key, value, output, (gate,) up, down."""


def config_of(
    arch: str, setting: str | int, layers: int = LAYERS, attention: str = "auto", **parallel: int | bool
) -> Config:
    sigma = {"embedding": 0.5, "hidden": 0.2, "residual_out": 0.2, "readout": 0.2}
    return config_from(
        {
            "model": MODELS[arch] | SIZES | {"n_layers": layers},
            "mup": {"sigma": sigma},
            "data": {"train": "shard"},
            "train": {"steps": 1, "recompute": setting},
            "kernels": {"attention": attention},
            "parallel": parallel,
        }
    )


KINDS = {
    "mm": "products",
    "addmm": "products",
    "bmm": "batched products",
    "_scaled_dot_product_flash_attention_for_cpu": "attention",
    "silu": "activation",
    "gelu": "activation",
    "native_layer_norm": "norm",
    "_fused_rms_norm": "norm",
}


class Watch(TorchDispatchMode):
    """How often each kind of operator ran, and which of the memory that operators made is still held."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        self.made: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        kind = KINDS.get(name, "others")
        if func.namespace == "_c10d_functional" and name != "wait_tensor":
            kind = "collectives"
        elif func.namespace == "megamup":  # products with their collective
            kind = "gradients of products" if name.endswith("gradients") else "sent products"
        self.counts[kind] += 1
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in given:
                self.made[leaf.untyped_storage()] = leaf.untyped_storage().nbytes()
        return result

    @property
    def kept(self) -> int:
        """Bytes made inside that live."""
        return sum(self.made.values())


@dataclass
class Outcome:
    loss: float
    gradients: dict[str, Tensor]
    kept: int
    """Bytes that live between forward and backward."""
    forward: Counter[str] = field(default_factory=Counter)
    backward: Counter[str] = field(default_factory=Counter)


def outcome(
    config: Config,
    hook: Callable[[torch.nn.Module], object] = lambda _: None,
    between: Callable[[], object] = lambda: None,
) -> Outcome:
    """One forward and backward pass, alone or on the ranks that the config asks for.

    Args:
        config: the model's.
        hook: called with every layer's core attention before.
        between: called between forward and backward.
    """
    mesh = SINGLE
    if config.parallel != Parallel():
        distributed.join()
        mesh = build_mesh(config.parallel)
    model = build_network(config, mesh)
    for module in model.modules():
        if isinstance(module, CoreAttention):
            hook(module)
    tokens = torch.randint(VOCAB, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(7))
    inputs, targets = (x.chunk(mesh.context.size, 1)[mesh.context.rank] for x in (tokens[:, :-1], tokens[:, 1:]))
    with Watch() as forward:
        loss = model({"tokens": inputs}, (targets, torch.tensor(1.0)))
    kept = forward.kept
    between()
    with Watch() as backward:
        loss.backward()
    gradients = {spec_of(shard).name: shard.grad for shard in model.parameters() if shard.grad is not None}
    return Outcome(loss.item(), gradients, kept, forward.counts, backward.counts)


@pytest.mark.parametrize("arch", MODELS)
@pytest.mark.parametrize("setting", SETTINGS[1:])
def test_gradients_are_bit_for_bit_those_of_keeping_all(arch: str, setting: str | int) -> None:
    expected, found = outcome(config_of(arch, "none")), outcome(config_of(arch, setting))
    assert found.loss == expected.loss
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(found.gradients[name], gradient), name


# --------------------------------------------------------------------------- what is kept


def per_layer(arch: str, setting: str | int) -> float:
    """Bytes that a block adds to what is kept, in bytes of the residual stream."""
    two, four = (outcome(config_of(arch, setting, layers=layers)).kept for layers in (2, 4))
    return (four - two) / 2 / (4 * BATCH * SEQ * D_MODEL)


@pytest.mark.parametrize("arch", MODELS)
def test_less_is_kept_in_the_order_of_the_settings(arch: str) -> None:
    """``full`` keeps a block's input alone, every second block's on average half of that and of everything."""
    none, selective, full, second = (per_layer(arch, setting) for setting in SETTINGS)
    assert none > selective > full == 1
    assert second == pytest.approx((none + full) / 2)
    # Products' and attention's results and the block's input, in units of d_model, of which d_ff is 2.5: no activation,
    # norm, rotation or sum. Attention's is the mean and its logarithm of the sum for 4 heads (1/8 of d_model).
    products = {"llama": 1 + 2 * 0.5 + 1 + 1 + 2 * 2.5, "gpt": 3 + 1 + 1 + 2.5}[arch]
    assert selective == 1 + products + 1 + 1 / 8


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_what_a_monitor_looks_at_is_not_kept(setting: str | int, attention: str) -> None:
    """Its logits are products of the block's to ``selective``'s eyes, but not the block's."""
    made: list[weakref.ref[Any]] = []

    def see(core: torch.nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        logits = inputs[0] @ inputs[1].repeat_interleave(2, 1).mT
        made.append(weakref.ref(logits.untyped_storage()))

    alive: list[bool] = []
    plain = outcome(config_of("llama", setting, attention=attention))
    watched = outcome(
        config_of("llama", setting, attention=attention),
        hook=lambda core: first_forward(core, see),
        between=lambda: alive.extend(storage() is not None for storage in made),
    )
    assert alive == [False] * LAYERS
    assert (watched.loss, watched.kept) == (plain.loss, plain.kept)
    for name, gradient in plain.gradients.items():
        assert torch.equal(watched.gradients[name], gradient), name


# --------------------------------------------------------------------------- what is computed again


@pytest.mark.parametrize("arch", MODELS)
def test_selective_repeats_no_product_and_no_attention(arch: str) -> None:
    none, selective = (outcome(config_of(arch, setting)).backward for setting in ("none", "selective"))
    assert selective["products"] == none["products"]
    assert selective["attention"] == none["attention"] == 0
    assert selective["batched products"] == none["batched products"]
    assert (none["activation"], selective["activation"]) == (0, LAYERS), "nothing else was repeated either"


def test_selective_repeats_no_product_of_plain_attention() -> None:
    """Whose products are batched: two a layer forward, four backward."""
    for setting in ("none", "selective"):
        found = outcome(config_of("llama", setting, attention="reference"))
        assert (found.forward["batched products"], found.backward["batched products"]) == (2 * LAYERS, 4 * LAYERS)


@pytest.mark.parametrize("arch", MODELS)
def test_full_repeats_each_once(arch: str) -> None:
    """All but the last product, of which nothing is needed; every second block's where the setting is 2."""
    none = outcome(config_of(arch, "none")).backward
    for setting, layers in (("full", LAYERS), (2, LAYERS // 2)):
        found = outcome(config_of(arch, setting)).backward
        assert found["attention"] == found["activation"] == layers
        assert found["products"] == none["products"] + (PRODUCTS[arch] - 1) * layers


@pytest.mark.parametrize(
    ("parallel", "kind"),
    [
        ({"tensor": 2}, "sent products"),
        ({"tensor": 2, "sequence": True}, "sent products"),
        ({"context": 2}, "collectives"),
    ],
    ids=["tensor", "sequence", "context"],
)
def test_selective_repeats_no_collective(parallel: dict[str, Any], kind: str) -> None:
    """``full`` repeats a block's four of the forward pass."""
    none, selective, full = (
        run_ranks(outcome, 2, config_of("llama", s, **parallel)) for s in ("none", "selective", "full")
    )
    for kept, some, again in zip(none, selective, full, strict=True):
        assert kept.forward[kind] == 4 * LAYERS
        assert some.backward[kind] == kept.backward[kind]
        assert some.backward["collectives"] == kept.backward["collectives"]
        assert some.backward["products"] == kept.backward["products"]
        assert again.backward[kind] == kept.backward[kind] + 4 * LAYERS
        for name, gradient in kept.gradients.items():
            assert torch.equal(some.gradients[name], gradient), name
            assert torch.equal(again.gradients[name], gradient), name


@pytest.mark.parametrize("arch", MODELS)
def test_selective_keeps_less_than_none_where_tensor_ranks_share_the_sequence(arch: str) -> None:
    """No gathered input and no partial sums of the whole: what a block keeps falls with the ranks."""

    def of_a_block(setting: str, tensor: int) -> int:
        config = [config_of(arch, setting, layers=n, tensor=tensor, sequence=True) for n in (4, 2)]
        four, two = (run_ranks(outcome, tensor, c)[0].kept for c in config)
        return (four - two) // 2

    assert of_a_block("full", 2) < of_a_block("selective", 2) < of_a_block("none", 2)
