"""The abc-table of maximal update parametrization (Yang & Hu 2020; Yang et al. 2022, Tensor Programs V, table 8).

It turns role x logical shape into initial standard deviation, forward multiplier and AdamW settings. Nothing here
has seen a tensor: a shard's shape is wrong for row-parallel weights, under ZeRO-3 and after flattening, so the table
is resolved to {global name: scales} from the config, before anything is built.

With n = fan_in / base fan_in (of that very tensor), b = batch / base batch, d = tokens / base tokens, L layers and
s = b^1/2 · d^α_data:

    |              | embedding   | hidden, query | residual out            | readout     | gain, bias |
    | init std     | σ_embedding | σ_hidden·n^-½ | σ_res·n^-½·(2L)^-½      | σ_readout   | 1, 0       |
    | multiplier   | α_embedding | α_hidden      | α_res                   | α_readout/n | 1          |
    | AdamW lr     | η_emb·s     | η_hidden·s/n  | η_res·s/n               | η_readout·s | η_vector·s |

    betas 1 - b(1 - β); eps ε·b^-½; attention logits q·k·α_attention·√(base d_head)/d_head; weight decay λ.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt

from megamup.config import Config
from megamup.errors import MegamupError
from megamup.parameters import Axis, Parameter, parameters


@dataclass(frozen=True)
class Scales:
    """What one parameter gets from the table."""

    init_std: float
    """Standard deviation of the initial normal weights; for gains and biases, see ``init_mean``."""
    multiplier: float
    """Factor on the output of the layer in the forward pass."""
    lr_scale: float
    """This parameter's learning rate is ``lr(t) * lr_scale``."""
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    """As torch.optim.AdamW takes it."""
    init_mean: float = 0.0


@dataclass(frozen=True)
class Ratios:
    """Target over base; all 1 under ``sp``, and for what the base leaves out."""

    width: dict[Axis, float]
    batch: float
    tokens: float
    d_head_base: int


def ratios(config: Config) -> Ratios:
    model, base = config.model, config.mup.base
    if config.mup.parametrization == "sp":
        return Ratios({"d_model": 1.0, "d_heads": 1.0, "d_ff": 1.0}, 1.0, 1.0, model.d_head)
    d_model = base.d_model or model.d_model
    d_head = base.d_head or model.d_head
    if base.d_head is None and base.n_heads and model.n_heads * model.d_head == model.d_model:
        d_head, rest = divmod(d_model, base.n_heads)
        if rest:
            raise MegamupError(
                f"mup.base: d_model={d_model} is not divisible by n_heads={base.n_heads}; set mup.base.d_head"
            )
    d_heads = d_head * base.n_heads if base.n_heads else model.n_heads * model.d_head * d_model / model.d_model
    width: dict[Axis, float] = {
        "d_model": model.d_model / d_model,
        "d_heads": model.n_heads * model.d_head / d_heads,
        "d_ff": model.d_ff / base.d_ff if base.d_ff else model.d_model / d_model,
    }
    batch = config.batch_tokens / base.batch_tokens if base.batch_tokens else 1.0
    tokens = config.batch_tokens * config.train.steps / base.tokens if base.tokens else 1.0
    return Ratios(width, batch, tokens, d_head)


def scales(parameter: Parameter, config: Config, at: Ratios) -> Scales:
    """One column of the table for one parameter."""
    mup, optim = config.mup, config.optim
    sigma, alpha, eta, zero = mup.sigma, mup.alpha, mup.eta, mup.zero_init
    n = at.width[parameter.fan_in] if parameter.fan_in else 1.0
    s = sqrt(at.batch) * at.tokens**mup.alpha_data
    depth = (2 * config.model.n_layers) ** -0.5
    betas, eps, decay = batch_betas(optim.betas, at.batch), optim.eps / sqrt(at.batch), optim.weight_decay

    column = {  # init std, multiplier, lr
        "embedding": (sigma.embedding, alpha.embedding, eta.embedding * s),
        "query": (sigma.hidden * n**-0.5 * (not zero.query), alpha.hidden, eta.hidden * s / n),
        "hidden": (sigma.hidden * n**-0.5, alpha.hidden, eta.hidden * s / n),
        "residual_out": (
            sigma.residual_out * n**-0.5 * depth * (not zero.residual_out),
            alpha.residual_out,
            eta.residual_out * s / n,
        ),
        "readout": (sigma.readout * (not zero.readout), readout_multiplier(config, at), eta.readout * s),
        "gain": (0.0, 1.0, eta.vector * s),
        "bias": (0.0, 1.0, eta.vector * s),
    }[parameter.role]

    found = Scales(*column, betas=betas, eps=eps, weight_decay=decay)
    if parameter.role in ("gain", "bias"):
        return replace(found, weight_decay=0.0, init_mean=float(parameter.role == "gain"))
    if optim.decay_mode == "independent":
        # AdamW multiplies the decay by the group's lr: dividing by its peak leaves λ·(lr(t)/lr_peak).
        found = replace(found, weight_decay=decay / (optim.lr * found.lr_scale) if found.lr_scale else 0.0)
    return found


def readout_multiplier(config: Config, at: Ratios) -> float:
    """α_readout/n, of the tied readout too (it has no parameter of its own: its weight is the embedding's)."""
    return config.mup.alpha.readout / at.width["d_model"]


def attention_scale(config: Config) -> float:
    """Factor on q·k: α·√(base d_head)/d_head under μP, α/√d_head under sp; the same at the base."""
    return config.mup.alpha.attention * sqrt(ratios(config).d_head_base) / config.model.d_head


def batch_betas(betas: tuple[float, float], batch: float) -> tuple[float, float]:
    """Keep Adam's averaging horizon in tokens: 1 - b(1 - β) (Malladi et al. 2022)."""
    scaled = tuple(1 - batch * (1 - beta) for beta in betas)
    if min(scaled) < 0:
        raise MegamupError(
            f"optim.betas={betas}: the batch is {batch:g} times mup.base.batch_tokens, and 1 - b(1 - β) = "
            f"{min(scaled):.3g} < 0; raise batch_tokens of the base or the betas"
        )
    return scaled[0], scaled[1]


def table(config: Config) -> dict[str, Scales]:
    """The whole table: {global name: scales}.

    Raises:
        MegamupError: a ratio leaves an optimizer setting out of range.
    """
    at = ratios(config)
    return {name: scales(parameter, config, at) for name, parameter in parameters(config.model).items()}
