"""How N, C and L were counted: what is said with every point, and what may not be mixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

import numpy as np

from megamup.errors import MegamupError
from megamup.flops import Convention
from megamup.scaling.curves import FloatArray
from megamup.scaling.readers.columns import parse_pairs
from megamup.scaling.readers.log import nearest

PARAMETER_COUNTS = ("non_embedding", "total")
FLOPS_CONVENTIONS = tuple(dict.fromkeys([*get_args(Convention), "6N_total", "measured"]))
"""`megamup/flops.py` says what the first are; `6N_total`: 6·N with embedding and readout in N (Hoffmann et al. 2022);
`measured`: by a profiler."""
NONE = "none"
"""The convention of what no point has."""
AS_IN = "as in column "
"""Begins the convention of what a table doesn't say."""

QUANTITY_OF = {"flops": "C", "parameters": "N", "loss": "L"}
EXACT, NEAR, FORWARD_SPREAD = 0.01, 0.1, 0.25
BOTH_PASSES = 4.0
"""C/(N·D) above which a backward pass was counted: forward alone takes 2, and attention seldom as much again."""
LEAST = 1.0
"""C/(N·D) below which a unit is wrong: forward alone takes 2, less where N counts tables that are looked up."""


def parse_stated(texts: Sequence[str]) -> dict[str, str]:
    """`--convention flops=6N,parameters=total,loss=TEXT`.

    Raises:
        MegamupError: an unknown key or convention.
    """
    stated = parse_pairs(texts, "--convention", "flops=6N,parameters=total")
    allowed = {"flops": FLOPS_CONVENTIONS, "parameters": PARAMETER_COUNTS, "loss": None}
    for key, value in stated.items():
        if key not in allowed:
            raise MegamupError(
                f"--convention: {key!r} is unknown{nearest(key, allowed)}; expected {', '.join(allowed)}"
            )
        known = allowed[key]
        if known is not None and value not in known:
            raise MegamupError(
                f"--convention: {key}={value}: unknown{nearest(value, known)}; expected one of {', '.join(known)}"
            )
    return stated


def agreed(found: Mapping[str, str], stated: Mapping[str, str], name: str) -> dict[str, str]:
    """What a source says, filled from what its user states.

    Raises:
        MegamupError: the two differ.
    """
    filled = dict(found)
    for key, value in stated.items():
        if found[key].startswith(AS_IN):
            filled[key] = value
        elif found[key] not in (value, NONE):
            raise MegamupError(
                f"--convention: {key}={value}, but {name} says {found[key]!r}; expected the same: only what a "
                "table doesn't say can be stated"
            )
    return filled


def check_same(conventions: Mapping[str, Mapping[str, str]], option: str = "convention") -> dict[str, str]:
    """The one convention of several sources, by their names.

    Raises:
        MegamupError: two count FLOPs, parameters or loss in different ways.
    """
    common: dict[str, str] = {}
    for key in QUANTITY_OF:
        by_value: dict[str, str] = {}
        for name, convention in conventions.items():
            by_value.setdefault(convention[key], name)
        by_value.pop(NONE, None)
        if len(by_value) > 1:
            told = ", ".join(f"{name}: {value}" for value, name in by_value.items())
            raise MegamupError(
                f"{option}: {key}: {told}; expected one, as {QUANTITY_OF[key]} counted in two ways is no ladder: leave "
                f"one kind out with --exclude or, where a table's is known, state it with --convention {key}=..."
            )
        common[key] = next(iter(by_value), NONE)
    return common


def flops_ratio(n: FloatArray, d: FloatArray, c: FloatArray, convention: Mapping[str, str], *, counted: bool) -> str:
    """What C/(N·D) says of how C was counted, in words; arguments of shape (points,).

    Args:
        counted: the trainer counted C itself, by the convention named.

    Raises:
        MegamupError: C looks like the forward pass alone, or less, or isn't the 6·N·D that was stated.
    """
    ratio = c / (n * d)
    low, high, median = float(ratio.min()), float(ratio.max()), float(np.median(ratio))
    text = f"C/(N·D) = {median:.3g}" if high - low < EXACT * median else f"C/(N·D) = {low:.3g} to {high:.3g}"
    if counted:
        return text
    if abs(median / 2 - 1) < NEAR and max(high / 2 - 1, 1 - low / 2) < FORWARD_SPREAD:
        raise MegamupError(
            f"--columns: {text}: C looks like 2·N·D, forward only; expected about 6·N·D, as the backward pass costs "
            "twice the forward: give --columns C=3*COLUMN"
        )
    forward = np.abs(ratio / 2 - 1) < NEAR
    if forward.any() and high > BOTH_PASSES:
        raise MegamupError(
            f"--columns: {text}: C looks like 2·N·D, forward only, in {int(forward.sum())} of {len(ratio)} points and "
            "like more in others; expected one way to count: read them as two tables by --where, with C=3*COLUMN for "
            "the first"
        )
    if low < LEAST:
        raise MegamupError(
            f"--columns: {text}: less than the forward pass takes; expected about 6: give C in FLOPs, N in parameters "
            "and D in tokens, such as --columns D=1e9*COLUMN for billions"
        )
    if max(abs(low / 6 - 1), abs(high / 6 - 1)) < EXACT:
        return f"{text} (6ND)"
    if convention["flops"] in ("6N", "6N_total"):
        raise MegamupError(
            f"--convention: flops={convention['flops']}, but {text}; expected 6: N counts other parameters than C "
            "does (embeddings), or C isn't 6·N·D: map N and C to columns that agree, or state another convention"
        )
    return f"{text} (not 6ND: attention scores or embeddings count in one and not in the other)"
