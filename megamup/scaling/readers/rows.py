"""Rows of a table as points, and as curves where several are of one run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megamup.errors import MegamupError
from megamup.scaling.curves import Curve
from megamup.scaling.readers.columns import LABELS, QUANTITIES, check_keys, parse_expression
from megamup.scaling.readers.conventions import AS_IN, NONE, QUANTITY_OF
from megamup.scaling.readers.sources import check_unique
from megamup.scaling.readers.tables import Table
from megamup.scaling.readers.track import CONSTANTS, Track


@dataclass(frozen=True)
class RowPoint:
    """One row's quantities."""

    name: str
    run: str
    """Empty where the table names no runs."""
    inputs: dict[str, float]
    loss: float


def check_table_columns(columns: Mapping[str, str]) -> None:
    """Refuse a mapping that makes no points.

    Raises:
        MegamupError: an unknown key, no L, or no input.
    """
    check_keys(columns)
    if "L" not in columns or not any(key in columns for key in QUANTITIES if key != "L"):
        raise MegamupError(
            f"--columns: {dict(columns)} is not enough; expected L=COLUMN and N=COLUMN or C=COLUMN (or D, S, B, U, lr)"
        )


def table_convention(columns: Mapping[str, str]) -> dict[str, str]:
    """What the table's columns say of how they were counted: nothing but their names."""
    return {key: AS_IN + columns[quantity] if quantity in columns else NONE for key, quantity in QUANTITY_OF.items()}


def rows_of(
    table: Table, columns: Mapping[str, str], exclude: Sequence[str], prefix: str
) -> tuple[list[RowPoint], list[str]]:
    """The rows' points, and the names of all rows and runs, those left out too.

    Args:
        exclude: names or runs whose rows are not looked at.
        prefix: begins the names of rows without one (`row LINE`).

    Raises:
        MegamupError: `columns` that don't fit the table, a value not above 0 (file:line), or a name that two rows have.
    """
    check_table_columns(columns)
    for label in LABELS:
        if label in columns:
            table.check_column(columns[label], f"--columns: {label}={columns[label]}")
    expressions = {
        key: parse_expression(key, text, table.columns, str(table.path))
        for key, text in columns.items()
        if key not in LABELS
    }
    points, names = [], []
    for row in table.rows:
        name = str(row.cells[columns["name"]]) if "name" in columns else f"{prefix}row {row.line}"
        run = str(row.cells.get(columns["run"])) if "run" in columns else ""
        names += [name, run] if run else [name]
        if name not in exclude and run not in exclude:
            inputs = {key: expression.value(row.cells, row.where) for key, expression in expressions.items()}
            loss = inputs.pop("L")
            points.append(RowPoint(name, run, inputs, loss))
    if "name" in columns:
        check_unique(
            [point.name for point in points],
            f"{table.path}, column {columns['name']} (rows of one run are told by run={columns['name']} instead)",
        )
    return points, names


def tracks_of_rows(points: Sequence[RowPoint], path: str) -> list[Track]:
    """The runs whose rows are points of their curves.

    Raises:
        MegamupError: the table names no runs or no tokens, or two rows of a run are at the same tokens.
    """
    by_run: dict[str, list[RowPoint]] = {}
    for point in points:
        by_run.setdefault(point.run, []).append(point)
    if "" in by_run:
        raise MegamupError(
            f"{path}: its rows are single points; expected several of a run to make a curve: say which column names it "
            "with --columns run=COLUMN"
        )
    return [_track(run, rows, path) for run, rows in by_run.items()]


def _track(run: str, rows: Sequence[RowPoint], path: str) -> Track:
    if any("D" not in row.inputs for row in rows):
        raise MegamupError(f"{path}: D is missing; expected the tokens at every row of a curve: add --columns D=COLUMN")
    ordered = sorted(rows, key=lambda row: row.inputs["D"])
    step, tokens, flops = (np.array([row.inputs.get(key, math.nan) for row in ordered]) for key in ("S", "D", "C"))
    if np.any(np.diff(tokens) == 0):
        raise MegamupError(
            f"{path}: run {run} has two rows at the same tokens; expected one: drop one, or name runs apart"
        )
    curve = Curve(step, tokens, flops, np.array([row.loss for row in ordered]))
    constants = {key: ordered[-1].inputs[key] for key in CONSTANTS if key in ordered[-1].inputs}
    return Track(run, None, constants, curve)
