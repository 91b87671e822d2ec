"""What one micro batch costs a rank: seconds of embedding, block and readout, forward and backward, by kind of work.

Products are counted by FLOPs or bytes (a roofline; Williams et al. 2009), everything between them by the bytes that
it reads and writes, where a chain of element-wise operations counts as one, as compiled or fused kernels do it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megamup.flops import Lengths
from megamup.model import Model
from megamup.plan.layout import Layout
from megamup.plan.rates import Rates

LOGIT_BYTES = 60
"""Read and written per logit between its product and its gradient's: the passes in fp32 of megamup/parallel/loss.py
(cast, scale, max, subtract, exp, sum, divide, scale, cast)."""
CAP_BYTES = 48
"""Besides, of a cap (divide, tanh, square, subtract, scale, scale the gradient)."""
LIGER_LOGIT_BYTES = 6
"""The same as LOGIT_BYTES by Liger's kernel (Hsu et al. 2024): read for the maximum and sum, read and written for the
gradient."""
BIASED_SHARE = 0.5
"""Of FlashAttention's rate that torch's memory-efficient kernel reaches, which is xformers' and takes biases (Dao 2023,
figure 4, by eye)."""
BUCKET_PASSES = 12
"""Operations on int64 (queries, keys) that tell which bucket a distance falls into (megamup/models/embeddings.py)."""


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
    """One micro batch of a stack of a model in a layout, on devices of given rates."""

    model: Model
    lengths: Lengths
    layout: Layout
    rates: Rates
    cross: bool = False
    """The stack is a decoder, whose blocks attend to an encoder's output too."""

    @property
    def seq_len(self) -> int:
        return self.lengths[int(self.cross)] if isinstance(self.lengths, tuple) else self.lengths

    @property
    def memory_len(self) -> int:
        return self.lengths[0] if self.cross and isinstance(self.lengths, tuple) else 0

    @property
    def causal(self) -> bool:
        return self.model.causal or self.cross

    @property
    def tokens(self) -> int:
        """That one tensor rank multiplies with its weights."""
        return self.tokens_of(self.seq_len)

    def tokens_of(self, length: int) -> int:
        return self.layout.micro_sequences * length // self.layout.context

    @property
    def stream(self) -> float:
        """Bytes of the residual stream that one rank holds."""
        stretch = self.layout.tensor if self.layout.sequence else 1
        return self.tokens * self.model.d_model * self.layout.element / stretch

    def block(self) -> Passes:
        """A block, what is computed again in the backward pass included."""
        between = self.between()
        plain = self.linears().plus(self.attention()).plus(between).plus(self.exchanges())
        if self.cross:
            plain = plain.plus(self.cross_attention())
        if self.layout.recompute == "selective":
            return Passes(plain.forward, plain.backward.plus(between.forward))
        return Passes(plain.forward, plain.backward.plus(plain.forward, self.layout.recomputed))

    def linears(self) -> Passes:
        """The products with weights, and the tensor axis's traffic (Shoeybi et al. 2019, section 3): forward the row
        layers' sums, backward the column layers'."""
        model, tokens = self.model, self.tokens
        heads, kv_heads = model.n_heads * model.d_head, model.n_kv_heads * model.d_head
        found = self.columns([heads, kv_heads, kv_heads], tokens)
        found = found.plus(self.columns([model.d_ff] * (2 if model.gated else 1), tokens))
        found = found.plus(self.row(heads)).plus(self.row(model.d_ff))
        if self.cross:
            memory = self.tokens_of(self.memory_len)
            found = found.plus(self.columns([heads], tokens)).plus(self.row(heads))
            found = found.plus(self.columns([kv_heads, kv_heads], memory))
        return found

    def columns(self, widths: list[int], tokens: int) -> Passes:
        """Column layers of as many outputs over all ranks, which share an input."""
        t, d = self.layout.tensor, self.model.d_model
        forward = sum(self.product(tokens, n // t, d) for n in widths)
        of_input = sum(self.product(tokens, d, n // t) for n in widths)
        of_weights = sum(self.product(n // t, d, tokens) for n in widths)
        entering = self.gather(tokens) if self.layout.sequence else 0.0
        return Passes(
            Seconds(products=forward, tensor=entering),
            Seconds(products=of_input + of_weights, tensor=self.column_backward(of_input, of_weights, tokens)),
        )

    def row(self, width: int) -> Passes:
        """A row layer of as many inputs over all ranks; with sequence parallelism its gradient is gathered."""
        k, d, tokens = width // self.layout.tensor, self.model.d_model, self.tokens
        leaving = self.gather(tokens)
        forward, backward = (leaving, leaving) if self.layout.sequence else (2 * leaving, 0.0)
        return Passes(
            Seconds(products=self.product(tokens, d, k), tensor=forward),
            Seconds(products=self.product(tokens, k, d) + self.product(d, k, tokens), tensor=backward),
        )

    def product(self, m: int, n: int, k: int) -> float:
        fast = self.rates.product(m, n, k, self.layout.element, fast=True)
        if not self.layout.fp8:
            return fast
        quantized = (m * k + k * n) * (self.layout.element + 1)  # both are read and written in 8 bits before it
        return fast + self.rates.stream(quantized, ops=2)

    def gather(self, tokens: int) -> float:
        """An all-gather or reduce-scatter of so many tokens' stream over the tensor axis."""
        whole = tokens * self.model.d_model * self.layout.element
        return self.rates.gather(whole, self.layout.tensor, 1)

    def stream_sum(self) -> float:
        """The stream's all-reduce; with sequence parallelism a reduce-scatter here and an all-gather there, the same
        bytes."""
        return 2 * self.gather(self.tokens)

    def column_backward(self, of_input: float, of_weights: float, tokens: int) -> float:
        """Seconds that column layers' backward pass waits for the tensor axis.

        The sum of the input's gradient runs behind the weights' products; with sequence parallelism the input, kept
        as a stretch, is gathered behind the input's gradient (Korthikanti et al. 2022, section 4.2.2).
        """
        hidden, once = 1.0 if self.layout.overlap_tensor else 0.0, self.gather(tokens)
        if not self.layout.sequence:
            return max(0.0, 2 * once - hidden * of_weights)
        return max(0.0, once - hidden * of_input) + max(0.0, once - hidden * of_weights)

    @property
    def heads(self) -> float:
        """That a rank attends with, over all its sequences."""
        return self.model.n_heads / self.layout.tensor * self.layout.micro_sequences / self.layout.context

    def attention(self) -> Passes:
        """Scores, softmax and mixing of values of the stack itself."""
        if not self.layout.fused_attention:
            return self.scores(self.seq_len)
        if self.model.positions == "relative":
            return self.flash(self.seq_len, 1.0, BIASED_SHARE).plus(self.biases())
        return self.flash(self.seq_len, 0.5 if self.causal else 1.0)

    def cross_attention(self) -> Passes:
        return self.flash(self.memory_len, 1.0) if self.layout.fused_attention else self.scores(self.memory_len)

    def flash(self, keys: int, visible: float, share: float = 1.0) -> Passes:
        """Fused: 4·s²·d_head FLOPs a head forward, of which a causal mask leaves half, and 2.5 times that backward
        (Dao 2023)."""
        flops = 4.0 * visible * self.heads * self.seq_len * keys * self.model.d_head / share
        forward, backward = (self.rates.flash(factor * flops, keys) for factor in (1.0, 2.5))
        return Passes(Seconds(attention=forward), Seconds(attention=backward))

    def scores(self, keys: int) -> Passes:
        """Every score, each through memory in the softmax."""
        layout, queries = self.layout, self.seq_len
        e, batch = layout.element, max(1, round(self.heads))
        scores = self.rates.product(queries, keys, self.model.d_head, e, batch)
        mixed = self.rates.product(queries, self.model.d_head, keys, e, batch)
        size = batch * float(queries) * keys * e
        dropped = 2.5 if layout.dropout else 0.0  # read, written, and a mask of half the size
        softmax, of_softmax = self.rates.stream((2 + dropped) * size), self.rates.stream((3 + dropped) * size)
        return Passes(Seconds(attention=scores + mixed + softmax), Seconds(attention=2 * (scores + mixed) + of_softmax))

    def biases(self) -> Passes:
        """T5's, looked up in every block; backward the gradient of every sequence's, summed and scattered."""
        pairs = float(self.seq_len) ** 2
        of_heads = pairs * self.model.n_heads / self.layout.tensor / self.layout.context * self.layout.element
        of_sequences = pairs * self.heads * self.layout.element
        forward = BUCKET_PASSES * 8 * pairs + (4 if self.causal else 2) * of_heads
        return Passes(
            Seconds(memory=self.rates.stream(forward, ops=BUCKET_PASSES)),
            Seconds(memory=self.rates.stream(2 * of_sequences + 4 * of_heads, ops=4)),
        )

    def between(self) -> Passes:
        """Norms, residual sums, rotary positions, activation function: bytes read and written."""
        model, t = self.model, self.layout.tensor
        norms, sums = (1, 1) if model.parallel_block else (3, 3) if self.cross else (2, 2)
        heads = (model.n_heads + model.n_kv_heads) * model.d_head
        turned = heads if model.positions == "rotary" else 0
        normed = heads if model.qk_norm else 0
        inner, of_inner = (3, 5) if model.gated else (2, 3)  # two inputs, or one
        sharded = self.tokens * self.layout.element / t
        # a norm: read, write; backward: read input and gradient, write. A residual sum: read two, write; twice each.
        # Of a parallel block the sum is of three, in one.
        read = 2 * norms + (4 if model.parallel_block else 3 * sums)
        of_read = 3 * norms + (4 if model.parallel_block else 3 * sums)
        dropped = (1, 5) if self.layout.dropout else (0, 0)  # masks; backward a pass of its own for each branch
        forward = self.stream * (read + dropped[0]) + sharded * (2 * turned + 2 * normed + inner * model.d_ff)
        backward = self.stream * (of_read + dropped[1]) + sharded * (2 * turned + 3 * normed + of_inner * model.d_ff)
        ops = norms + sums + 2 + (2 if normed else 0)
        return Passes(Seconds(memory=self.rates.stream(forward, ops)), Seconds(memory=self.rates.stream(backward, ops)))

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
            sizes = [size * each for size in (heads, kv_heads, kv_heads, heads)]
            if self.cross:
                of_memory = self.tokens_of(self.memory_len) * layout.element / layout.tensor
                sizes += [heads * each, kv_heads * of_memory, kv_heads * of_memory, heads * each]
            seconds = sum(self.rates.exchange(size, layout.context, layout.tensor) for size in sizes)
        return Passes(Seconds(context=seconds), Seconds(context=seconds))

    def norm(self) -> Passes:
        """One by itself."""
        return Passes(
            Seconds(memory=self.rates.stream(2 * self.stream)), Seconds(memory=self.rates.stream(3 * self.stream))
        )

    def transform(self) -> Passes:
        """BERT's before the readout, whole on every tensor rank: a product, GELU, a norm."""
        d, tokens = self.model.d_model, self.tokens // (self.layout.tensor if self.layout.sequence else 1)
        element, stream = self.layout.element, self.rates.stream(4 * self.stream, ops=2)
        forward = self.rates.product(tokens, d, d, element)
        backward = forward + self.rates.product(d, d, tokens, element)
        return Passes(Seconds(products=forward, memory=stream), Seconds(products=backward, memory=1.5 * stream))

    def embedding(self) -> Passes:
        """Lookup and its sum over the tensor axis; backward its scattered gradient. A norm where those stand last."""
        size = self.tokens * self.model.d_model * self.layout.element
        looked_up = Passes(
            Seconds(memory=self.rates.stream(2 * size, ops=2), tensor=self.stream_sum()),
            Seconds(memory=self.rates.stream(3 * size, ops=2)),
        )
        return looked_up.plus(self.norm()) if self.model.norm_place == "after" else looked_up

    def readout(self) -> Passes:
        """Logits and loss after a norm or a transform; the gradient's two products are in the backward pass, wherever
        they run."""
        vocab, d, layout = self.model.vocab_size // self.layout.tensor, self.model.d_model, self.layout
        element = layout.element
        forward = self.rates.product(self.tokens, vocab, d, element)
        backward = self.rates.product(self.tokens, d, vocab, element)
        backward += self.rates.product(vocab, d, self.tokens, element)
        logits = float(self.tokens) * vocab
        at_a_time = layout.logits_at_a_time
        pieces = {"reference": 0.0, "fused": max(1.0, logits / at_a_time), "liger": max(1.0, vocab / d)}[layout.loss]
        passes = logits * (LIGER_LOGIT_BYTES if layout.loss == "liger" else LOGIT_BYTES)
        if self.model.logit_soft_cap is not None:
            passes += logits * CAP_BYTES
        passes += pieces * vocab * d * (2 * element + 8)  # a piece's gradient of the weight, added in fp32
        normed = 1 if self.model.norm_place == "before" else 0
        found = Passes(
            Seconds(products=forward, memory=self.rates.stream(normed * 2 * self.stream + passes, ops=9 + normed)),
            Seconds(
                products=backward, memory=self.rates.stream(normed * 3 * self.stream, normed), tensor=self.stream_sum()
            ),
        )
        return found.plus(self.transform()) if self.model.arch == "bert" else found
