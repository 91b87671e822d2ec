"""What a rank computes with at a time: all that the bytes of its activations depend on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from megamup import kernel_rules
from megamup.config import Config, micro_batches
from megamup.model import Model
from megamup.mup import readout_multiplier
from megamup.parameters import Stack

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Setting:
    """A stack of a model in a layout."""

    model: Model
    seq_len: int
    """Of the stack."""
    memory_len: int
    """Of the other stack, to whose output the blocks attend; 0: they don't."""
    causal: bool
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
    def of(cls, config: Config, stack: Stack, world_size: int, zero_stage: int, device: Device) -> Setting:
        parallel, mixed = config.parallel, config.precision == "bf16"
        return cls(
            model=config.model,
            seq_len=config.decoder_len if stack.cross else config.seq_len,
            memory_len=config.seq_len if stack.cross else 0,
            causal=config.model.causal or stack.cross,
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
    def memory_tokens(self) -> int:
        return self.sequences * self.memory_len // self.context

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
    def memory(self) -> int:
        """Bytes of the other stack's output."""
        return self.memory_tokens // (self.tensor if self.split else 1) * self.model.d_model * self.bytes_each

    @cached_property
    def whole(self) -> int:
        """Bytes of as many features in all tokens of the sharded region."""
        return self.tokens * self.model.d_model * self.bytes_each

    @cached_property
    def pairs(self) -> int:
        """Pairs of query and key of one sequence, over the heads that this rank attends with."""
        return self.seq_len**2 * (self.model.n_heads // self.tensor // self.context)


def backends(config: Config, device: Device) -> dict[str, str]:
    """What ``auto`` stands for, as far as memory goes: flash-attn, SDPA and flex attention keep the same."""
    kernels, on_gpu = config.kernels, device == "cuda"

    def liger(op: str) -> bool:
        return on_gpu and kernel_rules.lacks(op, "liger", config) is None

    fuses = kernels.compile  # what Liger's kernels do, torch's compiler does
    names = {
        "attention": "sdpa",
        "norm": "liger" if liger("norm") and not fuses else "torch",
        "mlp": "liger" if liger("mlp") and not fuses else "torch",
        "rotary": "liger" if liger("rotary") and not fuses else "torch",
        "cross_entropy": "liger" if liger("cross_entropy") else "fused",
    }
    return {op: name if getattr(kernels, op) == "auto" else getattr(kernels, op) for op, name in names.items()}
