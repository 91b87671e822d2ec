"""Params files of the Cerebras Model Zoo's GPT-style models, read as values of our config.

Two layouts are known: ``train_input``, ``model``, ``optimizer``, ``runconfig``; and ``trainer: {init, fit}``, which
replaced it. Keys are written here as the first spells them; messages and comments name the file's own. Nothing is
dropped in silence: a key of ``model`` that may change the model is an error, any other that has no place is listed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megamup.errors import MegamupError

TRAINER = {
    "model.mixed_precision": "trainer.init.precision.enabled",
    "model": "trainer.init.model",
    "optimizer.max_gradient_norm": "trainer.init.precision.max_gradient_norm",
    "optimizer.learning_rate": "trainer.init.schedulers",
    "optimizer": "trainer.init.optimizer.AdamW",
    "runconfig.seed": "trainer.init.seed",
    "runconfig.checkpoint_steps": "trainer.init.checkpoint.steps",
    "runconfig.log_steps": "trainer.init.logging.log_steps",
    "runconfig": "trainer.init.loop",
    "train_input": "trainer.fit.train_dataloader",
    "eval_input": "trainer.fit.val_dataloader",
}
"""Key or section -> its place in the layout with ``trainer``; a key goes before its section."""

REQUIRED = (
    ("model.hidden_size",),
    ("model.num_hidden_layers",),
    ("model.num_heads",),
    ("model.filter_size",),
    ("model.vocab_size",),
    ("model.max_position_embeddings",),
    ("optimizer.betas", "optimizer.beta1"),
    ("optimizer.eps",),
    ("optimizer.weight_decay", "optimizer.weight_decay_rate"),
    ("optimizer.learning_rate",),
    ("runconfig.max_steps",),
    ("train_input.batch_size",),
    ("train_input.data_dir",),
)
"""Keys without which no run is described, each with its other names. The Model Zoo's defaults aren't guessed."""

ARCHITECTURES = {("learned", "layernorm", "gelu"): "gpt", ("rotary", "rmsnorm", "swiglu"): "llama"}
"""(position_embedding_type, norm_type, nonlinearity) -> ours; biasless-layernorm is a gpt without biases."""

BIASES = ("use_projection_bias_in_attention", "use_ffn_bias_in_attention", "use_ffn_bias")

FIXED: dict[str, tuple[Any, ...]] = {
    "model.dropout_rate": (0,),
    "model.embedding_dropout_rate": (0,),
    "model.attention_dropout_rate": (0,),
    "model.residual_dropout_rate": (0,),
    "model.attention_type": ("scaled_dot_product",),
    "model.attention_module": ("aiayn_attention", "multiquery_attention"),
    "model.use_position_embedding": (True,),
    "model.use_bias_in_output": (False,),
    "model.use_untied_layer_norm": (False,),
    "model.embedding_layer_norm": (False,),
    "model.scale_qk_dot_by_layer_idx": (False,),
    "model.pos_scaling_factor": (1,),
    "optimizer.correct_bias": (True,),
}
"""What our models and AdamW do and have no key for; any other value is another model."""

NO_EFFECT = {
    f"model.{name}"
    for name in (
        *("name", "fp16_type", "use_bfloat16", "loss_scaling", "loss_weight", "attention_softmax_fp32"),
        *("initializer_range", "initializer", "embedding_initializer", "output_layer_initializer"),  # sigma, for us
        *("alibi_trainable_slopes", "alibi_implementation", "num_relative_attention_buckets"),  # of other positions
        *("scale_output_logits_by_d", "compute_eval_metrics", "boundary_casting", "tf_summary", "to_float16"),
    )
}
"""Keys of ``model`` that leave an SP model's function as it is."""

MUP_KEYS = (
    *("model.mup_base_hidden_size", "model.mup_base_filter_size", "model.embeddings_scale", "model.scale_qk_dot_by_d"),
    *("model.output_logits_scale", "model.output_logits_alpha", "model.attention_logits_alpha"),
    "optimizer.adjust_learning_rate",
)

SCHEDULES = (
    "supported: two schedulers in sequence, a Linear warm-up to the peak and a Linear (or CosineDecay) decay from it, "
    "each with initial_learning_rate, end_learning_rate and total_iters"
)


@dataclass
class Draft:
    """Values of our config, and what a reader should know of where they come from."""

    values: dict[str, Any]
    comments: dict[str, str] = field(default_factory=dict)
    """Dotted key, of a section too -> comment on its line."""
    left: list[str] = field(default_factory=list)
    """Keys of the input that are not carried over."""

    def put(self, key: str, value: Any, comment: str) -> None:
        *sections, last = key.split(".")
        into = self.values
        for section in sections:
            into = into.setdefault(section, {})
        into[last] = value
        self.comments[key] = comment


class Params:
    """A params file by dotted keys, which remembers what was read."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.trainer = "trainer" in values
        self.leaves = dict(leaves(values))
        self.read: set[str] = set()

    def name(self, key: str) -> str:
        """The key as this file spells it."""
        if not self.trainer:
            return key
        section, _, last = key.partition(".")
        return TRAINER.get(key) or f"{TRAINER[section]}.{last}"

    def get(self, key: str, default: Any = None) -> Any:
        """The value; the default where it is missing or null."""
        self.read.add(self.name(key))
        value = self.leaves.get(self.name(key))
        return default if value is None else value

    def first(self, *keys: str) -> str:
        """The first of several names of a key that the file has; the first of all where it has none."""
        return next((key for key in keys if self.leaves.get(self.name(key)) is not None), keys[0])

    def whole(self, key: str) -> int:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise MegamupError(f"{self.name(key)}={value!r}: expected a whole number")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise MegamupError(f"{self.name(key)}={value!r}: expected true or false")
        return value

    def left(self) -> list[str]:
        return [name for name in self.leaves if name not in self.read]


def leaves(values: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is no section; a list is a value."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def number(name: str, value: Any) -> float:
    """YAML reads 1e-8, without a dot, as a string; it is a number all the same."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise MegamupError(f"{name}={value!r}: expected a number") from None


def is_params(values: dict[str, Any]) -> bool:
    """Whether a YAML file is laid out as the Model Zoo's are."""
    return any(section in values for section in ("trainer", "train_input", "runconfig"))


def translate(values: dict[str, Any]) -> Draft:
    """Values of our config, still in standard parametrization, from a params file's.

    Raises:
        MegamupError: keys are missing (all in one message); the file is μP already; a key makes it another model than
            ours, or a schedule that we don't have.
    """
    params = Params(values)
    missing = [params.name(keys[0]) for keys in REQUIRED if params.leaves.get(params.name(params.first(*keys))) is None]
    if missing:
        raise MegamupError(f"keys of the Model Zoo that are missing: {', '.join(missing)}")
    refuse_mup(params)
    check_fixed(params)
    draft = Draft({})
    put_model(draft, params)
    put_data(draft, params)
    put_optimizer(draft, params)
    put_schedule(draft, params)
    put_run(draft, params)
    refuse_unknown(params)
    draft.left += params.left()
    return draft


def refuse_mup(params: Params) -> None:
    for key in MUP_KEYS:
        for name, value in params.leaves.items():
            inside = name == params.name(key) or name.startswith(params.name(key) + ".")
            off = value is None or value is False or (value == 1 and value is not True)
            if inside and not off:
                raise MegamupError(f"{name}={value!r}: the config is in μP already; give the target's standard one")


def check_fixed(params: Params) -> None:
    for key, allowed in FIXED.items():
        value = params.get(key, allowed[0])
        if value not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise MegamupError(
                f"{params.name(key)}={value!r}: expected {expected}; our models have no key for anything else"
            )


def refuse_unknown(params: Params) -> None:
    """What is left in ``model`` may be a part of the model."""
    harmless = {params.name(key) for key in (*NO_EFFECT, *MUP_KEYS)}
    for name in params.left():
        if name.startswith(params.name("model.")) and name not in harmless and params.leaves[name] is not None:
            raise MegamupError(
                f"{name}={params.leaves[name]!r}: our models have no place for it; if it doesn't change the model, "
                "take it out of the input"
            )


def put_model(draft: Draft, params: Params) -> None:
    kinds = {"position_embedding_type": "learned", "norm_type": "layernorm", "nonlinearity": "gelu"}
    found = {key: str(params.get(f"model.{key}", default)).lower() for key, default in kinds.items()}
    biasless = found["norm_type"] == "biasless-layernorm"
    shape = (found["position_embedding_type"], "layernorm" if biasless else found["norm_type"], found["nonlinearity"])
    arch = ARCHITECTURES.get(shape)
    if arch is None:
        given = ", ".join(f"{params.name(f'model.{key}')}={value}" for key, value in found.items())
        raise MegamupError(
            f"{given}: expected learned, layernorm and gelu (arch gpt), or rotary, rmsnorm and swiglu (arch llama)"
        )
    draft.put("model.arch", arch, f"{', '.join(shape)} ({', '.join(kinds)})")
    renamed = {"d_model": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_heads", "d_ff": "filter_size"}
    renamed |= {"vocab_size": "vocab_size", "max_seq_len": "max_position_embeddings"}
    for ours, key in renamed.items():
        draft.put(f"model.{ours}", params.whole(f"model.{key}"), params.name(f"model.{key}"))
    tied = "model.share_embedding_weights"
    draft.put("model.tie_embeddings", params.flag(tied, True), f"{params.name(tied)} (true where not given)")
    norms = {not biasless} if arch == "gpt" else set()
    draft.put("model.bias", bias(params, norms), f"{', '.join(BIASES)} (true where not given)")
    eps = "model.layer_norm_epsilon"
    if params.get(eps) is not None:
        draft.put("model.norm_eps", number(params.name(eps), params.get(eps)), params.name(eps))
    put_heads(draft, params)


def bias(params: Params, norms: set[bool]) -> bool:
    """Our one key for all biases: of the linear layers, and of the norms where these have one."""
    keys = [f"model.{key}" for key in BIASES]
    found = {params.flag(key, True) for key in keys} | norms
    if len(found) > 1:
        without = "all false together with norm_type=biasless-layernorm" if norms else "all false"
        raise MegamupError(
            f"{', '.join(map(params.name, keys))}: expected all true, or {without}; our model.bias is one key"
        )
    return found.pop()


def put_heads(draft: Draft, params: Params) -> None:
    model, groups = draft.values["model"], "model.extra_attention_params.num_kv_groups"
    if params.get("model.attention_module") == "multiquery_attention":
        draft.put("model.n_kv_heads", params.whole(groups) if params.get(groups) else 1, params.name(groups))
    if model["arch"] == "gpt":
        return
    head = model["d_model"] / max(model["n_heads"], 1)
    turned = params.get("model.rotary_dim", head)
    if turned != head:
        raise MegamupError(f"{params.name('model.rotary_dim')}={turned!r}: expected the whole head, {head:g}")
    theta = "model.rope_theta"
    if params.get(theta) is not None:
        draft.put(theta, number(params.name(theta), params.get(theta)), params.name(theta))


def put_data(draft: Draft, params: Params) -> None:
    for ours, key in (("data.train", "train_input.data_dir"), ("data.valid", "eval_input.data_dir")):
        given = params.get(key)
        if given is not None:
            prefixes = [{"prefix": str(one)} for one in given] if isinstance(given, list) else str(given)
            draft.put(ours, prefixes, f"{params.name(key)}: must be a shard prefix made by tools/preprocess_data.py")
    if params.get("train_input.max_sequence_length") is not None:
        name = params.name("train_input.max_sequence_length")
        draft.put("data.seq_len", params.whole("train_input.max_sequence_length"), name)
    draft.put("batch.global_sequences", params.whole("train_input.batch_size"), params.name("train_input.batch_size"))


def put_optimizer(draft: Draft, params: Params) -> None:
    if not params.trainer:  # the other layout has the type in the keys' own path
        kind = params.get("optimizer.optimizer_type", "AdamW")
        if str(kind).lower() != "adamw":
            raise MegamupError(f"optimizer.optimizer_type={kind!r}: expected AdamW; μP's table here is AdamW's")
    betas = params.first("optimizer.betas", "optimizer.beta1")
    name = params.name(betas)
    given = params.get(betas) if betas == "optimizer.betas" else [params.get(betas), params.get("optimizer.beta2")]
    if not isinstance(given, list) or len(given) != 2:
        raise MegamupError(f"{name}={given!r}: expected two numbers")
    draft.put("optim.betas", [number(name, beta) for beta in given], name)
    decay = params.first("optimizer.weight_decay", "optimizer.weight_decay_rate")
    for ours, key in (("optim.eps", "optimizer.eps"), ("optim.weight_decay", decay)):
        draft.put(ours, number(params.name(key), params.get(key)), params.name(key))
    clip = "optimizer.max_gradient_norm"
    none = "" if params.get(clip) is not None else "not in the input, so no clipping: "
    draft.put("optim.grad_clip", number(params.name(clip), params.get(clip, 0.0)), none + params.name(clip))


def put_schedule(draft: Draft, params: Params) -> None:
    name = params.name("optimizer.learning_rate")
    (first, warmup), (second, decay) = stages(name, params.get("optimizer.learning_rate"))
    if first != "Linear" or second not in ("Linear", "CosineDecay") or not 0 <= warmup.start < warmup.end:
        raise MegamupError(f"{name}: {first}, then {second}; {SCHEDULES}")
    if not warmup.end == decay.start >= decay.end:
        raise MegamupError(
            f"{name}: warm-up ends at {warmup.end:g}, the decay goes from {decay.start:g} to {decay.end:g}; {SCHEDULES}"
        )
    last, steps = warmup.steps + decay.steps, params.whole("runconfig.max_steps")
    kind = "the second scheduler"
    if last != steps:  # its rate would stand still, or be cut off; ours has no such end
        kind += f"; the input's decay ends at step {last}, here at the last one, {steps}"
    draft.put("schedule.kind", "linear" if second == "Linear" else "cosine", f"{name}: {kind}")
    draft.put("schedule.warmup_steps", warmup.steps, f"{name}: steps of the first scheduler")
    ratio = float(f"{decay.end / decay.start:.12g}")
    draft.put("schedule.min_ratio", ratio, f"derived: end / peak = {decay.end:g} / {decay.start:g}")
    draft.left += [f"{name}[0].initial_learning_rate"] if warmup.start else []  # ours starts at 0
    draft.left += [f"{name}[{at}].{key}" for at, stage in enumerate((warmup, decay)) for key in stage.left]


@dataclass(frozen=True)
class Stage:
    start: float
    end: float
    steps: int
    left: tuple[str, ...]
    """Keys of the scheduler that have no meaning here."""


def stages(name: str, given: Any) -> list[tuple[str, Stage]]:
    """(scheduler, its numbers) of the two schedulers, from either layout."""
    if isinstance(given, list) and len(given) == 1 and isinstance(given[0], dict) and [*given[0]] == ["SequentialLR"]:
        sequence = given[0]["SequentialLR"]
        given = sequence.get("schedulers") if isinstance(sequence, dict) and [*sequence] == ["schedulers"] else None
        entries: list[tuple[Any, Any]] = [item for entry in named(given) for item in entry.items()]
    else:
        entries = [(entry.get("scheduler"), entry) for entry in named(given)]
    if len(entries) != 2 or not all(isinstance(keys, dict) for _, keys in entries):
        raise MegamupError(f"{name}: {given!r}; {SCHEDULES}")
    return [(str(kind).removesuffix("LR"), stage(f"{name}[{at}]", keys)) for at, (kind, keys) in enumerate(entries)]


def named(given: Any) -> list[dict[str, Any]]:
    """A list of sections, or nothing where it isn't one."""
    return given if isinstance(given, list) and all(isinstance(entry, dict) for entry in given) else []


def stage(name: str, keys: dict[str, Any]) -> Stage:
    length = "total_iters" if "total_iters" in keys else "steps"
    used = ("initial_learning_rate", "end_learning_rate", length)
    if not all(key in keys for key in used):
        raise MegamupError(f"{name}: {keys!r}; {SCHEDULES}")
    start, end, steps = (number(f"{name}.{key}", keys[key]) for key in used)
    if not (steps >= 1 and steps % 1 == 0):  # NaN too
        raise MegamupError(f"{name}.{length}={keys[length]!r}: expected a whole number of steps")
    return Stage(start, end, int(steps), tuple(key for key in keys if key not in (*used, "scheduler")))


def put_run(draft: Draft, params: Params) -> None:
    draft.put("train.steps", params.whole("runconfig.max_steps"), params.name("runconfig.max_steps"))
    optional = {"train.log_every": "log_steps", "train.save_every": "checkpoint_steps", "run.seed": "seed"}
    if "valid" in draft.values["data"]:  # without it there is nothing to evaluate
        optional |= {"train.eval_every": "eval_frequency"}
    for ours, key in optional.items():
        if params.get(f"runconfig.{key}") is not None:
            draft.put(ours, params.whole(f"runconfig.{key}"), params.name(f"runconfig.{key}"))
    evaluated = ("runconfig.eval_steps", "eval_input.batch_size")
    if "valid" in draft.values["data"] and all(params.leaves.get(params.name(key)) for key in evaluated):
        steps, batch = map(params.whole, evaluated)
        draft.put("train.eval_sequences", steps * batch, f"derived: {' · '.join(map(params.name, evaluated))}")
    mixed = "model.mixed_precision"
    comment = params.name(mixed) + ("" if params.get(mixed) is not None else ", which the input doesn't have")
    draft.put("precision", "bf16" if params.flag(mixed, False) else "fp32", comment)
