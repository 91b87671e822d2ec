"""The next token."""

from __future__ import annotations

import numpy as np

from megamup.data.objectives.base import NOT_COUNTED, Window, count, documents_of, in_a_row, width_of
from megamup.data.objectives.draws import Draws
from megamup.data.permutation import Indices
from megamup.data.samples import SampleSource


class Causal:
    """Every token but the first is a target; one row holds inputs and targets, read from the shards without a copy.

    Args:
        seq_len: targets of a sample.
        eod_id: where the batch tells documents apart; default: it doesn't.
    """

    def __init__(self, seq_len: int, eod_id: int | None = None) -> None:
        self.raw_len, self.eod_id = seq_len, eod_id
        self.columns = {"tokens": slice(0, seq_len), "targets": slice(1, seq_len + 1)}
        if eod_id is not None:
            self.columns["documents"] = slice(seq_len + 1, 2 * seq_len + 1)
        self.width = width_of(self.columns)

    def fill(self, source: SampleSource, indices: Indices, window: Window) -> Indices:
        source.read(indices, list(window[:, : self.raw_len + 1]))
        if self.eod_id is not None:
            window[:, self.columns["documents"]] = documents_of(window[:, self.columns["tokens"]], self.eod_id)
        counts = source.n_targets(indices)
        if counts.min(initial=self.raw_len) < self.raw_len:
            targets = window[:, self.columns["targets"]]
            targets[np.arange(self.raw_len) >= counts[:, None]] = NOT_COUNTED
        return counts


class Prefix:
    """What comes after a prefix, of which a decoder sees as much as of all else: tokens before.

    The prefix is from 1 to seq_len - 1 tokens long, each length as likely.

    Args:
        seq_len: tokens of a sample.
        draws: the prefixes' lengths.
        eod_id: see `Causal`.
    """

    def __init__(self, seq_len: int, draws: Draws, eod_id: int | None = None) -> None:
        self.raw_len, self.eod_id, self._draws = seq_len, eod_id, draws
        self.columns = in_a_row(tokens=seq_len, targets=seq_len, documents=0 if eod_id is None else seq_len)
        self.width = width_of(self.columns)

    def fill(self, source: SampleSource, indices: Indices, window: Window) -> Indices:
        rows = np.empty((len(indices), self.raw_len + 1), np.int64)
        source.read(indices, list(rows))
        prefix = 1 + self._draws.below("prefix", indices, self.raw_len - 1)  # (batch, 1)
        places = np.arange(self.raw_len)
        counted = (places >= prefix - 1) & (places < source.n_targets(indices)[:, None])
        window[:, self.columns["tokens"]] = rows[:, :-1]
        window[:, self.columns["targets"]] = np.where(counted, rows[:, 1:], NOT_COUNTED)
        if self.eod_id is not None:
            window[:, self.columns["documents"]] = documents_of(rows[:, :-1], self.eod_id)
        return count(window[:, self.columns["targets"]])
