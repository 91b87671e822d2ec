import tracemalloc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from megamup.data.collate import collate
from megamup.data.corpus import Corpus
from megamup.data.samples import PackedSamples, SampleSource, SequentialSamples
from megamup.errors import MegamupError

MakeCorpus = Callable[..., Corpus]


def windows(samples: SampleSource, first: int, stop: int) -> Any:
    return collate(samples, np.arange(first, stop)).window


def test_every_epoch_sees_every_sample_in_a_new_order(counting_corpus: Corpus) -> None:
    samples = PackedSamples(counting_corpus, seq_len=10, seed=1, vocab_size=1004)
    assert len(samples) == 100
    starts = windows(samples, 0, 500)[:, 0].reshape(5, 100)  # in one call over all epochs
    assert (np.sort(starts, axis=1) == np.arange(0, 1000, 10)).all()
    assert len({tuple(epoch) for epoch in starts.tolist()}) == 5


def test_sample_is_contiguous_and_overlaps_by_one(counting_corpus: Corpus) -> None:
    """Also where it lies in two shards."""
    found = windows(PackedSamples(counting_corpus, seq_len=10, seed=1, vocab_size=1004), 0, 100)
    assert len(counting_corpus.shards) == 5
    assert (found == found[:, :1] + np.arange(11)).all()


def test_order_is_a_function_of_seed_content_and_index(make_corpus: MakeCorpus) -> None:
    """Paths and a manifest have no say, other content has; how many are asked for at a time hasn't."""
    tokens = list(range(1003))

    def order(seed: int, *tokens_of: list[int], **options: Any) -> list[int]:
        samples = PackedSamples(make_corpus(tokens_of, 1004, **options), 10, seed, 1004)
        return [int(start) for start in samples.locate(np.arange(150))[1]]

    plain = order(1, tokens)
    assert order(1, tokens, name="elsewhere") == plain
    assert order(1, tokens, name="foreign", manifest=False) == plain
    assert order(2, tokens) != plain
    assert order(1, [1, *tokens[1:]], name="changed") != plain
    samples = PackedSamples(make_corpus([tokens], 1004), 10, 1, 1004)
    assert [int(samples.locate(np.array([index]))[1][0]) for index in range(150)] == plain


def test_order_stays_what_it_was(counting_corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed order would break the resumption of runs that began before the change."""
    monkeypatch.setattr(Corpus, "content_hash", "0123abcd")
    samples = PackedSamples(counting_corpus, seq_len=10, seed=1234, vocab_size=1004)
    epochs, found = samples.locate(np.array([0, 1, 2, 99, 100, 10**9]))
    assert epochs.tolist() == [0, 0, 0, 0, 1, 10**7]
    assert found.tolist() == [40, 76, 38, 44, 62, 75]
    part = PackedSamples(counting_corpus, seq_len=10, seed=1234, vocab_size=1004, fraction=0.25)
    assert part.locate(np.array([0, 1, 24, 25]))[1].tolist() == [77, 39, 61, 31]


def test_fractions_nest_and_are_the_same_for_every_seed(counting_corpus: Corpus) -> None:
    def epoch(fraction: float, seed: int, number: int) -> list[int]:
        samples = PackedSamples(counting_corpus, 10, seed, 1004, fraction)
        first = number * len(samples)
        return [int(index) for index in samples.locate(np.arange(first, first + len(samples)))[1]]

    quarter, half = epoch(0.25, 1, 0), epoch(0.5, 1, 0)
    assert (len(set(quarter)), len(set(half))) == (25, 50)
    assert set(quarter) < set(half)
    assert epoch(0.25, 1, 1) != quarter
    assert set(epoch(0.25, 1, 1)) == set(epoch(0.25, 7, 0)) == set(quarter)
    assert epoch(0.25, 7, 0) != quarter
    assert sorted(epoch(1, 1, 0)) == list(range(100))
    assert quarter != list(range(25))


def test_a_fraction_is_the_decimal_that_was_written(counting_corpus: Corpus) -> None:
    assert int(0.29 * 100) == 28
    assert len(PackedSamples(counting_corpus, 10, 0, 1004, fraction=0.29)) == 29
    with pytest.raises(
        MegamupError, match=r"fraction=0\.009 of its 100 samples .*less than one; expected at least 0\.01"
    ):
        PackedSamples(counting_corpus, 10, 0, 1004, fraction=0.009)


def test_nothing_grows_with_the_corpus() -> None:
    """An epoch of 10^12 samples takes no more memory to order than one of five thousand."""
    peaks = []
    for n_tokens in (10**5, 10**13):
        corpus = cast(Corpus, SimpleNamespace(n_tokens=n_tokens, manifest=None, content_hash="0", prefix="large"))
        samples = PackedSamples(corpus, 10, 1, 1004, fraction=0.5)
        tracemalloc.start()
        epochs, found = samples.locate(np.array([0, 10**11, 5 * 10**11, 10**15]))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] < 1_000_000
    assert epochs.tolist() == [0, 0, 1, 2000]
    assert len(set(found.tolist())) == 4
    assert max(found) < len(samples) * 2


@pytest.mark.parametrize("n_tokens", [1, 5, 9, 10, 11, 20, 21, 1003])
@pytest.mark.parametrize("manifest", [True, False])
def test_every_token_is_a_target_once_in_evaluation(make_corpus: MakeCorpus, n_tokens: int, manifest: bool) -> None:
    tokens = [*range(n_tokens - 1), 1003]
    samples = SequentialSamples(make_corpus([tokens], 1004, manifest=manifest), seq_len=10, vocab_size=1004)
    seen, inputs = [], []
    batch = collate(samples, np.arange(len(samples) + 3))
    for window, count in zip(batch.window, batch.n_targets.tolist(), strict=True):
        seen += window[1 : 1 + count].tolist()
        inputs += window[:count].tolist()
    assert seen == tokens
    assert inputs == [1003, *tokens[:-1]]


def test_too_few_tokens(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus([list(range(10))])
    with pytest.raises(MegamupError, match=r"holds 10 tokens; a sample needs 11 \(data\.seq_len"):
        PackedSamples(corpus, seq_len=10, seed=0, vocab_size=257)
    assert len(PackedSamples(corpus, seq_len=9, seed=0, vocab_size=257)) == 1


def test_vocabulary_is_checked_at_once_with_a_manifest(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus([[1, 200, 3]])
    for open_samples in (
        lambda: PackedSamples(corpus, 2, 0, vocab_size=200),
        lambda: SequentialSamples(corpus, 2, vocab_size=200),
    ):
        with pytest.raises(MegamupError, match=r"holds token id 200, outside model\.vocab_size=200"):
            open_samples()


@pytest.mark.parametrize("corpus_vocabulary", [257, 70_000])
def test_vocabulary_is_checked_in_every_sample(make_corpus: MakeCorpus, corpus_vocabulary: int) -> None:
    corpus = make_corpus([[1, 2, 200, 3]], corpus_vocabulary, manifest=False)
    for samples in (PackedSamples(corpus, 3, 0, vocab_size=200), SequentialSamples(corpus, 3, vocab_size=200)):
        with pytest.raises(MegamupError, match=r"corpus '.*corpus': token 2 has id 200, outside model\.vocab_size=200"):
            windows(samples, 0, 1)


def test_negative_ids_are_found(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus([[1, 2, 3, 4]], vocab_size=70_000, manifest=False)
    corpus.shards[0].bin_path.write_bytes(np.array([1, -2, 3, 4], "<i4").tobytes())
    with pytest.raises(MegamupError, match=r"token 1 has id -2"):
        windows(PackedSamples(Corpus(corpus.prefix), 3, 0, vocab_size=70_000), 0, 1)
