"""Tables in CSV (or tab-separated), JSON lines or a JSON list, and W&B's exports of histories among them."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megamup.errors import MegamupError
from megamup.scaling.readers.log import Record, RunLog, by_step, by_wandb_step, flat, listed, matches, nearest

CHART_STEP = "Step"
CHART_RUN = " - "
"""A chart's export has columns `RUN - KEY` beside `Step`; `__MIN` and `__MAX` of each are of its drawing."""
CHART_ENDS = ("__MIN", "__MAX")


@dataclass(frozen=True)
class Row:
    """One row; `where` names it in messages (file:line)."""

    line: int
    where: str
    cells: Record


@dataclass(frozen=True)
class Table:
    path: Path
    columns: list[str]
    rows: list[Row]

    def check_column(self, column: str, option: str) -> None:
        """Refuse a column that isn't there.

        Raises:
            MegamupError: with the nearest that is.
        """
        if column not in self.columns:
            raise MegamupError(
                f"{option}: {self.path} has no column {column!r}{nearest(column, self.columns)}; "
                f"it has {listed(self.columns)}"
            )


def read_table(path: Path) -> Table:
    """A table; content tells the format.

    Raises:
        MegamupError: no such file, or one that is none of the formats (file:line).
    """
    if not path.is_file():
        raise MegamupError(f"--data: {path} is no file; expected CSV with a header line, or JSON lines")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise MegamupError(f"--data: {path} is not UTF-8: byte {error.start}; expected CSV or JSON lines") from None
    start = text.lstrip()[:1]
    if start in ("{", "["):
        rows = _json_rows(path, text, is_list=start == "[")
        columns = list(dict.fromkeys(key for row in rows for key in row.cells))
    else:
        rows, columns = _csv_rows(path, text)
    if not rows:
        raise MegamupError(f"--data: {path} holds no row; expected one for each run, or for each point of a curve")
    return Table(path, columns, rows)


def filtered(table: Table, conditions: Mapping[str, Sequence[str]]) -> Table:
    """The rows whose cell, as text, is one of the values given for its column, for every such column.

    Raises:
        MegamupError: no such column, or no row left.
    """
    for column in conditions:
        table.check_column(column, f"--where {column}")
    rows = [row for row in table.rows if matches(row.cells, conditions)]
    if not rows:
        column = next(iter(conditions))
        present = listed(sorted({str(row.cells.get(column)) for row in table.rows}))
        raise MegamupError(
            f"--where: no row of {table.path} has {dict(conditions)!r}; expected one at least: {column} is {present}"
        )
    return replace(table, rows=rows)


def histories(table: Table, columns: Mapping[str, str]) -> list[RunLog]:
    """The runs in an export of W&B histories; none where the table is one of points.

    A chart's export has `Step` and a column `RUN - KEY` for each run and key. A history (`run.history()`) has `_step`,
    and the column that `run=` names where it holds several runs; a table with `name=` is one of runs, whatever it has.
    """
    if "name" in columns:
        return []
    if CHART_STEP in table.columns and any(CHART_RUN in column for column in table.columns):
        return _chart(table)
    if "_step" not in table.columns:
        return []
    if "run" in columns:
        table.check_column(columns["run"], f"--columns: run={columns['run']}")
    runs: dict[str, list[Record]] = {}
    for row in table.rows:
        name = str(row.cells[columns["run"]]) if "run" in columns else table.path.stem
        runs.setdefault(name, []).append(_numbers(row.cells) | {"_step": _step(row, "_step")})
    return [RunLog(name, None, by_wandb_step(records)) for name, records in runs.items()]


def facts_by_run(path: Path) -> dict[str, Record]:
    """The rows of a table by its column `name` (`Name` in a W&B export of runs): what the logs of those runs lack.

    Raises:
        MegamupError: as `read_table`, or no such column.
    """
    table = read_table(path)
    column = next((name for name in ("name", "Name") if name in table.columns), None)
    if column is None:
        raise MegamupError(
            f"--facts: {path} has no column 'name'; expected one that names the runs, beside their facts"
        )
    return {str(row.cells[column]): {key: row.cells[key] for key in row.cells if key != column} for row in table.rows}


def _chart(table: Table) -> list[RunLog]:
    runs: dict[str, list[Record]] = {}
    for row in table.rows:
        for column, value in row.cells.items():
            name, separator, key = column.rpartition(CHART_RUN)
            if separator and not key.endswith(CHART_ENDS) and value not in ("", None):
                runs.setdefault(name, []).append({"step": _step(row, CHART_STEP), key: value})
    return [RunLog(name, None, by_step(records)) for name, records in runs.items()]


def _step(row: Row, column: str) -> float:
    try:
        return float(row.cells[column])
    except (KeyError, TypeError, ValueError):
        raise MegamupError(f"{row.where}: {column} is {row.cells.get(column)!r}; expected the step's number") from None


def _numbers(cells: Record) -> Record:
    """The cells that hold a number: an export leaves those empty that a step didn't log."""
    found: Record = {}
    for key, value in cells.items():
        try:
            number = float(value)
        except (TypeError, ValueError):
            continue
        if not math.isnan(number):
            found[key] = number
    return found


def _csv_rows(path: Path, text: str) -> tuple[list[Row], list[str]]:
    header = text.split("\n", 1)[0]
    reader = csv.DictReader(
        io.StringIO(text, newline=""), delimiter="\t" if "\t" in header and "," not in header else ","
    )
    columns = list(reader.fieldnames or [])
    twice = next((column for column in columns if columns.count(column) > 1), None)
    if twice is not None:
        raise MegamupError(f"--data: {path} has two columns {twice!r}; expected names that differ: rename one")
    return [Row(reader.line_num, f"{path}:{reader.line_num}", row) for row in reader], columns


def _json_rows(path: Path, text: str, *, is_list: bool) -> list[Row]:
    if is_list:
        entries = [(number, f"{path}, entry {number}", entry) for number, entry in enumerate(_json(path, 1, text), 1)]
    else:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        entries = [(number, f"{path}:{number}", _json(path, number, line)) for number, line in lines]
    for _, where, entry in entries:
        if not isinstance(entry, dict):
            raise MegamupError(f"{where}: {str(entry)[:60]!r} is no JSON object; expected one for each row")
    return [Row(number, where, flat(entry)) for number, where, entry in entries]


def _json(path: Path, line: int, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise MegamupError(f"{path}:{line}: {text[:60]!r} is not JSON ({error}); expected an object a line") from None
