"""A class's config.json from the ``model`` section, and the section from a config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megamup.errors import MegamupError
from megamup.model import Model, RopeScaling

Settings = Mapping[str, Any]

PLAIN = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "relu2": "relu2"}
GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_pytorch_tanh"}
T5_PROJECTION = {
    **PLAIN,
    "swiglu": "gated-silu",
    "geglu": "gated-gelu_python",  # T5 takes gated-gelu for the approximation; this one is exact
    "geglu_tanh": "gated-gelu",
}
SYNONYMS = {
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_python_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "gated-gelu_new": "gated-gelu",
    "gated-swish": "gated-silu",
}


def activation(known: Mapping[str, str], key: str, theirs: Any) -> str:
    """Ours of this name of theirs.

    Raises:
        MegamupError: there is none.
    """
    wanted = SYNONYMS.get(theirs, theirs) if isinstance(theirs, str) else None
    for ours, name in known.items():
        if SYNONYMS.get(name, name) == wanted:
            return ours
    raise MegamupError(
        f"config.json: {key}={theirs!r} is no activation of megamup; expected {', '.join(known.values())}"
    )


def refuse(settings: Settings, **expected: Any) -> None:
    """Raises MegamupError where a setting has another value than the one that megamup computes."""
    for key, value in expected.items():
        if settings.get(key, value) != value:
            raise MegamupError(
                f"config.json: {key}={settings[key]!r} has no counterpart in megamup; expected {value!r}"
            )


def required(settings: Settings, key: str) -> int:
    """A size. Raises MegamupError where it isn't there, or is none."""
    found = settings.get(key)
    if found is None:
        raise MegamupError(f"config.json: {key} is missing; expected the class's own config.json, whole")
    if type(found) is not int or found < 1:
        raise MegamupError(f"config.json: {key}={found!r}; expected a whole number above 0")
    return found


# ----------------------------------------------------------------------------- gpt2


def gpt2_settings(model: Model) -> dict[str, Any]:
    return {
        "n_embd": model.d_model,
        "n_layer": model.n_layers,
        "n_head": model.n_heads,
        "n_inner": model.d_ff,
        "n_positions": model.max_seq_len,
        "n_ctx": model.max_seq_len,
        "activation_function": PLAIN[model.activation],
        "layer_norm_epsilon": model.norm_eps,
        "scale_attn_weights": True,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"), 0.0),
    }


def gpt2_section(settings: Settings) -> dict[str, Any]:
    refuse(settings, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    d_model = required(settings, "n_embd")
    return {
        "arch": "gpt",
        "d_model": d_model,
        "n_layers": required(settings, "n_layer"),
        "n_heads": required(settings, "n_head"),
        "d_ff": settings.get("n_inner") or 4 * d_model,
        "max_seq_len": required(settings, "n_positions"),
        "activation": activation(PLAIN, "activation_function", settings.get("activation_function", "gelu_new")),
        "norm_eps": settings.get("layer_norm_epsilon", 1e-5),
        "tie_embeddings": settings.get("tie_word_embeddings", True),
    }


# ----------------------------------------------------------------------------- llama and its kin


def llama_settings(model: Model) -> dict[str, Any]:
    """Also of Mistral and Mixtral, whose ``sliding_window`` Llama lacks, and of Qwen 2 and 3."""
    return {
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.d_head,
        "hidden_act": GATED[model.activation],
        "max_position_embeddings": model.max_seq_len,
        "rms_norm_eps": model.norm_eps,
        "attention_dropout": 0.0,
        **rope_settings(model),
    }


def with_biases(model: Model) -> dict[str, Any]:
    return llama_settings(model) | {"attention_bias": model.bias, "mlp_bias": model.bias}


def mistral_settings(model: Model) -> dict[str, Any]:
    return llama_settings(model) | {"sliding_window": model.window}


def mixtral_settings(model: Model) -> dict[str, Any]:
    moe = model.moe
    assert moe is not None
    return mistral_settings(model) | {
        "intermediate_size": moe.d_expert or model.d_ff,
        "num_local_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "router_aux_loss_coef": moe.balance,
    }


def qwen_settings(model: Model) -> dict[str, Any]:
    """The kind of each layer by name, so that any pattern of windows is said."""
    seen = [model.sees(layer) for layer in range(model.n_layers)]
    return llama_settings(model) | {
        "attention_bias": False,
        "use_sliding_window": model.window is not None,
        "sliding_window": model.window,
        "max_window_layers": model.n_layers,
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in seen],
    }


def rope_settings(model: Model) -> dict[str, Any]:
    """``rope_parameters``, and what transformers before its version 5 read of them."""
    theta, scaling = model.rope_theta, model.rope_scaling
    found: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None and scaling.kind == "ntk":  # a larger base, and nothing else
        theta *= scaling.factor ** (model.d_head / (model.d_head - 2))
    elif scaling is not None:
        found = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind != "linear":
            found["original_max_position_embeddings"] = scaling.original_max_seq_len
        if scaling.kind == "yarn":
            found |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        if scaling.kind == "llama3":
            found |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    older = None if found["rope_type"] == "default" else found
    return {"rope_parameters": found | {"rope_theta": theta}, "rope_theta": theta, "rope_scaling": older}


def llama_section(settings: Settings) -> dict[str, Any]:
    refuse(settings, quantization_config=None)
    attention_bias, mlp_bias = settings.get("attention_bias", False), settings.get("mlp_bias", False)
    d_model, n_heads = required(settings, "hidden_size"), required(settings, "num_attention_heads")
    return {
        "arch": "llama",
        "d_model": d_model,
        "n_layers": required(settings, "num_hidden_layers"),
        "n_heads": n_heads,
        "n_kv_heads": settings.get("num_key_value_heads") or n_heads,
        "d_head": settings.get("head_dim") or d_model // n_heads,
        "d_ff": required(settings, "intermediate_size"),
        "max_seq_len": settings.get("max_position_embeddings", 2048),
        "activation": activation(GATED, "hidden_act", settings.get("hidden_act", "silu")),
        "norm_eps": settings.get("rms_norm_eps", 1e-6),
        "bias": bool(attention_bias or mlp_bias),
        "tie_embeddings": settings.get("tie_word_embeddings", False),
        **rope_section(settings),
    }


MISTRAL = {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131_072}
"""What the class takes where config.json has no such key; Llama has other defaults, or none."""
MIXTRAL = MISTRAL | {"sliding_window": None, "rms_norm_eps": 1e-5, "rope_theta": 1e6}
QWEN = {"max_position_embeddings": 32_768}


def mistral_section(settings: Settings) -> dict[str, Any]:
    known = MISTRAL | dict(settings)
    return llama_section(known) | {"window": known["sliding_window"]}


def mixtral_section(settings: Settings) -> dict[str, Any]:
    refuse(settings, router_jitter_noise=0.0)
    moe = {
        "experts": settings.get("num_local_experts", 8),
        "top_k": settings.get("num_experts_per_tok", 2),
        "balance": settings.get("router_aux_loss_coef", 0.001),
    }
    return mistral_section(MIXTRAL | dict(settings)) | {"moe": moe}


def qwen2_section(settings: Settings) -> dict[str, Any]:
    return llama_section(QWEN | dict(settings)) | {"bias": True} | windows(settings)


def qwen3_section(settings: Settings) -> dict[str, Any]:
    heads = {"head_dim": settings.get("head_dim") or 128}
    return llama_section(QWEN | dict(settings) | heads) | {"qk_norm": True} | windows(settings)


def windows(settings: Settings) -> dict[str, Any]:
    """Window and pattern of Qwen's ``layer_types``, or of the ``max_window_layers`` that older files have."""
    window, layers = settings.get("sliding_window"), required(settings, "num_hidden_layers")
    if not settings.get("use_sliding_window", False) or window is None:
        return {}
    first = settings.get("max_window_layers", 28)
    kinds: Sequence[str] = settings.get("layer_types") or [
        "sliding_attention" if layer >= first else "full_attention" for layer in range(layers)
    ]
    full = [layer + 1 for layer, kind in enumerate(kinds) if kind == "full_attention"]
    if len(full) == layers:
        return {}
    every = full[0] if full else None
    if every is not None and full != list(range(every, layers + 1, every)):
        raise MegamupError(
            f"config.json: layers {full} of {layers} (layer_types, max_window_layers) see all positions; expected all "
            "layers to have a window, or every k-th to have none"
        )
    return {"window": window, "global_every": every}


def rope_section(settings: Settings) -> dict[str, Any]:
    older = settings.get("rope_scaling") or {}
    newer = settings.get("rope_parameters") or {}
    for key, value in {"rope_scaling": older, "rope_parameters": newer}.items():
        if not isinstance(value, dict):
            raise MegamupError(f"config.json: {key}={value!r}; expected an object, or null")
    rope = {"rope_theta": settings.get("rope_theta", 10_000.0), **older, **newer}
    kind = rope.get("rope_type", rope.get("type", "default"))
    found: dict[str, Any] = {"rope_theta": rope["rope_theta"]}
    if rope.get("partial_rotary_factor", settings.get("partial_rotary_factor", 1.0)) != 1.0:
        raise MegamupError("config.json: partial_rotary_factor turns a part of each head only; expected 1.0")
    if kind == "default":
        return found
    if kind not in ("linear", "yarn", "llama3"):
        raise MegamupError(f"config.json: rope_type={kind!r}; expected default, linear, yarn or llama3")
    if unknown := [key for key in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(key) is not None]:
        raise MegamupError(
            f"config.json: {unknown[0]} of rope_parameters has no counterpart; expected yarn's own factor"
        )
    refuse(rope, truncate=True)
    scaling = {key: float(rope[key]) for key in RopeScaling.model_fields if isinstance(rope.get(key), int | float)}
    original = rope.get("original_max_position_embeddings") or required(settings, "max_position_embeddings")
    return found | {"rope_scaling": scaling | {"kind": kind, "original_max_seq_len": int(original)}}


# ----------------------------------------------------------------------------- bert


def bert_settings(model: Model) -> dict[str, Any]:
    return {
        "hidden_size": model.d_model,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "intermediate_size": model.d_ff,
        "hidden_act": PLAIN[model.activation],
        "max_position_embeddings": model.max_seq_len,
        "type_vocab_size": max(model.token_types, 1),
        "layer_norm_eps": model.norm_eps,
        "position_embedding_type": "absolute",
        **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0),
    }


def bert_section(settings: Settings) -> dict[str, Any]:
    refuse(settings, is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")
    refuse(settings, hidden_act="gelu")  # the transform before our readout has no other
    return {
        "arch": "bert",
        "d_model": required(settings, "hidden_size"),
        "n_layers": required(settings, "num_hidden_layers"),
        "n_heads": required(settings, "num_attention_heads"),
        "d_ff": required(settings, "intermediate_size"),
        "max_seq_len": settings.get("max_position_embeddings", 512),
        "norm_eps": settings.get("layer_norm_eps", 1e-12),
        "token_types": settings.get("type_vocab_size", 2),
        "tie_embeddings": settings.get("tie_word_embeddings", True),
    }


# ----------------------------------------------------------------------------- t5


def t5_settings(model: Model) -> dict[str, Any]:
    return {
        "d_model": model.d_model,
        "d_kv": model.d_head,
        "d_ff": model.d_ff,
        "num_layers": model.n_layers,
        "num_decoder_layers": model.n_decoder_layers,
        "num_heads": model.n_heads,
        "feed_forward_proj": T5_PROJECTION[model.activation],
        "relative_attention_num_buckets": model.relative_buckets,
        "relative_attention_max_distance": model.relative_distance,
        "layer_norm_epsilon": model.norm_eps,
        "n_positions": model.max_seq_len,
        "is_encoder_decoder": True,
        "dropout_rate": 0.0,
    }


def t5_section(settings: Settings) -> dict[str, Any]:
    projection = settings.get("feed_forward_proj", "relu")
    gated = "gated" in str(projection)
    known = {ours: name for ours, name in T5_PROJECTION.items() if name.startswith("gated") == gated}
    d_model, n_heads = required(settings, "d_model"), required(settings, "num_heads")
    return {
        "arch": "t5",
        "d_model": d_model,
        "n_layers": required(settings, "num_layers"),
        "n_decoder_layers": settings.get("num_decoder_layers") or settings["num_layers"],
        "n_heads": n_heads,
        "d_head": required(settings, "d_kv"),
        "d_ff": required(settings, "d_ff"),
        "max_seq_len": settings.get("n_positions", 512),
        "activation": activation(known, "feed_forward_proj", projection),
        "relative_buckets": settings.get("relative_attention_num_buckets", 32),
        "relative_distance": settings.get("relative_attention_max_distance", 128),
        "norm_eps": settings.get("layer_norm_epsilon", 1e-6),
    }


def t5_scales_logits(settings: Settings) -> bool:
    """T5 v1.0 scales the decoder's output, v1.1 doesn't, and ``tie_word_embeddings`` tells which; transformers 5 ties
    always where the file has no readout of its own, and has a key for this."""
    return bool(settings.get("scale_decoder_outputs", settings.get("tie_word_embeddings", True)))
