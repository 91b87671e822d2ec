"""What a study file says of a ladder: runs that make the data of a scaling law, sized together from a FLOPs budget.

The configs' own model is the smallest; wider ones have more heads of its size and a d_ff in proportion, as μP wants.
What comes of a ladder (models, batches, steps) is worked out in sizing.py.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megamup.fields import NonNegative, Positive, PositiveFloat, Section

Ratio = Annotated[float, Field(gt=1)]
Several = Annotated[int, Field(ge=2, strict=True)]


class Ladder(Section):
    """What all kinds have in common."""

    budget: PositiveFloat
    """Training FLOPs of all trials together, counted as ``train.flops_convention`` says; evaluations come on top."""
    tokens_per_parameter: PositiveFloat = 20.0
    """D/N, N without embeddings and readout. Widths come in steps, so what is left of the budget lengthens all runs a
    little. 20 is about optimal for large models (Hoffmann et al. 2022)."""
    aspect: PositiveFloat | None = None
    """d_model / n_layers, so that models grow in depth too; default: the configs' depth at every width."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """``schedule.warmup_steps`` as a share of each run's steps."""
    logs: Positive = 100
    """Logged steps of a run (``train.log_every``)."""
    evaluations: NonNegative = 0
    """Evaluations in a run besides the last (``train.eval_every``), for laws that read a curve."""


class ScaleN(Ladder):
    """Loss against size: widths in equal ratios, and the data no limit (Kaplan et al. 2020, section 3.2)."""

    kind: Literal["scale_N"]
    sizes: Several = 5
    span: Ratio = 4.0
    """Largest width over the smallest."""
    tokens: Literal["equal", "proportional"] = "equal"
    """``equal``: all see ``tokens_per_parameter`` times the largest N. ``proportional``: each its own N's."""


class ScaleD(Ladder):
    """Loss against unique tokens: every run is equally long, on shares of the data that it repeats ``epochs`` times.
    Kaplan et al. (2020, section 4.1) take each curve's lowest point, as if stopped early. A second size makes L(N, D)
    identifiable."""

    kind: Literal["scale_D"]
    sizes: Positive = 2
    span: Ratio = 2.0
    epochs: Annotated[tuple[Annotated[float, Field(ge=1)], ...], Field(min_length=2)] = (1, 2, 4, 8, 16, 32)


class IsoFlop(Ladder):
    """Several sizes at each of several equal budgets (Hoffmann et al. 2022, approach 2), around the size that
    ``tokens_per_parameter`` gives."""

    kind: Literal["isoflop"]
    budgets: Annotated[int, Field(ge=3, strict=True)] = 3
    ratio: Ratio = 3.0
    """Each budget over the one before."""
    sizes: Annotated[int, Field(ge=4, strict=True)] = 5
    span: Ratio = 3.0
    """Largest width of a budget over its smallest."""


class CriticalBatch(Ladder):
    """Steps and tokens to the same losses at several batch sizes, each with its best of several rates (McCandlish et
    al. 2018, section 2.3). A run of batch B sees 1 + B/B' times the tokens, B' the middle of the batches: what
    (S/S_min - 1)(E/E_min - 1) = 1 asks of runs to one loss, were B' the critical batch."""

    kind: Literal["critical_batch"]
    batches: Annotated[tuple[Positive, ...], Field(min_length=3)]
    """Values of ``batch.global_sequences``."""
    rates: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.5, 1, 2)
    """Learning rates as multiples of ``optim.lr`` times the square root of the batch over the configs' own (Malladi et
    al. 2022)."""


AnyLadder = Annotated[ScaleN | ScaleD | IsoFlop | CriticalBatch, Field(discriminator="kind")]
KINDS = ("scale_N", "scale_D", "isoflop", "critical_batch")
