import gc
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from megamup.data.blend import Blend, Chain
from megamup.data.collate import collate
from megamup.data.corpus import Corpus
from megamup.data.loader import BatchStream, TensorBatch
from megamup.data.objectives import Causal
from megamup.data.permutation import Indices
from megamup.data.samples import PackedSamples, Row, SequentialSamples
from megamup.errors import MegamupError

MakeCorpus = Callable[..., Corpus]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def samples(counting_corpus: Corpus) -> PackedSamples:
    return PackedSamples(counting_corpus, seq_len=10, seed=1, vocab_size=1004)


def joined(batches: list[TensorBatch]) -> list[list[int]]:
    return [row for batch in batches for row in batch.window.tolist()]


def test_resumption_at_any_step_on_any_layout_gives_the_same_batches(
    counting_corpus: Corpus, make_corpus: MakeCorpus
) -> None:
    """The global batch of a step is the same for all ranks, micro batches, read-ahead, and steps that came before."""
    other = PackedSamples(make_corpus([list(range(500))], 1004, name="other"), 10, 1, 1004, fraction=0.5)
    blend = Blend([PackedSamples(counting_corpus, 10, 1, 1004), other], [2, 1])
    expected = [collate(blend, np.arange(step * 12, step * 12 + 12)).window.tolist() for step in range(30)]
    generator = np.random.default_rng(0)
    for data_size, micro_sequences, prefetch in itertools.product((1, 2, 3, 4), (1, 3), (1, 2, 5)):
        if 12 % (data_size * micro_sequences):
            continue
        streams = [BatchStream(blend, 12, micro_sequences, rank, data_size, prefetch) for rank in range(data_size)]
        first = int(generator.integers(27))
        for step in (first, first + 1, first + 2, int(generator.integers(30)), int(generator.integers(30))):
            parts = [stream.micro_batches(step) for stream in streams]
            assert [row for part in parts for row in joined(part)] == expected[step]
            assert all(len(part) == 12 // data_size // micro_sequences for part in parts)


def test_any_step_in_any_order(samples: PackedSamples) -> None:
    stream = BatchStream(samples, global_sequences=4, micro_sequences=2)
    forward = [joined(stream.micro_batches(step)) for step in range(6)]
    assert [joined(stream.micro_batches(step)) for step in reversed(range(6))] == forward[::-1]
    assert joined(BatchStream(samples, 4, 4).micro_batches(3)) == forward[3]


def test_batches_are_tensors_for_training(samples: PackedSamples) -> None:
    batch = BatchStream(samples, 4, 2).micro_batches(0)[0]
    assert batch.window.dtype == torch.int64
    assert batch.window.is_contiguous()
    assert (batch.tokens.shape, batch.targets.shape) == ((2, 10), (2, 10))
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    assert batch.tokens.untyped_storage().data_ptr() == batch.targets.untyped_storage().data_ptr()
    assert batch.complete
    assert batch.n_targets == 20


def test_a_step_keeps_its_memory(samples: PackedSamples) -> None:
    """Batches that are still in use, as by a copy to a device, aren't written to by steps that follow."""
    stream = BatchStream(samples, 8, 8, prefetch=3)
    kept = [stream.micro_batches(step) for step in range(8)]
    copies = [batch[0].window.clone() for batch in kept]
    for step in range(8, 30):
        stream.micro_batches(step)
    assert all(torch.equal(batch[0].window, copy) for batch, copy in zip(kept, copies, strict=True))


def test_batch_that_cannot_be_split(samples: PackedSamples) -> None:
    with pytest.raises(MegamupError, match=r"global_sequences=8 .*micro_sequences=3 times 2 data ranks"):
        BatchStream(samples, 8, 3, 0, 2)


def test_errors_of_the_reading_thread_surface(make_corpus: MakeCorpus) -> None:
    """At the step that they are of, and again if it is asked for again; other steps are read all the same."""
    corpus = make_corpus([[1] * 40 + [250] + [1] * 40], manifest=False)
    stream = BatchStream(SequentialSamples(corpus, 10, vocab_size=200), 2, 2)
    stream.micro_batches(0)
    stream.micro_batches(1)
    for _ in range(2):
        with pytest.raises(MegamupError, match=r"token 40 has id 250"):
            stream.micro_batches(2)
    assert stream.micro_batches(3)[0].n_targets == 20


class Slow:
    """Counts the samples that were asked for; each takes a while."""

    seq_len = 4

    def __init__(self, seconds: float) -> None:
        self.seconds, self.read_at = seconds, list[int]()

    def __len__(self) -> int:
        return 100

    def read(self, indices: Indices, rows: Sequence[Row]) -> None:
        time.sleep(self.seconds)
        self.read_at += indices.tolist()
        for row in rows:
            row[:] = 0

    def n_targets(self, indices: Indices) -> Indices:
        return np.full_like(indices, self.seq_len)


@pytest.mark.parametrize("prefetch", [1, 3])
def test_reads_as_many_steps_ahead_as_asked(prefetch: int) -> None:
    source = Slow(0)
    stream = BatchStream(source, 1, 1, prefetch=prefetch)
    stream.micro_batches(5)
    until = time.monotonic() + 5
    while len(source.read_at) < prefetch + 1 and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(0.02)
    assert source.read_at == list(range(5, 6 + prefetch))


def test_reading_and_computing_overlap() -> None:
    stream = BatchStream(Slow(0.02), 1, 1)
    stream.micro_batches(0)
    start = time.monotonic()
    for step in range(1, 11):
        time.sleep(0.02)
        stream.micro_batches(step)
    assert time.monotonic() - start < 0.3  # one after the other: 0.4


def data_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("megamup-data")]


def test_the_thread_starts_at_first_use_and_ends_with_the_stream(samples: PackedSamples) -> None:
    gc.collect()
    before = set(data_threads())
    stream = BatchStream(samples, 4, 2)
    assert set(data_threads()) == before
    stream.micro_batches(0)
    (thread,) = set(data_threads()) - before
    del stream
    gc.collect()
    thread.join(timeout=5)
    assert not thread.is_alive()


def test_a_program_ends_though_its_stream_reads_ahead(tmp_path: Path) -> None:
    program = """
import sys
sys.path.insert(0, sys.argv[1])
from tests.data.test_loader import Slow
from megamup.data.loader import BatchStream
stream = BatchStream(Slow(0.05), 1, 1, prefetch=4)
stream.micro_batches(0)
"""
    done = subprocess.run([sys.executable, "-c", program, str(ROOT)], timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_evaluation_counts_every_token_once(make_corpus: MakeCorpus) -> None:
    """Over several corpora and batches that don't fit: each token is a target once, on one of the ranks."""
    corpora = [make_corpus([list(range(33))], 1004, name="one"), make_corpus([list(range(33, 90))], 1004, name="two")]
    valid = Chain([SequentialSamples(corpus, 10, 1004) for corpus in corpora])
    streams = [BatchStream(valid, 4, 1, rank, 2) for rank in range(2)]
    parts = [batch for stream in streams for step in range(len(stream)) for batch in stream.micro_batches(step)]
    targets = torch.cat([batch.targets[batch.targets >= 0] for batch in parts])
    assert sorted(targets.tolist()) == list(range(90))
    assert [batch.n_targets for batch in parts] == [int((batch.targets >= 0).sum()) for batch in parts]
    assert [batch.complete for batch in parts] == [batch.n_targets == 10 for batch in parts]
    assert min(int(batch.tokens.min()) for batch in parts) == 0, "what no target counts after is still an id"


def test_an_objective_of_other_lengths_is_refused(samples: PackedSamples) -> None:
    with pytest.raises(MegamupError, match="samples of 10 tokens, where the objective takes 12"):
        BatchStream(samples, 4, 2, objective=Causal(12))
