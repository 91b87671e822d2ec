"""Paths told apart by content: run folders of ours, offline wandb runs, TensorBoard; each to a `RunLog`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from megamup.errors import MegamupError
from megamup.scaling.readers.log import RunLog, listed, nearest
from megamup.scaling.readers.run_folder import read_run_folder
from megamup.scaling.readers.tensorboard_run import is_tensorboard, read_tensorboard_run
from megamup.scaling.readers.wandb_run import read_wandb_run, wandb_file

Reader = Callable[[str, Path], RunLog]


def reader_of(path: Path) -> Reader | None:
    """What reads `path`, None where it is no run. A run folder of ours is read from its own metrics, whatever copies
    of them it holds."""
    if (path / "metrics.jsonl").is_file():
        return read_run_folder
    if wandb_file(path) is not None:
        return read_wandb_run
    return read_tensorboard_run if is_tensorboard(path) else None


def read_run(path: Path, name: str | None = None) -> RunLog:
    """One run, called `name` (default its folder's).

    Raises:
        MegamupError: `path` is none, or its reader's.
    """
    reader = reader_of(path)
    if reader is None:
        raise MegamupError(
            f"--runs: {path} is no run folder, nor holds any; a run's folder has config.yaml, metrics.jsonl and "
            "environment.json; an offline wandb run has run-ID.wandb, TensorBoard events.out.tfevents*"
        )
    return reader(name or path.resolve().name, path)


def find_runs(paths: Sequence[Path]) -> dict[str, Path]:
    """Runs by name, which is their folder's; the whole path where two would be called the same.

    A folder that holds run folders, such as a study's, stands for those; what is no run is found out by `read_run`.

    Raises:
        MegamupError: one given twice.
    """
    found = [run for path in paths for run in _runs_at(path)]
    resolved = [run.resolve() for run in found]
    check_unique([str(run) for run in resolved], "--runs")
    names = [run.name for run in resolved]
    return dict(zip(names if len(set(names)) == len(names) else [run.as_posix() for run in found], found, strict=True))


def _runs_at(path: Path) -> list[Path]:
    """The path itself, or the runs directly in it."""
    if reader_of(path) is not None or not path.is_dir():
        return [path]
    # By what it resolves to: wandb keeps a link `latest-run` beside the runs.
    inside = {child.resolve(): child for child in sorted(path.iterdir()) if reader_of(child) is not None}
    return list(inside.values()) or [path]


def check_unique(names: Sequence[str], where: str) -> None:
    """Refuse a name that is there twice.

    Raises:
        MegamupError: with the name.
    """
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise MegamupError(f"{where}: {name!r} is given twice; expected every run once: drop one")
        seen.add(name)


def check_excluded(exclude: Sequence[str], names: Sequence[str]) -> None:
    """Refuse a name to leave out that nothing has.

    Raises:
        MegamupError: with the nearest that is there.
    """
    for name in exclude:
        if name not in names:
            raise MegamupError(f"--exclude: no run is called {name!r}{nearest(name, names)}; there are {listed(names)}")
