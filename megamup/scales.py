"""What a parametrization says of one parameter and of one block: plain numbers, resolved before anything is built."""

from __future__ import annotations

from dataclasses import dataclass


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
    """As torch.optim.AdamW takes it at the peak learning rate."""
    init_mean: float = 0.0


@dataclass(frozen=True)
class Branch:
    """A residual connection: ``x -> skip · x + branch · f(x)``."""

    skip: float = 1.0
    branch: float = 1.0


@dataclass(frozen=True)
class BlockScales:
    """Factors in one block's forward pass that belong to no parameter."""

    attention_logits: float
    """On q·k."""
    attention_output: float = 1.0
    """On the mixed values."""
    activation_input: float = 1.0
    """In the argument of GELU or SiLU: ``f(m·x)/m``."""
    activation_output: float = 1.0
    attention: Branch = Branch()
    cross: Branch = Branch()
    mlp: Branch = Branch()
