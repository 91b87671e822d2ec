"""What every reader returns: a run's records and the facts that hold for all of it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megamup.errors import MegamupError

Record = dict[str, Any]


@dataclass(frozen=True)
class RunLog:
    """One run as it was logged."""

    name: str
    source: Path | None
    """Where it lies; None for a run in a table."""
    records: list[Record]
    """Flat, one for each step that logged anything, in the order of the steps; each has `step`."""
    facts: Record = field(default_factory=dict)
    """What is constant in the run, flat: config keys (`optim.lr`), `parameters.total`, `data.unique_tokens`."""
    flops_convention: str | None = None
    """How `flops` was counted, where the run says."""

    @property
    def planned_steps(self) -> float | None:
        """Steps that the run is to have, where it says."""
        steps = self.facts.get("train.steps")
        return float(steps) if isinstance(steps, int | float) else None

    @property
    def keys(self) -> list[str]:
        """Every name that a record or a fact has."""
        return list(dict.fromkeys([key for record in self.records for key in record] + list(self.facts)))


def by_step(records: Iterable[Record]) -> list[Record]:
    """Records in the order of their `step`; those of one step are merged, later over earlier."""
    merged: dict[float, Record] = {}
    for record in records:
        merged.setdefault(record["step"], {}).update(record)
    return [merged[step] for step in sorted(merged)]


def by_wandb_step(records: Sequence[Record]) -> list[Record]:
    """`by_step` of records with wandb's `_step`, which counts calls: their own `step` only where every one has it."""
    own = all(isinstance(record.get("step"), int | float) for record in records)
    return by_step(records if own else [record | {"step": record["_step"]} for record in records])


def flat(values: Mapping[str, Any], prefix: str = "") -> Record:
    """Nested mappings as one, with dots between their keys."""
    found: Record = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def matches(values: Mapping[str, Any], conditions: Mapping[str, Sequence[str]]) -> bool:
    """Whether each named value, as text, is one of those given for it."""
    return all(str(values.get(name)) in wanted for name, wanted in conditions.items())


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name closest to `word`, empty where none is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def listed(names: Iterable[str], most: int = 30) -> str:
    """Names for a message, not more than are read."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def positive(value: Any, where: str) -> float:
    """`value` as a number.

    Raises:
        MegamupError: it is no finite number above 0; the message begins with `where`.
    """
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise MegamupError(
            f"{where} is {value!r}; expected a finite number above 0: correct it, or leave this point out "
            "with --exclude"
        )
    return number
