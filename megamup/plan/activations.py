"""The graph of a block, as operations with their bytes: what `megamup.models.blocks` does with each backend.

Which tensors an operation saves is torch's and the kernels' own doing (the derivative formulas of each); the parts of
models/blocks.py and of these functions correspond name by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

from megamup.config import Config, micro_batches
from megamup.mup import readout_multiplier
from megamup.plan.tape import Footprint, Op, Recompute, Tape
from megamup.sections import Model

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Setting:
    """What a rank computes with at a time: all that the bytes of a block depend on."""

    model: Model
    seq_len: int
    sequences: int
    """In a micro batch."""
    tensor: int
    context: int
    split: bool
    """Sequence parallelism: the residual stream is cut over tensor ranks."""
    bytes_each: int
    """Of an activation."""
    weight_bytes: int
    """Of a weight as the model has it, and of its gradient."""
    multiplies_logits: bool
    chosen: tuple[tuple[str, str], ...]
    """(operation, backend)"""
    device: Device

    @classmethod
    def of(cls, config: Config, world_size: int, zero_stage: int, device: Device) -> Setting:
        parallel, mixed = config.parallel, config.precision == "bf16"
        return cls(
            model=config.model,
            seq_len=config.seq_len,
            sequences=micro_batches(config, world_size)[0],
            tensor=parallel.tensor,
            context=parallel.context,
            split=parallel.sequence,
            bytes_each=2 if mixed else 4,
            weight_bytes=2 if mixed and zero_stage > 0 else 4,
            multiplies_logits=readout_multiplier(config) != 1.0,
            chosen=tuple(backends(config, device).items()),
            device=device,
        )

    @cached_property
    def backends(self) -> dict[str, str]:
        return dict(self.chosen)

    @cached_property
    def tokens(self) -> int:
        """Within tensor-parallel regions."""
        return self.sequences * self.seq_len // self.context

    @cached_property
    def stream_tokens(self) -> int:
        """Of the residual stream."""
        return self.tokens // self.tensor if self.split else self.tokens

    @property
    def casts(self) -> bool:
        """Layers cast their weights to the activations' type on use, and autograd keeps the copies."""
        return self.weight_bytes != self.bytes_each

    @cached_property
    def stream(self) -> int:
        """Bytes of the residual stream."""
        return self.stream_tokens * self.model.d_model * self.bytes_each

    @cached_property
    def whole(self) -> int:
        """Bytes of as many features in all tokens of the sharded region."""
        return self.tokens * self.model.d_model * self.bytes_each


def backends(config: Config, device: Device) -> dict[str, str]:
    """What ``auto`` stands for, as far as memory goes: flash-attn, SDPA and flex attention keep the same."""
    kernels, liger = config.kernels, device == "cuda" and not config.kernels.compile
    names = {
        "attention": "sdpa",
        "norm": "liger" if liger else "torch",
        "mlp": "liger" if liger and config.model.arch == "llama" else "torch",
        "rotary": "liger" if liger else "torch",
        "cross_entropy": "liger" if device == "cuda" and config.parallel.tensor == 1 else "fused",
    }
    return {op: name if getattr(kernels, op) == "auto" else getattr(kernels, op) for op, name in names.items()}


@lru_cache(maxsize=4096)
def block_footprint(at: Setting, recompute: Recompute, summed: bool) -> Footprint:
    """What a block takes.

    Args:
        summed: its weights have gradients from an earlier micro batch, or lose theirs to a bucket at once.
    """
    return BlockTape(at, summed).tape.footprint(recompute)


class BlockTape:
    """Builds the tape of one block. Each method appends what a method of models/blocks.py does."""

    def __init__(self, at: Setting, summed: bool) -> None:
        self.at, self.model, self.each = at, at.model, at.bytes_each
        self.tape = Tape("x", at.stream, summed=summed)
        middle = self.joined("x", self.attention(self.norm("x", "attention_norm")), "middle")
        self.joined(middle, self.mlp(self.norm(middle, "mlp_norm")), "out")

    def add(self, *inputs: str, to: str, size: int, **rest: object) -> str:
        return self.tape.add(Op(inputs, to, size, **rest))  # type: ignore[arg-type]

    def norm(self, x: str, name: str) -> str:
        return add_norm(self.tape, self.at, x, name)

    def products(self, x: str, widths: dict[str, int]) -> None:
        """`column_parallel`: x Wᵀ for every weight, whose rows over all ranks are ``widths``."""
        at, model = self.at, self.model
        gathered = at.whole if at.split else 0
        reduced = at.whole if at.tensor > 1 else 0
        for name, width in widths.items():
            size = width // at.tensor * model.d_model
            self.add(
                x,
                to=name,
                size=at.tokens * (width // at.tensor) * self.each,
                saves=(x,),
                copies=2 * size if at.casts else 0,
                scratch=gathered,
                backward_scratch=gathered + reduced + (2 * size if at.casts else 0),
                weight=size * at.weight_bytes,
                dear=True,
            )

    def biased(self, name: str, size: int, holds: tuple[str, ...] = ()) -> str:
        if not self.model.bias:
            return name
        return self.add(name, to=f"{name}+bias", size=size, passes=True, holds=holds)

    def row(self, x: str, name: str, width: int, holds: tuple[str, ...]) -> str:
        """`RowParallelLinear`: the ranks' products summed, or each stretch's sum on its rank."""
        at = self.at
        size = width // at.tensor * self.model.d_model
        partial = at.whole if at.tensor > 1 else 0
        in_rows = at.tokens * (width // at.tensor) * self.each if at.split and at.sequences > 1 else 0
        y = self.add(
            x,
            to=name,
            size=at.stream,
            saves=(x,),
            holds=holds,
            copies=2 * size if at.casts else 0,
            scratch=partial + in_rows,
            backward_scratch=(at.whole if at.split else 0) + in_rows + (2 * size if at.casts else 0),
            weight=size * at.weight_bytes,
            dear=True,
        )
        return self.biased(y, at.stream, holds)

    def attention(self, x: str) -> str:
        at, model = self.at, self.model
        widths = {"query": model.n_heads * model.d_head}
        widths |= dict.fromkeys(("key", "value"), model.n_kv_heads * model.d_head)
        self.products(x, widths)
        size = {name: at.tokens * (width // at.tensor) * self.each for name, width in widths.items()}
        part = {name: self.exchanged(self.biased(name, size[name]), size[name]) for name in widths}
        before = tuple(part.values())
        if model.arch == "llama":
            for name in ("query", "key"):
                part[name] = self.rotated(part[name], size[name])
        mixed = self.core(part["query"], part["key"], part["value"], size["query"])
        mixed = self.exchanged(mixed, size["query"])
        return self.row(mixed, "output", widths["query"], holds=(x, *before, mixed))

    def exchanged(self, x: str, size: int) -> str:
        """`exchange`: parts are stacked, sent and joined."""
        if self.at.context == 1:
            return x
        return self.add(x, to=f"{x} exchanged", size=size, scratch=2 * size, backward_scratch=2 * size, dear=True)

    def rotated(self, x: str, size: int) -> str:
        if self.at.backends["rotary"] == "liger":
            return self.add(x, to=f"{x} rotated", size=size)
        return self.add(x, to=f"{x} rotated", size=size, scratch=2 * size, backward_scratch=3 * size // 2)

    def core(self, query: str, key: str, value: str, size: int) -> str:
        at, model = self.at, self.model
        heads = model.n_heads // at.tensor
        if at.backends["attention"] != "reference":
            saves, lse = (query, key, value, "mixed"), 4 * at.tokens * heads
            return self.add(query, key, value, to="mixed", size=size, saves=saves, hidden=lse, dear=True)
        # Scores, masked scores and softmax in fp32, of which the softmax stays, as do keys and values for every head.
        scores = 4 * at.tokens * heads * at.seq_len
        repeated = 2 * 4 * at.tokens * heads * model.d_head if model.n_kv_heads < model.n_heads or self.each < 4 else 0
        if self.each < 4:
            repeated += 4 * at.tokens * heads * model.d_head  # the query in fp32
        return self.add(
            query, key, value,
            to="mixed",
            size=size,
            saves=() if repeated else (query, key, value),
            hidden=scores + repeated,
            scratch=2 * scores,
            backward_scratch=2 * scores + repeated,
            dear=False,
        )  # fmt: skip

    def mlp(self, x: str) -> str:
        at, model = self.at, self.model
        names = ("up",) if model.arch == "gpt" else ("gate", "up")
        self.products(x, dict.fromkeys(names, model.d_ff))
        size = at.tokens * (model.d_ff // at.tensor) * self.each
        part = [self.biased(name, size) for name in names]
        inner = self.gelu(part[0], size) if model.arch == "gpt" else self.swiglu(part[0], part[1], size)
        return self.row(inner, "down", model.d_ff, holds=(x, *part, inner))

    def gelu(self, x: str, size: int) -> str:
        if self.at.backends["mlp"] != "reference":
            return self.add(x, to="inner", size=size, saves=(x,))
        exact = size * 4 // self.each  # x/√2, x/2 and 1 + erf are kept, in fp32
        return self.add(x, to="inner", size=size, hidden=3 * exact, scratch=exact, backward_scratch=2 * exact)

    def swiglu(self, gate: str, up: str, size: int) -> str:
        match self.at.backends["mlp"]:
            case "liger":  # gradients are written over gate and up
                return self.add(gate, up, to="inner", size=size, saves=(gate, up), passes=True)
            case "torch":
                silu = self.add(gate, to="silu", size=size, saves=(gate,))
                return self.add(silu, up, to="inner", size=size, saves=(silu, up))
        exact = size * 4 // self.each
        copies = 2 * exact if self.each < 4 else 0  # gate and up in fp32
        saves = () if copies else (gate, up)
        return self.add(
            gate, up, to="inner", size=size, saves=saves, hidden=2 * exact + copies, scratch=exact,
            backward_scratch=2 * exact,
        )  # fmt: skip

    def joined(self, x: str, added: str, to: str) -> str:
        return self.add(x, added, to=to, size=self.at.stream, passes=True)


def add_norm(tape: Tape, at: Setting, x: str, name: str) -> str:
    """Append a norm. Kernels keep their input and a number or two a token; sums written in torch more."""
    stream, tokens, model = at.stream, at.stream_tokens, at.model
    exact = stream * 4 // at.bytes_each
    composed = at.backends["norm"] == "reference" or (
        at.backends["norm"] == "torch" and at.device == "cpu" and model.arch == "llama"
    )
    if not composed:
        moments = 8 if model.arch == "gpt" else 4
        return tape.add(Op((x,), name, stream, saves=(x,), hidden=moments * tokens))
    if at.bytes_each < 4:
        x = tape.add(Op((x,), f"{name} in fp32", exact))
    normed = tape.add(
        Op((x,), f"{name} without gain", exact, saves=(x,), hidden=4 * tokens, backward_scratch=4 * exact)
    )
    scratch = exact if at.bytes_each < 4 else 0
    return tape.add(Op((normed,), name, stream, saves=(normed,), scratch=scratch, backward_scratch=exact + scratch))
