from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from megamup.data.objectives.draws import Draws
from megamup.data.objectives.masked import Masked, MaskedPairs, Masking, choose, ngram_sizes
from megamup.data.objectives.words import Words
from megamup.errors import MegamupError

Make = Callable[..., Any]
VOCABULARY, MASK, SEP, CLS = 1000, 900, 901, 902
SPECIAL = (MASK, SEP, CLS)


def masking(**changes: Any) -> Masking:
    plain: dict[str, Any] = {"share": 0.15, "replace": (0.8, 0.1, 0.1), "ngram": 1, "mask_id": MASK, "special": SPECIAL}
    return Masking(**(plain | {"vocab_size": VOCABULARY} | changes))


def masked(length: int, documents: bool = False, **changes: Any) -> Masked:
    return Masked(length, masking(**changes), Draws("key"), eod_id=0, documents=documents)


def pairs(length: int, kind: str, **changes: Any) -> MaskedPairs:
    return MaskedPairs(length, kind, masking(**changes), Draws("key"), CLS, SEP, eod_id=0)


def test_shares_are_those_of_the_paper(make_text: Make, collate_text: Make) -> None:
    """15% of the tokens, of those 80% masked, 10% random, 10% kept; all others are read as they are."""
    text = make_text(128, vocabulary=900)
    columns = collate_text(masked(128), text, samples=1000)
    original = np.array([text.text(index) for index in range(1000)])
    tokens, targets = columns["tokens"], columns["targets"]
    chosen = targets >= 0
    assert (chosen.sum(1) == round(0.15 * 128)).all(), "as many of each sample"
    assert (targets[chosen] == original[chosen]).all()
    assert (tokens[~chosen] == original[~chosen]).all()
    as_mask, kept = (tokens == MASK)[chosen].mean(), (tokens == original)[chosen].mean()
    assert abs(as_mask - 0.8) < 0.01  # 2.5 standard deviations at least, of 19,000 targets
    assert abs(kept - 0.1) < 0.008
    at_random = tokens[chosen & (tokens != MASK) & (tokens != original)]
    assert abs(len(at_random) / chosen.sum() - 0.1) < 0.008
    assert not set(at_random.tolist()) & set(SPECIAL)
    assert at_random.max() > 980
    assert at_random.min() < 20
    assert abs(at_random.mean() - 500) < 30
    per_place = chosen.mean(0)
    assert abs(per_place - per_place.mean()).max() < 5 * (0.15 * 0.85 / 1000) ** 0.5, "every place as likely"


def test_what_ends_documents_is_no_target(make_text: Make, collate_text: Make) -> None:
    text = make_text(64, document=4)
    columns = collate_text(masked(64, documents=True, share=0.9), text)
    for row in range(64):
        ends = text.text(row) == 0
        assert (columns["targets"][row][ends] == -1).all()
        assert (columns["tokens"][row][ends] == 0).all()
        assert columns["documents"][row].tolist() == (np.cumsum(ends) - ends).tolist()
        assert (columns["targets"][row] >= 0).sum() == round(0.9 * (~ends).sum())


@pytest.mark.parametrize("ngram", [1, 3])
def test_whole_words_are_masked_with_all_their_tokens_or_none(make_text: Make, collate_text: Make, ngram: int) -> None:
    before = np.arange(VOCABULARY) % 3 == 0  # a third of the tokens begin a word, the other two go on with it
    words = Words(before, np.zeros(VOCABULARY, bool))
    text = make_text(128, document=20)
    columns = collate_text(masked(128, ngram=ngram, words=words, replace=(1.0, 0.0, 0.0)), text, samples=300)
    shares = []
    for row in range(300):
        original, chosen = text.text(row), columns["targets"][row] >= 0
        begins = words.begins(original[None])[0] | (original == 0) | np.roll(original == 0, 1)
        word = np.cumsum(begins)
        for number in np.unique(word[chosen]):
            assert chosen[word == number].all()
        shares.append(chosen.sum() / round(0.15 * (original != 0).sum()))
    assert max(shares) == 1, "never more than the budget"
    assert np.mean(shares) > 0.96, "and hardly less"


def test_ngrams_are_as_likely_as_one_over_their_length(make_text: Make, collate_text: Make) -> None:
    sizes = ngram_sizes(np.random.default_rng(0).random(100_000), 3)
    shares = np.bincount(sizes)[1:] / 100_000
    assert shares == pytest.approx(np.array([1, 1 / 2, 1 / 3]) / (11 / 6), abs=0.005)
    columns = collate_text(masked(256, ngram=3, share=0.05), make_text(256), samples=500)
    chosen = np.pad(columns["targets"] >= 0, ((0, 0), (1, 1))).astype(int)
    edges = np.diff(chosen, axis=1)
    lengths = np.nonzero(edges < 0)[1] - np.nonzero(edges > 0)[1]
    seen = np.bincount(lengths)[1:4] / len(lengths)
    assert seen == pytest.approx(shares, abs=0.06)  # some stand beside another, which looks like a longer one


def test_a_unit_beyond_the_budget_is_passed_over() -> None:
    units = np.array([[0, 0, 0, 0, 1, 2, 2, 3]])
    free = np.ones_like(units, bool)
    for seed in range(20):
        order = np.random.default_rng(seed).integers(2**60, size=units.shape, dtype=np.uint64)
        found = choose(order, units, free, np.array([3]))[0]
        assert found.sum() >= 2
        assert not found[:4].any()
    assert choose(order, units, free, np.array([8]))[0].all()
    assert not choose(order, np.zeros_like(units), free, np.array([3])).any(), "a text of one word, say"


def test_masks_are_new_in_every_epoch_and_for_every_seed(make_text: Make, collate_text: Make) -> None:
    """The place in the stream counts, not the text."""
    text = make_text(64)
    first = collate_text(masked(64), text)["targets"] >= 0
    assert (first[0] != first[1]).any()
    other = Masked(64, masking(), Draws("another key"), eod_id=0, documents=False)
    assert ((collate_text(other, text)["targets"] >= 0) != first).any(axis=1).all()


def test_past_the_end_nothing_is_masked(make_text: Make, collate_text: Make) -> None:
    columns = collate_text(masked(64), make_text(64, samples=1, counted=20), samples=2)
    assert (columns["targets"] >= 0).sum(1).tolist() == [3, 0]
    assert (columns["tokens"][0, 20:] == 0).all()
    assert (columns["targets"][0, 20:] == -1).all()


def parts(tokens: list[int], types: list[int]) -> tuple[list[int], list[int]]:
    """A and B of a row, checked to stand in their frame."""
    assert tokens[0] == CLS
    middle = types.index(1) - 1
    assert tokens[middle] == tokens[-1] == SEP
    assert types == [0] * (middle + 1) + [1] * (len(types) - middle - 1)
    return tokens[1:middle], tokens[middle + 1 : -1]


@pytest.mark.parametrize("kind", ["next_sentence", "sentence_order"])
def test_pairs(make_text: Make, collate_text: Make, kind: str) -> None:
    text = make_text(29, vocabulary=900)
    columns = collate_text(pairs(32, kind, share=1e-9, replace=(0.0, 0.0, 1.0)), text, samples=600)
    assert abs(columns["pair"].mean() - 0.5) < 0.07
    lengths = set()
    for row in range(600):
        first, second = parts(columns["tokens"][row].tolist(), columns["token_types"][row].tolist())
        own, label = text.text(row).tolist(), columns["pair"][row, 0]
        lengths.add(min(len(first), len(second)))
        if label == 0:
            assert first + second == own
        elif kind == "sentence_order":
            assert second + first == own
        else:
            assert first == own[: len(first)]
            assert second != own[len(first) :]
    assert min(lengths) == 7, "a quarter of the text or more"
    assert max(lengths) == 14


def test_the_other_sentence_is_another_samples(make_text: Make, collate_text: Make) -> None:
    text = make_text(29, samples=50)
    columns = collate_text(pairs(32, "next_sentence", replace=(0.0, 0.0, 1.0)), text, samples=50)
    ends = [text.text(index)[-5:].tolist() for index in range(50)]
    for row in np.flatnonzero(columns["pair"][:, 0]).tolist():
        assert columns["tokens"][row, -6:-1].tolist() in ends[:row] + ends[row + 1 :]
    with pytest.raises(MegamupError, match="only one of 29 tokens"):
        collate_text(pairs(32, "next_sentence"), make_text(29, samples=1), samples=1)


def test_pairs_are_masked_and_their_frame_is_not(make_text: Make, collate_text: Make) -> None:
    columns = collate_text(pairs(64, "sentence_order"), make_text(61, vocabulary=900), samples=200)
    chosen = columns["targets"] >= 0
    assert (chosen.sum(1) == round(0.15 * 61)).all()
    assert not np.isin(columns["targets"], SPECIAL).any()
    assert ((columns["tokens"] == CLS).sum(1) == 1).all()
    assert ((columns["tokens"] == SEP).sum(1) == 2).all()


def test_an_unfinished_pair_has_no_label(make_text: Make, collate_text: Make) -> None:
    for kind in ("next_sentence", "sentence_order"):
        text = make_text(29, samples=4, counted=20)
        columns = collate_text(pairs(32, kind), text, samples=6)
        assert columns["pair"][3:, 0].tolist() == [-1, -1, -1]
        assert (columns["pair"][:3] >= 0).all()
        assert (columns["targets"][4:] == -1).all()
        assert (columns["targets"][3] >= 0).any()
