"""A run as one frozen object: YAML files merged left to right, then ``a.b=c``, then checked as a whole.

Every rule about which values go together stands in this file, so that a wrong config is one message before any
process group exists. No torch here: the planner, the preprocessing and the launcher read configs too.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megamup import shipped
from megamup.deepspeed_file import load_deepspeed, zero_stage
from megamup.errors import MegamupError

Positive = Annotated[int, Field(gt=0, strict=True)]
NonNegative = Annotated[int, Field(ge=0, strict=True)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


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


class Model(Section):
    arch: Literal["gpt", "llama"]
    """``gpt``: learned positions, LayerNorm, GELU, biases, tied. ``llama``: RoPE, RMSNorm, SwiGLU, GQA, untied."""
    d_model: Positive
    n_layers: Positive
    n_heads: Positive
    vocab_size: Positive
    """Rows of the embedding; at least the tokenizer's vocabulary, and divisible by ``parallel.tensor``."""
    max_seq_len: Positive
    """Longest sequence; the number of learned positions of ``gpt``."""
    n_kv_heads: Positive = None  # type: ignore[assignment]
    """Key and value heads (grouped-query attention); default ``n_heads``."""
    d_head: Positive = None  # type: ignore[assignment]
    """Default ``d_model / n_heads``."""
    d_ff: Positive = None  # type: ignore[assignment]
    """Default ``4 d_model`` (gpt), or ``8/3 d_model`` rounded up to a multiple of 16 (llama)."""
    tie_embeddings: bool = None  # type: ignore[assignment]
    """Readout shares the token embedding; default true for gpt, false for llama."""
    bias: bool = None  # type: ignore[assignment]
    """Biases of the linear layers and norms; default true for gpt, false for llama."""
    norm_eps: PositiveFloat = 1e-5
    rope_theta: PositiveFloat = 10_000.0

    @model_validator(mode="before")
    @classmethod
    def fill_defaults(cls, values: Any) -> Any:
        """Fill what follows from other keys; a missing required key is left for pydantic to name."""
        if not isinstance(values, dict):
            return values
        filled = {key: value for key, value in values.items() if value is not None}
        d_model, n_heads, gpt = filled.get("d_model"), filled.get("n_heads"), filled.get("arch") == "gpt"
        filled.setdefault("tie_embeddings", gpt)
        filled.setdefault("bias", gpt)
        if isinstance(n_heads, int):
            filled.setdefault("n_kv_heads", n_heads)
        if isinstance(d_model, int):
            filled.setdefault("d_ff", 4 * d_model if gpt else -(-8 * d_model // 48) * 16)
        if isinstance(d_model, int) and isinstance(n_heads, int) and n_heads > 0 and "d_head" not in filled:
            if d_model % n_heads:
                raise ValueError(f"d_model={d_model} is not divisible by n_heads={n_heads}; change one or set d_head")
            filled["d_head"] = d_model // n_heads
        return filled

    @model_validator(mode="after")
    def check_heads(self) -> Model:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is not divisible by n_kv_heads={self.n_kv_heads}")
        if self.arch == "llama" and self.d_head % 2:
            raise ValueError(f"d_head={self.d_head} is odd; rotary positions turn pairs: use an even d_head")
        return self


class Base(Section):
    """The proxy on which the hyperparameters were found; a key left out equals the model's own (ratio 1)."""

    d_model: Positive | None = None
    d_ff: Positive | None = None
    """Default: the model's, scaled as ``d_model`` is."""
    n_heads: Positive | None = None
    n_kv_heads: Positive | None = None
    """Says how large the proxy was (tools/plan.py); no ratio of the table depends on it."""
    d_head: Positive | None = None
    """Default: ``d_model / n_heads`` where the base gives ``n_heads`` and the model's heads fill d_model too, else the
    model's (more heads of the same size)."""
    n_layers: Positive | None = None
    """Says how large the proxy was (tools/plan.py); the table's L is the model's own depth."""
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

    attention: PositiveFloat = 1.0
    """Multiplies the attention logits."""


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
    parametrization: Literal["mup", "sp"] = "mup"
    """``sp`` sets every ratio of the table to 1 and attention to 1/√d_head: the control of an experiment."""
    base: Base = Base()
    sigma: Sigma = Sigma()
    alpha: Alpha = Alpha()
    eta: Eta = Eta()
    zero_init: ZeroInit = ZeroInit()
    alpha_data: float = 0.0
    """Exponent of the data ratio in the learning rate; -0.12 fits compute-optimal training."""


class Parallel(Section):
    tensor: Positive = 1
    pipeline: Positive = 1

    def data(self, world_size: int) -> int:
        """Number of data-parallel replicas among ``world_size`` ranks."""
        model_ranks = self.tensor * self.pipeline
        if world_size % model_ranks:
            raise MegamupError(
                f"parallel: tensor={self.tensor} x pipeline={self.pipeline} = {model_ranks} ranks a replica, but "
                f"{world_size} ranks were started, which is no multiple; start a multiple of {model_ranks}"
            )
        return world_size // model_ranks


class Source(Section):
    prefix: str
    weight: PositiveFloat = 1.0


Sources = str | Annotated[tuple[Source, ...], Field(min_length=1)]


class Data(Section):
    train: Sources
    """Shard prefix (``.bin`` and ``.idx``), or a list of ``{prefix, weight}``."""
    valid: Sources | None = None
    """The same, held out, for evaluation; every token counts once, so weights have no say."""
    seq_len: Positive | None = None
    """Default ``model.max_seq_len``."""


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
    decay_mode: Literal["torch", "independent"] = "torch"
    """``torch``: p -= lr·λ·p. ``independent``: p -= (lr(t)/lr_peak)·λ·p (Wortsman et al. 2023)."""
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
    log_every: Positive = 10
    eval_every: NonNegative = 0
    """Steps between evaluations; 0: never in between. With ``data.valid`` set, the last step is always evaluated."""
    eval_sequences: Positive | None = None
    """Sequences of an evaluation, from the start of ``data.valid``, rounded up to whole batches; default all."""
    save_every: NonNegative = 0
    """Steps between checkpoints; 0: none. Otherwise the last step is saved too."""
    flops_convention: Literal["6N", "palm", "chinchilla"] = "palm"
    """How ``flops`` in metrics.jsonl counts (see megamup/flops.py). MFU is always PaLM's."""


class Log(Section):
    wandb: bool = False
    """Copy metrics to Weights & Biases; offline without a key."""
    tensorboard: bool = False


class Config(Section):
    model: Model
    data: Data
    train: Train
    run: Run = Run()
    mup: Mup = Mup()
    parallel: Parallel = Parallel()
    batch: Batch = Batch()
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    precision: Literal["fp32", "bf16"] = "fp32"
    """``bf16``: matrix products in bf16; master weights, gradient accumulation and optimizer in fp32."""
    deepspeed: str = "ds_configs/zero0.json"
    """A DeepSpeed config with ZeRO keys; everything else belongs to this config."""
    log: Log = Log()

    @property
    def seq_len(self) -> int:
        return self.data.seq_len or self.model.max_seq_len

    @property
    def batch_tokens(self) -> int:
        return self.batch.global_sequences * self.seq_len

    @property
    def zero_stage(self) -> int:
        return zero_stage(load_deepspeed(self.deepspeed))

    @model_validator(mode="after")
    def check_combinations(self) -> Config:
        model, tensor, pipeline = self.model, self.parallel.tensor, self.parallel.pipeline
        for key in ("n_heads", "n_kv_heads", "d_ff", "vocab_size"):
            size = getattr(model, key)
            if size % tensor:
                raise ValueError(
                    f"model.{key}={size} is not divisible by parallel.tensor={tensor}; "
                    f"the next that is: {-(-size // tensor) * tensor}"
                )
        if model.n_layers < pipeline:
            raise ValueError(
                f"model.n_layers={model.n_layers} is less than parallel.pipeline={pipeline}: "
                "a stage would hold no layer; use at most one stage a layer"
            )
        if self.seq_len > model.max_seq_len:
            raise ValueError(f"data.seq_len={self.seq_len} is longer than model.max_seq_len={model.max_seq_len}")
        if self.schedule.warmup_steps > self.train.steps:
            raise ValueError(
                f"schedule.warmup_steps={self.schedule.warmup_steps} exceeds train.steps={self.train.steps}"
            )
        if (self.train.eval_every or self.train.eval_sequences) and self.data.valid is None:
            raise ValueError("train.eval_every and train.eval_sequences need data.valid, a held-out shard prefix")
        stage = self.zero_stage  # reads the file, so that a wrong one is found here
        if pipeline > 1 and stage > 1:
            raise ValueError(
                f"deepspeed={self.deepspeed} is ZeRO {stage}, but parallel.pipeline={pipeline} "
                "works with ZeRO 0 or 1 only (DeepSpeed partitions gradients against the pipeline's "
                "accumulation); use ds_configs/zero1.json or pipeline=1"
            )
        return self


def micro_batches(config: Config, world_size: int) -> tuple[int, int]:
    """Return (sequences a rank sees at a time, how often per step) for a number of ranks.

    Raises:
        MegamupError: the global batch can't be split evenly.
    """
    data_size = config.parallel.data(world_size)
    total, pipeline = config.batch.global_sequences, config.parallel.pipeline
    if total % data_size:
        raise MegamupError(
            f"batch.global_sequences={total} is not divisible by {data_size} data-parallel ranks; "
            f"the next that is: {-(-total // data_size) * data_size}"
        )
    share = total // data_size
    whole = [size for size in range(1, share + 1) if share % size == 0]
    micro = config.batch.micro_sequences or max(size for size in whole if size <= max(1, share // pipeline))
    if share % micro:
        raise MegamupError(
            f"batch.micro_sequences={micro} does not divide a rank's share of the batch, {total} / {data_size} = "
            f"{share} sequences; use one of {whole}"
        )
    return micro, share // micro


def load_config(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Config:
    """Merge YAML ``files`` left to right, then ``a.b=c`` overrides, and check the whole.

    Raises:
        MegamupError: one message that lists every wrong key with its value, what was expected and the nearest name.
    """
    merged: dict[str, Any] = {}
    for file in files:
        merge(merged, read_yaml(Path(file)))
    for override in overrides:
        merge(merged, parse_override(override))
    return config_from(merged)


def config_from(values: dict[str, Any]) -> Config:
    """Validate a plain dict; raises MegamupError as `load_config` does."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise MegamupError("\n".join(describe(problem) for problem in error.errors())) from None


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line's ``CONFIG... [a.b=c ...]`` into files and overrides."""
    overrides = [argument for argument in arguments if "=" in argument and not Path(argument).is_file()]
    return [argument for argument in arguments if argument not in overrides], overrides


def read_yaml(path: Path) -> dict[str, Any]:
    found = shipped.find(path)
    if found is None:
        raise MegamupError(f"{path}: no such config file")
    try:
        values = yaml.safe_load(found.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise MegamupError(f"{path}: not readable as YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise MegamupError(f"{path}: expected sections such as `model:`, found {type(values).__name__}")
    return values


def parse_override(override: str) -> dict[str, Any]:
    """``a.b=c`` as a nested dict; the value is read as YAML, so numbers, lists and null are what they look like."""
    key, separator, text = override.partition("=")
    if not separator or not key or any(not part for part in key.split(".")):
        raise MegamupError(f"{override!r}: expected a key and a value, such as optim.lr=0.003")
    try:
        value: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise MegamupError(f"{override!r}: the value is not YAML: {error}") from None
    for part in reversed(key.split(".")):
        value = {part: value}
    return value  # type: ignore[no-any-return]


def merge(into: dict[str, Any], new: dict[str, Any]) -> None:
    """Merge ``new`` into ``into`` in place: sections merge, everything else replaces."""
    for key, value in new.items():
        if isinstance(value, dict):
            if not isinstance(into.get(key), dict):
                into[key] = {}  # a section of its own: a YAML alias may stand in two places
            merge(into[key], value)
        else:
            into[key] = value


def dump_config(config: Config) -> str:
    """The resolved config as YAML; `load_config` of it gives the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def describe(problem: Any) -> str:
    """One line for one of pydantic's errors: key, value, what was expected, nearest valid name."""
    unions = ("str", "int", "float", "bool", "none")  # pydantic names the member of a union that it tried
    *inner, last = [str(part) for part in problem["loc"]] or [""]
    inner = [part for part in inner if part not in unions and not part.startswith("tuple[")]
    named = problem["type"] == "extra_forbidden" or (last not in unions and not last.startswith("tuple["))
    location = [part for part in (*inner, *([last] if named else [])) if part]
    key = ".".join(location)
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        known = valid_keys()
        elsewhere = [name for name in known if name.rsplit(".", 1)[-1] == location[-1]]  # in the wrong section
        near = elsewhere or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        return f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
    if problem["type"] == "missing":
        return f"{key}: missing; it has no default"
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}={problem['input']!r}: {message}"


def valid_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the config."""
    keys: list[str] = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += valid_keys(field.annotation, f"{prefix}{name}.")
    return keys
