"""The sections of a config: every key with its type, its default and what it does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from megamup.errors import MegamupError
from megamup.fields import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section


class Run(Section):
    name: Annotated[str, Field(min_length=1, coerce_numbers_to_str=True)] = "run"
    """Name of the run's folder below ``dir``."""
    dir: str = "runs"
    """Folder that holds run folders."""
    seed: NonNegative = 1234
    """Seed of the initial weights and of the order of samples."""

    @property
    def folder(self) -> Path:
        return Path(self.dir) / self.name


class Base(Section):
    """The proxy on which the hyperparameters were found; a key left out equals the model's own (ratio 1)."""

    d_model: Positive | None = None
    d_ff: Positive | None = None
    """Default: the model's, scaled as ``d_model`` is."""
    n_heads: Positive | None = None
    n_kv_heads: Positive | None = None
    """Default: as many query heads to a key head as the model has. Fixed heads on a wider model change that number,
    and with it the initial keys and values."""
    d_head: Positive | None = None
    """Default: ``d_model / n_heads`` where the base gives ``n_heads`` and the model's heads fill d_model too, else the
    model's (more heads of the same size)."""
    n_layers: Positive | None = None
    """Depth of the proxy: the ratio of ``mup.depth``'s rules. t5's decoder is taken to grow by the same ratio."""
    batch_tokens: Positive | None = None
    """Tokens in a global batch of the proxy (the table's b)."""
    tokens: Positive | None = None
    """Tokens that the proxy was trained on (the table's d)."""


class RoleValues(Section):
    embedding: NonNegativeFloat = 1.0
    hidden: NonNegativeFloat = 1.0
    residual_out: NonNegativeFloat = 1.0
    readout: NonNegativeFloat = 1.0


class Sigma(RoleValues):
    """Initial standard deviations at the base width (the table's σ)."""

    embedding: NonNegativeFloat = 0.02
    hidden: NonNegativeFloat = 0.02
    residual_out: NonNegativeFloat = 0.02
    readout: NonNegativeFloat = 0.02


class Alpha(RoleValues):
    """Forward multipliers (the table's α)."""

    readout: PositiveFloat = 1.0
    attention: PositiveFloat = 1.0
    """Multiplies the attention logits (an inverse temperature)."""
    activation: PositiveFloat = 1.0
    """u-μP only: multiplies the input of the MLP's activation function."""
    attention_ratio: PositiveFloat = 1.0
    """u-μP only: what attention adds to the residual stream, over what the MLPs add."""


class Eta(RoleValues):
    """Learning rates by role, as multiples of ``optim.lr`` (the table's η)."""

    vector: NonNegativeFloat = 1.0
    """Gains and biases."""


class ZeroInit(Section):
    """Weights that start at zero (Tensor Programs V, appendix D.2)."""

    query: bool = False
    residual_out: bool = False
    readout: bool = False


class Mup(Section):
    parametrization: Literal["mup", "sp", "umup"] = "mup"
    """``sp`` sets every ratio of the table to 1 and attention to 1/√d_head: the control of an experiment.
    ``umup``: unit-scaled μP (Blake et al. 2024), which needs no base width."""
    base: Base = Base()
    depth: Literal["none", "sqrt", "completep"] = "none"
    """How hyperparameters cross depth. ``sqrt``: residual branches over √L (depth-μP, Yang et al. 2023);
    ``completep``: over L (Dey et al. 2025); ``none``: only the initial weights know L (GPT-2)."""
    scale_eps: bool = False
    """Adam's eps over the width ratio, as gradients are (Dey et al. 2025, table 1)."""
    horizon: Literal["tokens", "run"] = "tokens"
    """What Adam's averages keep when batch and length change. ``tokens``: their span in tokens (Malladi et al. 2022);
    ``run``: their share of the run (Mlodozeniec et al. 2025), so that a longer run averages longer."""
    sigma: Sigma = Sigma()
    alpha: Alpha = Alpha()
    eta: Eta = Eta()
    zero_init: ZeroInit = ZeroInit()
    alpha_data: float = 0.0
    """Exponent of the data ratio in the learning rate; -0.12 fits compute-optimal training."""

    @model_validator(mode="after")
    def check_unit_scaling(self) -> Mup:
        """u-μP fixes what others tune: a value given there would have no effect."""
        if self.parametrization == "umup":
            if self.sigma != Sigma():
                raise ValueError("sigma has no effect under parametrization=umup, which draws every weight with 1")
            if self.depth != "none":
                raise ValueError(f"depth={self.depth} has no effect under parametrization=umup, which has its own rule")
            if self.scale_eps:
                raise ValueError("scale_eps has no effect under parametrization=umup, which knows no base width")
            shape = [key for key, value in self.base if value is not None and key not in ("batch_tokens", "tokens")]
            if shape:
                raise ValueError(f"base.{shape[0]} has no effect under parametrization=umup, which needs no base shape")
        elif (self.alpha.activation, self.alpha.attention_ratio) != (1.0, 1.0):
            raise ValueError("alpha.activation and alpha.attention_ratio belong to parametrization=umup")
        return self


class Parallel(Section):
    tensor: Positive = 1
    pipeline: Positive = 1
    context: Positive = 1
    """Ranks that share a sequence (DeepSpeed-Ulysses, Jacobs et al. 2023): each holds a stretch of it, and attention
    exchanges stretches for heads. For sequences whose activations don't fit on one rank."""
    sequence: bool = False
    """Between the tensor-parallel regions each tensor rank keeps its stretch of the sequence only (Korthikanti et al.
    2022): norms and residual stream take 1/tensor of the memory, at the same traffic."""
    expert: Positive = 1
    """Data (and context) ranks that share out the experts of ``model.moe`` (Lepikhin et al. 2021): each holds
    1/expert of them, and tokens travel to the ranks of their experts and back. ZeRO 0 to 2."""

    def data(self, world_size: int) -> int:
        """Number of data-parallel replicas among ``world_size`` ranks."""
        if world_size % self.replica_ranks:
            context = f" x context={self.context}" if self.context > 1 else ""
            raise MegamupError(
                f"parallel: tensor={self.tensor} x pipeline={self.pipeline}{context} = {self.replica_ranks} ranks a "
                f"replica, but {world_size} ranks were started, which is no multiple; start a multiple of "
                f"{self.replica_ranks}"
            )
        data = world_size // self.replica_ranks
        if data * self.context % self.expert:
            raise MegamupError(
                f"parallel.expert={self.expert} does not divide the {data * self.context} ranks that hold a tensor "
                f"shard of a stage (data={data} x context={self.context}); use one of "
                f"{[n for n in range(1, data * self.context + 1) if data * self.context % n == 0]}"
            )
        return data

    @property
    def replica_ranks(self) -> int:
        """Ranks that train on the same samples."""
        return self.tensor * self.pipeline * self.context

    @property
    def label(self) -> str:
        parts = [f"tensor={self.tensor}", f"pipeline={self.pipeline}"]
        parts += [f"{key}={size}" for key, size in (("context", self.context), ("expert", self.expert)) if size > 1]
        return ", ".join([*parts, "sequence"] if self.sequence else parts)

    @model_validator(mode="after")
    def check_sequence(self) -> Parallel:
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence=true has no effect with tensor=1: there is no tensor rank to share it with")
        return self


class Kernels(Section):
    """The backend of each operation, chosen once at the start and written to environment.json. A backend that this
    machine can't run is an error that says why; ``auto`` takes the fastest that it can."""

    attention: Literal["auto", "flash_attn", "sdpa", "flex", "reference"] = "auto"
    norm: Literal["auto", "liger", "torch", "reference"] = "auto"
    mlp: Literal["auto", "liger", "torch", "reference"] = "auto"
    """The activation between its products."""
    rotary: Literal["auto", "liger", "torch", "reference"] = "auto"
    cross_entropy: Literal["auto", "fused", "liger", "reference"] = "auto"
    """``fused`` and ``liger``: readout and loss in one, a few rows at a time, so that full logits never exist."""
    optimizer: Literal["auto", "torch", "deepspeed"] = "auto"
    """``torch``: its fused AdamW; ``deepspeed``: FusedAdam on CUDA, DeepSpeedCPUAdam where the optimizer's state is on
    the host (ZeRO offload, or no GPU)."""
    matmul: Literal["torch", "fp8"] = "torch"
    """``fp8``: products of the blocks' linear layers, experts' left out, in 8-bit floats, each tensor scaled by its
    largest element at each use (torchao's ``tensorwise`` recipe); needs ``precision: bf16`` and an Ada or Hopper GPU or
    later. A CPU emulates it: the same numbers, no faster."""
    compile: bool = False
    """Compile each block as a region of its own (torch.compile): one graph for all layers, fixed shapes. Costs a minute
    at the first start; kept between runs."""


Share = Annotated[float, Field(gt=0, le=1)]


class Source(Section):
    prefix: str
    weight: PositiveFloat = 1.0
    """Share of the training samples, relative to the other sources' weights."""
    fraction: Share | None = None
    """Default ``data.fraction``."""


Sources = str | Annotated[tuple[Source, ...], Field(min_length=1)]
ValidSets = dict[str, str | tuple[str, ...]]
SET_NAME = re.compile("[A-Za-z0-9_]+")


class Data(Section):
    train: Sources
    """Prefix of a corpus (``PREFIX.json`` and its shards, or Megatron's ``.bin`` and ``.idx``), or a list of
    ``{prefix, weight, fraction}``."""
    valid: Sources | ValidSets | None = None
    """The same, held out, for evaluation; every token counts once, so weights and fractions have no say. Or named
    sets, ``{books: P, code: [P1, P2]}``: the metrics then tell of each (``valid_loss_books``) and of all together."""
    seq_len: Positive | None = None
    """Default ``model.max_seq_len``."""
    fraction: Share = 1.0
    """Train on this share of the samples, for L(N, D): the same ones for every seed, and a smaller share's are among a
    larger one's. Epochs are of the share."""
    documents: bool = False
    """A token attends within its own document only, whose end-of-document token is its last (Grattafiori et al. 2024).
    Positions go on through a sample all the same, as they would in the middle of a longer one."""
    prefetch: Positive = 2
    """Steps that are read ahead of training."""
    cache: str | None = None
    """Folder for the hashes of corpora without a manifest, and of files that were touched; default ``megamup`` in the
    user's cache folder."""

    @property
    def train_sources(self) -> tuple[Source, ...]:
        return listed(self.train)

    @property
    def valid_sets(self) -> dict[str, tuple[str, ...]]:
        """Prefixes by the name of their set; of sources that have none it is ``valid``."""
        if isinstance(self.valid, dict):
            return {name: (found,) if isinstance(found, str) else found for name, found in self.valid.items()}
        return {} if self.valid is None else {"valid": tuple(source.prefix for source in listed(self.valid))}

    @field_validator("valid", mode="before")
    @classmethod
    def check_sets(cls, value: Any) -> Any:
        """One message, where pydantic has one for each member of the union."""
        if value == {}:
            raise ValueError("{}: expected a set by its name, or null for no evaluation")
        for name, found in value.items() if isinstance(value, dict) else ():
            if not isinstance(name, str) or not SET_NAME.fullmatch(name):
                raise ValueError(
                    f"{name!r}: expected a name of letters, digits and _, as it becomes part of valid_loss_NAME"
                )
            prefixes = found if isinstance(found, list | tuple) else [found]
            if not prefixes or not all(isinstance(prefix, str) for prefix in prefixes):
                raise ValueError(f"{name}: {found!r}: expected the prefix of a corpus, or a list of prefixes")
        return value

    @model_validator(mode="after")
    def check_valid(self) -> Data:
        if self.valid is None or isinstance(self.valid, dict):
            return self
        sources = listed(self.valid)
        weights = [source.weight for source in sources]
        if len(set(weights)) > 1:
            raise ValueError(
                f"valid: weights {weights}: every held-out token counts once, so all weights must be equal"
            )
        if any(source.fraction is not None for source in sources):
            raise ValueError("valid: a fraction has no effect: every held-out token counts once; leave it out")
        return self


def listed(sources: Sources) -> tuple[Source, ...]:
    return (Source(prefix=sources),) if isinstance(sources, str) else sources


class Batch(Section):
    global_sequences: Positive = 32
    """Sequences that one optimizer step sees, over all ranks."""
    micro_sequences: Positive | None = None
    """Sequences that one rank sees at a time; default: its share of the batch, in ``pipeline`` parts."""


class Optim(Section):
    lr: PositiveFloat = 3e-3
    """Peak learning rate at the base; the table turns it into each group's."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    decay_mode: Literal["torch", "width", "independent", "constant"] = "torch"
    """``torch``: p -= lr·λ·p with the parameter's own lr. ``width``: the same with λ·n where the table's lr has 1/n
    (the mup package; CompleteP). ``independent``: p -= λ·(lr(t)/lr_peak)·p (Loshchilov & Hutter 2019; Wortsman et
    al. 2023). ``constant``: p -= λ·p, whatever the rate and its schedule."""
    grad_clip: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 switches clipping off."""


class Schedule(Section):
    kind: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """After warm-up: constant; linear or cosine to ``min_ratio``; wsd (constant, then linear decay)."""
    warmup_steps: NonNegative = 0
    min_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Last learning rate as a share of the peak (not for ``constant``)."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """wsd: share of all steps spent in the decay (Hägele et al. 2024)."""


class Train(Section):
    steps: Positive
    init: str | None = None
    """Folder of weights to start from (``tools/import_hf.py`` writes it); default: they are drawn. It has to stay
    while the run goes on."""
    log_every: Positive = 10
    eval_every: NonNegative = 0
    """Steps between evaluations; 0: never in between. With ``data.valid`` set, the last step is always evaluated."""
    eval_sequences: Positive | None = None
    """Sequences of an evaluation, from the start of ``data.valid`` or of each of its sets, rounded up to whole batches;
    default all."""
    save_every: NonNegative = 0
    """Steps between checkpoints; 0: none. Otherwise the last step is saved too."""
    recompute: Literal["none", "selective", "full"] | Positive = "none"
    """Activations that the backward pass computes again instead of keeping them. ``selective``: all but the results of
    matrix products and attention; ``full``: all but a block's input; a number k: all but that of every k-th block."""
    profile: tuple[Positive, Positive] | None = None
    """First and last step of a profile, such as ``[10, 15]``: a trace, where the time went, and memory over time, in
    the run's folder under ``profile/``."""
    monitor_every: NonNegative = 100
    """Steps between measurements of what μP keeps (updates, logits, activations; megamup/train/monitor.py); 0: none."""
    flops_convention: Literal["6N", "palm", "chinchilla", "chinchilla_non_embedding"] = "palm"
    """How ``flops`` in metrics.jsonl counts (see megamup/flops.py). MFU is always PaLM's."""

    @field_validator("recompute", mode="before")
    @classmethod
    def check_recompute(cls, value: Any) -> Any:
        """One message, where pydantic has one for each member of the union."""
        if value in ("none", "selective", "full") or (type(value) is int and value > 0):
            return value
        raise ValueError(f"expected none, selective, full or a number of blocks from 1 on, not {value!r}")


class Log(Section):
    wandb: bool = False
    """Copy metrics to Weights & Biases; offline without a key."""
    tensorboard: bool = False
    forecast: str | None = None
    """A fit file (``tools/scaling.py fit --output``): the run says its predicted final loss, and warns when its
    training loss leaves the band that the fitted runs' curves predict. It changes nothing in the training."""
