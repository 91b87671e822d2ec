"""FLOPs per token by named convention, peaks of devices, and MFU.

Every figure names its convention (they differ by 2x on small models), and a device whose peak isn't known here has
none: it is measured (megamup/train/metrics.py) and labelled so, never taken from another card.
"""

from __future__ import annotations

import math
import re
from typing import Literal

from megamup.errors import MegamupError
from megamup.model import Model
from megamup.parameters import Parameter, parameters

Convention = Literal["6N", "palm", "chinchilla", "chinchilla_non_embedding"]

# Dense bf16 peaks in FLOP/s from the vendors' data sheets, without sparsity, by a part of the device's name that
# distinguishes it; the first that fits counts. fp32 without tensor cores is not listed: it is measured.
BF16_PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "A100": 312e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
}


def training_flops(parameters: float, tokens: float) -> float:
    """C = 6·N·D, forward and backward (Kaplan et al. 2020, section 2.1); N as the caller counts it.

    Raises:
        MegamupError: a number that isn't finite and above 0.
    """
    for name, value in (("parameters", parameters), ("tokens", tokens)):
        if not 0 < value < math.inf:
            raise MegamupError(f"{name}: {value!r} is no amount; expected a finite number above 0")
    return 6.0 * parameters * tokens


Lengths = int | tuple[int, int]
"""Tokens of a sequence; of an encoder-decoder, those of either stack."""


def flops_per_token(model: Model, seq_len: Lengths, convention: Convention) -> float:
    """FLOPs of forward and backward for one token.

    ``6N``: 6·N with N the non-embedding parameters (Kaplan et al. 2020, section 2.1: no attention scores, no
    readout, no lookup; of experts those that a token goes to). ``palm``: 6·N + 12·L·H·Q·T with N all parameters that a
    token is multiplied with, readout included (Chowdhery et al. 2022, appendix B; the scores counted without the causal
    half, and without the saving of windows; biases, which that model doesn't have, are added and not multiplied).
    ``chinchilla``: every matrix product, the softmax and the embedding as a one-hot product (Hoffmann et al. 2022,
    appendix F; here with the true numbers of key-value heads and of matrices in the MLP); backward twice the forward.
    ``chinchilla_non_embedding``: the same without embedding and logits, which is what that appendix's table A4 was
    computed with, whatever its text says.

    Of an encoder-decoder it is the mean over the tokens that both stacks read: a parameter counts for the tokens that
    it is multiplied with (keys and values of cross-attention with the encoder's), the readout for the decoder's.
    """
    within, across = seq_len if isinstance(seq_len, tuple) else (seq_len, 0)
    if convention == "6N":
        outside = ("embedding.", "readout.")
        weights = sum(
            met(p, model, within, across) for p in parameters(model).values() if not p.name.startswith(outside)
        )
        return 6.0 * weights / (within + across)
    if convention == "palm":
        multiplied = [p for p in parameters(model).values() if p.role != "bias" and not lookup(p)]
        readout = model.vocab_size * model.d_model * (across or within)
        weights = sum(met(p, model, within, across) for p in multiplied) + readout
        return (6.0 * weights + 12.0 * model.n_heads * model.d_head * pairs(model, within, across)) / (within + across)
    embedding = logits = 0.0
    if convention == "chinchilla":
        embedding = 2.0 * model.vocab_size * model.d_model * (within + across)
        logits = 2.0 * model.vocab_size * model.d_model * (across or within)
    multiplied = [p for p in parameters(model).values() if p.in_block and p.role not in ("bias", "gain")]
    products = 2.0 * sum(met(p, model, within, across) for p in multiplied)
    heads = model.n_heads * model.d_head
    scores = (4.0 * heads + 3.0 * model.n_heads) * pairs(model, within, across)  # QKᵀ and ·V, softmax
    return 3.0 * (embedding + products + scores + logits) / (within + across)


def lookup(parameter: Parameter) -> bool:
    """Not multiplied with a token: tables, the readout (counted by itself, as it may be tied), one product a text."""
    return parameter.name.startswith(("embedding.", "readout.", "pooler.", "pair."))


def met(parameter: Parameter, model: Model, within: int, across: int) -> float:
    """Elements of a parameter times the tokens of a sequence that meet them."""
    share = 1.0
    if model.moe is not None and ".moe.experts." in parameter.name:
        share = model.moe.top_k / model.moe.experts
    of_memory = ".cross.key." in parameter.name or ".cross.value." in parameter.name
    decoder = parameter.name.startswith("decoder.") and not of_memory
    return parameter.size * share * (across if decoder else within)


def pairs(model: Model, within: int, across: int) -> float:
    """Pairs of query and key in a sequence, over all blocks."""
    if model.arch != "t5":
        return float(model.n_layers) * within**2
    assert model.n_decoder_layers is not None
    return float(model.n_layers) * within**2 + float(model.n_decoder_layers) * across * (across + within)


def known_peak(device_name: str, precision: str) -> float | None:
    """Peak FLOP/s of one device, or None where no data sheet figure is known for it."""
    if precision != "bf16" or "MIG" in device_name:  # a slice of a card has a slice of its peak
        return None
    return next((peak for name, peak in BF16_PEAKS.items() if re.search(rf"\b{name}\b", device_name)), None)


def mfu_percent(tokens_per_s: float, model: Model, seq_len: Lengths, peak_flops: float) -> float:
    """Model FLOPs utilization as PaLM defines it: achieved over possible tokens per second, over all devices.

    Where some products are in 8-bit floats the peak stays bf16's, so that MFU goes up as tokens per second do; products
    of two peaks have no MFU of their own (torchtitan reports none for them).
    """
    return 100.0 * tokens_per_s * flops_per_token(model, seq_len, "palm") / peak_flops
