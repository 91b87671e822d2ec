"""What a run consumes: its record `data.json`, and the documents of any of its steps.

Which samples a step sees follows from the record and the corpora alone, so nothing is logged while a run trains.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megamup.config import Config, config_from, read_yaml
from megamup.data.corpus import Corpus
from megamup.data.mixture import RunData, TrainData, TrainSource, Wanted
from megamup.errors import MegamupError

VERSION = 1
"""Of the order of samples: another order under the same record would be another number."""
FREE = ("name", "prefix", "state", "tokenizer_sha256")
"""What may differ when a run goes on: data may have moved, or got a manifest that tells its tokenizer."""


@dataclass(frozen=True)
class Part:
    """Tokens of one document."""

    document: int
    """Index in the corpus."""
    start: int
    stop: int
    """Tokens of the document, from its first token on, as a half-open range."""


@dataclass(frozen=True)
class Sample:
    """One sequence of a step."""

    source: str
    """Name, as in metrics.jsonl and data.json."""
    prefix: str
    """Of its corpus."""
    epoch: int
    """How often the run had seen all of the source before."""
    index: int
    """The sample's number in the corpus."""
    start: int
    stop: int
    """Its tokens in the corpus's stream; of a decoder the first is only an input, the last only a target. Of an encoder
    some may not be read, where denoisers need different lengths, and with ``objective.pairs`` the second half of some
    samples is another one's."""
    parts: tuple[Part, ...]
    """The documents that those tokens are of, in order."""


def record(config: Config, data: RunData) -> dict[str, Any]:
    """The content of data.json: all that determines which samples a run sees at which step, and where they lie."""
    train = [
        {
            **describe(source.name, source.samples.corpus),
            "samples": len(source.samples),
            "weight": source.wanted.weight,
            "fraction": source.wanted.fraction,
        }
        for source in data.train.sources
    ]
    valid = [] if data.valid is None else list(map(describe, data.valid.names, data.valid.corpora))
    values = {
        "version": VERSION,
        "seed": config.run.seed,
        "seq_len": config.raw_len,
        "global_sequences": config.batch.global_sequences,
        "train": train,
        "valid": valid,
    }
    if config.objective.kind != "causal":  # whose records were written before there was any other
        values["objective"] = config.objective.model_dump(mode="json", exclude={"z_loss"})
    return values


def describe(name: str, corpus: Corpus) -> dict[str, Any]:
    return {
        "name": name,
        "prefix": os.path.abspath(corpus.prefix),
        "content_hash": corpus.content_hash,
        "state": corpus.state,
        "tokens": corpus.n_tokens,
        "tokenizer_sha256": corpus.manifest.tokenizer.sha256 if corpus.manifest else None,
    }


def read_record(run_folder: Path) -> dict[str, Any] | None:
    """The record of a run, None where there is none.

    Raises:
        MegamupError: it is broken, or of another version of megamup's order.
    """
    path = run_folder / "data.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values["version"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MegamupError(f"{path}: not the record of a run's data: {error!r}") from error
    if version != VERSION:
        raise MegamupError(
            f"{path}: version {version} of the order of samples, this megamup has {VERSION}; use the megamup that the "
            "run began with (environment.json), or start a new run under another run.name"
        )
    return dict(values)


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What `now` would read other than the run of record `before`, a line each. Moved data is no change."""
    found: list[str] = []
    for key in ("train", "valid"):
        there, here = (sorted(values[key], key=lambda source: str(source["name"])) for values in (before, now))
        if comparable(there) != comparable(here):
            found += source_changes(f"data.{key}", there, here)
    return found


def identity(values: dict[str, Any]) -> str:
    """Of a record without what is free: equal for ranks that read the same, wherever it lies on their machines."""
    fixed = values | {key: comparable(values[key]) for key in ("train", "valid")}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def check_files(run_folder: Path, data: RunData) -> None:
    """Read the corpora of a run again whose files have been touched since they were recorded.

    Raises:
        MegamupError: one has other content than its manifest says.
    """
    values = read_record(run_folder)
    if values is None:
        return
    recorded = {source["state"] for key in ("train", "valid") for source in values[key]}
    for corpus in [*data.train.corpora, *(data.valid.corpora if data.valid else [])]:
        if corpus.state not in recorded:
            corpus.check_content()


def comparable(sources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sources without what is free to change, in the order that the stream has them in."""
    kept = [{key: value for key, value in source.items() if key not in FREE} for source in sources]
    return sorted(kept, key=lambda source: str(source["content_hash"]))


def source_changes(key: str, there: list[dict[str, Any]], here: list[dict[str, Any]]) -> Iterator[str]:
    """Differences of sources of the same name; and sources that only one side names."""
    before, now = ({source["name"]: source for source in sources} for sources in (there, here))
    for name in sorted(before.keys() | now.keys()):
        if name not in now or name not in before:
            yield f"  {key}: {name!r} {'is new' if name in now else 'is gone'}"
            continue
        for item, value in before[name].items():
            if item not in FREE and now[name][item] != value:
                yield f"  {key} {now[name]['prefix']!r}: {item} {value!r} there, {now[name][item]!r} now"


def documents_of_step(run_folder: Path, step: int) -> list[Sample]:
    """What a run saw, or will see, at a step: the sequences of its global batch, in order.

    Args:
        run_folder: with config.yaml and data.json.
        step: 1-based, as in metrics.jsonl.

    Raises:
        MegamupError: no such run or step, or a corpus that isn't what it was when the run read it.
    """
    config = config_from(read_yaml(run_folder / "config.yaml"))
    if not 1 <= step <= config.train.steps:
        raise MegamupError(f"step {step} of {run_folder}: expected 1 to train.steps={config.train.steps}")
    values = read_record(run_folder)
    if values is None:
        raise MegamupError(f"{run_folder}: no data.json, the record of a run's data; expected the folder of a run")
    data = open_recorded(run_folder, values, config)
    size = values["global_sequences"]
    located = data.locate(np.arange((step - 1) * size, step * size))
    return [
        sample_at(data.sources[place], epoch, index, config.model.causal)
        for place, epoch, index in zip(*(column.tolist() for column in located), strict=True)
    ]


def open_recorded(run_folder: Path, values: dict[str, Any], config: Config) -> TrainData:
    """The training data of a run as it was recorded, checked to be the same."""
    cache = None if config.data.cache is None else Path(config.data.cache)
    for source in values["train"]:
        corpus = Corpus(source["prefix"], cache)
        found = corpus.content_hash
        if found == source["content_hash"] and corpus.state != source["state"]:
            corpus.check_content()
        if found != source["content_hash"]:
            raise MegamupError(
                f"{source['prefix']!r}: content hash {found}, but {run_folder} read {source['content_hash']}: the "
                "corpus was written anew since; restore what the run read (data.json tells its tokens and tokenizer)"
            )
    return TrainData(
        [Wanted(source["prefix"], source["weight"], source["fraction"]) for source in values["train"]],
        seq_len=values["seq_len"],
        vocab_size=config.model.vocab_size,
        seed=values["seed"],
        cache=cache,
    )


def sample_at(source: TrainSource, epoch: int, index: int, causal: bool) -> Sample:
    corpus, seq_len = source.samples.corpus, source.samples.seq_len
    start, stop = index * seq_len + (0 if causal else 1), (index + 1) * seq_len + 1
    parts = []
    for document in corpus.documents_at(start, stop):
        first, end = corpus.bounds(document)
        if first < end:  # documents without a token have no part in it
            parts.append(Part(document, max(start, first) - first, min(stop, end) - first))
    return Sample(source.name, corpus.prefix, epoch, index, start, stop, tuple(parts))
