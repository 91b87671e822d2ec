from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from megamup.data.collate import collate
from megamup.data.loader import BatchStream, TensorBatch, open_sources
from megamup.data.samples import PackedSamples
from megamup.data.shards import Shard
from megamup.errors import MegamupError

MakeShard = Callable[..., Shard]


@dataclass
class Source:
    prefix: str
    weight: float = 1.0


@pytest.fixture
def samples(counting_shard: Shard) -> PackedSamples:
    return PackedSamples(counting_shard, seq_len=10, seed=1, vocab_size=1004)


def joined(batches: list[TensorBatch]) -> list[list[int]]:
    return torch.cat([batch.tokens for batch in batches]).tolist()


@pytest.mark.parametrize("data_size", [1, 2, 4])
@pytest.mark.parametrize("micro_sequences", [1, 2])
def test_global_batch_is_the_same_for_every_layout(
    samples: PackedSamples, data_size: int, micro_sequences: int
) -> None:
    streams = [BatchStream(samples, 8, micro_sequences, rank, data_size) for rank in range(data_size)]
    for step in (0, 1, 2, 30):
        expected = collate(samples, range(step * 8, step * 8 + 8)).tokens.tolist()
        parts = [stream.micro_batches(step) for stream in streams]
        assert [row for part in parts for row in joined(part)] == expected
        assert all(len(part) == 8 // data_size // micro_sequences for part in parts)


def test_any_step_in_any_order(samples: PackedSamples) -> None:
    stream = BatchStream(samples, global_sequences=4, micro_sequences=2)
    forward = [joined(stream.micro_batches(step)) for step in range(6)]
    assert [joined(stream.micro_batches(step)) for step in reversed(range(6))] == forward[::-1]
    assert joined(BatchStream(samples, 4, 4).micro_batches(3)) == forward[3]


def test_batches_are_tensors_for_training(samples: PackedSamples) -> None:
    batch = BatchStream(samples, 4, 2).micro_batches(0)[0]
    assert (batch.tokens.dtype, batch.targets.dtype, batch.mask.dtype) == (
        torch.int64,
        torch.int64,
        torch.float32,
    )
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    assert batch.tokens.is_contiguous()


def test_batch_that_cannot_be_split(samples: PackedSamples) -> None:
    with pytest.raises(MegamupError, match=r"global_sequences=8 .*micro_sequences=3 times 2 data ranks"):
        BatchStream(samples, 8, 3, 0, 2)


def test_errors_of_the_reading_thread_surface(make_shard: MakeShard) -> None:
    documents = [[1] * 40 + [250] + [1] * 40]
    shard = make_shard(documents, manifest=False)
    stream = BatchStream(open_sources(shard.prefix, seq_len=10, vocab_size=200, seed=0, shuffle=False), 2, 2)
    stream.micro_batches(0)
    stream.micro_batches(1)
    with pytest.raises(MegamupError, match=r"token 40 has id 250"):
        stream.micro_batches(2)


def test_evaluation_counts_every_token_once(make_shard: MakeShard) -> None:
    """Over several shards and batches that don't fit: each token is a target once, on one of the ranks."""
    one = make_shard([list(range(33))], 1004, name="one")
    two = make_shard([list(range(33, 90))], 1004, name="two")
    sources = [Source(one.prefix), Source(two.prefix)]
    valid = open_sources(sources, seq_len=10, vocab_size=1004, seed=0, shuffle=False)
    streams = [BatchStream(valid, 4, 1, rank, 2) for rank in range(2)]
    parts = [stream.micro_batches(step) for stream in streams for step in range(len(stream))]
    targets = torch.cat([batch.targets[batch.mask == 1] for part in parts for batch in part])
    assert sorted(targets.tolist()) == list(range(90))


def test_training_blend(make_shard: MakeShard) -> None:
    shards = [make_shard([[token] * 101], name=f"s{token}") for token in (1, 2)]
    sources = [Source(shards[0].prefix, 3), Source(shards[1].prefix, 1)]
    train = open_sources(sources, seq_len=10, vocab_size=257, seed=0, shuffle=True)
    firsts = [int(train.sample(index)[0]) for index in range(400)]
    assert (firsts.count(1), firsts.count(2)) == (300, 100)


def test_equal_shards_are_read_in_different_orders(counting_shard: Shard) -> None:
    sources = [Source(counting_shard.prefix), Source(counting_shard.prefix)]
    train = open_sources(sources, seq_len=10, vocab_size=1004, seed=0, shuffle=True)
    starts = [int(train.sample(index)[0]) for index in range(200)]
    assert starts[0::2] != starts[1::2]
    assert sorted(starts[0::2]) == sorted(starts[1::2]) == list(range(0, 1000, 10))


def test_sources_that_make_no_sense(counting_shard: Shard) -> None:
    with pytest.raises(MegamupError, match="the list of sources is empty"):
        open_sources([], seq_len=10, vocab_size=1004, seed=0, shuffle=True)
    sources = [Source(counting_shard.prefix, 1), Source(counting_shard.prefix, 2)]
    with pytest.raises(MegamupError, match=r"data\.valid: weights \[1, 2\].*must be equal"):
        open_sources(sources, seq_len=10, vocab_size=1004, seed=0, shuffle=False)
    with pytest.raises(MegamupError, match=r"no file '.*absent\.idx'"):
        open_sources("absent", seq_len=10, vocab_size=1004, seed=0, shuffle=True)
