"""What a report draws beside the fits, found again from the runs behind them: curves, reductions, utilization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megamup.errors import MegamupError
from megamup.scaling.analysis import Result
from megamup.scaling.critical_batch import CriticalBatches, critical_batch
from megamup.scaling.curves import Curve
from megamup.scaling.envelope import Envelope, envelope
from megamup.scaling.isoflop import IsoFlop, isoflop
from megamup.scaling.mfu import Utilisation, utilisations
from megamup.scaling.reduction import Curves
from megamup.scaling.runs import Point, Reading, load_curves, read_curve


@dataclass(frozen=True)
class Evidence:
    """What could be found; what couldn't be read is in the warnings."""

    curves: Curves
    """Training curves of the fitted runs, as they were logged."""
    held_curves: Curves
    smoothed: Curves
    """Curves that the envelope was made from."""
    envelope: Envelope | None
    isoflop: IsoFlop | None
    critical: CriticalBatches | None
    utilisations: tuple[Utilisation, ...]
    warnings: tuple[str, ...]


def evidence_of(results: Sequence[Result], held: Sequence[Point], curves: Curves | None) -> Evidence:
    """Read what lies behind the results.

    Args:
        curves: smoothed curves of the runs, for envelope and critical batch; None reads them where the points say.
    """
    runs = list({p.source or p.name: p for r in results for p in (r.runs or r.ladder).points}.values())
    by_reduction = {result.reduction: result for result in results if result.reduction is not None}
    warnings: list[str] = []
    shown, held_shown = _logged(runs, warnings), _logged(held, warnings)
    smooth: Curves = ()
    found: Envelope | None = None
    critical: CriticalBatches | None = None
    for name in ("envelope", "critical-batch"):
        if name not in by_reduction:
            continue
        result = by_reduction[name]
        try:
            smooth = curves if curves is not None else _smoothed(result)
            if name == "envelope":
                found = envelope(smooth, convention=result.ladder.convention)
            else:
                critical = critical_batch(smooth, convention=result.ladder.convention)
        except MegamupError as error:
            warnings.append(f"the curves behind the law {name} are not shown: {error}")
    behind = by_reduction["isoflop"].runs if "isoflop" in by_reduction else None
    return Evidence(
        shown,
        held_shown,
        smooth if found is not None else (),
        found,
        None if behind is None else isoflop(behind),
        critical,
        _utilisations([*runs, *held], warnings),
        tuple(warnings),
    )


def _logged(points: Sequence[Point], warnings: list[str]) -> list[tuple[Point, Curve]]:
    """The training curves of the points that have a run; a warning for each that can't be read."""
    found = []
    for point in points:
        if point.source is None:
            continue
        try:
            found.append((point, read_curve(point.source)))
        except MegamupError as error:
            warnings.append(f"the training curve of {point.run or point.name} is not shown: {error}")
    return found


def _smoothed(result: Result) -> Curves:
    """The curves of the runs behind a reduction, read as they were for it.

    Raises:
        MegamupError: runs of a table, which the fit file doesn't name; what a reader refuses.
    """
    points = [] if result.runs is None else list(result.runs.points)
    sources = [point.source for point in points if point.source is not None]
    if not points or len(sources) < len(points):
        raise MegamupError("curves: the fit holds none of a table; expected them: give the runs or the table again")
    reading = Reading.from_text(result.ladder.convention["reading"])
    ladder, curves = load_curves(sources, (), reading)
    return list(zip(ladder.points, curves, strict=True))


def _utilisations(points: Sequence[Point], warnings: list[str]) -> tuple[Utilisation, ...]:
    """Of the points that are run folders of ours."""
    folders: list[Path] = []
    for point in points:
        folder = point.source
        if folder is not None and (folder / "metrics.jsonl").is_file() and folder not in folders:
            folders.append(folder)
    good = []
    for folder in folders:
        try:
            utilisations([folder])
        except MegamupError as error:
            warnings.append(f"the MFU of {folder.name} is not shown: {error}")
        else:
            good.append(folder)
    return tuple(utilisations(good))
