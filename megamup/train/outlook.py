"""What a fit file predicts of this run, beside what it does: said at the start, at every logged step and at the end."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megamup.config import Config
from megamup.errors import MegamupError

if TYPE_CHECKING:
    from megamup.scaling.curves import Smoothing
    from megamup.scaling.forecast import Band, Forecast

PATIENCE = 3
"""Logged steps in a row outside the band before it is said."""


def read_outlook(config: Config) -> Forecast | None:
    """The forecast that ``log.forecast`` names, checked; None without one.

    Raises:
        MegamupError: no fit file, or one that says nothing of such a run.
    """
    if config.log.forecast is None:
        return None
    from megamup.scaling.forecast import read_forecast  # scipy is not a trainer's otherwise

    return read_forecast(Path(config.log.forecast), config, "log.forecast")


class Average:
    """`scaling.curves.smoothed`, a record at a time."""

    def __init__(self, smoothing: Smoothing) -> None:
        self.smoothing = smoothing
        self.total = self.weight = self.tokens = 0.0

    def add(self, tokens: float, loss: float) -> float:
        """Take in the loss of the record at `tokens`; the average so far."""
        decay = float(self.smoothing.decay(np.array([self.tokens or tokens, tokens]))[1])
        self.total, self.weight = self.total * decay + loss, self.weight * decay + 1
        self.tokens = tokens
        return self.value

    @property
    def value(self) -> float:
        return self.total / self.weight


class Outlook:
    """The forecast of a run, held against its smoothed training loss. Warns, and never stops anything."""

    def __init__(self, config: Config, forecast: Forecast) -> None:
        from megamup.scaling.curves import Smoothing
        from megamup.scaling.forecast import band

        self.config, self.forecast = config, forecast
        self.band: Band | None = None
        self.lines = [f"predicted {forecast}", *(f"warning: {text}" for text in forecast.warnings)]
        try:
            self.band = band(forecast, config)
        except MegamupError as error:
            self.lines.append(f"no band of the training loss: {error}")
        self.average = Average(Smoothing("none") if self.band is None else self.band.smoothing)
        self.final = Average(forecast.smoothing)
        self.outside = 0

    def replay(self, path: Path) -> None:
        """Take in what a resumed run has logged: the average goes on where it was."""
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                self._take_in(json.loads(line))

    def watch(self, record: Mapping[str, Any]) -> dict[str, float]:
        """What the record gains: ``predicted_loss``, the band's middle; ``outside_band`` where the run is outside."""
        smoothed = self._take_in(record)
        expected = self.band.at(record["step"] / self.config.train.steps) if self.band is not None else None
        if expected is None:
            return {}
        middle, low, high = expected
        inside = low <= smoothed <= high
        self._tell(inside, f"step {record['step']}: training loss {smoothed:.4f}, predicted {low:.4f} to {high:.4f}")
        self.outside = 0 if inside else self.outside + 1
        return {"predicted_loss": middle} | ({} if inside else {"outside_band": 1.0})

    def verdict(self, record: Mapping[str, Any]) -> str | None:
        """The last record's loss beside the predicted one; None where it lacks the loss that the law is of."""
        # One batch's training loss is no measurement: a fit to training losses is of their average.
        measured = self.final.value if self.forecast.measured == "loss" else record.get(self.forecast.measured)
        if measured is None:
            return None
        error = 100 * (self.forecast.loss / measured - 1)
        low, high = self.forecast.low, self.forecast.high
        where = "no interval" if low is None or high is None else "inside" if low <= measured <= high else "OUTSIDE"
        return (
            f"measured final {self.forecast.measured} {measured:.4g}, predicted {self.forecast}: {error:+.2f}%, {where}"
        )

    def _take_in(self, record: Mapping[str, Any]) -> float:
        """The average of the training loss after this record, smoothed as the band's own losses were."""
        tokens, loss = float(record["tokens"]), float(record["loss"])
        self.final.add(tokens, loss)
        return self.average.add(tokens, loss)

    def _tell(self, inside: bool, what: str) -> None:
        """One warning when the run has left the band for good, one line when it is back."""
        if not inside and self.outside + 1 == PATIENCE:
            advice = "compare its config with the ladder's (rate, batch, data), or doubt the fit"
            print(
                f"warning: {what}: outside its band for {PATIENCE} logged steps; {advice}", file=sys.stderr, flush=True
            )
        elif inside and self.outside >= PATIENCE:
            print(f"{what}: back in its band", file=sys.stderr, flush=True)
