import numpy as np

from megamup.data.collate import collate
from megamup.data.samples import PackedSamples, SequentialSamples
from megamup.data.shards import Shard


def test_collate(counting_shard: Shard) -> None:
    samples = PackedSamples(counting_shard, seq_len=10, seed=1, vocab_size=1004)
    batch = collate(samples, [5, 7])
    windows = np.stack([samples.sample(5), samples.sample(7)])
    assert (batch.tokens == windows[:, :-1]).all()
    assert (batch.targets == windows[:, 1:]).all()
    assert (batch.mask == 1).all()
    assert [array.dtype.name for array in batch] == ["int64", "int64", "float32"]
    assert [array.shape for array in batch] == [(2, 10)] * 3


def test_collate_masks_padding(counting_shard: Shard) -> None:
    sequential = SequentialSamples(counting_shard, seq_len=10, vocab_size=1004)
    batch = collate(sequential, [99, 100, 101])
    assert batch.mask.sum(axis=1).tolist() == [10, 3, 0]
    assert batch.targets[1, :3].tolist() == [1000, 1001, 1002]
