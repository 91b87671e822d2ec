"""What the plan has no figures for: said, with the keys that it comes from, where else a wrong number would stand."""

from __future__ import annotations

from megamup.config import Config

PLAIN_ACTIVATIONS = ("gelu", "swiglu")


def unplanned(config: Config) -> list[str]:
    """Why activations and time of a step aren't predicted, one reason a key; none where they are."""
    model, kernels = config.model, config.kernels
    reasons = {
        "model.moe": (model.moe is not None, "how many tokens each expert gets is known only as it trains"),
        "data.documents": (config.data.documents, "what a mask by documents saves depends on how long they are"),
        "model.window": (model.window is not None, "attention within a window isn't modelled"),
        "model.attention_soft_cap": (model.attention_soft_cap is not None, "capped attention isn't modelled"),
        "model.logit_soft_cap": (
            model.logit_soft_cap is not None and kernels.cross_entropy == "reference",
            "whole logits with a cap aren't modelled",
        ),
        "kernels.attention": (
            kernels.attention == "reference" and config.train.recompute == "selective",
            "which of the plain formula's parts train.recompute=selective keeps isn't modelled",
        ),
        "kernels.mlp": (
            kernels.mlp == "reference" and model.activation not in PLAIN_ACTIVATIONS,
            f"the plain formula of {model.activation} isn't modelled",
        ),
    }
    return [f"{key}={shown(config, key)}: {why}" for key, (found, why) in reasons.items() if found]


def shown(config: Config, key: str) -> str:
    section, name = key.split(".")
    value = getattr(getattr(config, section), name)
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value.experts} experts" if name == "moe" else str(value)
