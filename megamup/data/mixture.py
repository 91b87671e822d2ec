"""What `data.train` and `data.valid` name, opened and checked: which corpora, in which shares, for how many epochs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megamup.config import Config
from megamup.data.blend import Blend, Chain
from megamup.data.corpus import Corpus, TextCounts, text_counts
from megamup.data.objectives import Objective, open_objective
from megamup.data.permutation import Indices
from megamup.data.samples import PackedSamples, SequentialSamples
from megamup.errors import MegamupError

MANY_EPOCHS = 4
"""Up to here repeated tokens teach nearly as much as new ones (Muennighoff et al. 2023, "Scaling Data-Constrained
Language Models", section 6)."""


class Wanted(NamedTuple):
    """A source of training data as the config names it."""

    prefix: str
    weight: float = 1.0
    fraction: float = 1.0


@dataclass(frozen=True)
class TrainSource:
    """A source of training data, open."""

    name: str
    wanted: Wanted
    samples: PackedSamples


class TrainData:
    """The endless stream of training samples.

    Which sample stands where is a function of (seed, content of the corpora, weights, fractions, seq_len): sources
    stand in the order of their content hashes, so that paths and the order of the list have no say.

    Args:
        wanted: at least one.
        seq_len: targets of a sample.
        vocab_size: the model's.
        seed: of the order.
        cache: see `Corpus`.

    Raises:
        MegamupError: a corpus is missing, broken, too short, of another vocabulary, or there twice.
    """

    def __init__(
        self, wanted: Sequence[Wanted], *, seq_len: int, vocab_size: int, seed: int, cache: Path | None = None
    ) -> None:
        self.corpora = [Corpus(source.prefix, cache) for source in wanted]
        check_different("data.train", self.corpora)
        names = unique_names([source.prefix for source in wanted])
        found = [
            TrainSource(name, source, PackedSamples(corpus, seq_len, seed, vocab_size, source.fraction))
            for name, source, corpus in zip(names, wanted, self.corpora, strict=True)
        ]
        self.sources = sorted(found, key=lambda source: source.samples.corpus.content_hash)
        self.stream = Blend(
            [source.samples for source in self.sources], [source.wanted.weight for source in self.sources]
        )

    def locate(self, positions: Indices) -> tuple[Indices, Indices, Indices]:
        """(place in `sources`, epoch, sample of its corpus) at `positions` of the stream. Shape (positions,) each."""
        which, indices = self.stream.locate(positions)
        epochs, samples = np.empty_like(indices), np.empty_like(indices)
        for place, source in enumerate(self.sources):
            here = which == place
            epochs[here], samples[here] = source.samples.locate(indices[here])
        return which, epochs, samples

    def epochs(self, n_samples: int) -> dict[str, float]:
        """How often each source was seen after `n_samples` of the stream, by name."""
        counts = self.stream.consumed(n_samples)
        return {source.name: count / len(source.samples) for source, count in zip(self.sources, counts, strict=True)}

    def metrics(self, n_samples: int) -> dict[str, float]:
        """`epochs` under the names of metrics.jsonl."""
        epochs = self.epochs(n_samples)
        if len(epochs) == 1:
            return {"epochs": next(iter(epochs.values()))}
        return {f"epochs_{name}": value for name, value in epochs.items()}

    def summary(self, n_samples: int) -> list[str]:
        """A line a source for a run of `n_samples`."""
        epochs, total = self.epochs(n_samples), sum(source.wanted.weight for source in self.sources)
        return [
            train_line(source, source.wanted.weight / total, epochs[source.name])
            for source in sorted(self.sources, key=lambda source: source.name)
        ]


def train_line(source: TrainSource, share: float, epochs: float) -> str:
    samples, fraction = source.samples, source.wanted.fraction
    part = f" (fraction {fraction:g})" if fraction < 1 else ""
    line = (
        f"data.train {source.name}: {samples.corpus.n_tokens:,} tokens, {len(samples):,} samples of {samples.seq_len}"
        f"{part}, {100 * share:.3g}% of the batches, {epochs:.3g} epochs in this run"
    )
    if epochs > MANY_EPOCHS:
        line += (
            f"; warning: past {MANY_EPOCHS} epochs repeated tokens teach less than new ones (Muennighoff et al. 2023)"
        )
    return line


@dataclass(frozen=True)
class ValidSet:
    """Held-out samples that have a loss of their own, one corpus after the other."""

    name: str
    corpora: tuple[Corpus, ...]
    stream: Chain

    @property
    def text(self) -> TextCounts:
        """What its tokens were before."""
        return text_counts(self.corpora)


class ValidData:
    """The held-out samples, every token of every corpus a target once.

    Args:
        sets: prefixes by the name of their set, at least one.
        seq_len: targets of a sample.
        vocab_size: the model's.
        cache: see `Corpus`.

    Raises:
        MegamupError: as `TrainData`.
    """

    def __init__(
        self, sets: Mapping[str, Sequence[str]], *, seq_len: int, vocab_size: int, cache: Path | None = None
    ) -> None:
        self.sets: list[ValidSet] = []
        for name, prefixes in sets.items():
            corpora = tuple(Corpus(prefix, cache) for prefix in prefixes)
            stream = Chain([SequentialSamples(corpus, seq_len, vocab_size) for corpus in corpora])
            self.sets.append(ValidSet(name, corpora, stream))
        self.corpora = [corpus for each in self.sets for corpus in each.corpora]
        check_different("data.valid", self.corpora)
        self.names = unique_names([corpus.prefix for corpus in self.corpora])

    @property
    def content_hash(self) -> str:
        """Of the corpora, in order."""
        return hashlib.sha256("".join(corpus.content_hash for corpus in self.corpora).encode()).hexdigest()

    def summary(self, train: Iterable[Corpus]) -> list[str]:
        """A line a corpus, which tells if it is trained on."""
        seen = {corpus.stream_sample for corpus in train}
        set_of = {corpus: f" ({each.name})" for each in self.sets for corpus in each.corpora if len(self.sets) > 1}
        return [
            f"data.valid {name}{set_of.get(corpus, '')}: {corpus.n_tokens:,} tokens"
            + (
                "; warning: trained on, so that its loss says nothing of new text"
                if corpus.stream_sample in seen
                else ""
            )
            for name, corpus in zip(self.names, self.corpora, strict=True)
        ]


@dataclass(frozen=True)
class RunData:
    """All data of a run."""

    train: TrainData
    valid: ValidData | None
    objective: Objective
    """What becomes of training samples."""
    valid_objective: Objective
    """Of held-out ones: the same, drawn alike for every seed."""

    def summary(self, n_samples: int) -> list[str]:
        """What a run of `n_samples` reads, in lines for its user."""
        held_out = [] if self.valid is None else self.valid.summary(self.train.corpora)
        return self.train.summary(n_samples) + held_out


def open_run_data(config: Config) -> RunData:
    """Open and check all data of a run.

    Raises:
        MegamupError: see `TrainData` and `open_objective`; corpora of different tokenizers.
    """
    data = config.data
    wanted = [Wanted(source.prefix, source.weight, source.fraction or data.fraction) for source in data.train_sources]
    vocab_size, cache = config.model.vocab_size, cache_folder(config)
    train = TrainData(wanted, seq_len=config.raw_len, vocab_size=vocab_size, seed=config.run.seed, cache=cache)
    valid = open_valid_data(config) if data.valid_sets else None
    corpora = [*train.corpora, *(valid.corpora if valid else [])]
    check_tokenizers(corpora)
    return RunData(train, valid, open_objective(config, corpora), open_objective(config, corpora, held_out=True))


def open_valid_data(config: Config) -> ValidData:
    """Open and check the held-out data of a run, which has some.

    Raises:
        MegamupError: see `TrainData`; corpora of different tokenizers.
    """
    vocab_size, cache = config.model.vocab_size, cache_folder(config)
    valid = ValidData(config.data.valid_sets, seq_len=config.raw_len, vocab_size=vocab_size, cache=cache)
    check_tokenizers(valid.corpora)
    return valid


def cache_folder(config: Config) -> Path | None:
    return None if config.data.cache is None else Path(config.data.cache)


def check_different(key: str, corpora: Sequence[Corpus]) -> None:
    """Twice the same content would be read in the same order, each sample twice in a row."""
    seen: dict[str, Corpus] = {}
    for corpus in corpora:
        other = seen.setdefault(corpus.stream_sample, corpus)
        if other is not corpus:
            weights = ", and give the other the sum of their weights" if key == "data.train" else ""
            raise MegamupError(
                f"{key}: {other.prefix!r} and {corpus.prefix!r} hold the same tokens; expected each corpus once: leave "
                f"one out{weights}"
            )


def check_tokenizers(corpora: Sequence[Corpus]) -> None:
    """All corpora that tell their tokenizer must tell the same: an id means one thing to a model."""
    known = [
        (corpus, corpus.manifest.tokenizer)
        for corpus in corpora
        if corpus.manifest and corpus.manifest.tokenizer.sha256
    ]
    for corpus, tokenizer in known[1:]:
        first, expected = known[0]
        if tokenizer.sha256 != expected.sha256:
            raise MegamupError(
                f"data: {first.prefix!r} was made with tokenizer {expected.name!r} ({expected.sha256[:12]}), "
                f"{corpus.prefix!r} with {tokenizer.name!r} ({tokenizer.sha256[:12]}); expected one tokenizer: "
                "preprocess one of them again"
            )


def unique_names(prefixes: Sequence[str]) -> list[str]:
    """The ends of different paths, as short as tells them apart: `wiki`, `code`, but `a/train`, `b/train`."""
    parts = [Path(os.path.abspath(prefix)).parts[1:] for prefix in prefixes]
    names: list[str] = []
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            break
    return names
