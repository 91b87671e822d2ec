"""What an encoder-decoder learns: spans that sentinels stand for (Raffel et al. 2020), the end of a text, and mixtures
of both (Tay et al. 2022).

Every text is as long as makes the encoder's input full, so that the encoder never reads padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from megamup.data.objectives.base import (
    NOT_COUNTED,
    Flags,
    Window,
    count,
    documents_of,
    in_a_row,
    read_text,
    width_of,
)
from megamup.data.objectives.draws import Bits, Draws
from megamup.data.permutation import Indices
from megamup.data.samples import SampleSource
from megamup.objective import Lengths

Scalar = TypeVar("Scalar", np.int64, np.bool_)


@dataclass(frozen=True)
class Denoising:
    """One way to make an input and a target out of a text."""

    lengths: Lengths
    eod_id: int
    """Ends inputs and targets."""
    first_sentinel: int = 0
    mode_id: int | None = None
    """Begins the inputs."""
    weight: float = 1.0


@dataclass(frozen=True)
class Example:
    """Parts of a batch. Shape (batch, its length) each."""

    inputs: Window
    targets: Window
    input_documents: Window
    target_documents: Window
    """What a target's position may see; of a span's tokens the document of its first."""
    continued: Flags
    """Targets of another document than their span's first: nothing in its inputs tells of them, so they don't count."""


class Denoised:
    """Encoder inputs and decoder targets, and the targets one place on, after a start token, as decoder inputs.

    With `documents`, a document's targets begin with the start token too, so that nothing of the document before is
    read. A span that reaches over the end of a document ends there: what of the next one is in it isn't learnt.

    Args:
        seq_len: of the encoder.
        decoder_len: of the targets; shorter ones are padded.
        denoisers: one for each sample, drawn by weight.
        draws: all that is random.
        start_id: first input of the decoder.
        documents: whether the batch tells documents apart; of one denoiser of spans.
    """

    def __init__(
        self,
        seq_len: int,
        decoder_len: int,
        denoisers: tuple[Denoising, ...],
        draws: Draws,
        start_id: int,
        documents: bool = False,
    ) -> None:
        self.denoisers, self.start_id, self._draws = denoisers, start_id, draws
        self.raw_len = max(each.lengths.raw for each in denoisers)
        self.columns = in_a_row(
            tokens=seq_len,
            decoder_tokens=decoder_len,
            targets=decoder_len,
            documents=seq_len * documents,
            decoder_documents=decoder_len * documents,
        )
        self.width = width_of(self.columns)
        self._shares = np.cumsum([each.weight for each in denoisers]) / sum(each.weight for each in denoisers)

    def fill(self, source: SampleSource, indices: Indices, window: Window) -> Indices:
        text = read_text(source, indices)
        which = np.zeros_like(indices)
        if len(self.denoisers) > 1:
            uniform = self._draws.uniform("denoiser", indices)[:, 0]
            which = np.searchsorted(self._shares[:-1], uniform, side="right")
        for number, denoiser in enumerate(self.denoisers):
            rows = np.flatnonzero(which == number)
            if len(rows):
                window[rows] = self.denoise(denoiser, indices[rows], text[rows, : denoiser.lengths.raw])
        return count(window[:, self.columns["targets"]])

    def denoise(self, denoiser: Denoising, indices: Indices, text: Window) -> Window:
        """Rows of a window. Shape (indices, width)."""
        documents = documents_of(text, denoiser.eod_id)
        if denoiser.lengths.spans:
            noise, span = spans(self._draws, indices, denoiser.lengths)
            example = corrupt(denoiser, text, documents, noise, span)
        else:
            example = cut(denoiser, text, documents)
        window = np.empty((len(indices), self.width), np.int64)
        window[:, self.columns["tokens"]] = readable(example.inputs, denoiser.eod_id)
        targets, decoder_tokens = window[:, self.columns["targets"]], window[:, self.columns["decoder_tokens"]]
        length, by_document = example.targets.shape[1], "documents" in self.columns
        targets[:, length:] = NOT_COUNTED
        targets[:, :length] = example.targets
        if by_document:
            targets[:, :length][example.continued] = NOT_COUNTED
        decoder_tokens[:, 0] = self.start_id
        decoder_tokens[:, length:] = denoiser.eod_id
        decoder_tokens[:, 1:length] = readable(targets[:, : length - 1], denoiser.eod_id)
        if by_document:
            changed = np.diff(example.target_documents, axis=1) != 0
            decoder_tokens[:, 1:length][changed] = self.start_id
            window[:, self.columns["documents"]] = example.input_documents
            decoder_documents = window[:, self.columns["decoder_documents"]]
            decoder_documents[:, :length] = example.target_documents
            decoder_documents[:, length:] = example.target_documents[:, -1:]
        return window


def readable(tokens: Window, eod_id: int) -> Window:
    """Where there is no text, the end-of-document token."""
    return np.where(tokens < 0, eod_id, tokens)


def random_segments(bits: Bits, items: int, segments: int) -> Window:
    """Lengths of `segments` stretches that `items` are cut into, each such cut as likely. Shape (batch, segments).

    Args:
        bits: random, shape (batch, items - 1).
    """
    ends = np.empty((len(bits), segments + 1), np.int64)
    ends[:, 0], ends[:, -1] = 0, items
    if segments > 1:
        cuts = np.argpartition(bits, segments - 2, axis=1)[:, : segments - 1] + 1
        ends[:, 1:-1] = np.sort(cuts, axis=1)
    return np.diff(ends, axis=1)


def spans(draws: Draws, indices: Indices, lengths: Lengths) -> tuple[Flags, Window]:
    """Which tokens are noise, and the number of the stretch that each is in: even ones are kept, odd ones noise.

    T5's ``random_spans_noise_mask``: noise and the rest are each cut into as many stretches, and these alternate.
    Shape (indices, raw) each.
    """
    kept = lengths.raw - lengths.noise
    stretches = np.empty((len(indices), 2 * lengths.spans), np.int64)
    stretches[:, ::2] = random_segments(draws.bits("kept", indices, max(kept - 1, 1)), kept, lengths.spans)
    noise_bits = draws.bits("noise", indices, max(lengths.noise - 1, 1))
    stretches[:, 1::2] = random_segments(noise_bits, lengths.noise, lengths.spans)
    begins = np.zeros((len(indices), lengths.raw), np.int64)
    np.put_along_axis(begins, np.cumsum(stretches, axis=1)[:, :-1], 1, axis=1)
    stretch = np.cumsum(begins, axis=1)
    return stretch % 2 == 1, stretch


def corrupt(denoiser: Denoising, text: Window, documents: Window, noise: Flags, stretch: Window) -> Example:
    """A sentinel for each span in the inputs; in the targets before its tokens.

    Args:
        text: shape (batch, raw); below 0 past the end of a corpus.
        documents: of its tokens.
        noise, stretch: see `spans`.
    """
    begins = np.diff(stretch, axis=1, prepend=-1) != 0
    sentinels = np.where(text < 0, NOT_COUNTED, denoiser.first_sentinel - stretch // 2)
    stays, goes = ~noise | begins, noise | begins

    def picked(values: npt.NDArray[Scalar], where: Flags) -> npt.NDArray[Scalar]:
        return values[where].reshape(len(text), -1)  # as many in each row

    inputs = picked(np.where(noise, sentinels, text), stays)
    targets = picked(np.where(noise, text, sentinels), goes)
    # A span's document is that of its first token, which in the targets stands after the sentinel.
    own = picked(documents, goes)
    sentinel_at = np.where(picked(~noise, goes), np.arange(targets.shape[1]), 0)
    of_span = np.take_along_axis(own, np.maximum.accumulate(sentinel_at, axis=1) + 1, axis=1)
    continued = (own != of_span) & picked(noise, goes)
    ends = np.where(text[:, -1:] < 0, NOT_COUNTED, denoiser.eod_id)
    return Example(
        framed(denoiser, inputs, denoiser.mode_id),
        np.concatenate([targets, ends], axis=1),
        repeated(denoiser, picked(documents, stays)),
        np.concatenate([of_span, of_span[:, -1:]], axis=1),
        np.concatenate([continued, np.zeros_like(ends, bool)], axis=1),
    )


def cut(denoiser: Denoising, text: Window, documents: Window) -> Example:
    """The beginning as inputs, the end as targets."""
    place = denoiser.lengths.raw - denoiser.lengths.noise
    ends = np.where(text[:, -1:] < 0, NOT_COUNTED, denoiser.eod_id)
    targets = np.concatenate([text[:, place:], ends], axis=1)
    of_targets = np.concatenate([documents[:, place:], documents[:, -1:]], axis=1)
    inputs = framed(denoiser, text[:, :place], denoiser.mode_id)
    return Example(inputs, targets, repeated(denoiser, documents[:, :place]), of_targets, np.zeros_like(targets, bool))


def framed(denoiser: Denoising, inputs: Window, first: int | None) -> Window:
    """Inputs after their mode, if they have one, and before their end."""
    end = np.full((len(inputs), 1), denoiser.eod_id)
    parts = [inputs, end] if first is None else [np.full_like(end, first), inputs, end]
    return np.concatenate(parts, axis=1)


def repeated(denoiser: Denoising, documents: Window) -> Window:
    """Documents of `framed` inputs: mode and end are of their neighbours'."""
    parts = [documents, documents[:, -1:]]
    return np.concatenate(parts if denoiser.mode_id is None else [documents[:, :1], *parts], axis=1)
