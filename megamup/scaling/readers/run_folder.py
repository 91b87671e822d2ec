"""Run folders as the trainer writes them: config.yaml, environment.json, data.json, metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megamup.errors import MegamupError
from megamup.scaling.readers.log import Record, RunLog, by_step, flat


def read_metrics(path: Path) -> list[Record]:
    """The records of a `metrics.jsonl`, one for each step, in the order of the steps.

    Lines of one step are merged, later over earlier: an evaluation may stand on its own line, and a resumed
    run writes some steps twice. A half-written last line is what a killed run leaves, and is dropped.

    Raises:
        MegamupError: no such file, no complete line in it, or a broken line before the last (file:line).
    """
    if not path.is_file():
        raise MegamupError(f"{path}: no such file; expected the metrics of a run, one JSON object a line")
    lines = path.read_text(encoding="utf-8", errors="replace").rstrip().split("\n")
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = _parse_record(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):
            raise MegamupError(
                f"{path}:{number}: {line[:60]!r} is no JSON object with a `step`; expected one object a "
                "line: restore the file, or delete this line if its step is of no use"
            )
    if not records:
        raise MegamupError(f"{path}: holds no complete line; the run logged nothing, so leave it out")
    return by_step(records)


def read_run_folder(name: str, folder: Path) -> RunLog:
    """A run folder; its facts are its config, both counts of parameters and the unique tokens of its data.

    Raises:
        MegamupError: a file that is missing or broken, or lacks the FLOPs convention or `train.steps`.
    """
    config_path, environment_path = folder / "config.yaml", folder / "environment.json"
    config = _read_config(config_path)
    _number(config, ("train", "steps"), config_path)
    environment = _read_json(environment_path)
    convention = environment.get("flops_convention")
    if not isinstance(convention, str):
        raise MegamupError(
            f"{environment_path}: flops_convention is {convention!r}; expected its name, such "
            "as '6N': without it the FLOPs of this run can't be compared with others"
        )
    counts = {
        f"parameters.{kind}": _number(environment, ("parameters", kind), environment_path)
        for kind in ("non_embedding", "total")
    }
    records = read_metrics(folder / "metrics.jsonl")
    facts = flat(config) | counts | _unique_tokens(folder / "data.json", records)
    return RunLog(name, folder, records, facts, convention)


def _unique_tokens(path: Path, records: list[Record]) -> Record:
    """`data.unique_tokens`: the tokens of the corpus, or share of it, that the run drew from.

    Of a blend: the different tokens that the run saw, Σ min(size, share of the tokens seen), as its sources repeat at
    different times. Runs of before there was a data.json don't know.
    """
    if not path.is_file():
        return {}
    content = _read_json(path)
    seq_len, sources = content.get("seq_len"), content.get("train")
    try:
        sizes = [float(source["samples"]) * float(seq_len) for source in sources]  # type: ignore[union-attr, arg-type]
        weights = [float(source["weight"]) for source in sources]  # type: ignore[union-attr]
    except (KeyError, TypeError, ValueError) as error:
        raise MegamupError(f"{path}: {error!r}: not the record of a run's data; restore it") from error
    if len(sizes) == 1:
        return {"data.unique_tokens": sizes[0]}
    seen = max((float(record["tokens"]) for record in records if "tokens" in record), default=0.0)
    total = sum(weights)
    return {"data.unique_tokens": sum(min(size, seen * w / total) for size, w in zip(sizes, weights, strict=True))}


def _parse_record(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    is_step = isinstance(record, dict) and isinstance(record.get("step"), int | float)
    return record if is_step else None


def _read_json(path: Path) -> Record:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MegamupError(f"{path}: no such file; expected what the trainer writes into a run's folder") from error
    except ValueError as error:
        raise MegamupError(f"{path}: is not JSON ({error}); restore it, or leave this run out") from error
    return content if isinstance(content, dict) else {}


def _read_config(path: Path) -> Record:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MegamupError(f"{path}: no such file; expected the run's resolved config") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MegamupError(f"{path}: is not YAML ({error}); restore it, or leave this run out") from error
    return content if isinstance(content, dict) else {}


def _number(content: Record, keys: Sequence[str], path: Path) -> float:
    value: Any = content
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MegamupError(
            f"{path}: {'.'.join(keys)} is {value!r}; expected a number: restore the file, or leave this run out"
        )
    return value
