"""The abc-table of maximal update parametrization (Yang & Hu 2020; Yang et al. 2022, Tensor Programs V, table 8).

It turns role x logical shape into initial standard deviation, forward multiplier and AdamW settings. Nothing here
has seen a tensor: a shard's shape is wrong for row-parallel weights, under ZeRO-3 and after flattening, so the table
is resolved to {global name: scales} from the config, before anything is built.

With n = fan_in / base fan_in (of that very tensor), g = query heads to a key head over the base's, ℓ = L / base L,
b = batch / base batch, d = tokens / base tokens, κ = b (or b/d, see ``mup.horizon``) and s = κ^½ · d^α_data:

    |            | embedding | query, hidden | key, value       | residual out         | readout     | gain, bias |
    | init std   | σ_emb     | σ_hidden·n^-½ | σ_hidden·(ng)^-½ | σ_res·n^-½·R^-½      | σ_readout   | 1, 0       |
    | multiplier | α_emb     | α_hidden      | α_hidden         | α_res                | α_readout/n | 1          |
    | AdamW lr   | η_emb·s   | η_hidden·s/n  | η_hidden·s/n     | η_res·s/n            | η_readout·s | η_vector·s |

    betas 1 - κ(1 - β); eps ε·κ^-½, over the ratio of d_model with ``mup.scale_eps``;
    attention logits q·k·α_attention·√(base d_head)/d_head; weight decay by ``optim.decay_mode``.

Key-value heads that stay as few while the model widens (g > 1) are outputs of fixed size; the spectral condition
(Yang, Simon & Bernstein 2023) then wants initial weights smaller by √(fan_out/fan_in), and updates as they are.

Depth (``mup.depth``): a branch adds ℓ^-a of what it computes, a = ½ (Yang et al. 2023, depth-μP) or 1 (Dey et al. 2025,
CompleteP). Inside blocks the lr is times ℓ^(a-1) and eps times ℓ^-a. R, the residual branches of the stack (2L, or 3L
in a decoder with cross-attention), is in the initial deviation then the base's.

Where the other architectures stand in it. Cross-attention sums over d_model of the memory, whose coordinates have the
size of any hidden state: query, key and value as above. T5 leaves its attention unscaled and draws queries smaller by
√d_head instead; here the logits' factor says both, which is the same at the base and, unlike T5's, right at any d_head
(fold it into the queries and T5's own class computes it: convert/). Relative biases are one number a head and distance,
of fixed fan-in 1 and read as logits: the column of biases. BERT's transform and pooler are hidden, its pair classifier
is a readout. T5's tied readout has d_model^-½ on unit-variance embeddings, the table's tied one α/n on the base's: the
same at the base. Token types are embeddings. A router sums over d_model into a fixed number of experts: a readout's
column with α = 1, inside a block; an expert is a hidden and a residual-out layer, each of its own tokens.
Gains of query and key norms are gains: after such a norm q·k is at most √d_head², and the table's 1/d_head holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from megamup import umup
from megamup.config import Config
from megamup.errors import MegamupError
from megamup.parameters import Axis, Parameter, parameters
from megamup.scales import BlockScales, Branch, Scales

DEPTH_EXPONENT = {"none": 0.0, "sqrt": 0.5, "completep": 1.0}
"""The table's a."""


@dataclass(frozen=True)
class Ratios:
    """Target over base; all 1 under ``sp``, and for what the base leaves out."""

    width: dict[Axis, float]
    group: float
    """Query heads that share a key head."""
    depth: float
    batch: float
    tokens: float
    d_head_base: int
    n_layers_base: int


def ratios(config: Config) -> Ratios:
    model, base = config.model, config.mup.base
    if config.mup.parametrization == "sp":
        return Ratios({"d_model": 1.0, "d_heads": 1.0, "d_ff": 1.0}, 1.0, 1.0, 1.0, 1.0, model.d_head, model.n_layers)
    d_model = base.d_model or model.d_model
    d_head = base_d_head(config, d_model)
    heads, base_heads = model.n_heads * model.d_head, None if base.n_heads is None else d_head * base.n_heads
    width: dict[Axis, float] = {
        "d_model": model.d_model / d_model,
        "d_heads": heads / base_heads if base_heads else model.d_model / d_model,
        "d_ff": model.d_ff / base.d_ff if base.d_ff else model.d_model / d_model,
    }
    group = 1.0
    if base.n_kv_heads:
        own_heads = base.n_heads or model.n_heads / width["d_heads"]  # more heads of the same size
        group = (model.n_heads / model.n_kv_heads) / (own_heads / base.n_kv_heads)
    n_layers = base.n_layers or model.n_layers
    batch = config.batch_tokens / base.batch_tokens if base.batch_tokens else 1.0
    tokens = config.tokens / base.tokens if base.tokens else 1.0
    return Ratios(width, group, model.n_layers / n_layers, batch, tokens, d_head, n_layers)


def base_d_head(config: Config, d_model: int) -> int:
    model, base = config.model, config.mup.base
    if base.d_head or base.n_heads is None or model.n_heads * model.d_head != model.d_model:
        return base.d_head or model.d_head
    d_head, rest = divmod(d_model, base.n_heads)
    if rest:
        raise MegamupError(
            f"mup.base: d_model={d_model} is not divisible by n_heads={base.n_heads}; set mup.base.d_head"
        )
    return d_head


def column(parameter: Parameter, config: Config, at: Ratios) -> tuple[float, float, float, float]:
    """(init std, multiplier, lr factor of width, lr factor of everything else) of one parameter."""
    mup = config.mup
    sigma, alpha, eta, zero = mup.sigma, mup.alpha, mup.eta, mup.zero_init
    n = at.width[parameter.fan_in] if parameter.fan_in else 1.0
    layers = config.model.n_layers
    branches = parameter.branches if mup.depth == "none" else parameter.branches * at.n_layers_base / layers
    deeper = 1.0
    if mup.depth != "none" and parameter.in_block:
        deeper = at.depth ** (DEPTH_EXPONENT[mup.depth] - 1)
    residual_std = sigma.residual_out * n**-0.5 * branches**-0.5 if branches else 0.0
    return {
        "embedding": (sigma.embedding, alpha.embedding, 1.0, eta.embedding),
        "query": (sigma.hidden * n**-0.5 * (not zero.query), alpha.hidden, 1 / n, eta.hidden * deeper),
        "key_value": (sigma.hidden * (n * at.group) ** -0.5, alpha.hidden, 1 / n, eta.hidden * deeper),
        "hidden": (sigma.hidden * n**-0.5, alpha.hidden, 1 / n, eta.hidden * deeper),
        "residual_out": (residual_std * (not zero.residual_out), alpha.residual_out, 1 / n, eta.residual_out * deeper),
        "router": (sigma.readout, 1 / n, 1.0, eta.readout * deeper),
        "readout": (sigma.readout * (not zero.readout), readout_multiplier(config), 1.0, eta.readout),
        "gain": (0.0, 1.0, 1.0, eta.vector * deeper),
        "bias": (0.0, 1.0, 1.0, eta.vector * deeper),
    }[parameter.role]


def scales(parameter: Parameter, config: Config, at: Ratios) -> Scales:
    """One column of the table for one parameter."""
    mup, optim = config.mup, config.optim
    kappa = at.batch if mup.horizon == "tokens" else at.batch / at.tokens
    found = umup.column(parameter, config) if mup.parametrization == "umup" else column(parameter, config, at)
    init_std, multiplier, lr_width, lr_rest = found
    lr_scale = lr_width * lr_rest * sqrt(kappa) * at.tokens**mup.alpha_data
    eps = optim.eps / sqrt(kappa)
    if mup.scale_eps:
        eps /= at.width["d_model"]
    if parameter.in_block:
        eps *= at.depth ** -DEPTH_EXPONENT[mup.depth]
    vector = parameter.role in ("gain", "bias")
    return Scales(
        init_std,
        multiplier,
        lr_scale,
        betas=horizon_betas(config, kappa),
        eps=eps,
        weight_decay=0.0 if vector else weight_decay(config, lr_width, lr_scale),
        init_mean=float(parameter.role == "gain"),
    )


def weight_decay(config: Config, lr_width: float, lr_scale: float) -> float:
    """What AdamW, which multiplies it by the group's lr, is to be given at the peak of the schedule."""
    optim = config.optim
    if optim.decay_mode == "torch" or lr_scale == 0:
        return optim.weight_decay
    if optim.decay_mode == "width":
        return optim.weight_decay / lr_width
    return optim.weight_decay / (optim.lr * lr_scale)


def readout_multiplier(config: Config) -> float:
    """α_readout/n, of the tied readout too (it has no parameter of its own: its weight is the embedding's)."""
    if config.mup.parametrization == "umup":
        return umup.readout_multiplier(config)
    return config.mup.alpha.readout / ratios(config).width["d_model"]


def attention_scale(config: Config) -> float:
    """Factor on q·k: α·√(base d_head)/d_head under μP, α/√d_head under sp; the same at the base."""
    return config.mup.alpha.attention * sqrt(ratios(config).d_head_base) / config.model.d_head


def block_scales(config: Config, layer: int) -> BlockScales:
    """The factors of block ``layer`` (0-based) that belong to no parameter."""
    if config.mup.parametrization == "umup":
        return umup.block_scales(config, layer)
    branch = Branch(branch=ratios(config).depth ** -DEPTH_EXPONENT[config.mup.depth])
    return BlockScales(attention_logits=attention_scale(config), attention=branch, cross=branch, mlp=branch)


def horizon_betas(config: Config, kappa: float) -> tuple[float, float]:
    """Keep the horizon of Adam's averages: 1 - κ(1 - β) (Malladi et al. 2022)."""
    betas = config.optim.betas
    scaled = tuple(1 - kappa * (1 - beta) for beta in betas)
    if min(scaled) < 0:
        raise MegamupError(
            f"optim.betas={betas}: a step is {kappa:g} times the base's share of Adam's horizon (mup.base.batch_tokens"
            f"{', mup.base.tokens' if config.mup.horizon == 'run' else ''}), and 1 - {kappa:g}·(1 - β) = "
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
