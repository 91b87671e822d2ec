"""What a kernel can compute, as far as the config alone says; whether a machine can run it: `megamup.kernels.choice`.

No torch here: a wrong config is refused before a process group starts, and the planner proposes nothing that a run
would refuse.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # whose checks may ask here
    from megamup.config import Config

BACKENDS: dict[str, tuple[str, ...]] = {
    "attention": ("flash_attn", "sdpa", "flex", "reference"),
    "norm": ("liger", "torch", "reference"),
    "mlp": ("liger", "torch", "reference"),
    "rotary": ("liger", "torch", "reference"),
    "cross_entropy": ("liger", "fused", "reference"),
    "matmul": ("torch", "fp8"),
}
"""The backends of every operation."""

FLASH_WIDEST_HEAD = 256
FLEX_NARROWEST_HEAD = 16
LIGER_WIDEST_ROW = 65_536  # of a norm or an activation, which a kernel holds in one block
LIGER_ACTIVATIONS = ("swiglu", "geglu_tanh")
FP8_MULTIPLE = 16
"""What a GPU's product of 8-bit floats wants every side to be a multiple of."""


def lacks(op: str, backend: str, config: Config) -> str | None:
    """Why ``backend`` can't serve ``op`` of this model on any machine; None if it can."""
    match op, backend:
        case "attention", _:
            return attention_lacks(backend, config)
        case "cross_entropy", "liger":
            return liger_loss_lacks(config)
        case (("mlp" | "norm"), "liger"):
            return liger_row_lacks(op, config)
        case "matmul", "fp8":
            return fp8_lacks(config)
    return None


def refused(config: Config) -> str | None:
    """Why a backend that the config names can't compute its model; None if all can."""
    return next(refusals(config), None)


def refusals(config: Config) -> Iterator[str]:
    for op, backends in BACKENDS.items():
        wanted = str(getattr(config.kernels, op))
        if wanted != "auto" and (reason := lacks(op, wanted, config)) is not None:
            others = [name for name in backends if lacks(op, name, config) is None]
            yield f"kernels.{op}={wanted} can't compute this model: {reason}. What can: {', '.join(others)}"


def attention_lacks(backend: str, config: Config) -> str | None:
    model = config.model
    if backend == "sdpa" and model.attention_soft_cap is not None:
        return f"it has no soft cap, and model.attention_soft_cap is {model.attention_soft_cap:g}"
    if backend == "flex" and model.d_head < FLEX_NARROWEST_HEAD:
        return f"it needs model.d_head of {FLEX_NARROWEST_HEAD} or more, which is {model.d_head}"
    return flash_attn_lacks(config) if backend == "flash_attn" else None


def flash_attn_lacks(config: Config) -> str | None:
    model = config.model
    if config.precision != "bf16":
        return f"it computes in 16 bits only: precision is {config.precision}, set precision=bf16"
    if model.d_head > FLASH_WIDEST_HEAD:
        return f"it takes model.d_head up to {FLASH_WIDEST_HEAD}, which is {model.d_head}"
    if model.positions == "relative":
        return "it adds no biases to scores, and model.positions is relative"
    if config.data.documents and config.kernels.compile:
        return (
            "it has to know how many documents a batch has, and kernels.compile=true wants one number for all batches"
        )
    return None


def liger_loss_lacks(config: Config) -> str | None:
    model, tensor = config.model, config.parallel.tensor
    if tensor > 1:
        return f"its vocabulary is whole on each rank, parallel.tensor={tensor} cuts it"
    if model.logit_soft_cap is not None:
        return f"it is asked for plain logits here, and model.logit_soft_cap is {model.logit_soft_cap:g}"
    if config.objective.z_loss:
        return f"its loss would hold the z-loss, and objective.z_loss is {config.objective.z_loss:g}"
    return None


def liger_row_lacks(op: str, config: Config) -> str | None:
    model = config.model
    if op == "mlp" and model.activation not in LIGER_ACTIVATIONS:
        return f"it has {' and '.join(LIGER_ACTIVATIONS)}, and model.activation is {model.activation}"
    row = model.d_model if op == "norm" else model.d_ff // config.parallel.tensor
    if row > LIGER_WIDEST_ROW:
        return f"it takes rows of up to {LIGER_WIDEST_ROW} elements, these have {row}"
    return None


def fp8_lacks(config: Config) -> str | None:
    model, tensor = config.model, config.parallel.tensor
    sides = {
        "model.d_model": model.d_model,
        "model.n_heads · model.d_head / parallel.tensor": model.n_heads * model.d_head // tensor,
        "model.n_kv_heads · model.d_head / parallel.tensor": model.n_kv_heads * model.d_head // tensor,
        "model.d_ff / parallel.tensor": model.d_ff // tensor,
        "data.seq_len · batch.micro_sequences (1 where it is not set) / parallel.context": config.seq_len
        * (config.batch.micro_sequences or 1)
        // config.parallel.context,
        "objective.decoder_len · batch.micro_sequences (1 where it is not set) / parallel.context": config.decoder_len
        * (config.batch.micro_sequences or 1)
        // config.parallel.context,
    }
    for key, side in sides.items():
        if side % FP8_MULTIPLE:
            return f"it needs products whose sides are multiples of {FP8_MULTIPLE}: {key} is {side}"
    return None
