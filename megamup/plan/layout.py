"""How a step is laid out over ranks and in time, as the step's time sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from megamup.config import Config, micro_batches
from megamup.deepspeed_file import load_deepspeed
from megamup.errors import MegamupError
from megamup.plan.ends import LOGITS_AT_A_TIME
from megamup.plan.setting import Device, backends


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes, micro batches, and what runs behind what.

    Defaults are this program's; others, whose published steps the model is tested on, differ there.
    """

    tensor: int
    pipeline: int
    context: int
    data: int
    sequence: bool
    """Sequence parallelism beside ``tensor`` (Korthikanti et al. 2022)."""
    zero: int
    micro_sequences: int
    micro_batches: int
    recompute: Literal["none", "selective", "full"] | int
    precision: Literal["fp32", "bf16"]
    fp8: bool
    fused_attention: bool
    """Scores never reach the memory (Dao 2023), and their masked half isn't computed."""
    loss: str
    """Backend of ``kernels.cross_entropy``."""
    overlap_data: bool
    """Gradients are reduced behind the backward pass, and ZeRO-3's weights gathered behind products."""
    gradient_bytes: int
    """Of one number that crosses the data axis."""
    casts_weights: bool
    """Weights are kept in fp32 and cast to bf16 in every forward pass."""
    overlap_tensor: bool = True
    """The tensor axis's backward traffic of column-parallel layers runs behind products (parallel/collectives.py)."""
    scatters_gradients: bool = False
    """ZeRO 1 and 2 reduce a gradient to the rank that steps it alone; DeepSpeed 0.19.8 reduces it on all."""
    overlap_pipeline: bool = False
    """Activations travel between stages while these compute."""
    virtual_stages: int = 1
    """Pieces of the model on each pipeline rank (Narayanan et al. 2021, section 2.2.2)."""
    dropout: bool = False
    """Of attention's weights and of both branches' outputs."""
    logits_at_a_time: int = LOGITS_AT_A_TIME["cuda"]
    """Of the loss backend ``fused``; every such piece adds to the weight's gradient. Liger's has as many rows as take
    d_model each of them."""
    context_kind: Literal["exchange", "gather"] = "exchange"
    """``exchange``: all-to-all of stretches for heads (Jacobs et al. 2023); ``gather``: keys and values of the whole
    sequence on every rank (Llama team 2024, section 3.3.2)."""

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def replicas(self) -> int:
        """Ranks with the same weights, over which gradients are reduced."""
        return self.data * self.context

    @property
    def element(self) -> int:
        """Bytes of an activation."""
        return 2 if self.precision == "bf16" else 4

    @property
    def recomputed(self) -> float:
        """Share of the blocks whose forward pass is done twice."""
        if self.recompute in ("none", "selective"):
            return 0.0
        return 1.0 if self.recompute == "full" else 1.0 / int(self.recompute)


def layout_of(config: Config, world_size: int, device: Device = "cuda") -> Layout:
    """The layout that a config has on a number of ranks; ``device`` decides which kernels it has for ``auto``.

    Raises:
        MegamupError: the ranks or the batch can't be split so, or state is kept by the host.
    """
    micro, count = micro_batches(config, world_size)
    parallel, mixed, kernels = config.parallel, config.precision == "bf16", backends(config, device)
    zero = zero_section(config)
    stage = config.zero_stage
    for key in ("offload_optimizer", "offload_param"):
        if zero.get(key, {}).get("device", "none") != "none":
            raise MegamupError(
                f"deepspeed={config.deepspeed}: {key}: the time of a step that waits for the host isn't predicted; "
                "take a file without it, or leave --cluster out"
            )
    return Layout(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        context=parallel.context,
        data=parallel.data(world_size),
        sequence=parallel.sequence,
        zero=stage,
        micro_sequences=micro,
        micro_batches=count,
        recompute=config.train.recompute,
        precision=config.precision,
        fp8=config.kernels.matmul == "fp8",
        fused_attention=kernels["attention"] != "reference",
        loss=kernels["cross_entropy"],
        overlap_data=parallel.pipeline == 1 and overlaps(zero, stage, mixed),
        gradient_bytes=gradient_bytes(config, 2 if mixed and stage > 0 else 4),
        casts_weights=mixed and stage == 0,
        overlap_tensor=config.kernels.matmul == "torch",
        logits_at_a_time=LOGITS_AT_A_TIME[device],
    )


def gradient_bytes(config: Config, otherwise: int) -> int:
    """Of one number of the gradients as it is sent: DeepSpeed's ``communication_data_type``, default their own."""
    named = load_deepspeed(config.deepspeed).get("communication_data_type")
    return otherwise if named is None else 4 if str(named).lower() in ("fp32", "float", "float32") else 2


def zero_section(config: Config) -> dict[str, Any]:
    section = load_deepspeed(config.deepspeed).get("zero_optimization", {})
    return section if isinstance(section, dict) else {}


def overlaps(zero: dict[str, Any], stage: int, mixed: bool) -> bool:
    """Whether gradients are reduced during the backward pass: at ZeRO 0 by ours (megamup/train/overlap.py), else by
    DeepSpeed's ``overlap_comm``, by default at ZeRO 3 only, and in bf16 not at ZeRO 1."""
    asked = zero.get("overlap_comm")
    wanted = stage == 3 if asked is None else bool(asked)
    return stage == 0 or (wanted and not (stage == 1 and mixed))
