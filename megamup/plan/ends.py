"""What stands before and after the blocks: the embedding; the final norm, the readout and the loss."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megamup.plan.activations import Setting, add_norm
from megamup.plan.tape import Tape

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
    logits: int
    """Of `forward` or `backward`: logits, and their softmax or gradient."""


@lru_cache(maxsize=4096)
def embedding(at: Setting, summed: bool) -> End:
    """Tokens to the residual stream; its gradient is dense, over the whole vocabulary."""
    model = at.model
    weight = model.vocab_size // at.tensor * model.d_model * at.weight_bytes
    looked_up = at.tokens * model.d_model * at.weight_bytes
    positions = model.max_seq_len * model.d_model * at.weight_bytes if model.arch == "gpt" else 0
    kept = 8 * at.tokens * (2 if at.tensor > 1 else 1) + (at.tokens if at.tensor > 1 else 0)
    backward = kept + at.stream + (looked_up if at.tensor > 1 or at.casts else 0) + weight + positions
    forward = kept + looked_up + at.whole + (at.stream if at.tensor > 1 or positions else 0)
    return End(kept, forward, backward, 0 if summed else weight + positions, 0)


@lru_cache(maxsize=4096)
def head(at: Setting, summed: bool) -> End:
    """Final norm, readout and loss, from the last block's output on."""
    tape = Tape("x", at.stream)
    hidden_name = add_norm(tape, at, "x", "final_norm")
    norm = tape.footprint()
    model = at.model
    rows = model.vocab_size // at.tensor  # of the readout that this rank has
    copied = rows * model.d_model * at.bytes_each if at.casts else 0
    gradient = rows * model.d_model * at.weight_bytes
    assert hidden_name == "final_norm"
    if at.backends["cross_entropy"] == "reference":
        return reference(at, norm.kept, norm.backward - at.stream, copied, gradient, summed)
    return fused(at, norm.kept, norm.backward, copied, gradient, summed)


def reference(at: Setting, norm_kept: int, norm_backward: int, copied: int, gradient: int, summed: bool) -> End:
    """Logits, then their softmax in fp32, which is kept; backward its gradient beside it."""
    model = at.model
    size = at.tokens * (model.vocab_size // at.tensor) * at.bytes_each
    exact = size * 4 // at.bytes_each
    multiplied = at.multiplies_logits
    hidden = at.whole
    base = norm_kept + hidden + copied
    kept = base + exact
    forward = base + size + max(exact, size if multiplied else 0)
    converted = size if at.bytes_each < 4 else 0
    softmax = kept + exact + converted
    products = kept - exact + size + hidden + gradient + copied
    multiply = kept - exact + 2 * size if multiplied else 0
    weights = 0 if summed else gradient
    backward = max(softmax, multiply, products, norm_backward + weights + hidden)
    return End(kept, forward, backward, weights, 2 * exact + converted)


def logits_at_a_time(at: Setting, rows: int) -> int:
    """Bytes of logits of ``rows`` words that exist at a time."""
    if at.backends["cross_entropy"] == "liger":  # in as many pieces as the vocabulary is wider than the model, in place
        piece = -(-at.tokens // -(-rows // at.model.d_model))
        return (1 << (piece - 1).bit_length()) * rows * at.bytes_each
    at_a_time = min(at.tokens, max(1, LOGITS_AT_A_TIME[at.device] // rows))
    return at_a_time * rows * (4 + (2 if at.bytes_each < 4 else 0))


def fused(at: Setting, norm_kept: int, norm_backward: int, copied: int, gradient: int, summed: bool) -> End:
    """Loss and gradients together, some rows' logits at a time; the weight's gradient is summed in fp32."""
    model = at.model
    rows = model.vocab_size // at.tensor
    logits = logits_at_a_time(at, rows)
    summed_weight = rows * model.d_model * 4
    of_hidden = at.whole
    piece = rows * model.d_model * 2 if at.bytes_each < 4 else 0  # a piece's product, before it is added
    entered = at.whole if at.split and at.tensor > 1 else 0
    kept = norm_kept + of_hidden + summed_weight
    forward = kept + at.stream + entered + copied + max(logits, piece)
    converted = gradient if at.weight_bytes < 4 else 0
    weights = 0 if summed else gradient
    handed = kept + converted + (of_hidden if at.tensor > 1 else 0)
    return End(kept, forward, max(handed, norm_backward + weights), weights, logits)
