from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from megamup.data.samples import PackedSamples, Permutation, SequentialSamples
from megamup.data.shards import Shard
from megamup.errors import MegamupError

MakeShard = Callable[..., Shard]


def test_permutation_is_a_bijection() -> None:
    for n in range(1, 1001):
        permutation = Permutation(n, key="key")
        assert sorted(map(permutation, range(n))) == list(range(n))


@pytest.mark.parametrize("n", [2**31 - 1, 10**12 + 39, 2**40])
def test_large_permutation(n: int) -> None:
    permutation = Permutation(n, key="key")
    values = [permutation(index) for index in range(2000)]
    assert len(set(values)) == 2000
    assert min(values) >= 0
    assert max(values) < n
    # Uniform on [0, n): the mean of 2,000 is within 4 standard errors (n / sqrt(12 * 2000)) of n / 2.
    assert abs(np.mean(values) / n - 0.5) < 4 / np.sqrt(12 * 2000)


def test_permutations_of_few_samples_all_occur() -> None:
    counts = Counter(tuple(map(Permutation(4, f"{key}"), range(4))) for key in range(2400))
    assert len(counts) == 24
    assert min(counts.values()) > 50
    assert max(counts.values()) < 150


def test_every_epoch_sees_every_sample_in_a_new_order(counting_shard: Shard) -> None:
    samples = PackedSamples(counting_shard, seq_len=10, seed=1, vocab_size=1004)
    assert len(samples) == 100
    epochs = [[int(samples.sample(epoch * 100 + index)[0]) for index in range(100)] for epoch in range(5)]
    for starts in epochs:
        assert sorted(starts) == list(range(0, 1000, 10))
    assert len({tuple(starts) for starts in epochs}) == 5


def test_sample_is_contiguous_and_overlaps_by_one(counting_shard: Shard) -> None:
    samples = PackedSamples(counting_shard, seq_len=10, seed=1, vocab_size=1004)
    for index in range(100):
        sample = samples.sample(index)
        assert sample.tolist() == list(range(sample[0], sample[0] + 11))


def test_order_is_a_function_of_seed_name_and_index(counting_shard: Shard) -> None:
    def order(seed: int, name: str = "") -> list[int]:
        samples = PackedSamples(counting_shard, 10, seed, 1004, name)
        return [int(samples.sample(index)[0]) for index in range(150)]

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert order(1, "0") != order(1, "1")
    fresh = PackedSamples(counting_shard, 10, 1, 1004)
    assert fresh.sample(149)[0] == order(1)[149]


def test_order_stays_what_it_was(counting_shard: Shard) -> None:
    """A changed order would break the resumption of runs that began before the change."""
    samples = PackedSamples(counting_shard, seq_len=10, seed=1234, vocab_size=1004)
    starts = [int(samples.sample(index)[0]) for index in (0, 1, 2, 99, 100, 10**9)]
    assert starts == [290, 940, 660, 880, 320, 860]


@pytest.mark.parametrize("n_tokens", [1, 5, 9, 10, 11, 20, 21, 1003])
@pytest.mark.parametrize("manifest", [True, False])
def test_every_token_is_a_target_once_in_evaluation(make_shard: MakeShard, n_tokens: int, manifest: bool) -> None:
    tokens = [*range(n_tokens - 1), 1003]
    shard = make_shard([tokens], vocab_size=1004, manifest=manifest)
    samples = SequentialSamples(shard, seq_len=10, vocab_size=1004)
    seen, inputs = [], []
    for index in range(len(samples) + 3):
        sample = samples.sample(index)
        assert sample.shape == (11,)
        count = samples.n_targets(index)
        seen += sample[1 : 1 + count].tolist()
        inputs += sample[:count].tolist()
    assert seen == tokens
    assert inputs == [1003, *tokens[:-1]]


def test_too_few_tokens(make_shard: MakeShard) -> None:
    shard = make_shard([list(range(10))])
    with pytest.raises(MegamupError, match=r"holds 10 tokens; a sample of data\.seq_len=10 needs 11"):
        PackedSamples(shard, seq_len=10, seed=0, vocab_size=257)
    assert len(PackedSamples(shard, seq_len=9, seed=0, vocab_size=257)) == 1


def test_vocabulary_is_checked_at_once_with_a_manifest(make_shard: MakeShard) -> None:
    shard = make_shard([[1, 200, 3]])
    for open_samples in (
        lambda: PackedSamples(shard, 2, 0, vocab_size=200),
        lambda: SequentialSamples(shard, 2, vocab_size=200),
    ):
        with pytest.raises(MegamupError, match=r"holds token id 200, outside model\.vocab_size=200"):
            open_samples()


@pytest.mark.parametrize("shard_vocabulary", [257, 70_000])
def test_vocabulary_is_checked_in_every_sample(make_shard: MakeShard, shard_vocabulary: int) -> None:
    shard = make_shard([[1, 2, 200, 3]], shard_vocabulary, manifest=False)
    message = r"shard '.*shard': token 2 has id 200, outside model\.vocab_size=200"
    with pytest.raises(MegamupError, match=message):
        PackedSamples(shard, 3, 0, vocab_size=200).sample(0)
    with pytest.raises(MegamupError, match=message):
        SequentialSamples(shard, 3, vocab_size=200).sample(0)


def test_negative_ids_are_found(make_shard: MakeShard) -> None:
    shard = make_shard([[1, 2, 3, 4]], vocab_size=70_000, manifest=False)
    shard.bin_path.write_bytes(np.array([1, -2, 3, 4], "<i4").tobytes())
    with pytest.raises(MegamupError, match=r"token 1 has id -2"):
        PackedSamples(Shard(shard.prefix), 3, 0, vocab_size=70_000).sample(0)
