"""Masked language modelling (Devlin et al. 2018), of one text or a pair."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megamup.data.objectives.base import NOT_COUNTED, Flags, Window, count, documents_of, in_a_row, read_text, width_of
from megamup.data.objectives.draws import Bits, Draws
from megamup.data.objectives.words import Words
from megamup.data.permutation import Indices
from megamup.data.samples import SampleSource
from megamup.errors import MegamupError


@dataclass(frozen=True)
class Masking:
    """Which tokens become targets, and what stands in their place."""

    share: float
    replace: tuple[float, float, float]
    """Shares of mask, random token, unchanged."""
    ngram: int
    mask_id: int
    special: tuple[int, ...]
    """Ids that no random token is."""
    vocab_size: int
    words: Words | None = None
    """Of whole words; None: tokens are masked one by one."""

    def apply(self, draws: Draws, samples: Indices, tokens: Window, free: Flags) -> Window:
        """Mask `tokens` in place; returns the targets. Shape (batch, seq) each.

        Args:
            draws: what is masked.
            samples: shape (batch,).
            tokens: what is read.
            free: which of them may be masked.
        """
        units = self.units(draws, samples, tokens, free)
        budget = np.maximum(np.rint(self.share * free.sum(1)).astype(np.int64), 1)
        chosen = choose(draws.bits("order", samples, tokens.shape[1]), units, free, budget)
        targets = np.where(chosen, tokens, NOT_COUNTED)
        how = draws.uniform("replacement", samples, tokens.shape[1])
        tokens[chosen & (how < self.replace[0])] = self.mask_id
        at_random = chosen & (self.replace[0] <= how) & (how < self.replace[0] + self.replace[1])
        tokens[at_random] = self.random_tokens(draws.bits("token", samples, tokens.shape[1])[at_random])
        return targets

    def random_tokens(self, bits: Bits) -> Indices:
        """Ids of the vocabulary but the special ones, each as likely. Shape of bits."""
        found = (bits % np.uint64(self.vocab_size - len(self.special))).astype(np.int64)
        for special in sorted(self.special):
            found += found >= special
        return found

    def units(self, draws: Draws, samples: Indices, tokens: Window, free: Flags) -> Window:
        """The number of the unit that each token is in, from 0 on: what is masked together. Shape of tokens.

        Units are words, or up to `ngram` words in a row; what may not be masked is in none of theirs.
        """
        length = tokens.shape[1]
        breaks = ~free
        breaks[:, 1:] |= ~free[:, :-1]
        breaks[:, 0] = True
        begins = breaks | (np.ones_like(free) if self.words is None else self.words.begins(tokens))
        if self.ngram > 1:
            word = np.cumsum(begins, axis=1) - 1
            sizes = ngram_sizes(draws.uniform("ngram", samples, length), self.ngram)
            first = np.zeros((len(tokens), length + 1), bool)  # of the words in a row: begins an n-gram
            np.put_along_axis(first, np.minimum(np.cumsum(sizes, axis=1), length), True, axis=1)
            begins &= breaks | np.take_along_axis(first, word, axis=1)
        return np.cumsum(begins, axis=1) - 1


def ngram_sizes(uniform: np.ndarray[tuple[int, ...], np.dtype[np.float64]], largest: int) -> Window:
    """Numbers from 1 to `largest`, n in proportion to 1/n (Lan et al. 2019). Shape of uniform."""
    weights = 1 / np.arange(1, largest + 1)
    return 1 + np.searchsorted(np.cumsum(weights / weights.sum())[:-1], uniform, side="right")


def choose(order: Bits, units: Window, free: Flags, budget: Indices) -> Flags:
    """Tokens of units that come first in a random order; one that would exceed the budget is passed over.

    Args:
        order: of units, shape (batch, seq); the first of them count.
        units: of each token.
        free: tokens that may be chosen.
        budget: how many tokens of each row, shape (batch,).
    """
    batch, length = units.shape
    places = (units + np.arange(batch)[:, None] * length)[free]
    sizes = np.bincount(places, minlength=batch * length).reshape(batch, length)
    by_order = np.argsort(order, axis=1)
    sizes = np.take_along_axis(sizes, by_order, axis=1)
    taken, left = np.zeros((batch, length), bool), budget[:, None]
    for _ in range(2):  # as many as fit in order; then smaller ones, where a larger one was the first that didn't
        fits = ~taken & (sizes > 0) & (sizes <= left)
        now = fits & (np.cumsum(np.where(fits, sizes, 0), axis=1) <= left)
        taken |= now
        left = left - np.where(now, sizes, 0).sum(1, keepdims=True)
    chosen = np.empty_like(taken)
    np.put_along_axis(chosen, by_order, taken, axis=1)
    return np.asarray(np.take_along_axis(chosen, units, axis=1) & free)


class Masked:
    """Masked tokens of one text, with neither a first token nor a last one of its own.

    Args:
        seq_len: tokens of a sample.
        masking: how.
        draws: what.
        eod_id: stands for what is past the end of an evaluation's corpus; never masked.
        documents: whether the batch tells documents apart.
    """

    def __init__(self, seq_len: int, masking: Masking, draws: Draws, eod_id: int, documents: bool) -> None:
        self.raw_len, self.masking, self.eod_id, self._draws = seq_len, masking, eod_id, draws
        self.columns = in_a_row(tokens=seq_len, targets=seq_len, documents=seq_len if documents else 0)
        self.width = width_of(self.columns)

    def fill(self, source: SampleSource, indices: Indices, window: Window) -> Indices:
        tokens = read_text(source, indices, padding=self.eod_id)
        if "documents" in self.columns:
            window[:, self.columns["documents"]] = documents_of(tokens, self.eod_id)
        targets = self.masking.apply(self._draws, indices, tokens, free=tokens != self.eod_id)
        window[:, self.columns["tokens"]], window[:, self.columns["targets"]] = tokens, targets
        return count(targets)


class MaskedPairs:
    """Masked tokens of `[CLS] A [SEP] B [SEP]`, and whether A and B are what the label 0 says: a text in its order.

    A is from a quarter to three quarters of the text, so that neither is too short to tell. Half of the samples have
    label 1: B comes from another sample, any of one pass over the source, or A and B are swapped. Label -1: past the
    end of an evaluation's corpus.

    Args:
        seq_len: tokens of a sample.
        pairs: ``next_sentence`` or ``sentence_order``.
        masking: how.
        draws: what, and where A ends.
        cls_id: the first token.
        sep_id: ends A and B.
        eod_id: see `Masked`.
    """

    def __init__(
        self, seq_len: int, pairs: str, masking: Masking, draws: Draws, cls_id: int, sep_id: int, eod_id: int
    ) -> None:
        self.raw_len, self.pairs, self.masking, self._draws = seq_len - 3, pairs, masking, draws
        self.cls_id, self.sep_id, self.eod_id = cls_id, sep_id, eod_id
        self.columns = in_a_row(tokens=seq_len, targets=seq_len, token_types=seq_len, pair=1)
        self.width = width_of(self.columns)

    def fill(self, source: SampleSource, indices: Indices, window: Window) -> Indices:
        text = read_text(source, indices)
        whole = text[:, -1] >= 0
        quarter = self.raw_len // 4
        first = quarter + self._draws.below("split", indices, self.raw_len - 2 * quarter + 1)[:, 0]
        first = np.clip(first, 1, self.raw_len - 1)
        odd = whole & (self._draws.bits("label", indices)[:, 0] % np.uint64(2) == 1)
        if self.pairs == "next_sentence":
            self.replace_second(source, indices, text, first, odd)
        else:
            first[odd] = swap(text, first, odd)
        tokens, free, types = self.assemble(text, first)
        targets = self.masking.apply(self._draws, indices, tokens, free)
        window[:, self.columns["tokens"]], window[:, self.columns["targets"]] = tokens, targets
        window[:, self.columns["token_types"]] = types
        window[:, self.columns["pair"]] = np.where(whole, odd, NOT_COUNTED)[:, None]
        return count(targets)

    def replace_second(self, source: SampleSource, indices: Indices, text: Window, first: Indices, odd: Flags) -> None:
        """Write the ends of other samples into rows of `text` that are `odd`; those of unfinished ones don't do."""
        if len(source) < 2:
            raise MegamupError(
                f"objective.pairs=next_sentence takes second stretches from other samples, but there is only one of "
                f"{self.raw_len} tokens; expected more text, a shorter data.seq_len, or pairs=sentence_order"
            )
        rows = np.flatnonzero(odd)
        if not len(rows):
            return
        steps = 1 + self._draws.below("other", indices[rows], len(source) - 1)[:, 0]
        others = read_text(source, (indices[rows] + steps) % len(source))
        usable = others[:, -1] >= 0
        odd[rows[~usable]] = False
        rows, others = rows[usable], others[usable]
        second = np.arange(self.raw_len) >= first[rows, None]
        text[rows] = np.where(second, others, text[rows])

    def assemble(self, text: Window, first: Indices) -> tuple[Window, Flags, Window]:
        """`[CLS] A [SEP] B [SEP]`, which of it may be masked, and the type of each: 0 to A's end, 1 of B."""
        length = text.shape[1]
        places = np.arange(length + 3)
        middle = first[:, None] + 1  # the place of A's [SEP]
        own = (places > 0) & (places != middle) & (places < length + 2)
        from_text = np.clip(places - 1 - (places > middle), 0, length - 1)
        tokens = np.where(own, np.take_along_axis(text, from_text, axis=1), self.sep_id)
        tokens[:, 0] = self.cls_id
        tokens[tokens < 0] = self.eod_id
        return tokens, own & (tokens != self.eod_id), (places > middle).astype(np.int64)


def swap(text: Window, first: Indices, odd: Flags) -> Indices:
    """Rotate the rows of `text` that are `odd` so that what came second comes first; returns how long it is in them."""
    length = text.shape[1]
    places = (np.arange(length) + first[odd, None]) % length
    text[odd] = np.take_along_axis(text[odd], places, axis=1)
    return np.asarray(length - first[odd])
