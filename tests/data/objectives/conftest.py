"""Texts as sources of samples, and what a collator makes of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from megamup.data.objectives.base import Objective, Window
from megamup.data.permutation import Indices
from megamup.data.samples import Row

EOD = 0
"""Ends documents in these texts."""


@dataclass
class Text:
    """Samples of random ids from 1 on below `vocabulary`, with an end of document about every `document` tokens."""

    seq_len: int
    vocabulary: int = 1000
    document: int = 0
    samples: int = 100_000
    counted: int | None = None
    """Targets of the last sample; those after it have none."""

    def __len__(self) -> int:
        return self.samples

    def text(self, index: int) -> Window:
        """A sample's tokens, but for the one before."""
        return self.row(index)[1:]

    def row(self, index: int) -> Window:
        generator = np.random.default_rng(index)
        row = generator.integers(1, self.vocabulary, self.seq_len + 1)
        if self.document:
            row[generator.random(self.seq_len + 1) < 1 / self.document] = EOD
        return row

    def read(self, indices: Indices, rows: Sequence[Row]) -> None:
        for index, row in zip(indices.tolist(), rows, strict=True):
            row[:] = self.row(index)

    def n_targets(self, indices: Indices) -> Indices:
        last = self.seq_len if self.counted is None else self.counted
        counts = np.where(indices < self.samples - 1, self.seq_len, last)
        return np.where(indices < self.samples, counts, 0)


Collated = dict[str, Window]
"""Columns by name."""


def collated(objective: Objective, text: Text, first: int = 0, samples: int = 64) -> Collated:
    """The columns of some samples; also checked: samples one by one are the same, and all that is there was written."""
    indices = np.arange(first, first + samples)
    window = np.full((samples, objective.width), -99)
    counts = objective.fill(text, indices, window)
    for index in (0, samples - 1):
        single = np.full((1, objective.width), -99)
        objective.fill(text, indices[index : index + 1], single)
        assert (single == window[index]).all(), "a sample is the same in any batch"
    assert (window > -99).all()
    columns = {name: window[:, place] for name, place in objective.columns.items()}
    assert counts.tolist() == (columns["targets"] >= 0).sum(1).tolist()
    assert columns["tokens"].min() >= 0 or "shared" in name_of(objective)
    return columns


def name_of(objective: Objective) -> str:
    tokens, targets = objective.columns["tokens"], objective.columns["targets"]
    return "shared" if tokens.stop > targets.start else "apart"


@pytest.fixture
def collate_text() -> Callable[..., Collated]:
    return collated


@pytest.fixture
def make_text() -> Callable[..., Text]:
    return Text
