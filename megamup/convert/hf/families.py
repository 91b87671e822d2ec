"""The classes of `transformers` that megamup's models are, and which one a model is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megamup.convert.hf import settings as of
from megamup.convert.hf import tables
from megamup.convert.hf.fold import OwnScales
from megamup.convert.hf.settings import Settings
from megamup.convert.hf.tables import Entry, Inventory
from megamup.errors import MegamupError
from megamup.fields import Section
from megamup.model import GATED, Model
from megamup.parameters import parameters

PLAIN = tuple(of.PLAIN)
NO_MORE = {"parallel_block": (False,), "attention_soft_cap": (None,), "logit_soft_cap": (None,)}
DECODER = NO_MORE | {"arch": ("gpt", "llama"), "norm_place": ("before",)}
GPT2 = DECODER | {"norm": ("layer",), "positions": ("learned",), "activation": PLAIN, "qk_norm": (False,)}
LLAMA = DECODER | {"norm": ("rms",), "positions": ("rotary",), "activation": GATED, "qk_norm": (False,)}
BERT = NO_MORE | {"arch": ("bert",), "norm": ("layer",), "norm_place": ("after",), "positions": ("learned",)}
T5 = NO_MORE | {"arch": ("t5",), "norm": ("rms",), "positions": ("relative", "none"), "bias": (False,)}
PLAIN_ATTENTION = {"qk_norm": (False,), "window": (None,), "moe": (None,)}


@dataclass(frozen=True)
class Family:
    name: str
    """The class."""
    model_type: str
    traits: Mapping[str, tuple[Any, ...]]
    """What keys of the ``model`` section may be."""
    entries: Callable[[Model, Inventory], list[Entry]]
    settings: Callable[[Model], dict[str, Any]]
    """Its config.json, but for what all classes have."""
    section: Callable[[Settings], dict[str, Any]]
    """The ``model`` section of a config.json, but for ``vocab_size``."""
    always: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the ``model`` section whose parameters it has in any case; ours may lack them, as if they were zero."""
    prefix: str = ""
    """Of names, where the whole model was saved and not the part below its head."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Tensors that a file may have again under another name -> their own."""
    passed_over: tuple[str, ...] = ()
    """Ends of names of tensors that a file may have and that its class doesn't read."""

    def inventory(self, model: Model) -> Inventory:
        """Parameters of ours, and those that the class has besides."""
        token_types = {"token_types": max(model.token_types, 1)} if model.arch == "bert" else {}
        return parameters(model.model_copy(update={**self.always, **token_types}))

    def own_scales(self, model: Model, settings: Settings) -> OwnScales:
        if self.model_type == "t5":
            return OwnScales(1.0, model.d_model**-0.5 if of.t5_scales_logits(settings) else 1.0)
        return OwnScales(model.d_head**-0.5)

    def lacks(self, model: Model) -> list[str]:
        """What of a model the class can't compute, by key and value."""
        values = {key: getattr(model, key) for key in self.traits}
        found = [f"{key}={said(value)}" for key, value in values.items() if value not in self.traits[key]]
        if self.name in SAME_HEADS and model.n_kv_heads != model.n_heads:
            found.append(f"n_kv_heads={model.n_kv_heads} of n_heads={model.n_heads}")
        if self.name in WIDTH_OF_HEADS and model.n_heads * model.d_head != model.d_model:
            found.append(f"n_heads={model.n_heads} x d_head={model.d_head} beside d_model={model.d_model}")
        if self.name == "LlamaForCausalLM" and model.d_model % model.n_heads:
            found.append(f"d_model={model.d_model}, no multiple of n_heads={model.n_heads}")
        if self.name == "MixtralForCausalLM":
            found += unlike_mixtral(model)
        return found


SAME_HEADS = ("GPT2LMHeadModel", "BertForMaskedLM", "BertForPreTraining", "T5ForConditionalGeneration")
WIDTH_OF_HEADS = SAME_HEADS[:3]


def said(value: Any) -> str:
    return "set" if isinstance(value, Section) else str(value).lower() if isinstance(value, bool) else str(value)


def unlike_mixtral(model: Model) -> list[str]:
    if model.moe is None:
        return ["moe=null"]
    allowed = {"every": 1, "shared": 0, "normalize": True}
    return [
        f"moe.{key}={said(getattr(model.moe, key))}"
        for key, value in allowed.items()
        if getattr(model.moe, key) != value
    ]


def kin_of_llama(name: str, model_type: str, **changes: Any) -> Family:
    """Llama's names, with settings and traits of its own."""
    traits = LLAMA | {"window": (None,), "moe": (None,), "bias": (False,)} | changes.pop("traits")
    given = {"entries": tables.llama, "settings": of.llama_settings, "section": of.llama_section} | changes
    copies = {"lm_head.weight": "model.embed_tokens.weight"}
    return Family(name, model_type, traits, prefix="model.", copies=copies, passed_over=(".inv_freq",), **given)


class Anything(tuple[Any, ...]):
    """The values of a key that may have any."""

    __slots__ = ()

    def __contains__(self, value: object) -> bool:
        return True


ANY = Anything()

PAIR_HEAD = ("bert.pooler.dense", "cls.seq_relationship")
BERT_COPIES = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}

FAMILIES = (
    Family(
        "GPT2LMHeadModel",
        "gpt2",
        GPT2 | PLAIN_ATTENTION,
        tables.gpt2,
        of.gpt2_settings,
        of.gpt2_section,
        always={"bias": True},
        prefix="transformer.",
        copies={"lm_head.weight": "transformer.wte.weight"},
        passed_over=(".attn.bias", ".attn.masked_bias"),
    ),
    kin_of_llama("LlamaForCausalLM", "llama", traits={"bias": ANY}, settings=of.with_biases),
    kin_of_llama(
        "MistralForCausalLM",
        "mistral",
        traits={"window": ANY, "global_every": (None,)},
        settings=of.mistral_settings,
        section=of.mistral_section,
    ),
    kin_of_llama(
        "Qwen2ForCausalLM",
        "qwen2",
        traits={"window": ANY},
        entries=tables.qwen2,
        settings=of.qwen_settings,
        section=of.qwen2_section,
        always={"bias": True},
    ),
    kin_of_llama(
        "Qwen3ForCausalLM",
        "qwen3",
        traits={"window": ANY, "qk_norm": (True,)},
        entries=tables.qwen3,
        settings=of.qwen_settings,
        section=of.qwen3_section,
    ),
    kin_of_llama(
        "MixtralForCausalLM",
        "mixtral",
        traits={"window": ANY, "global_every": (None,), "moe": ANY},
        settings=of.mixtral_settings,
        section=of.mixtral_section,
    ),
    Family(
        "BertForMaskedLM",
        "bert",
        BERT | PLAIN_ATTENTION | {"activation": ("gelu",), "pair_head": (False,)},
        tables.bert,
        of.bert_settings,
        of.bert_section,
        always={"bias": True},
        copies=BERT_COPIES,
        passed_over=(".position_ids", *(f"{head}.{kind}" for head in PAIR_HEAD for kind in tables.BOTH)),
    ),
    Family(
        "BertForPreTraining",
        "bert",
        BERT | PLAIN_ATTENTION | {"activation": ("gelu",), "pair_head": (True,)},
        tables.bert,
        of.bert_settings,
        lambda settings: of.bert_section(settings) | {"pair_head": True},
        always={"bias": True},
        copies=BERT_COPIES,
        passed_over=(".position_ids",),
    ),
    Family(
        "T5ForConditionalGeneration",
        "t5",
        T5 | PLAIN_ATTENTION,
        tables.t5,
        of.t5_settings,
        of.t5_section,
        always={"positions": "relative"},
        copies={
            "encoder.embed_tokens.weight": "shared.weight",
            "decoder.embed_tokens.weight": "shared.weight",
            "lm_head.weight": "shared.weight",
        },
        passed_over=(".layer.1.EncDecAttention.relative_attention_bias.weight",),
    ),
)
"""The first that has all of a model's traits is the one."""


def family_of(model: Model) -> Family:
    """Raises MegamupError where no class computes such a model, and says what the nearest ones lack."""
    lacks = {family.name: family.lacks(model) for family in FAMILIES}
    for family in FAMILIES:
        if not lacks[family.name]:
            return family
    least = min(map(len, lacks.values()))
    nearest = [f"{name} has no model.{', model.'.join(keys)}" for name, keys in lacks.items() if len(keys) == least]
    raise MegamupError(
        f"model.arch={model.arch}: no class of transformers computes this model; of the nearest, {', '.join(nearest)}"
    )


def family_named(name: Any) -> Family:
    """Raises MegamupError where the class of a config.json isn't supported."""
    for family in FAMILIES:
        if family.name == name:
            return family
    raise MegamupError(
        f"config.json: architectures={name!r} is not supported; expected one of "
        + ", ".join(family.name for family in FAMILIES)
    )
