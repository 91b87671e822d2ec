from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from megamup.data.objectives.draws import Draws
from megamup.data.objectives.spans import Denoised, Denoising, random_segments, spans
from megamup.objective import Denoiser, Objective, denoised, prefix_lengths, span_lengths

Make = Callable[..., Any]
EOD, START, FIRST, MODE = 0, 3, 1999, 1700


def denoising(seq_len: int, density: float = 0.15, mean_span: float = 3.0) -> Denoising:
    return Denoising(span_lengths(seq_len, density, mean_span), EOD, FIRST)


def collator(seq_len: int, *denoisers: Denoising, extra: int = 0, documents: bool = False) -> Denoised:
    denoisers = denoisers or (denoising(seq_len),)
    length = max(each.lengths.targets for each in denoisers) + extra
    return Denoised(seq_len, length, denoisers, Draws("key"), START, documents)


def t5_lengths(tokens: int, density: float, mean_span: float) -> tuple[int, int]:
    """Of inputs and targets, as `random_spans_helper` in T5's preprocessors.py counts them."""
    noise = round(tokens * density)
    n_spans = round(noise / mean_span)
    return tokens - noise + n_spans + 1, noise + n_spans + 1


@pytest.mark.parametrize("density", [0.1, 0.15, 0.3])
@pytest.mark.parametrize("mean_span", [2.0, 3.0, 8.0])
@pytest.mark.parametrize("seq_len", [64, 128, 512, 1024])
def test_lengths_are_t5s(seq_len: int, density: float, mean_span: float) -> None:
    tokens = seq_len
    while t5_lengths(tokens + 1, density, mean_span)[0] <= seq_len:
        tokens += 1
    found = span_lengths(seq_len, density, mean_span)
    assert (found.raw, found.inputs, found.targets) == (tokens, *t5_lengths(tokens, density, mean_span))
    assert found.inputs == seq_len, "filled to the last token"


def test_published_lengths() -> None:
    """T5's pretraining: 568 tokens become 512 and 114."""
    found = span_lengths(512, 0.15, 3.0)
    assert (found.raw, found.inputs, found.targets) == (568, 512, 114)


def reconstruct(tokens: list[int], targets: list[int], n_spans: int) -> list[int]:
    """The text of inputs and targets, checked: sentinels in order, the end at both ends."""
    assert tokens[-1] == targets[-1] == EOD
    sentinels = [FIRST - number for number in range(n_spans)]
    assert [token for token in tokens if token in sentinels] == sentinels
    assert [token for token in targets if token in sentinels] == sentinels
    assert targets[0] == FIRST
    assert tokens[0] not in sentinels, "a text begins with a token"
    noise: dict[int, list[int]] = {}
    for token in targets[:-1]:
        if token in sentinels:
            current = noise.setdefault(token, [])
        else:
            current.append(token)
    assert all(noise.values()), "no span is empty"
    return [token for part in tokens[:-1] for token in (noise[part] if part in sentinels else [part])]


@pytest.mark.parametrize(("density", "mean_span"), [(0.15, 3.0), (0.5, 3.0), (0.15, 64.0), (0.3, 1.0)])
def test_input_and_target_are_the_text(make_text: Make, collate_text: Make, density: float, mean_span: float) -> None:
    each = denoising(128, density, mean_span)
    text = make_text(each.lengths.raw)
    columns = collate_text(collator(128, each), text)
    for row in range(64):
        targets = columns["targets"][row].tolist()
        assert reconstruct(columns["tokens"][row].tolist(), targets, each.lengths.spans) == text.text(row).tolist()
        assert columns["decoder_tokens"][row].tolist() == [START, *targets[:-1]]


def test_spans_are_t5s() -> None:
    """Of `random_spans_noise_mask`: as many tokens and spans in each sample, apart, of every length and place."""
    lengths = span_lengths(128, 0.15, 3.0)
    noise, stretch = spans(Draws("key"), np.arange(4000), lengths)
    assert (noise.sum(1) == lengths.noise).all()
    assert (stretch.max(1) == 2 * lengths.spans - 1).all()
    assert not noise[:, 0].any()
    assert noise[:, -1].all()
    sizes = np.concatenate([np.bincount(row)[1::2] for row in stretch])
    assert sizes.mean() == pytest.approx(lengths.noise / lengths.spans)
    # Cuts of m things into k stretches, each as likely: a stretch is n long with C(m-n-1, k-2) / C(m-1, k-1).
    m, k = lengths.noise, lengths.spans
    assert (sizes == 1).mean() == pytest.approx((k - 1) / (m - 1), abs=0.01)
    middle = noise[:, 30:100].mean(0)
    assert abs(middle - lengths.noise / lengths.raw).max() < 0.04


@pytest.mark.parametrize(("items", "segments"), [(1, 1), (5, 1), (5, 5), (5, 2)])
def test_every_cut_is_as_likely(items: int, segments: int) -> None:
    bits = Draws("key").bits("cuts", np.arange(4000), max(items - 1, 1))
    found = random_segments(bits, items, segments)
    assert found.shape == (4000, segments)
    assert (found.sum(1) == items).all()
    assert (found >= 1).all()
    if (items, segments) == (5, 2):
        assert np.bincount(found[:, 0])[1:] == pytest.approx(1000, abs=110)


def documents_text(make_text: Make, raw: int) -> Any:
    return make_text(raw, document=12)


def visible(columns: Any, row: int, document: int) -> list[list[int]]:
    """All that tokens of a document may be read from: its part of encoder inputs, decoder inputs and targets."""
    encoder = columns["documents"][row] == document
    decoder = columns["decoder_documents"][row] == document
    return [
        columns["tokens"][row][encoder].tolist(),
        columns["decoder_tokens"][row][decoder].tolist(),
        columns["targets"][row][decoder].tolist(),
    ]


def test_documents_see_nothing_of_each_other(make_text: Make, collate_text: Make) -> None:
    """Another document changes; what is read of this one, and what is learnt of it, stays."""
    each = denoising(96)
    objective = collator(96, each, documents=True)
    text = documents_text(make_text, each.lengths.raw)
    before = collate_text(objective, text, samples=32)
    changed = {index: text.row(index).copy() for index in range(32)}
    for row in changed.values():
        document = np.cumsum(row[1:] == 0) - (row[1:] == 0)
        row[1:][(document % 2 == 1) & (row[1:] != 0)] = 777
    type(text).row, kept = lambda self, index: changed[index], type(text).row
    try:
        after = collate_text(objective, text, samples=32)
    finally:
        type(text).row = kept
    differ = 0
    for row in range(32):
        for document in range(int(before["documents"][row].max()) + 1):
            seen = visible(before, row, document)
            if document % 2 == 0:
                assert visible(after, row, document) == seen
            differ += visible(after, row, document) != seen
    assert differ > 32


def test_documents_of_tokens(make_text: Make, collate_text: Make) -> None:
    """Against the text: each token of a target that counts is of its position's document, and a span is of one."""
    each = denoising(96)
    text = documents_text(make_text, each.lengths.raw)
    columns = collate_text(collator(96, each, documents=True), text, samples=200)
    plain = collate_text(collator(96, each), text, samples=200)
    assert (columns["tokens"] == plain["tokens"]).all()
    left_out = 0
    for row in range(200):
        original = text.text(row)
        document_of = np.cumsum(original == 0) - (original == 0)
        noise, stretch = (found[0] for found in spans(Draws("key"), np.array([row]), each.lengths))
        targets, own = columns["targets"][row][:-1], columns["decoder_documents"][row][:-1]
        place = 0
        for span in range(each.lengths.spans):
            at = np.flatnonzero(noise & (stretch == 2 * span + 1))
            ids, documents = targets[place : place + len(at) + 1], own[place : place + len(at) + 1]
            first = document_of[at[0]]
            assert set(documents.tolist()) == {first}
            within = document_of[at] == first
            assert ids.tolist() == [FIRST - span, *np.where(within, original[at], -1)]
            left_out += int((~within).sum())
            assert first in columns["documents"][row], "what is learnt has something to be read from"
            place += len(at) + 1
        restarts = np.flatnonzero(np.diff(columns["decoder_documents"][row]) != 0) + 1
        assert (columns["decoder_tokens"][row][restarts] == START).all()
    assert 0 < left_out < 0.2 * 200 * each.lengths.noise


def test_prefix(make_text: Make, collate_text: Make) -> None:
    each = Denoising(prefix_lengths(64, 0.5), EOD)
    assert (each.lengths.raw, each.lengths.inputs, each.lengths.targets) == (126, 64, 64)
    text = make_text(126)
    columns = collate_text(collator(64, each), text)
    for row in range(64):
        assert columns["tokens"][row].tolist() == [*text.text(row)[:63].tolist(), EOD]
        assert columns["targets"][row].tolist() == [*text.text(row)[63:].tolist(), EOD]


def test_a_mixture_has_one_shape(make_text: Make, collate_text: Make) -> None:
    """Of R, S and X: the encoder's inputs are full, targets are padded, and the modes say what a sample is."""
    section = Objective(kind="ul2")
    lengths = denoised(section, 128)
    each = [
        Denoising(length, EOD, FIRST, MODE + number, weight)
        for number, (length, weight) in enumerate(zip(lengths, (1, 1, 2, 1, 1, 1, 1), strict=True))
    ]
    objective = collator(128, *each)
    text = make_text(objective.raw_len)
    columns = collate_text(objective, text, samples=1600)
    mode = columns["tokens"][:, 0] - MODE
    counts = np.bincount(mode, minlength=7)
    assert counts / 1600 == pytest.approx(np.array([1, 1, 2, 1, 1, 1, 1]) / 8, abs=0.035)
    for row in range(200):
        length = lengths[mode[row]]
        targets, own = columns["targets"][row], text.text(row)[: length.raw].tolist()
        assert (targets >= 0).tolist() == [True] * length.targets + [False] * (len(targets) - length.targets)
        tokens, targets = columns["tokens"][row, 1:].tolist(), targets[: length.targets].tolist()
        if length.spans:
            assert reconstruct(tokens, targets, length.spans) == own
        else:
            assert tokens[:-1] + targets[:-1] == own


def test_longer_targets_are_padded(make_text: Make, collate_text: Make) -> None:
    each = denoising(64)
    columns = collate_text(collator(64, each, extra=5), make_text(each.lengths.raw))
    assert (columns["targets"][:, -5:] == -1).all()
    assert (columns["decoder_tokens"][:, -5:] == EOD).all()
    assert (columns["targets"][:, :-5] >= 0).all()


def test_past_the_end_nothing_counts(make_text: Make, collate_text: Make) -> None:
    each = denoising(64)
    text = make_text(each.lengths.raw, samples=2, counted=30)
    for documents in (False, True):
        columns = collate_text(collator(64, each, documents=documents), text, samples=3)
        whole, part, none = ((row >= 0).sum() for row in columns["targets"])
        assert (whole, none) == (each.lengths.targets, 0)
        assert 0 < part < whole
        real = set(text.text(1)[:30].tolist())
        counted = [token for token in columns["targets"][1].tolist() if token >= 0]
        assert {token for token in counted if token <= 1900} <= real


def test_denoisers_of_the_section() -> None:
    with pytest.raises(ValueError, match="R and X need a mean_span"):
        Denoiser(mode="R", noise_density=0.15)
    with pytest.raises(ValueError, match="S has none"):
        Denoiser(mode="S", noise_density=0.15, mean_span=3.0)
