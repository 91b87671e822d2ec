"""Laws of a whole loss curve by its learning-rate schedule: fitted to some schedules, they predict others.

Inputs are the curve (counted from 1) and the step of each point; the schedules belong to the law, and so do the units
of θ: areas are divided by a third of the first schedule's, rates by its peak. The warm-up counts towards the area S1
and is no annealing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike

from megamup.errors import MegamupError
from megamup.scaling.laws.base import LOG_COEFFICIENTS, Exponent, FloatArray, Law, spread
from megamup.scaling.laws.schedules import Falls, Schedules
from megamup.scaling.laws.starts import LIKELY_EXPONENT, log_coefficients

CURVE_POINTS = 400
EXPONENT = Exponent("", 0.01, 3.0)
"""The searched range of alpha, beta and gamma; published ones lie between 0.4 and 0.7."""

SomeLaw = TypeVar("SomeLaw", bound="CurveLaw")


@dataclass(frozen=True)
class CurveLaw(Law):
    """What both laws share: L0 + A·S1^-alpha less what the annealing has won.

    θ: log L0, log of A·S1^-alpha at the unit of area, alpha, then the law's own.
    """

    inputs = ("curve", "step")
    published_objective = "huber"

    schedules: Schedules | None = field(default=None, compare=False)
    log_centre: tuple[float, float] = (0.0, 0.0)
    """What the logs of curve and step are given less by, in the points' centred inputs."""

    @property
    def known(self) -> Schedules:
        """The schedules.

        Raises:
            MegamupError: the law has none yet.
        """
        if self.schedules is None:
            raise MegamupError(f"{self.name}: no schedules given; expected the learning rate by step of every curve")
        return self.schedules

    @cached_property
    def log_area(self) -> float:
        """Log of the unit of areas."""
        return float(np.log(self.known.rates[0].sum() / 3))

    def bound_to(self: SomeLaw, columns: Mapping[str, FloatArray]) -> SomeLaw:
        centre = (float(np.mean(np.log(columns["curve"]))), float(np.mean(np.log(columns["step"]))))
        return replace(self, log_centre=centre)

    def predict(self, parameters: FloatArray, inputs: FloatArray) -> FloatArray:
        return super(CurveLaw, replace(self, log_centre=(0.0, 0.0))).predict(parameters, inputs)

    def places(self, log_x: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Curve and step of each point, from their centred logs: (n,) each."""
        curve, step = np.rint(np.exp(log_x + np.array(self.log_centre))).T
        return curve, step

    def log_areas(self, log_x: FloatArray) -> FloatArray:
        """Log of S1 of each point, in the unit: (n,)."""
        return np.log(self.known.areas(*self.places(log_x))) - self.log_area

    def common(self, theta: FloatArray, log_x: FloatArray) -> tuple[FloatArray, FloatArray]:
        """L0 (..., 1) and A·S1^-alpha (..., n)."""
        log_l0, log_a, alpha = (theta[..., i, np.newaxis] for i in range(3))
        return np.exp(log_l0), np.exp(log_a - alpha * self.log_areas(log_x))

    def common_public(self, theta: FloatArray) -> list[FloatArray]:
        """L0, A and alpha: (...,) each."""
        alpha = theta[..., 2]
        return [np.exp(theta[..., 0]), np.exp(theta[..., 1] + alpha * self.log_area), alpha]

    def common_internal(self, values: FloatArray) -> list[FloatArray]:
        """The first three of θ: (...,) each."""
        alpha = values[..., 2]
        return [np.log(values[..., 0]), np.log(values[..., 1]) - alpha * self.log_area, alpha]

    def starts_with(self, won: FloatArray, log_x: FloatArray, log_y: FloatArray, alpha: FloatArray) -> FloatArray:
        """log L0, log A', alpha and the log of the annealing's coefficient, the best at these alpha (s,): (s, 4).

        Args:
            won: what the annealing has won at each point, without its coefficient, (s or 1, n).
        """
        falling = np.exp(-alpha[:, np.newaxis] * self.log_areas(log_x))
        basis = np.stack(np.broadcast_arrays(np.ones_like(falling), falling, -won), axis=-1)
        l0, a, own = np.moveaxis(log_coefficients(basis, log_y), -1, 0)
        return np.stack([l0, a, alpha, own], axis=-1)


@dataclass(frozen=True)
class Annealing(CurveLaw):
    """L = L0 + A·S1^-alpha - C·S2: S1 the area under the rate, S2 the annealing's momentum (`Schedules.momenta`)."""

    name = "annealing"
    formula = "L = L0 + A·S1^-alpha - C·S2"
    parameters = ("L0", "A", "alpha", "C")
    source = "Tissue et al. 2024, arXiv:2408.11029, eq. 1"

    decay: float = 0.999
    """λ, by which the annealing of earlier steps is forgotten; the source takes 0.99 to 0.999."""

    @cached_property
    def log_momentum(self) -> float:
        """Log of the unit of S2: the largest of the schedules, 1 where none anneals."""
        last = [(c, len(rate)) for c, rate in enumerate(self.known.rates, start=1)]
        curves, steps = np.array(last, dtype=np.float64).T
        return float(np.log(self.known.momenta(curves, steps, self.decay).max() or 1.0))

    @property
    def bounds(self) -> tuple[FloatArray, FloatArray]:
        low, high = LOG_COEFFICIENTS
        return np.array([low, low, EXPONENT.low, low]), np.array([high, high, EXPONENT.high, high])

    def log_value(self, theta: FloatArray, log_x: FloatArray) -> FloatArray:
        with np.errstate(invalid="ignore"):  # NaN where the annealing would have won more than the loss
            return np.asarray(np.log(sum(self._terms(theta, log_x))))

    def jacobian(self, theta: FloatArray, log_x: FloatArray) -> FloatArray:
        terms = self._terms(theta, log_x)
        l0, falling, won = (term / sum(terms) for term in terms)
        return np.stack(np.broadcast_arrays(l0, falling, -self.log_areas(log_x) * falling, won), axis=-1)

    def starts(self, log_x: FloatArray, log_y: FloatArray, unit: FloatArray) -> FloatArray:
        """Exponents even in their logs, with the best coefficients."""
        return self.starts_with(self._momenta(log_x)[np.newaxis], log_x, log_y, spread(LIKELY_EXPONENT, unit[..., 2]))

    def public(self, theta: FloatArray, log_centre: FloatArray) -> FloatArray:
        del log_centre
        return np.stack([*self.common_public(theta), np.exp(theta[..., 3] - self.log_momentum)], axis=-1)

    def internal(self, parameters: FloatArray, log_centre: FloatArray) -> FloatArray:
        del log_centre
        values = np.asarray(parameters, dtype=np.float64)
        return np.stack([*self.common_internal(values), np.log(values[..., 3]) + self.log_momentum], axis=-1)

    def _terms(self, theta: FloatArray, log_x: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """L0, A·S1^-alpha and -C·S2."""
        l0, falling = self.common(theta, log_x)
        return l0, falling, -np.exp(theta[..., 3, np.newaxis]) * self._momenta(log_x)

    def _momenta(self, log_x: FloatArray) -> FloatArray:
        """S2 of each point, in the unit: (n,)."""
        return np.asarray(self.known.momenta(*self.places(log_x), self.decay) * np.exp(-self.log_momentum))


@dataclass(frozen=True)
class MultiPower(CurveLaw):
    """L = L0 + A·S1^-alpha - B·Σ_k (η_{k-1} - η_k)·(1 - (1 + C·η_k^-gamma·S_k)^-beta).

    S1 is the area under the rate with the warm-up's (the source's S1 + S_W), S_k that from step k on: what a fall of
    the rate wins comes in slowly, as a power of the area since (`Schedules.falls`).

    θ: after the common three, logs of B and of C in the units of rate and area, beta, gamma.
    """

    name = "multi-power"
    formula = "L = L0 + A·S1^-alpha - B·sum_k (lr_{k-1} - lr_k)·(1 - (1 + C·lr_k^-gamma·S_k)^-beta)"
    parameters = ("L0", "A", "alpha", "B", "C", "beta", "gamma")
    source = "Luo et al. 2025, arXiv:2503.12811, eq. 2 and 3"

    @cached_property
    def log_rate(self) -> float:
        """Log of the unit of rates."""
        return float(np.log(self.known.rates[0].max()))

    @property
    def bounds(self) -> tuple[FloatArray, FloatArray]:
        ends = zip(LOG_COEFFICIENTS, (EXPONENT.low, EXPONENT.high), strict=True)
        low, high = (np.array([log, log, e, log, log, e, e]) for log, e in ends)
        return low, high

    def log_value(self, theta: FloatArray, log_x: FloatArray) -> FloatArray:
        l0, falling = self.common(theta, log_x)
        falls, reach = self._reach(theta, log_x)
        with np.errstate(invalid="ignore"):  # NaN where the annealing would have won more than the loss
            return np.log(l0 + falling - np.exp(theta[..., 3, np.newaxis]) * _won(falls, reach, theta))

    def jacobian(self, theta: FloatArray, log_x: FloatArray) -> FloatArray:
        l0, falling = self.common(theta, log_x)
        falls, reach = self._reach(theta, log_x)
        b, beta = np.exp(theta[..., 3, np.newaxis]), theta[..., 5, np.newaxis, np.newaxis]
        log_growth = _log_growth(reach)
        left = falls.fall * np.exp(-beta * log_growth)
        by_reach = left * beta * np.exp(reach - log_growth)
        won = b * _won(falls, reach, theta)
        value = l0 + falling - won
        columns = [
            l0,
            falling,
            -self.log_areas(log_x) * falling,
            -won,
            -b * by_reach.sum(axis=-1),
            -b * (left * log_growth).sum(axis=-1),
            b * (by_reach * falls.log_rate).sum(axis=-1),
        ]
        return np.stack(np.broadcast_arrays(*columns), axis=-1) / value[..., np.newaxis]

    def starts(self, log_x: FloatArray, log_y: FloatArray, unit: FloatArray) -> FloatArray:
        """Exponents even in their logs, C within a factor 100 of its unit, the best coefficients."""
        exponents = spread(LIKELY_EXPONENT, unit[..., [2, 5, 6]])
        log_c = np.log(100) * (2 * unit[..., 4:5] - 1)
        theta = np.concatenate([np.zeros((len(unit), 4)), log_c, exponents[..., 1:]], axis=-1)
        won = _won(*self._reach(theta, log_x), theta)
        return np.concatenate([self.starts_with(won, log_x, log_y, exponents[..., 0]), theta[..., 4:]], axis=-1)

    def public(self, theta: FloatArray, log_centre: FloatArray) -> FloatArray:
        del log_centre
        log_b, log_c, beta, gamma = (theta[..., i] for i in range(3, 7))
        own = [np.exp(log_b - self.log_rate), np.exp(log_c + gamma * self.log_rate - self.log_area), beta, gamma]
        return np.stack([*self.common_public(theta), *own], axis=-1)

    def internal(self, parameters: FloatArray, log_centre: FloatArray) -> FloatArray:
        del log_centre
        values = np.asarray(parameters, dtype=np.float64)
        b, c, beta, gamma = (values[..., i] for i in range(3, 7))
        own = [np.log(b) + self.log_rate, np.log(c) - gamma * self.log_rate + self.log_area, beta, gamma]
        return np.stack([*self.common_internal(values), *own], axis=-1)

    def _reach(self, theta: FloatArray, log_x: FloatArray) -> tuple[Falls, FloatArray]:
        """The falls in the units, and log of C·η_k^-gamma·S_k: (..., n, m)."""
        seen = self.known.falls(*self.places(log_x))
        falls = Falls(seen.fall * np.exp(-self.log_rate), seen.log_rate - self.log_rate, seen.area)
        with np.errstate(divide="ignore"):  # no area yet: nothing won
            log_area = np.log(falls.area) - self.log_area
        log_c, gamma = theta[..., 4, np.newaxis, np.newaxis], theta[..., 6, np.newaxis, np.newaxis]
        return falls, log_c - gamma * falls.log_rate + log_area


def _won(falls: Falls, reach: FloatArray, theta: FloatArray) -> FloatArray:
    """Σ_k fall_k·(1 - (1 + e^reach)^-beta): (..., n)."""
    beta = theta[..., 5, np.newaxis, np.newaxis]
    return np.asarray(np.sum(falls.fall * -np.expm1(-beta * _log_growth(reach)), axis=-1))


def _log_growth(reach: FloatArray) -> FloatArray:
    """log(1 + e^reach), several times as fast as logaddexp; θ's bounds keep reach far below overflow."""
    return np.asarray(np.log1p(np.exp(reach)))


def predict_curve(
    law: CurveLaw, parameters: Mapping[str, float], schedule: ArrayLike, steps: ArrayLike | None = None
) -> tuple[FloatArray, FloatArray]:
    """The loss curve of a run with another learning-rate schedule.

    Args:
        law: with or without schedules of its own.
        parameters: by name, as fitted.
        schedule: learning rate of steps 1 to T, (T,).
        steps: where the loss is wanted, (m,); default up to 400 even steps from the schedule's first twentieth on.

    Returns:
        steps and loss in nats per token, (m,) each.

    Raises:
        MegamupError: a parameter is missing, or a step beyond the schedule.
    """
    missing = [name for name in law.parameters if name not in parameters]
    if missing:
        raise MegamupError(
            f"{law.name}: no value for {', '.join(missing)}; expected all of {', '.join(law.parameters)}"
        )
    new = replace(law, schedules=Schedules([schedule]))
    total = len(new.known.rates[0])
    default = np.unique(np.rint(np.linspace(max(1, total // 20), total, CURVE_POINTS)))
    wanted = default if steps is None else np.asarray(steps, dtype=np.float64)
    values = np.array([parameters[name] for name in law.parameters])
    return wanted, new.predict(values, np.column_stack([np.ones_like(wanted), wanted]))


ANNEALING, MULTI_POWER = Annealing(), MultiPower()

CURVE_LAWS: dict[str, CurveLaw] = {law.name: law for law in (ANNEALING, MULTI_POWER)}
