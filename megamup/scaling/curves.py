"""Loss curves: smoothed, read at any moment, sampled, crossed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megamup.errors import MegamupError

FloatArray = NDArray[np.float64]

DEFAULT_SHARE = 0.02
"""Half-life of the average over training losses, as a share of the tokens seen."""
UNKNOWN_WARMUP = 0.05
"""Share of the tokens after which a curve is sampled where its warm-up isn't known, or is shorter."""


class Moment(NamedTuple):
    """One place on a curve."""

    step: float
    tokens: float
    flops: float
    loss: float


@dataclass(frozen=True)
class Curve:
    """Loss (nats per token) of one run while it trained; every array of shape (n,)."""

    step: FloatArray
    """Optimizer steps done; NaN where not known."""
    tokens: FloatArray
    """Tokens seen, rising, above 0."""
    flops: FloatArray
    """FLOPs spent; NaN where not known."""
    loss: FloatArray

    def __len__(self) -> int:
        return len(self.tokens)

    def at_rows(self, rows: NDArray[np.bool_]) -> Curve:
        """The records where `rows` (n,) is true."""
        return Curve(self.step[rows], self.tokens[rows], self.flops[rows], self.loss[rows])

    def moment(self, index: int) -> Moment:
        """The record at `index`."""
        return Moment(*(float(values[index]) for values in (self.step, self.tokens, self.flops, self.loss)))


@dataclass(frozen=True)
class Smoothing:
    """A debiased exponential moving average: Σ wᵢ xᵢ / Σ wᵢ over the records so far, as TensorBoard and W&B draw it.

    `weight` decays by that factor a record (their slider at one record a pixel). `tokens` halves the weight every so
    many tokens (W&B's time-weighted form), however densely the run logged. `share` halves it where the run had seen
    that share of its tokens less, so the window grows with the run as Porian et al.'s does (2024, "Resolving
    Discrepancies in Compute-Optimal Scaling": 5% of the position to each side); under it a power law E + B·D^-β keeps
    its E and β at every D, where a window of fixed length bends its start.
    """

    kind: Literal["none", "weight", "tokens", "share"]
    value: float = 0.0

    def __str__(self) -> str:
        return "none" if self.kind == "none" else f"{self.kind}={self.value:g}"

    @property
    def meaning(self) -> str:
        """In words, with the half-life."""
        if self.kind == "none":
            return "not smoothed"
        if self.kind == "weight":
            half = math.log(0.5) / math.log(self.value)
            return f"debiased EMA of weight {self.value:g}, a half-life of {half:.3g} logged records"
        half_life = f"{self.value:g} tokens" if self.kind == "tokens" else f"{self.value:.3g} of the tokens seen"
        return f"debiased EMA with a half-life of {half_life}"

    def decay(self, tokens: FloatArray) -> FloatArray:
        """By how much the sums so far shrink at each record: (n,)."""
        if self.kind == "none":
            return np.zeros(len(tokens))
        if self.kind == "weight":
            return np.full(len(tokens), self.value)
        before = np.concatenate([tokens[:1], tokens[:-1]])
        if self.kind == "tokens":
            return np.asarray(0.5 ** ((tokens - before) / self.value))
        return np.asarray((before / tokens) ** (math.log(0.5) / math.log1p(-self.value)))


def parse_smoothing(text: str) -> Smoothing:
    """`none`, `weight=0.9`, `tokens=1e8` or `share=0.02`.

    Raises:
        MegamupError: none of these, or a value outside its range.
    """
    if text == "none":
        return Smoothing("none")
    kind, _, number = text.partition("=")
    value = _number(number)
    if kind == "tokens" and 0 < value < math.inf:
        return Smoothing("tokens", value)
    if kind in ("weight", "share") and 0 < value < 1:
        return Smoothing("weight" if kind == "weight" else "share", value)
    raise MegamupError(
        f"--smooth: {text!r}; expected none, weight=W or share=W with 0 < W < 1, or tokens=T above 0: "
        f"share={DEFAULT_SHARE} is what training losses get by default"
    )


def smoothed(curve: Curve, smoothing: Smoothing) -> Curve:
    """The curve with its losses averaged."""
    total = weight = 0.0
    loss = np.empty(len(curve))
    for i, (decay, value) in enumerate(zip(smoothing.decay(curve.tokens), curve.loss, strict=True)):
        total, weight = total * decay + value, weight * decay + 1.0
        loss[i] = total / weight
    return replace(curve, loss=loss)


@dataclass(frozen=True)
class At:
    """Where on its curve a run is read."""

    kind: Literal["final", "best", "step", "tokens", "flops", "fraction", "curve"]
    value: float = 0.0
    """Of step, tokens, flops or fraction; the number of points of `curve`."""

    def __str__(self) -> str:
        if self.kind in ("final", "best"):
            return self.kind
        return f"curve:{self.value:g}" if self.kind == "curve" else f"{self.kind}={self.value:.12g}"

    @property
    def meaning(self) -> str:
        """In words, to follow the name of a loss."""
        if self.kind == "final":
            return "at the final step"
        if self.kind == "best":
            return "where it is least"
        if self.kind == "curve":
            first = f"log-spaced after warm-up and {UNKNOWN_WARMUP:.0%} of its tokens"
            return f"at {self.value:g} points of every run, {first}"
        words = {"step": "step {}", "tokens": "{} tokens", "flops": "{} FLOPs", "fraction": "{} of the run's tokens"}
        return f"at {words[self.kind].format(f'{self.value:.6g}')}, interpolated in log tokens"


FINAL = At("final")


def parse_at(text: str) -> At:
    """`final`, `best`, `step=S`, `tokens=D`, `flops=C`, `fraction=F` or `curve:K`.

    Raises:
        MegamupError: none of these.
    """
    kind, number = (text.split("=", 1) if "=" in text else [*text.split(":", 1), ""])[:2]
    value = _number(number)
    if text in ("final", "best"):
        return At("final" if text == "final" else "best")
    if kind == "fraction" and 0 < value <= 1:
        return At("fraction", value)
    if kind == "curve" and ":" in text and value >= 2 and value == int(value):
        return At("curve", value)
    for known in ("step", "tokens", "flops"):
        if kind == known and "=" in text and 0 < value < math.inf:
            return At(known, value)
    raise MegamupError(
        f"--at: {text!r}; expected final, best, step=5000, tokens=1e9, flops=1e18, fraction=0.5 (0 to 1), or curve:20 "
        "for that many points of every run"
    )


def at(
    curve: Curve,
    *,
    step: float | None = None,
    tokens: float | None = None,
    flops: float | None = None,
    fraction: float | None = None,
) -> Moment:
    """The curve at one moment, the loss interpolated linearly in log(tokens).

    Args:
        fraction: of the curve's last `tokens`.

    Raises:
        MegamupError: the moment lies outside the curve, or the curve doesn't know its steps or FLOPs.
    """
    given = {"step": step, "tokens": tokens, "flops": flops, "fraction": fraction}
    ((key, value),) = ((key, value) for key, value in given.items() if value is not None)
    axis = curve.tokens / curve.tokens[-1] if key == "fraction" else getattr(curve, key)
    if not np.all(np.isfinite(axis)):
        raise MegamupError(f"--at: {key}={value:g}, but the run has no {key} for every record; use --at tokens=...")
    # Rounding of what was printed must not put the end of a run outside it.
    if not axis[0] * (1 - 1e-9) <= value <= axis[-1] * (1 + 1e-9):
        raise MegamupError(
            f"--at: {key}={value:g} is outside the curve, which goes from {axis[0]:.6g} to {axis[-1]:.6g}; expected a "
            "moment within: nothing is extrapolated"
        )
    return _interpolated(curve, float(np.interp(value, axis, curve.tokens)))


def steps_to(curve: Curve, loss: float) -> float | None:
    """Optimizer steps until the curve first is at or below `loss`, interpolated in log(tokens); None if it never is.

    Raises:
        MegamupError: the first record is below already, so that the crossing was not seen.
    """
    below = np.flatnonzero(curve.loss <= loss)
    if len(below) == 0:
        return None
    i = int(below[0])
    if i == 0:
        raise MegamupError(
            f"loss {loss:g}: the run is at {curve.loss[0]:.4g} at its first record (step {curve.step[0]:g}); expected "
            "to see it cross: choose a lower loss, or log from the start"
        )
    before, after = curve.loss[i - 1], curve.loss[i]
    logs = np.log(curve.tokens[i - 1 : i + 1])
    tokens = math.exp(logs[0] + (logs[1] - logs[0]) * (before - loss) / (before - after))
    return _interpolated(curve, tokens).step


def sample(curve: Curve, k: int, *, warmup_steps: float = 0.0) -> list[Moment]:
    """`k` moments, log-spaced in tokens, from the end of warm-up (or 5% of the tokens, if later) to the last record.

    Raises:
        MegamupError: the curve has fewer records than `k` there.
    """
    late = curve.tokens >= UNKNOWN_WARMUP * curve.tokens[-1]
    if warmup_steps > 0:
        late &= ~(curve.step < warmup_steps)
    tokens = curve.tokens[late]
    if len(tokens) < k:
        raise MegamupError(
            f"--at curve:{k}: {len(tokens)} records lie after warm-up and {UNKNOWN_WARMUP:.0%} of the run; expected at "
            "least as many as points: ask for fewer, or log more often"
        )
    spaced = np.geomspace(tokens[0], tokens[-1], k)
    # The ends are records themselves, whatever rounding geomspace has.
    return [_interpolated(curve, float(np.clip(t, tokens[0], tokens[-1]))) for t in spaced]


def read_at(curve: Curve, where: At, *, warmup_steps: float = 0.0) -> list[Moment]:
    """The moments that `where` asks for: one, or K of `curve:K`.

    Raises:
        MegamupError: as `at` and `sample`.
    """
    if where.kind == "final":
        return [curve.moment(-1)]
    if where.kind == "best":
        return [curve.moment(int(np.argmin(curve.loss)))]
    if where.kind == "curve":
        return sample(curve, int(where.value), warmup_steps=warmup_steps)
    return [at(curve, **{where.kind: where.value})]


def _interpolated(curve: Curve, tokens: float) -> Moment:
    step, flops = (float(np.interp(tokens, curve.tokens, values)) for values in (curve.step, curve.flops))
    loss = float(np.interp(math.log(tokens), np.log(curve.tokens), curve.loss))
    return Moment(step, tokens, flops, loss)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
