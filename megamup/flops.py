"""FLOPs per token by named convention, peaks of devices, and MFU.

Every figure names its convention (they differ by 2x on small models), and a device whose peak isn't known here has
none: it is measured (megamup/train/metrics.py) and labelled so, never taken from another card.
"""

from __future__ import annotations

import math
import re
from typing import Literal

from megamup.errors import MegamupError
from megamup.parameters import count, parameters
from megamup.sections import Model

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


def matmul_parameters(model: Model) -> int:
    """Parameters that a token is multiplied with: all but lookup tables and biases; the (tied) readout counts once."""
    biases = sum(parameter.size for parameter in parameters(model).values() if parameter.role == "bias")
    return count(model)["non_embedding"] - biases + model.vocab_size * model.d_model


def flops_per_token(model: Model, seq_len: int, convention: Convention) -> float:
    """FLOPs of forward and backward for one token.

    ``6N``: 6·N with N the non-embedding parameters (Kaplan et al. 2020, section 2.1: no attention scores, no
    readout, no lookup). ``palm``: 6·N + 12·L·H·Q·T with N all parameters that a token is multiplied with, readout
    included (Chowdhery et al. 2022, appendix B; the scores counted without the causal half; biases, which that model
    doesn't have, are added and not multiplied). ``chinchilla``: every matrix product, the softmax and the embedding
    as a one-hot product (Hoffmann et al. 2022, appendix F; here with the true numbers of key-value heads and of
    matrices in the MLP); backward twice the forward. ``chinchilla_non_embedding``: the same without embedding and
    logits, which is what that appendix's table A4 was computed with, whatever its text says.
    """
    if convention == "6N":
        return 6.0 * count(model)["non_embedding"]
    if convention == "palm":
        scores = 12.0 * model.n_layers * model.n_heads * model.d_head * seq_len
        return 6.0 * matmul_parameters(model) + scores
    d, heads, kv_heads = model.d_model, model.n_heads * model.d_head, model.n_kv_heads * model.d_head
    qkv = 2.0 * d * (heads + 2 * kv_heads)
    attention = 2.0 * seq_len * heads + 3.0 * model.n_heads * seq_len + 2.0 * seq_len * heads  # QKᵀ, softmax, ·V
    output = 2.0 * heads * d
    mlp = 2.0 * (2 if model.arch == "gpt" else 3) * d * model.d_ff
    blocks = model.n_layers * (qkv + attention + output + mlp)
    embedding = logits = 2.0 * model.vocab_size * d if convention == "chinchilla" else 0.0
    return 3.0 * (embedding + blocks + logits)


def known_peak(device_name: str, precision: str) -> float | None:
    """Peak FLOP/s of one device, or None where no data sheet figure is known for it."""
    if precision != "bf16" or "MIG" in device_name:  # a slice of a card has a slice of its peak
        return None
    return next((peak for name, peak in BF16_PEAKS.items() if re.search(rf"\b{name}\b", device_name)), None)


def mfu_percent(tokens_per_s: float, model: Model, seq_len: int, peak_flops: float) -> float:
    """Model FLOPs utilization as PaLM defines it: achieved over possible tokens per second, over all devices.

    Where some products are in 8-bit floats the peak stays bf16's, so that MFU goes up as tokens per second do; products
    of two peaks have no MFU of their own (torchtitan reports none for them).
    """
    return 100.0 * tokens_per_s * flops_per_token(model, seq_len, "palm") / peak_flops
