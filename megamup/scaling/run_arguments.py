"""The arguments by which programs are told their runs, and how to read them."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from megamup.errors import MegamupError
from megamup.scaling.curves import Curve, Smoothing, parse_at, parse_smoothing
from megamup.scaling.readers.columns import parse_pairs
from megamup.scaling.readers.conventions import parse_stated
from megamup.scaling.readers.track import Track
from megamup.scaling.runs import LOSSES, PARAMETER_COUNTS, Ladder, Point, Reading, load, load_curves, load_tracks


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `read_ladder` and `read_curves` read."""
    group = parser.add_argument_group("runs")
    group.add_argument(
        "--runs",
        nargs="+",
        type=Path,
        default=[],
        metavar="DIR",
        help="run folders, folders of them, offline wandb runs, TensorBoard folders: told apart by content",
    )
    group.add_argument(
        "--data",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="tables: CSV with a header, JSON lines; W&B's exports of runs, of a chart, of histories",
    )
    group.add_argument(
        "--columns",
        action="append",
        default=[],
        metavar="L=col,N=col",
        help="columns of --data, or keys of runs, for L (loss), N (parameters), D (tokens), C (FLOPs), S (steps), B "
        "(batch in tokens), U (unique tokens), lr, name, run; products will do: D=20*multiplier*N",
    )
    group.add_argument(
        "--where", action="append", default=[], metavar="col=value[,value]", help="keep rows or runs with these values"
    )
    group.add_argument("--exclude", nargs="+", default=[], metavar="NAME", help="runs to leave out, by name")
    group.add_argument(
        "--loss", choices=LOSSES, help="which loss of a run (default valid_loss; loss for laws of whole curves)"
    )
    group.add_argument(
        "--parameters", choices=PARAMETER_COUNTS, help="what N counts in run folders (default non_embedding)"
    )
    group.add_argument(
        "--at",
        metavar="final",
        help="where on its curve a run is read: final (default), best, step=S, tokens=D, flops=C, fraction=F, or "
        "curve:K for K points of every run",
    )
    group.add_argument(
        "--smooth",
        metavar="share=0.02",
        help="average over the loss: none, weight=W (TensorBoard's), tokens=T or share=F (half-life in tokens, or in "
        "the share of those seen); default share=0.02 for --loss loss, else none",
    )
    group.add_argument(
        "--convention",
        action="append",
        default=[],
        metavar="flops=6N,parameters=total",
        help="how a table counts, where you know",
    )
    group.add_argument("--facts", type=Path, metavar="FILE", help="a table that gives what runs lack, by their name")


def reading_of(arguments: argparse.Namespace) -> Reading:
    """What `add_run_arguments` was given, checked.

    Raises:
        MegamupError: no runs, a table without columns, or a value of another form.
    """
    if not arguments.runs and not arguments.data:
        raise MegamupError("--runs, --data: both missing; expected run folders or a table")
    if arguments.data and not arguments.columns:
        raise MegamupError("--columns: missing; --data needs its columns named: add --columns C=COLUMN,L=COLUMN")
    for option, given in (("--loss", arguments.loss), ("--parameters", arguments.parameters)):
        if given and not arguments.runs:
            raise MegamupError(
                f"{option}: {given}: says what is read of run folders; a table's is named by --columns: leave it out"
            )
    conditions: dict[str, tuple[str, ...]] = {}
    for text in arguments.where:
        column, equals, values = text.partition("=")
        if not (column and equals):
            raise MegamupError(f"--where: {text!r} is no COLUMN=VALUE; expected such as train_dataset=rpj")
        conditions[column] = (*conditions.get(column, ()), *values.split(","))
    return Reading(
        loss=arguments.loss or "valid_loss",
        parameters=arguments.parameters or PARAMETER_COUNTS[0],
        columns=parse_pairs(arguments.columns, "--columns", "C=flops,L=loss"),
        at=parse_at(arguments.at) if arguments.at else None,
        smoothing=parse_smoothing(arguments.smooth) if arguments.smooth else None,
        stated=parse_stated(arguments.convention),
        exclude=arguments.exclude,
        where=conditions,
        facts=arguments.facts,
    )


def read_ladder(arguments: argparse.Namespace) -> Ladder:
    """The points of all runs and tables given.

    Raises:
        MegamupError: as `reading_of` and `runs.load`.
    """
    return load(arguments.runs, arguments.data, reading_of(arguments))


def read_curves(arguments: argparse.Namespace) -> list[tuple[Point, Curve]]:
    """The whole smoothed curve of each run, and its last point, which holds the run's N, B, lr.

    Raises:
        MegamupError: as `reading_of` and `runs.load_curves`.
    """
    ladder, curves = load_curves(arguments.runs, arguments.data, reading_of(arguments))
    return list(zip(ladder.points, curves, strict=True))


def read_tracks(arguments: argparse.Namespace) -> tuple[Ladder, list[Track]]:
    """Each run as a law of its whole curve sees it: training loss unless told otherwise, smoothed only if told to.

    Raises:
        MegamupError: as `reading_of` and `runs.load_tracks`; a moment asked for.
    """
    if arguments.at:
        raise MegamupError(f"--at: {arguments.at!r}; a law of whole curves is fitted to all of them: leave --at out")
    reading = reading_of(arguments)
    smoothing = reading.smoothing or Smoothing("none")
    return load_tracks(
        arguments.runs, arguments.data, replace(reading, loss=arguments.loss or "loss", smoothing=smoothing)
    )
