"""Every law by the name that users write, and what the runs are reduced to before some of them are fitted."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from megamup.errors import MegamupError
from megamup.scaling.laws.annealing import ANNEALING, MULTI_POWER
from megamup.scaling.laws.base import FloatArray, Law
from megamup.scaling.laws.batch import BATCH_LOSS, CRITICAL_BATCH
from megamup.scaling.laws.hyperparameters import STEP_LAW_BATCH, STEP_LAW_LR
from megamup.scaling.laws.kaplan import (
    BATCH_CMIN,
    D_OPT,
    KAPLAN_C,
    KAPLAN_CMIN,
    KAPLAN_D,
    KAPLAN_N,
    KAPLAN_ND,
    KAPLAN_NS,
    N_OPT,
    N_OPT_CMIN,
    S_MIN_CMIN,
)
from megamup.scaling.laws.loss import CHINCHILLA, OVERTRAINING, power
from megamup.scaling.laws.repeated import DATA_CONSTRAINED

__all__ = ["LAWS", "NAMES", "POWER_INPUTS", "REDUCTIONS", "FloatArray", "Law", "Reduction", "get_law"]

POWER_INPUTS = ("C", "N", "D", "S")
"""What `power` may be a law of."""

LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        power("C"),
        KAPLAN_N,
        KAPLAN_D,
        KAPLAN_C,
        KAPLAN_ND,
        KAPLAN_NS,
        KAPLAN_CMIN,
        N_OPT,
        D_OPT,
        N_OPT_CMIN,
        BATCH_CMIN,
        S_MIN_CMIN,
        CHINCHILLA,
        OVERTRAINING,
        DATA_CONSTRAINED,
        CRITICAL_BATCH,
        BATCH_LOSS,
        STEP_LAW_LR,
        STEP_LAW_BATCH,
        ANNEALING,
        MULTI_POWER,
    )
}


@dataclass(frozen=True)
class Reduction:
    """What runs are reduced to before laws are fitted to it."""

    name: str
    """What the user writes after `--law`."""
    inputs: tuple[str, ...]
    """Keys that each run needs, beside its loss."""
    laws: tuple[Law, ...]
    """Fitted to what is left."""
    source: str


REDUCTIONS = {
    reduction.name: reduction
    for reduction in (
        Reduction(
            "envelope",
            ("N",),
            (N_OPT, D_OPT, power("C")),
            "Hoffmann et al. 2022, arXiv:2203.15556, approach 1",
        ),
        Reduction(
            "isoflop",
            ("C", "N", "D"),
            (N_OPT, D_OPT, power("C")),
            "Hoffmann et al. 2022, arXiv:2203.15556, approach 2",
        ),
        Reduction("critical-batch", ("B", "lr"), (CRITICAL_BATCH, BATCH_LOSS), CRITICAL_BATCH.source),
        Reduction("step-law-lr", ("N", "D", "lr", "B"), (STEP_LAW_LR,), STEP_LAW_LR.source),
        Reduction("step-law-batch", ("N", "D", "lr", "B"), (STEP_LAW_BATCH,), STEP_LAW_BATCH.source),
    )
}
"""By the name that users write. Laws that aren't fitted to the runs' own points come with one."""


NAMES = tuple(dict.fromkeys([*LAWS, *REDUCTIONS]))
"""All that users may write."""


def get_law(name: str, x: str | None = None) -> Law:
    """The law called `name`; `x` is the input of `power`.

    Raises:
        MegamupError: no such law, a reduction (which fits several), or an `x` that the law can't take.
    """
    if name == "power":
        wanted = x or "C"
        if wanted not in POWER_INPUTS:
            raise MegamupError(f"x: {wanted!r} is unknown; expected one of {', '.join(POWER_INPUTS)}")
        return power(wanted)
    if name not in LAWS:
        close = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        if name in REDUCTIONS:
            laws = ", ".join(law.name for law in REDUCTIONS[name].laws)
            raise MegamupError(f"law: {name!r} is no single law; expected one of those that it fits: {laws}")
        raise MegamupError(f"law: {name!r} is unknown; expected one of {', '.join(NAMES)}{hint}")
    law = LAWS[name]
    if x is not None and (x,) != law.inputs:
        raise MegamupError(f"x: {x!r}: the law {name} is one of {', '.join(law.inputs)}; expected no x, or that")
    return law
