"""What one micro batch costs a rank: seconds of embedding, block and readout, forward and backward, by kind of work.

Products are counted by FLOPs or bytes (a roofline; Williams et al. 2009), everything between them by the bytes that
it reads and writes, where a chain of element-wise operations counts as one, as compiled or fused kernels do it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megamup.model import Model
from megamup.plan.layout import Layout
from megamup.plan.rates import Rates

LOGIT_BYTES = 60
"""Read and written per logit between its product and its gradient's: the passes in fp32 of megamup/parallel/loss.py
(cast, scale, max, subtract, exp, sum, divide, scale, cast)."""
LIGER_LOGIT_BYTES = 6
"""The same by Liger's kernel (Hsu et al. 2024): read for the maximum and sum, read and written for the gradient."""
FUSED_LOGITS = 2**25
"""Logits that ``fused`` has at a time (LOGITS_AT_A_TIME there, of a GPU); Liger's has as many rows as take d_model each
of them. Every such piece adds to the weight's gradient."""


class Seconds(NamedTuple):
    """Of one pass, by kind of work. (A tuple: a search over layouts adds up millions.)"""

    products: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    tensor: float = 0.0
    """Waiting for the tensor axis."""
    context: float = 0.0
    """Waiting for the context axis."""

    def plus(self, other: Seconds, factor: float = 1.0) -> Seconds:
        """The sum with ``factor`` times the other."""
        return Seconds(
            self.products + factor * other.products,
            self.attention + factor * other.attention,
            self.memory + factor * other.memory,
            self.tensor + factor * other.tensor,
            self.context + factor * other.context,
        )

    @property
    def total(self) -> float:
        return sum(self)


class Passes(NamedTuple):
    forward: Seconds
    backward: Seconds

    def plus(self, other: Passes, factor: float = 1.0) -> Passes:
        return Passes(self.forward.plus(other.forward, factor), self.backward.plus(other.backward, factor))


NOTHING = Passes(Seconds(), Seconds())


@dataclass(frozen=True)
class Work:
    """One micro batch of a model in a layout, on devices of given rates."""

    model: Model
    seq_len: int
    layout: Layout
    rates: Rates

    @property
    def tokens(self) -> int:
        """That one tensor rank multiplies with its weights."""
        return self.layout.micro_sequences * self.seq_len // self.layout.context

    @property
    def stream(self) -> float:
        """Bytes of the residual stream that one rank holds."""
        stretch = self.layout.tensor if self.layout.sequence else 1
        return self.tokens * self.model.d_model * self.layout.element / stretch

    def block(self) -> Passes:
        """A block, what is computed again in the backward pass included."""
        between = self.between()
        plain = self.linears().plus(self.attention()).plus(between).plus(self.exchanges())
        if self.layout.recompute == "selective":
            return Passes(plain.forward, plain.backward.plus(between.forward))
        return Passes(plain.forward, plain.backward.plus(plain.forward, self.layout.recomputed))

    def linears(self) -> Passes:
        """The products with weights, and the tensor axis's traffic (Shoeybi et al. 2019, section 3): forward the row
        layers' sums, backward the column layers'."""
        model, t, d = self.model, self.layout.tensor, self.model.d_model
        heads, kv_heads = model.n_heads * model.d_head, model.n_kv_heads * model.d_head
        columns = [
            [heads // t, kv_heads // t, kv_heads // t],
            [model.d_ff // t] * (1 if model.arch == "gpt" else 2),
        ]
        rows = [heads // t, model.d_ff // t]
        forward = sum(self.product(self.tokens, n, d) for outputs in columns for n in outputs)
        forward += sum(self.product(self.tokens, d, k) for k in rows)
        of_inputs = [sum(self.product(self.tokens, d, n) for n in outputs) for outputs in columns]
        of_weights = [sum(self.product(n, d, self.tokens) for n in outputs) for outputs in columns]
        of_rows = sum(self.product(self.tokens, k, d) + self.product(d, k, self.tokens) for k in rows)
        waiting = sum(self.column_backward(i, w) for i, w in zip(of_inputs, of_weights, strict=True))
        leaving = 2 * self.stream_gather() if self.layout.sequence else 0.0  # the rows' gradients, whole again
        return Passes(
            Seconds(products=forward, tensor=2 * self.stream_sum()),
            Seconds(products=sum(of_inputs) + sum(of_weights) + of_rows, tensor=waiting + leaving),
        )

    def product(self, m: int, n: int, k: int) -> float:
        fast = self.rates.product(m, n, k, self.layout.element, fast=True)
        if not self.layout.fp8:
            return fast
        quantized = (m * k + k * n) * (self.layout.element + 1)  # both are read and written in 8 bits before it
        return fast + self.rates.stream(quantized, ops=2)

    def stream_gather(self) -> float:
        """An all-gather or reduce-scatter of the residual stream over the tensor axis."""
        whole = self.tokens * self.model.d_model * self.layout.element
        return self.rates.gather(whole, self.layout.tensor, 1)

    def stream_sum(self) -> float:
        """Its all-reduce; with sequence parallelism a reduce-scatter here and an all-gather there, the same bytes."""
        return 2 * self.stream_gather()

    def column_backward(self, of_input: float, of_weights: float) -> float:
        """Seconds that a column layer's backward pass waits for the tensor axis.

        The sum of the input's gradient runs behind the weights' products; with sequence parallelism the input, kept
        as a stretch, is gathered behind the input's gradient (Korthikanti et al. 2022, section 4.2.2).
        """
        hidden = 1.0 if self.layout.overlap_tensor else 0.0
        if not self.layout.sequence:
            return max(0.0, self.stream_sum() - hidden * of_weights)
        gathering = max(0.0, self.stream_gather() - hidden * of_input)
        return gathering + max(0.0, self.stream_gather() - hidden * of_weights)

    def attention(self) -> Passes:
        """Scores, softmax and mixing of values. Fused: 4·s²·d_head FLOPs a head forward, halved by the causal mask, and
        2.5 times that backward (Dao 2023). Else every score, each through memory in the softmax."""
        model, layout = self.model, self.layout
        heads = model.n_heads / layout.tensor * layout.micro_sequences / layout.context
        if layout.fused_attention:
            flops = 2.0 * heads * self.seq_len**2 * model.d_head
            forward, backward = (self.rates.flash(factor * flops, self.seq_len) for factor in (1.0, 2.5))
            return Passes(Seconds(attention=forward), Seconds(attention=backward))
        s, e, batch = self.seq_len, layout.element, max(1, round(heads))
        scores = self.rates.product(s, s, model.d_head, e, batch)
        mixed = self.rates.product(s, model.d_head, s, e, batch)
        size = batch * float(s) ** 2 * e
        dropped = 2.5 if layout.dropout else 0.0  # read, written, and a mask of half the size
        softmax, of_softmax = self.rates.stream((2 + dropped) * size), self.rates.stream((3 + dropped) * size)
        return Passes(Seconds(attention=scores + mixed + softmax), Seconds(attention=2 * (scores + mixed) + of_softmax))

    def between(self) -> Passes:
        """Norms, residual sums, rotary positions, activation function: bytes read and written."""
        model, t = self.model, self.layout.tensor
        turned = (model.n_heads + model.n_kv_heads) * model.d_head if model.arch == "llama" else 0
        inner, of_inner = (2, 3) if model.arch == "gpt" else (3, 5)  # GELU; SwiGLU with two inputs
        sharded = self.tokens * self.layout.element / t
        # a norm: read, write; backward: read input and gradient, write. A residual sum: read two, write; twice each.
        dropped = (1, 5) if self.layout.dropout else (0, 0)  # masks; backward a pass of its own for each branch
        forward = self.stream * (10 + dropped[0]) + sharded * (2 * turned + inner * model.d_ff)
        backward = self.stream * (12 + dropped[1]) + sharded * (2 * turned + of_inner * model.d_ff)
        return Passes(
            Seconds(memory=self.rates.stream(forward, ops=6)), Seconds(memory=self.rates.stream(backward, ops=6))
        )

    def exchanges(self) -> Passes:
        """The context axis's traffic of one block."""
        model, layout = self.model, self.layout
        if layout.context == 1:
            return NOTHING
        heads, kv_heads = model.n_heads * model.d_head, model.n_kv_heads * model.d_head
        each = self.tokens * layout.element / layout.tensor
        if layout.context_kind == "gather":
            whole = 2 * kv_heads * each * layout.context
            seconds = self.rates.gather(whole, layout.context, layout.tensor)
        else:
            sizes = (heads, kv_heads, kv_heads, heads)
            seconds = sum(self.rates.exchange(size * each, layout.context, layout.tensor) for size in sizes)
        return Passes(Seconds(context=seconds), Seconds(context=seconds))

    def embedding(self) -> Passes:
        """Lookup and its sum over the tensor axis; backward its scattered gradient."""
        size = self.tokens * self.model.d_model * self.layout.element
        return Passes(
            Seconds(memory=self.rates.stream(2 * size, ops=2), tensor=self.stream_sum()),
            Seconds(memory=self.rates.stream(3 * size, ops=2)),
        )

    def readout(self) -> Passes:
        """Final norm, logits and loss; the gradient's two products are in the backward pass, wherever they run."""
        vocab, d, layout = self.model.vocab_size // self.layout.tensor, self.model.d_model, self.layout
        element = layout.element
        forward = self.rates.product(self.tokens, vocab, d, element)
        backward = self.rates.product(self.tokens, d, vocab, element)
        backward += self.rates.product(vocab, d, self.tokens, element)
        logits = float(self.tokens) * vocab
        pieces = {"reference": 0.0, "fused": max(1.0, logits / FUSED_LOGITS), "liger": max(1.0, vocab / d)}[layout.loss]
        passes = logits * (LIGER_LOGIT_BYTES if layout.loss == "liger" else LOGIT_BYTES)
        passes += pieces * vocab * d * (2 * element + 8)  # a piece's gradient of the weight, added in fp32
        return Passes(
            Seconds(products=forward, memory=self.rates.stream(2 * self.stream + passes, ops=10)),
            Seconds(products=backward, memory=self.rates.stream(3 * self.stream), tensor=self.stream_sum()),
        )
