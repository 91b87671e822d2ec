"""μP's forward multipliers as factors on weights: theirs = factor x ours, one factor a parameter.

A multiplier acts on a product, not on the bias that is added to it; a branch's factor acts on both.

    |                  | factor                                                                            |
    | embedding        | its multiplier                                                                    |
    | query, its bias  | (weight: multiplier x) factor on q·k over the class's own, or all on the gain of   |
    |                  | a query norm                                                                      |
    | what ends a      | (weight: multiplier x) the branch's                                               |
    | branch, its bias |                                                                                   |
    | untied readout   | its multiplier over the class's own                                               |
    | tied readout     | on the gain and bias of the norm before it: that over the embedding's multiplier, |
    |                  | which its weight carries                                                          |
    | others           | their multiplier; gains and biases 1                                              |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from megamup.config import Config
from megamup.convert.hf.tables import VOCABULARY, Entry, Inventory, shape
from megamup.errors import MegamupError
from megamup.model import Model
from megamup.mup import block_scales, readout_multiplier, table
from megamup.parameters import stacks
from megamup.scales import BlockScales, Branch


@dataclass(frozen=True)
class OwnScales:
    """Factors that a class has in its code."""

    scores: float
    """On q·k."""
    logits: float = 1.0


def factors(config: Config, own: OwnScales) -> dict[str, float]:
    """What each parameter is multiplied by on its way out, and divided by on its way in.

    Raises:
        MegamupError: a factor of the forward pass is on no weight, or is zero.
    """
    model = config.model
    found = {name: scales.multiplier for name, scales in table(config).items()}

    def multiply(factor: float, *names: str) -> None:
        for name in names:
            if name in found:
                found[name] *= factor

    for stack in stacks(model):
        for layer in range(stack.layers):
            name, at = stack.block(layer), foldable(block_scales(config, layer))
            for part, branch in (("attention", at.attention.branch), ("cross", at.cross.branch)):
                of_scores = ("query_norm.weight",) if model.qk_norm else ("query.weight", "query.bias")
                multiply(at.attention_logits / own.scores, *(f"{name}.{part}.{each}" for each in of_scores))
                multiply(branch, f"{name}.{part}.output.weight", f"{name}.{part}.output.bias")
            ends = ("mlp.down.weight", "mlp.down.bias", "moe.experts.down", "moe.shared.down")
            multiply(at.mlp.branch, *(f"{name}.{each}" for each in ends))
    reading = readout_multiplier(config) / own.logits
    if not model.tie_embeddings:
        found["readout.weight"] = reading
    elif found["embedding.token"]:
        norm = norm_before_readout(model)
        multiply(reading / found["embedding.token"], f"{norm}.weight", f"{norm}.bias")
    if zero := next((name for name, factor in found.items() if factor == 0), None):
        raise MegamupError(f"mup.alpha: {zero} has a multiplier of 0, which can't be undone; expected one above 0")
    return found


def foldable(at: BlockScales) -> BlockScales:
    """Raises MegamupError where a block has factors that belong to no weight."""
    attention, cross, mlp = (Branch(branch=each.branch) for each in (at.attention, at.cross, at.mlp))
    if at != BlockScales(at.attention_logits, attention=attention, cross=cross, mlp=mlp):
        raise MegamupError(
            f"mup.parametrization=umup: its factor on the residual stream ({at.attention.skip:.4g} in this block) "
            "can't be folded: over the layers it makes the stream another size before each norm, whose eps would have "
            "to be another in each layer, and Hugging Face's classes have one"
        )
    return at


def norm_before_readout(model: Model) -> str:
    if model.arch == "bert":
        return "transform_norm"
    if model.norm_place == "after":
        raise MegamupError(
            "model.norm_place=after with tie_embeddings=true: no norm of its own is before the readout, so its "
            "multiplier has nowhere to go"
        )
    return f"{stacks(model)[-1].prefix}final_norm"


# ----------------------------------------------------------------------------- out


def fold(
    entries: Iterable[Entry],
    factor: Mapping[str, float],
    weights: Mapping[str, Tensor],
    widened: Inventory,
    vocab_size: int,
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Their tensors by name, in fp32, each computed when it is called for.

    Args:
        entries: the class's table.
        factor: see `factors`.
        weights: ours, whole.
        widened: what the class has: a parameter that ours lacks is zero there (biases, token types, relative biases).
        vocab_size: rows of theirs; ours may have more at the end.
    """

    def one(name: str) -> Tensor:
        if name not in weights:
            return torch.zeros(widened[name].shape)
        tensor = weights[name].float() * factor[name]
        return tensor[:vocab_size] if name in VOCABULARY else tensor

    stacked = lru_cache(maxsize=1)(one)  # experts of one tensor follow each other

    def theirs(entry: Entry) -> Tensor:
        if entry.expert is not None:
            return stacked(entry.ours[0])[entry.expert].clone()
        parts = [one(name) for name in entry.ours]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return (whole.t() if entry.transposed else whole).contiguous()

    for entry in entries:
        yield entry.theirs, partial(theirs, entry)


# ----------------------------------------------------------------------------- and in


@dataclass(frozen=True)
class Part:
    """Rows of one of their tensors that are one of ours, or an expert of it."""

    theirs: str
    transposed: bool
    rows: slice
    expert: int | None


def parts(entries: Iterable[Entry], inventory: Inventory) -> dict[str, list[Part]]:
    """What each of our parameters is made of: experts in order, or else the first part (others are copies)."""
    found: dict[str, list[Part]] = {}
    for entry in entries:
        start = 0
        for name in entry.ours:
            stop = start + inventory[name].shape[0]
            found.setdefault(name, []).append(Part(entry.theirs, entry.transposed, slice(start, stop), entry.expert))
            start = stop
    return found


def unfold(made_of: list[Part], factor: float, theirs: Mapping[str, Tensor]) -> Tensor:
    """One of our parameters, with the rows that theirs has; of the stored type where the factor is 1, else fp32."""

    def read(part: Part) -> Tensor:
        tensor = theirs[part.theirs]
        return tensor if part.expert is not None else (tensor.t() if part.transposed else tensor)[part.rows]

    first, *others = (read(part) for part in made_of)
    whole = torch.stack((first, *others)) if made_of[0].expert is not None else first
    return (whole if factor == 1 else whole.float() / factor).contiguous()


def shapes(entries: Iterable[Entry], inventory: Inventory) -> dict[str, tuple[int, ...]]:
    """Of all their tensors."""
    return {entry.theirs: shape(entry, inventory) for entry in entries}
