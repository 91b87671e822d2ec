"""Unit-scaled μP (Blake et al. 2024, table 2 and appendices B, G): every weight starts with deviation 1.

Activations have deviation 1 at initialization, since each operation is divided by the deviation that it would give
unit inputs, so the multipliers carry all widths and no base is needed:

    |              | embedding       | hidden, residual out       | readout    | gain, bias |
    | init std     | 1               | 1                          | 1          | 1, 0       |
    | multiplier   | α_embedding     | α/√fan_in                  | α/fan_in   | 1          |
    | AdamW lr     | η_emb/√d_model  | η_hidden/√fan_in · L^-½    | η_readout  | η · L^-½   |

where L^-½ belongs to parameters inside the L blocks; gpt's two embeddings, whose sum is to have deviation 1, are each
times 2^-½. The paper also scales the backward pass, so that gradients fit 8-bit floats. Those factors are constant over
a tensor, which AdamW ignores, and are left out: gradients here are those of the loss.
"""

from __future__ import annotations

from math import exp, log, pi, sqrt

from megamup.config import Config
from megamup.model import Model
from megamup.parameters import Parameter
from megamup.scales import BlockScales, Branch


def column(parameter: Parameter, config: Config) -> tuple[float, float, float, float]:
    """(init std, multiplier, lr factor of width, lr factor of everything else) of one parameter."""
    alpha, eta, zero = config.mup.alpha, config.mup.eta, config.mup.zero_init
    depth = config.model.n_layers**-0.5 if parameter.in_block else 1.0
    fan_in = parameter.shape[-1]  # of an embedding: d_model, as in the paper's section 4.4
    width = fan_in**-0.5
    tables = 2 if config.model.positions == "learned" else 1  # tokens and positions
    return {
        "embedding": (1.0, alpha.embedding * tables**-0.5, width, eta.embedding),
        "query": (float(not zero.query), alpha.hidden * width, width, eta.hidden * depth),
        "key_value": (1.0, alpha.hidden * width, width, eta.hidden * depth),
        "hidden": (1.0, alpha.hidden * width, width, eta.hidden * depth),
        "residual_out": (float(not zero.residual_out), width, width, eta.residual_out * depth),
        "router": (1.0, 1 / fan_in, 1.0, eta.readout * depth),
        "readout": (float(not zero.readout), readout_multiplier(config), 1.0, eta.readout),
        "gain": (0.0, 1.0, 1.0, eta.vector * depth),
        "bias": (0.0, 1.0, 1.0, eta.vector * depth),
    }[parameter.role]


def readout_multiplier(config: Config) -> float:
    """α_readout (the paper's α_loss-softmax) over d_model."""
    return config.mup.alpha.readout / config.model.d_model


def block_scales(config: Config, layer: int) -> BlockScales:
    """The factors of block ``layer`` (0-based)."""
    model, alpha = config.model, config.mup.alpha
    seq, temperature = config.seq_len, alpha.attention
    # Deviation of attention's output: between that of a mean over the causal past and that of picking one value.
    mixed = interpolate(1 / (1 + 4 * model.d_head / temperature**2), sqrt(log(seq) / seq) if seq > 1 else 1.0, 1.0)
    return BlockScales(
        attention_logits=temperature / model.d_head,
        attention_output=1 / mixed,
        activation_input=alpha.activation,
        activation_output=activation_scale(model, alpha.activation),
        attention=residual(config, 2 * layer),
        mlp=residual(config, 2 * layer + 1),
    )


def activation_scale(model: Model, mult: float) -> float:
    """One over the deviation of ``f(m·x)/m`` for unit x, f being GELU, or SiLU or GELU times a unit x."""
    if not model.gated:
        return interpolate(1 / (1 + 0.25 / mult**2), 2.0, sqrt(2 / (1 - 1 / pi)))
    return interpolate(1 / (1 + 1 / mult**2), 2.0, sqrt(2.0))


def residual(config: Config, index: int) -> Branch:
    """Appendix G: branch ``index`` of 2L (attention even, MLP odd) adds τ of a unit to the stream, which stays unit.

    ``alpha.residual_out`` is what all branches add over the embedding, ``alpha.attention_ratio`` attention over MLP.
    """
    alpha = config.mup.alpha
    mlp = alpha.residual_out * sqrt(2 / (1 + alpha.attention_ratio**2))
    attention = alpha.attention_ratio * mlp
    before = config.model.n_layers + (index + 1) // 2 * attention**2 + index // 2 * mlp**2
    tau = (mlp if index % 2 else attention) / sqrt(before)
    return Branch(skip=1 / sqrt(1 + tau**2), branch=tau / sqrt(1 + tau**2))


def interpolate(share: float, low: float, high: float) -> float:
    """From ``low`` (share 0) to ``high`` (share 1) on a logarithmic scale."""
    return exp(share * log(high) + (1 - share) * log(low))
