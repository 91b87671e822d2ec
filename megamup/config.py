"""A run as one frozen object: YAML files merged left to right, then ``a.b=c``, then checked as a whole.

The sections and their keys are in sections.py; which sections go together stands here, so that a wrong config is one
message before any process group exists. No torch here: planner, preprocessing and launcher read configs too.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from megamup import shipped
from megamup.deepspeed_file import load_deepspeed, zero_stage
from megamup.errors import MegamupError
from megamup.fields import Section
from megamup.model import Model
from megamup.objective import KINDS, Objective, check_objective, decoder_len, raw_len
from megamup.sections import Batch, Data, Kernels, Log, Mup, Optim, Parallel, Run, Schedule, Train


class Config(Section):
    model: Model
    data: Data
    train: Train
    objective: Objective = Objective()
    run: Run = Run()
    mup: Mup = Mup()
    parallel: Parallel = Parallel()
    batch: Batch = Batch()
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    precision: Literal["fp32", "bf16"] = "fp32"
    """``bf16``: matrix products in bf16; master weights, gradient accumulation and optimizer in fp32."""
    kernels: Kernels = Kernels()
    deepspeed: str = "ds_configs/zero0.json"
    """A DeepSpeed config with ZeRO keys; everything else belongs to this config."""
    log: Log = Log()

    @property
    def seq_len(self) -> int:
        return self.data.seq_len or self.model.max_seq_len

    @property
    def decoder_len(self) -> int:
        """Tokens of the decoder's part of a sequence, 0 where there is no decoder of its own."""
        return decoder_len(self.objective, self.model.arch, self.seq_len)

    @property
    def lengths(self) -> int | tuple[int, int]:
        """Tokens of a sequence; of an encoder and a decoder, those of either (`megamup.flops.Lengths`)."""
        return (self.seq_len, self.decoder_len) if self.decoder_len else self.seq_len

    @property
    def raw_len(self) -> int:
        """Tokens of a corpus that one sequence is made of."""
        return raw_len(self.objective, self.model.arch, self.seq_len)

    @property
    def sequence_tokens(self) -> int:
        """Tokens of one sequence that the model reads, in encoder and decoder."""
        return self.seq_len + self.decoder_len

    @property
    def batch_tokens(self) -> int:
        return self.batch.global_sequences * self.sequence_tokens

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.batch_tokens * self.train.steps

    @property
    def zero_stage(self) -> int:
        return zero_stage(load_deepspeed(self.deepspeed))

    @model_validator(mode="before")
    @classmethod
    def fill_objective(cls, values: Any) -> Any:
        """An architecture's own objective, where no other is named."""
        if not isinstance(values, dict):
            return values
        model, objective = values.get("model"), values.get("objective", {})
        kinds = KINDS.get(str(model.get("arch") if isinstance(model, dict) else getattr(model, "arch", None)))
        section = objective.model_dump() if isinstance(objective, Objective) else objective
        if kinds and isinstance(section, dict) and section.get("kind") is None:
            return values | {"objective": section | {"kind": kinds[0]}}
        return values

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
        check_objective(
            self.objective, model.arch, model.vocab_size, self.seq_len, model.pair_head, self.data.documents
        )
        self.check_stretches()
        self.check_experts()
        self.check_parametrization()
        blocks = model.n_layers + (model.n_decoder_layers or 0)
        if blocks < pipeline:
            raise ValueError(
                f"model.n_layers={model.n_layers} ({blocks} blocks in all) is less than parallel.pipeline={pipeline}: "
                "a stage would hold no layer; use at most one stage a layer"
            )
        if model.tie_embeddings and self.mup.zero_init.readout:
            raise ValueError(
                "mup.zero_init.readout=true has no effect on a tied readout, whose weight is the embedding's; set "
                "model.tie_embeddings=false or leave it out"
            )
        if self.seq_len > model.max_seq_len:
            raise ValueError(f"data.seq_len={self.seq_len} is longer than model.max_seq_len={model.max_seq_len}")
        if self.decoder_len > model.max_seq_len:
            raise ValueError(
                f"objective.decoder_len={self.decoder_len} is longer than model.max_seq_len={model.max_seq_len}; raise "
                "that, or lower data.seq_len or the objective's density"
            )
        self.check_training()
        stage = self.zero_stage  # reads the file, so that a wrong one is found here
        if pipeline > 1 and stage > 1:
            raise ValueError(
                f"deepspeed={self.deepspeed} is ZeRO {stage}, but parallel.pipeline={pipeline} "
                "works with ZeRO 0 or 1 only (DeepSpeed partitions gradients against the pipeline's "
                "accumulation); use ds_configs/zero1.json or pipeline=1"
            )
        return self

    def check_training(self) -> None:
        """Keys of training, data and kernels among each other."""
        if self.schedule.warmup_steps > self.train.steps:
            raise ValueError(
                f"schedule.warmup_steps={self.schedule.warmup_steps} exceeds train.steps={self.train.steps}"
            )
        if (self.train.eval_every or self.train.eval_sequences) and self.data.valid is None:
            raise ValueError("train.eval_every and train.eval_sequences need data.valid, a held-out shard prefix")
        if self.kernels.matmul == "fp8" and self.precision != "bf16":
            raise ValueError(
                f"kernels.matmul=fp8 gives bf16, but precision is {self.precision}: set precision=bf16 or "
                "kernels.matmul=torch"
            )
        if self.train.profile is not None and not self.train.profile[0] <= self.train.profile[1] <= self.train.steps:
            raise ValueError(
                f"train.profile={list(self.train.profile)}: expected its first and last step, in this order, neither "
                f"above train.steps={self.train.steps}"
            )

    def check_parametrization(self) -> None:
        """What a parametrization has no rule for."""
        model = self.model
        if self.mup.parametrization != "umup":
            return
        unruled = {
            "arch": model.arch in ("bert", "t5"),
            "norm_place": model.norm_place == "after",
            "activation": model.activation in ("relu", "relu2"),
            "parallel_block": model.parallel_block,
            "positions": model.positions == "relative",
            "moe": model.moe is not None,
        }
        for key in (key for key, found in unruled.items() if found):
            raise ValueError(
                f"mup.parametrization=umup has no rule for model.{key}={getattr(model, key)} (Blake et al. 2024 treat "
                "causal pre-norm stacks of attention and MLP); use parametrization=mup"
            )

    def check_experts(self) -> None:
        """What cuts experts, and what shares them out."""
        moe, tensor, ranks = self.model.moe, self.parallel.tensor, self.parallel.expert
        if moe is None:
            if ranks > 1:
                raise ValueError(f"parallel.expert={ranks} has no effect without model.moe: there are no experts")
            return
        if moe.d_expert is not None and moe.d_expert % tensor:
            raise ValueError(
                f"model.moe.d_expert={moe.d_expert} is not divisible by parallel.tensor={tensor}; "
                f"the next that is: {-(-moe.d_expert // tensor) * tensor}"
            )
        if moe.experts % ranks:
            raise ValueError(
                f"model.moe.experts={moe.experts} is not divisible by parallel.expert={ranks}: each rank holds as many"
            )
        if ranks > 1 and self.zero_stage > 2:
            raise ValueError(
                f"deepspeed={self.deepspeed} is ZeRO {self.zero_stage}, which would partition experts over ranks that "
                f"don't hold the same ones (parallel.expert={ranks}); use ds_configs/zero2.json or expert=1"
            )
        if ranks > 1 and self.zero_stage == 1 and self.precision == "bf16":
            raise ValueError(
                f"deepspeed={self.deepspeed} is ZeRO 1, which in bf16 reports another gradient norm than the model's "
                f"where ranks share out experts (parallel.expert={ranks}); use ds_configs/zero2.json or zero0.json"
            )
        if ranks > 1 and self.kernels.compile:
            raise ValueError(
                f"kernels.compile=true needs fixed shapes, but with parallel.expert={ranks} the number of tokens that "
                "come to a rank changes from batch to batch; leave one of them out"
            )

    def check_stretches(self) -> None:
        """What cuts the sequence must divide it, and context ranks share out a tensor rank's heads."""
        tensor, context = self.parallel.tensor, self.parallel.context
        for key in ("n_heads", "n_kv_heads"):
            heads = getattr(self.model, key)
            if heads % (tensor * context):
                raise ValueError(
                    f"model.{key}={heads} is not divisible by parallel.tensor={tensor} x parallel.context={context}: "
                    "each rank attends with whole heads; use fewer context ranks, or more heads"
                )
        stretches = context * (tensor if self.parallel.sequence else 1)
        for key, length in (("data.seq_len", self.seq_len), ("objective.decoder_len", self.decoder_len)):
            if length % stretches:
                raise ValueError(
                    f"{key}={length} can't be cut into {stretches} equal stretches (parallel.context={context}"
                    f"{f' x tensor={tensor}, as parallel.sequence=true' if self.parallel.sequence else ''}); "
                    f"the next that can: {-(-length // stretches) * stretches}"
                )


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
    inner = [part for part in inner if part not in unions and not part.startswith(("tuple[", "dict["))]
    named = problem["type"] == "extra_forbidden" or (last not in unions and not last.startswith(("tuple[", "dict[")))
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
