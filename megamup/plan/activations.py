"""The graph of a block, as operations with their bytes: what `megamup.models.blocks` does with each backend.

Which tensors an operation saves is torch's and the kernels' own doing (the derivative formulas of each); the parts of
models/{blocks,attention,mlp,norm}.py and of these functions correspond name by name.
"""

from __future__ import annotations

from functools import lru_cache

from megamup.plan.setting import Setting
from megamup.plan.tape import Footprint, Op, Recompute, Tape

BUCKET_BYTES = 44
"""Of a pair of positions, while the bucket of its distance is found (`megamup.models.embeddings.bucket`)."""


@lru_cache(maxsize=4096)
def block_footprint(at: Setting, recompute: Recompute, summed: bool) -> Footprint:
    """What a block takes.

    Args:
        summed: its weights have gradients from an earlier micro batch, or lose theirs to a bucket at once.
    """
    return BlockTape(at, summed).tape.footprint(recompute)


class BlockTape:
    """Builds the tape of one block. Each method appends what a method of the block's modules does."""

    def __init__(self, at: Setting, summed: bool) -> None:
        self.at, self.model, self.each = at, at.model, at.bytes_each
        self.tape = Tape("x", at.stream, summed=summed, outside={"memory": at.memory} if at.memory_len else {})
        if self.model.parallel_block:
            self.side_by_side()
        elif self.model.norm_place == "before":
            self.norms_first()
        else:
            self.norms_last()

    def norms_first(self) -> None:
        x = self.joined("x", self.attention(self.norm("x", "attention_norm")), "middle")
        if self.at.memory_len:
            x = self.joined(x, self.attention(self.norm(x, "cross_norm"), "cross ", "memory"), "seen")
        self.joined(x, self.mlp(self.norm(x, "mlp_norm")), "out")

    def norms_last(self) -> None:
        x = self.norm(self.joined("x", self.attention("x"), "middle"), "attention_norm")
        self.norm(self.joined(x, self.mlp(x), "out"), "mlp_norm")

    def side_by_side(self) -> None:
        same = self.norm("x", "attention_norm")
        both = self.joined(self.attention(same), self.mlp(same), "both")
        self.joined("x", both, "out")

    def add(self, *inputs: str, to: str, size: int, **rest: object) -> str:
        return self.tape.add(Op(inputs, to, size, **rest))  # type: ignore[arg-type]

    def norm(self, x: str, name: str) -> str:
        return add_norm(self.tape, self.at, x, name)

    def joined(self, x: str, added: str, to: str) -> str:
        return self.add(x, added, to=to, size=self.at.stream, passes=True)

    # ------------------------------------------------------------------- linear layers

    def products(self, x: str, widths: dict[str, int], tokens: int) -> None:
        """`column_parallel`: x Wᵀ for every weight, whose rows over all ranks are ``widths``."""
        at, model = self.at, self.model
        whole = tokens * model.d_model * self.each
        gathered = whole if at.split else 0
        reduced = whole if at.tensor > 1 else 0
        for name, width in widths.items():
            size = width // at.tensor * model.d_model
            self.add(
                x,
                to=name,
                size=tokens * (width // at.tensor) * self.each,
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

    # ------------------------------------------------------------------- attention

    def attention(self, x: str, name: str = "", memory: str | None = None) -> str:
        """Of the stack to itself, or to ``memory``."""
        at, model = self.at, self.model
        queries = {f"{name}query": model.n_heads * model.d_head}
        keys = dict.fromkeys((f"{name}key", f"{name}value"), model.n_kv_heads * model.d_head)
        self.products(x, queries, at.tokens)
        self.products(memory or x, keys, at.memory_tokens if memory else at.tokens)
        tokens = dict.fromkeys(queries, at.tokens) | dict.fromkeys(keys, at.memory_tokens if memory else at.tokens)
        size = {part: tokens[part] * (width // at.tensor) * self.each for part, width in (queries | keys).items()}
        parts = [self.exchanged(self.biased(part, size[part]), size[part]) for part in size]
        before, sizes = tuple(parts), list(size.values())
        if model.qk_norm:
            for place in (0, 1):
                parts[place] = self.head_norm(parts[place], sizes[place])
        if model.positions == "rotary":
            for place in (0, 1):
                parts[place] = self.rotated(parts[place], sizes[place])
        held = [x, *before]
        bias = None
        if model.positions == "relative" and memory is None:
            bias = self.relative_bias(name)
            held.append(bias)
        mixed = self.core(parts[0], parts[1], parts[2], f"{name}mixed", sizes, bias)
        if model.qk_norm and at.device == "cpu":  # heads come first in memory then, and are moved to lie in a row
            mixed = self.add(mixed, to=f"{mixed} in rows", size=sizes[0])
        mixed = self.exchanged(mixed, sizes[0])
        return self.row(mixed, f"{name}output", model.n_heads * model.d_head, holds=(*held, mixed))

    def exchanged(self, x: str, size: int) -> str:
        """`exchange`: parts are stacked, sent and joined."""
        if self.at.context == 1:
            return x
        return self.add(x, to=f"{x} exchanged", size=size, scratch=2 * size, backward_scratch=2 * size, dear=True)

    def head_norm(self, x: str, size: int) -> str:
        rows = size // self.each // self.model.d_head
        return add_norm(self.tape, self.at, x, f"{x} normed", size, rows, centred=False)

    def rotated(self, x: str, size: int) -> str:
        if self.at.backends["rotary"] == "liger":
            return self.add(x, to=f"{x} rotated", size=size)
        return self.add(x, to=f"{x} rotated", size=size, scratch=2 * size, backward_scratch=3 * size // 2)

    def relative_bias(self, name: str) -> str:
        """The bias of every pair of positions, of which the places in the table are kept."""
        at = self.at
        places = 8 * at.seq_len**2
        return self.add(
            to=f"{name}bias",
            size=at.pairs * self.each,
            hidden=places,
            scratch=(BUCKET_BYTES - 8) * at.seq_len**2,
            backward_scratch=at.pairs * self.each,
        )

    def core(self, query: str, key: str, value: str, to: str, sizes: list[int], bias: str | None) -> str:
        at, model = self.at, self.model
        heads = model.n_heads // at.tensor
        if at.backends["attention"] == "reference":
            return self.plain(query, key, value, to, sizes, () if bias is None else (bias,))
        if bias is not None:
            return self.core_with_bias(query, key, value, to, sizes, bias)
        saves, lse = (query, key, value, to), 4 * at.tokens * heads
        return self.add(query, key, value, to=to, size=sizes[0], saves=saves, hidden=lse, dear=True)

    def core_with_bias(self, query: str, key: str, value: str, to: str, sizes: list[int], bias: str) -> str:
        """torch's fused attention: on CUDA its memory-efficient kernel, which returns the bias' gradient for every
        sequence; on a CPU, none of whose kernels has that gradient, products and a softmax of their own."""
        at, model = self.at, self.model
        heads = model.n_heads // at.tensor
        repeated = 2 * (sizes[0] - sizes[1])  # keys and values for every head
        added = bias
        if at.causal:
            added = self.add(bias, to=f"{bias} masked", size=at.pairs * self.each, hidden=at.seq_len**2)
        if at.device == "cuda":
            return self.add(
                query, key, value, added,
                to=to,
                size=sizes[0],
                saves=(query, to, added) if repeated else (query, key, value, to, added),
                hidden=4 * at.tokens * heads + (2 * sizes[0] if repeated else 0),
                backward_scratch=at.sequences * at.pairs * self.each + (2 * sizes[0] if repeated else 0),
                dear=True,
            )  # fmt: skip
        return self.composed(query, key, value, to, sizes[0], added)

    def composed(self, query: str, key: str, value: str, to: str, size: int, added: str) -> str:
        """torch's plain attention: copies in fp32 for batched products; the softmax looks for rows of nothing."""
        scores, copied = 4 * self.at.sequences * self.at.pairs, size * 4 // self.each
        q, k, v = (self.add(part, to=f"{part} copied", size=copied) for part in (query, key, value))
        logits = self.add(q, k, to="scores", size=scores, saves=(q, k), dear=True)
        shares = self.add(logits, added, to="shares", size=scores, saves=("shares",), scratch=scores * 5 // 4)
        return self.add(shares, v, to=to, size=size, saves=(shares, v), dear=True)

    def plain(self, query: str, key: str, value: str, to: str, sizes: list[int], bias: tuple[str, ...]) -> str:
        """Scores, masked scores and softmax in fp32, of which the softmax stays, as do every head's keys and values."""
        at, model = self.at, self.model
        heads, keys = model.n_heads // at.tensor, at.memory_len if "cross" in to else at.seq_len
        scores = 4 * at.tokens * heads * keys
        of_keys = at.memory_tokens if "cross" in to else at.tokens
        repeated = 2 * 4 * of_keys * heads * model.d_head if model.n_kv_heads < model.n_heads or self.each < 4 else 0
        if self.each < 4:
            repeated += 4 * at.tokens * heads * model.d_head  # the query in fp32
        return self.add(
            query, key, value, *bias,
            to=to,
            size=sizes[0],
            saves=() if repeated else (query, key, value),
            hidden=scores + repeated,
            scratch=2 * scores,
            backward_scratch=2 * scores + repeated,
            dear=False,
        )  # fmt: skip

    # ------------------------------------------------------------------- MLP

    def mlp(self, x: str) -> str:
        at, model = self.at, self.model
        names = ("gate", "up") if model.gated else ("up",)
        self.products(x, dict.fromkeys(names, model.d_ff), at.tokens)
        size = at.tokens * (model.d_ff // at.tensor) * self.each
        part = [self.biased(name, size) for name in names]
        inner = self.gated(part[0], part[1], size) if model.gated else self.activation(part[0], size)
        return self.row(inner, "down", model.d_ff, holds=(x, *part, inner))

    def activation(self, x: str, size: int) -> str:
        if self.at.backends["mlp"] == "reference":  # of GELU x/√2, x/2 and 1 + erf are kept, in fp32
            exact = size * 4 // self.each
            return self.add(x, to="inner", size=size, hidden=3 * exact, scratch=exact, backward_scratch=2 * exact)
        match self.model.activation:
            case "relu":  # whose gradient its output tells
                return self.add(x, to="inner", size=size, saves=("inner",))
            case "relu2":
                relu = self.add(x, to="relu", size=size, saves=("relu",))
                return self.add(relu, to="inner", size=size, saves=(relu,), backward_scratch=2 * size)
        return self.add(x, to="inner", size=size, saves=(x,))

    def gated(self, gate: str, up: str, size: int) -> str:
        match self.at.backends["mlp"]:
            case "liger":  # gradients are written over gate and up
                return self.add(gate, up, to="inner", size=size, saves=(gate, up), passes=True)
            case "torch":
                opened = self.add(gate, to="opened", size=size, saves=(gate,))
                return self.add(opened, up, to="inner", size=size, saves=(opened, up))
        exact = size * 4 // self.each
        copies = 2 * exact if self.each < 4 else 0  # gate and up in fp32
        saves = () if copies else (gate, up)
        return self.add(
            gate, up, to="inner", size=size, saves=saves, hidden=2 * exact + copies, scratch=exact,
            backward_scratch=2 * exact,
        )  # fmt: skip


def add_norm(
    tape: Tape,
    at: Setting,
    x: str,
    name: str,
    size: int | None = None,
    rows: int | None = None,
    centred: bool | None = None,
) -> str:
    """Append a norm. Kernels keep their input and a number or two a row; sums written in torch more.

    Args:
        size: bytes of what is normed; default the residual stream, with its rows, by ``model.norm``.
    """
    size = at.stream if size is None else size
    rows = at.stream_tokens if rows is None else rows
    centred = at.model.norm == "layer" if centred is None else centred
    exact = size * 4 // at.bytes_each
    composed = at.backends["norm"] == "reference" or (
        at.backends["norm"] == "torch" and at.device == "cpu" and not centred
    )
    if not composed:
        return tape.add(Op((x,), name, size, saves=(x,), hidden=(8 if centred else 4) * rows))
    if at.bytes_each < 4:
        x = tape.add(Op((x,), f"{name} in fp32", exact))
    normed = tape.add(Op((x,), f"{name} without gain", exact, saves=(x,), hidden=4 * rows, backward_scratch=4 * exact))
    scratch = exact if at.bytes_each < 4 else 0
    return tape.add(Op((normed,), name, size, saves=(normed,), scratch=scratch, backward_scratch=exact + scratch))
