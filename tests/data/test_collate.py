import numpy as np

from megamup.data.collate import collate
from megamup.data.corpus import Corpus
from megamup.data.samples import PackedSamples, SequentialSamples


def test_collate(counting_corpus: Corpus) -> None:
    samples = PackedSamples(counting_corpus, seq_len=10, seed=1, vocab_size=1004)
    batch = collate(samples, np.array([5, 7]))
    starts = samples.locate(np.array([5, 7]))[1] * 10
    assert batch.window.tolist() == [list(range(start, start + 11)) for start in starts.tolist()]
    assert batch.window.dtype == np.int64
    assert batch.n_targets.tolist() == [10, 10]


def test_collate_into_given_memory(counting_corpus: Corpus) -> None:
    samples = PackedSamples(counting_corpus, seq_len=10, seed=1, vocab_size=1004)
    window = np.full((2, 11), -1)
    assert collate(samples, np.array([5, 7]), window).window is window
    assert (window == collate(samples, np.array([5, 7])).window).all()


def test_padding_is_no_target(counting_corpus: Corpus) -> None:
    sequential = SequentialSamples(counting_corpus, seq_len=10, vocab_size=1004)
    batch = collate(sequential, np.array([99, 100, 101]))
    targets = batch.window[:, batch.columns["targets"]]
    assert (targets >= 0).sum(axis=1).tolist() == batch.n_targets.tolist() == [10, 3, 0]
    assert targets[targets >= 0].tolist() == [*range(990, 1003)]
