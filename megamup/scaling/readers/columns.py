"""`--columns`: which column, or product of columns, stands for what of a point."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megamup.errors import MegamupError
from megamup.scaling.readers.log import listed, nearest, positive

QUANTITIES = {
    "L": "loss, nats per token",
    "N": "parameters",
    "D": "tokens seen",
    "C": "FLOPs of the run so far",
    "S": "optimizer steps",
    "B": "batch, tokens a step",
    "U": "unique tokens",
    "lr": "peak learning rate",
}
LABELS = ("name", "run")
KEYS = (*QUANTITIES, *LABELS)


@dataclass(frozen=True)
class Factor:
    """A column's name, or a number; multiplied or divided by."""

    of: str | float
    divides: bool = False


@dataclass(frozen=True)
class Expression:
    """A column, or a product of columns and numbers such as `20*multiplier*N`."""

    text: str
    factors: tuple[Factor, ...]

    @property
    def names(self) -> list[str]:
        """The columns in it."""
        return [factor.of for factor in self.factors if isinstance(factor.of, str)]

    def value(self, scope: Mapping[str, Any], where: str) -> float:
        """The product, each factor a finite number above 0.

        Raises:
            MegamupError: one isn't; the message begins with `where` (file:line).
        """
        product = 1.0
        for factor in self.factors:
            number = (
                factor.of if isinstance(factor.of, float) else positive(scope.get(factor.of), f"{where}: {factor.of}")
            )
            product = product / number if factor.divides else product * number
        return product


def parse_pairs(texts: Sequence[str], option: str, example: str) -> dict[str, str]:
    """`KEY=VALUE,KEY=VALUE` of one option, which may be given several times. A value may hold `=` and commas.

    Raises:
        MegamupError: a part without `=`, or a key that is there twice.
    """
    pairs: dict[str, str] = {}
    for part in [part for text in texts for part in re.split(r",(?=\s*\w+\s*=)", text)]:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (key and equals and value):
            raise MegamupError(f"{option}: {part!r} is no KEY=VALUE; expected such as {example}")
        if key in pairs:
            raise MegamupError(f"{option}: {key} is given twice, {pairs[key]} and {value}; drop one")
        pairs[key] = value
    return pairs


def check_keys(columns: Mapping[str, str]) -> None:
    """Refuse keys that stand for nothing.

    Raises:
        MegamupError: with those that do.
    """
    for key in columns:
        if key not in KEYS:
            raise MegamupError(
                f"--columns: {key!r} is unknown{nearest(key, KEYS)}; expected {', '.join(KEYS)} as KEY=COLUMN"
            )


def parse_expression(key: str, text: str, known: Sequence[str], where: str) -> Expression:
    """The expression of `--columns KEY=TEXT`; a name is the longest known one that fits, so it may hold `/` and `*`.

    Raises:
        MegamupError: a name that `where` (a file, a run) doesn't have.
    """
    if text in known:
        return Expression(text, (Factor(text),))
    by_length = sorted(known, key=len, reverse=True)
    factors, rest, divides = [], text, False
    while True:
        rest = rest.lstrip()
        name = next((name for name in by_length if name and re.match(re.escape(name) + r"\s*([*/]|$)", rest)), None)
        word = name if name is not None else re.split(r"[*/]", rest)[0].strip()
        number = None if name is not None else _as_number(word)
        if name is None and number is None:
            raise MegamupError(
                f"--columns: {key}={text}: {where} has no column {word!r}{nearest(word, known)}; it has {listed(known)}"
            )
        factors.append(Factor(word if number is None else number, divides))
        rest = rest[len(word) :].lstrip()
        if not rest:
            return Expression(text, tuple(factors))
        divides, rest = rest[0] == "/", rest[1:]


def _as_number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 < number < float("inf") else None
