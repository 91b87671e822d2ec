"""A law on a page that may be about several: its name, its titles, and the runs held out that it speaks of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megamup.scaling.analysis import Result
from megamup.scaling.runs import Point


@dataclass(frozen=True)
class Subject:
    """One law of the page."""

    result: Result
    name: str
    """Unique on the page, and fit for files and ids."""
    label: str
    """Its formula, with the reduction that it comes from."""
    held: tuple[Point, ...]
    """Runs held out; none for a law of something else than a run's loss."""
    alone: bool
    """Whether it is the page's only law."""

    def title(self, words: str) -> str:
        """A heading that says which law it is about, where that isn't plain."""
        return words[0].upper() + words[1:] if self.alone else f"{self.label}: {words[0].lower() + words[1:]}"


def subjects_of(results: Sequence[Result], held: Sequence[Point]) -> list[Subject]:
    """Each law of the results, those of a reduction together."""
    laws = [(each, result.reduction) for result in results for each in (result, *result.companions)]
    names: list[str] = []
    labels: list[str] = []
    for each, reduction in laws:
        name = f"power-{each.law.inputs[0]}" if each.law.name == "power" else each.law.name
        names.append(name if name not in names else f"{name}-{len(names) + 1}")
        label = each.law.formula if reduction in (None, each.law.name) else f"{each.law.formula} ({reduction})"
        labels.append(label if label not in labels else f"{label} ({len(labels) + 1})")
    return [
        Subject(
            each,
            name,
            label,
            tuple(held) if each.law.response == "L" and each.curve_evidence is None else (),
            alone=len(laws) == 1,
        )
        for (each, _), name, label in zip(laws, names, labels, strict=True)
    ]
