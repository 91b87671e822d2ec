"""Learning-rate schedules as the laws of a whole loss curve see them: areas under the rate, and where it fell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.signal import lfilter

from megamup.errors import MegamupError
from megamup.scaling.laws.base import FloatArray

BLOCKS = 64
"""Groups that the steps before a point are summed in, each longer than the next: the latest are single steps."""
ROUNDING = 1e-13
"""Of the peak: straight lines bend by less. A cosine of 1e6 steps bends by 5e-12 at each."""

REMEMBERED = 16
"""Sets of points whose sums are kept: a search asks for the same ones at every iteration."""

Found = TypeVar("Found")


class Falls(NamedTuple):
    """Where the learning rate fell before each of n points, in m groups of steps; (n, m) each."""

    fall: FloatArray
    """Σ (η_{k-1} - η_k) over the steps k of a group; below 0 where the rate rose."""
    log_rate: FloatArray
    """log η_k."""
    area: FloatArray
    """S_k = Σ η from step k to the point."""


class Schedules:
    """Learning rate by step of one run or more; curves and steps are counted from 1.

    Args:
        rates: for each curve η_1 .. η_T, (T,).

    Raises:
        MegamupError: no schedule, or one with a rate below 0 or not finite, or with none above 0.
    """

    def __init__(self, rates: Sequence[ArrayLike]) -> None:
        self.rates = [np.asarray(rate, dtype=np.float64) for rate in rates]
        if not self.rates:
            raise MegamupError("schedules: none given; expected the learning rate by step of one run or more")
        for number, rate in enumerate(self.rates, start=1):
            if rate.ndim != 1 or not rate.size or not np.all(np.isfinite(rate) & (rate >= 0)) or not rate.max() > 0:
                raise MegamupError(
                    f"schedules: curve {number}: expected a finite learning rate >= 0 for every step, and one above 0"
                )
        self._area = [np.cumsum(rate) for rate in self.rates]
        # Where a schedule ends at 0 its log has no value: a millionth of the peak stands for it.
        self._log_rate = [np.log(np.maximum(rate, 1e-6 * rate.max())) for rate in self.rates]
        self._memory: dict[tuple[object, ...], object] = {}
        self._given: list[dict[str, list[float]]] | None = None

    def knots(self) -> list[dict[str, list[float]]]:
        """For files: the steps and rates of each schedule between which it is a straight line."""
        if self._given is not None:
            return self._given
        found = []
        for rate in self.rates:
            bend = np.abs(np.diff(rate, 2)) > ROUNDING * rate.max()
            steps = np.unique(np.concatenate([[0], np.flatnonzero(bend) + 1, [len(rate) - 1]]))
            found.append({"step": (steps + 1.0).tolist(), "lr": rate[steps].tolist()})
        return found

    @classmethod
    def from_knots(cls, knots: Sequence[Mapping[str, Sequence[float]]]) -> Schedules:
        """The inverse of `knots`, which gives them back as they are."""
        schedules = cls([schedule_of(each["step"], each["lr"]) for each in knots])
        schedules._given = [{key: list(each[key]) for key in ("step", "lr")} for each in knots]
        return schedules

    def areas(self, curves: FloatArray, steps: FloatArray) -> FloatArray:
        """S1, the sum of the learning rates up to each point, warm-up included: (n,).

        Raises:
            MegamupError: no such curve or step, or a point before the first rate above 0.
        """

        def find() -> FloatArray:
            areas = np.array([self._area[c][t - 1] for c, t in self._places(curves, steps)])
            if not np.all(areas > 0):
                raise MegamupError("step: a point lies before the first learning rate above 0; expected later ones")
            return areas

        return self._remembered(("areas", curves.tobytes(), steps.tobytes()), find)

    def momenta(self, curves: FloatArray, steps: FloatArray, decay: float) -> FloatArray:
        """S2 = Σ_i Σ_{k<=i} (η_{k-1} - η_k)·decay^(i-k), over steps i up to each point, warm-up left out: (n,)."""

        def find() -> FloatArray:
            by_curve = [np.cumsum(lfilter([1.0], [1.0, -decay], _falls(rate))) for rate in self.rates]
            return np.array([by_curve[c][t - 1] for c, t in self._places(curves, steps)])

        return self._remembered(("momenta", decay, curves.tobytes(), steps.tobytes()), find)

    def falls(self, curves: FloatArray, steps: FloatArray) -> Falls:
        """What the multi-power law sums over, for each of n points."""

        def find() -> Falls:
            parts = [self._falls_before(c, t) for c, t in self._places(curves, steps)]
            return Falls(*(np.stack(each) for each in zip(*parts, strict=True)))

        return self._remembered(("falls", curves.tobytes(), steps.tobytes()), find)

    def _remembered(self, key: tuple[object, ...], find: Callable[[], Found]) -> Found:
        if key not in self._memory:
            if len(self._memory) >= REMEMBERED:
                self._memory.clear()
            self._memory[key] = find()
        return self._memory[key]  # type: ignore[return-value]

    def _falls_before(self, curve: int, step: int) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Sums of the falls of each block, and their rate and area at the mean of what fell in it: (m,) each.

        Blocks are even in the log of the distance to the point, in which the law is smooth; one sharp fall in a block
        is exact wherever it lies.
        """
        fall = _falls(self.rates[curve])[:step]
        area = self._area[curve][step - 1] - self._area[curve][:step] + self.rates[curve][:step]
        begin = _block_starts(step)
        weight = np.abs(fall) + 1e-300
        total = np.add.reduceat(weight, begin)
        mean_rate = np.add.reduceat(weight * self._log_rate[curve][:step], begin) / total
        mean_area = np.add.reduceat(weight * area, begin) / total
        rest = (0, BLOCKS - len(begin))
        return np.pad(np.add.reduceat(fall, begin), rest), np.pad(mean_rate, rest), np.pad(mean_area, rest)

    def _places(self, curves: FloatArray, steps: FloatArray) -> list[tuple[int, int]]:
        """(index of the curve from 0, step from 1) of each point.

        Raises:
            MegamupError: a curve or a step that the schedules don't have.
        """
        places = []
        for curve, step in zip(np.rint(curves).astype(int), np.rint(steps).astype(int), strict=True):
            if not 1 <= curve <= len(self.rates):
                raise MegamupError(f"curve: {curve} is unknown; expected 1 to {len(self.rates)}, one for each schedule")
            if not 1 <= step <= len(self.rates[curve - 1]):
                raise MegamupError(
                    f"step: {step} of curve {curve} is beyond its schedule of {len(self.rates[curve - 1])} steps"
                )
            places.append((int(curve) - 1, int(step)))
        return places


def schedule_of(steps: ArrayLike, rates: ArrayLike) -> FloatArray:
    """Learning rate of every step from 1 to the last, from those logged at `steps` (n,), linear in between.

    Before the first logged step it goes on as between the first two, down to 0: a warm-up rises, a constant stays.
    """
    logged, known = np.asarray(steps, dtype=np.float64), np.asarray(rates, dtype=np.float64)
    every = np.arange(1, int(logged[-1]) + 1)
    rate = np.interp(every, logged, known)
    if len(logged) > 1:
        slope = (known[1] - known[0]) / (logged[1] - logged[0])
        early = every < logged[0]
        rate[early] = np.clip(known[0] + slope * (every[early] - logged[0]), 0, known.max())
    return np.asarray(rate)


def _falls(rate: FloatArray) -> FloatArray:
    """η_{k-1} - η_k of every step: (T,); 0 until the rate first falls, as a warm-up is no annealing."""
    fall = -np.diff(rate, prepend=rate[0])
    fall[: int(np.argmax(fall > 0))] = 0
    return fall if np.any(fall > 0) else np.zeros_like(fall)


@lru_cache(maxsize=4096)
def _block_starts(step: int) -> NDArray[np.int64]:
    """First index of each of at most `BLOCKS` blocks of the indices 0 .. step - 1, rising."""
    distance = np.rint(np.geomspace(1, step, BLOCKS)).astype(np.int64)
    return np.unique(step - distance)
