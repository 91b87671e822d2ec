"""What stands before, between and after the blocks: embeddings and norms; the readout and the loss."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megamup.plan.activations import add_norm
from megamup.plan.setting import Setting
from megamup.plan.tape import Footprint, Op, Tape

LOGITS_AT_A_TIME = {"cpu": 2**21, "cuda": 2**25}
"""Of the fused cross-entropy (``megamup.parallel.loss``)."""


@dataclass(frozen=True)
class End:
    kept: int
    """From the forward to the backward pass."""
    forward: int
    """Most during the forward pass."""
    backward: int
    """Most during the backward pass, gradients of its weights included."""
    weights: int
    """Gradients of weights after it; none where they are added to those there are."""
    logits: int = 0
    """Of `forward` or `backward`: logits, and their softmax or gradient."""
    products: tuple[tuple[int, int], ...] = ()
    """As a block's (`megamup.plan.tape.Footprint`); gradients of an end fill no bucket before it is over."""


@lru_cache(maxsize=4096)
def embedding(at: Setting, summed: bool) -> End:
    """Tokens to the residual stream; its gradient is dense, over the whole vocabulary."""
    model = at.model
    weight = model.vocab_size // at.tensor * model.d_model * at.weight_bytes
    looked_up = at.tokens * model.d_model * at.weight_bytes
    tables = (model.max_seq_len if model.positions == "learned" else 0) + model.token_types
    positions = tables * model.d_model * at.weight_bytes
    kept = 8 * at.tokens * (2 if at.tensor > 1 else 1) + (at.tokens if at.tensor > 1 else 0)
    backward = kept + at.stream + (looked_up if at.tensor > 1 or at.casts else 0) + weight + positions
    forward = kept + looked_up + at.whole + (at.stream if at.tensor > 1 or positions else 0)
    if model.norm_place == "after":
        tape = Tape("x", at.stream)
        add_norm(tape, at, "x", "embedding_norm")
        norm = tape.footprint()
        forward, backward = max(forward, kept + norm.forward), max(backward, kept + norm.backward)
        kept += norm.kept
    return End(kept, forward, backward, 0 if summed else weight + positions)


@lru_cache(maxsize=4096)
def memory_norm(at: Setting) -> End:
    """The encoder's last norm, whose output stays for the decoder's blocks."""
    tape = Tape("x", at.stream)
    add_norm(tape, at, "x", "final_norm")
    norm = tape.footprint()
    return End(norm.kept + at.stream, norm.forward, norm.backward, 0)


@lru_cache(maxsize=4096)
def head(at: Setting, summed: bool) -> End:
    """What norms or transforms the last block's output, the readout and the loss."""
    model, tape, x = at.model, Tape("x", at.stream, summed=summed), "x"
    if model.norm_place == "before":
        x = add_norm(tape, at, x, "final_norm")
    if model.arch == "bert":
        add_transform(tape, at, x)
    before = tape.footprint()
    rows = model.vocab_size // at.tensor  # of the readout that this rank has
    copied = rows * model.d_model * at.bytes_each if at.casts else 0
    gradient = rows * model.d_model * at.weight_bytes
    if at.backends["cross_entropy"] == "reference":
        return reference(at, before, copied, gradient, summed)
    return fused(at, before, copied, gradient, summed)


def add_transform(tape: Tape, at: Setting, x: str) -> str:
    """`megamup.models.heads.Transform`: a product with a whole weight, GELU, a norm."""
    model, size = at.model, at.model.d_model**2
    copies, weight = 2 * size if at.casts else 0, size * at.weight_bytes
    y = tape.add(
        Op((x,), "transformed", at.stream, saves=(x,), copies=copies, backward_scratch=copies, weight=weight, dear=True)
    )
    if model.bias:
        y = tape.add(Op((y,), "transformed+bias", at.stream, passes=True))
    y = tape.add(Op((y,), "activated", at.stream, saves=(y,)))
    return add_norm(tape, at, y, "transform_norm")


def reference(at: Setting, before: Footprint, copied: int, gradient: int, summed: bool) -> End:
    """Logits, then their softmax in fp32, which is kept; backward its gradient beside it."""
    model = at.model
    size = at.tokens * (model.vocab_size // at.tensor) * at.bytes_each
    exact = size * 4 // at.bytes_each
    multiplied = at.multiplies_logits
    hidden = at.whole
    base = before.kept + hidden + copied
    kept = base + exact
    forward = base + size + max(exact, size if multiplied else 0)
    converted = size if at.bytes_each < 4 else 0
    softmax = kept + exact + converted
    products = kept - exact + size + hidden + gradient + copied
    multiply = kept - exact + 2 * size if multiplied else 0
    weights = 0 if summed else gradient
    backward = max(softmax, multiply, products, before.backward - at.stream + weights + hidden)
    return End(kept, max(before.forward, forward), backward, weights + before.weights, 2 * exact + converted)


def logits_at_a_time(at: Setting, rows: int) -> int:
    """Bytes of logits of ``rows`` words that exist at a time."""
    if at.backends["cross_entropy"] == "liger":  # in as many pieces as the vocabulary is wider than the model, in place
        piece = -(-at.tokens // -(-rows // at.model.d_model))
        return (1 << (piece - 1).bit_length()) * rows * at.bytes_each
    at_a_time = min(at.tokens, max(1, LOGITS_AT_A_TIME[at.device] // rows))
    capped = 2 if at.model.logit_soft_cap is not None else 0  # its slope, and what that is made of
    return at_a_time * rows * (4 * (1 + capped) + (4 if at.bytes_each < 4 else 0))  # product and gradient in 16 bits


def fused(at: Setting, before: Footprint, copied: int, gradient: int, summed: bool) -> End:
    """Loss and gradients together, some rows' logits at a time; the weight's gradient is summed in fp32."""
    model = at.model
    rows = model.vocab_size // at.tensor
    logits = logits_at_a_time(at, rows)
    summed_weight = rows * model.d_model * 4
    of_hidden = at.whole
    piece = rows * model.d_model * 2 if at.bytes_each < 4 else 0  # a piece's product, before it is added
    entered = at.whole if at.split and at.tensor > 1 else 0
    kept = before.kept + of_hidden + summed_weight
    forward = kept + at.stream + entered + copied + max(logits, piece)
    converted = gradient if at.weight_bytes < 4 else 0
    weights = 0 if summed else gradient
    handed = kept + converted + (of_hidden if at.tensor > 1 else 0)
    backward = max(handed, before.backward + weights)
    return End(kept, max(before.forward, forward), backward, weights + before.weights, logits)
