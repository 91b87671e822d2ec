"""The instrument: every byte of torch's allocator, whoever allocates or releases it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megamup.config import Config
from megamup.train.fork import run_ranks
from megamup.train.loop import start, train_step
from megamup.train.memory import (
    event_tree,
    every_thread_counted,
    live_bytes,
    measure_peak,
    memory_events,
    timeline,
    trace_memory,
)

CPU = torch.device("cpu")
MIB = 2**20


def mebibytes(count: int) -> torch.Tensor:
    return torch.zeros(count * MIB // 4)


def test_peak_counts_temporaries_within_operations_and_what_was_there() -> None:
    before = live_bytes(CPU)
    kept = mebibytes(3)

    def step() -> torch.Tensor:
        return (kept + 1).mul_(2) * 3  # a sum and a product beside `kept`

    assert measure_peak(step, CPU) - before == pytest.approx(9 * MIB, abs=4096)


def test_a_timeline_says_what_was_alive_at_the_peak() -> None:
    kept = mebibytes(2)

    def step() -> None:
        with record_function("outer"):
            first = mebibytes(5)
            del first
            mebibytes(1)

    trace = trace_memory(step)
    assert trace.at_peak["outer > aten::zeros > aten::empty"] == 5 * MIB
    assert sum(trace.at_peak.values()) == trace.peak
    assert trace.at_peak["before the step"] >= kept.nbytes
    assert trace.live[0] == pytest.approx(trace.peak - 5 * MIB, abs=4096)
    assert trace.live[-1] == pytest.approx(trace.live[0], abs=4096)
    assert trace.times_s == sorted(trace.times_s)
    assert len(trace.times_s) == len(trace.live)


def test_what_another_thread_releases_is_counted() -> None:
    """As threads of collectives do, which the profiler doesn't follow."""

    def step() -> None:
        held = [mebibytes(4)]
        thread = threading.Thread(target=held.clear)
        thread.start()
        thread.join()
        mebibytes(3)

    trace = trace_memory(step)
    assert trace.peak - trace.live[0] == pytest.approx(4 * MIB, abs=4096)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as blind:
        step()
    events = memory_events(event_tree(blind), CPU)
    assert sum(event.size for event in events) == pytest.approx(4 * MIB, abs=4096), "then it need not be counted"


def test_a_step_that_frees_what_is_older_is_measured_once_it_has_settled() -> None:
    held: list[torch.Tensor] = [mebibytes(6)]

    def step() -> None:
        held.clear()
        held.append(mebibytes(6))

    before = live_bytes(CPU)
    assert measure_peak(step, CPU) == pytest.approx(before, abs=4096)


def test_live_bytes_counts_storages_once_and_gradients_too() -> None:
    before = live_bytes(CPU)
    weight = torch.nn.Parameter(mebibytes(2))
    view = weight.detach()[:100]
    assert live_bytes(CPU) - before == 2 * MIB
    (2 * weight.sum()).backward()
    assert live_bytes(CPU) - before == pytest.approx(4 * MIB, abs=4096)
    assert view.shape == (100,)


def test_a_profile_in_progress_has_the_same_timeline() -> None:
    kept = mebibytes(2)
    with every_thread_counted(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as running:
        kept = mebibytes(8) + 1
    found = timeline(running, live_bytes(CPU), CPU)
    assert found.peak - found.live[0] == pytest.approx(16 * MIB, abs=4096)
    assert found.live[-1] == live_bytes(CPU)
    assert kept.nbytes == 8 * MIB


@pytest.mark.parametrize("tensor", [1, 2])
def test_the_allocator_and_the_live_tensors_agree_on_a_run(make_config: Any, tensor: int) -> None:
    """Counted from a run's beginning: what is left after two steps is what live tensors hold."""
    config = make_config(f"parallel.tensor={tensor}", "deepspeed=ds_configs/zero0.json")
    for counted, live in run_ranks(from_the_beginning, tensor, config, tensor):
        assert counted == pytest.approx(live, abs=2**15)


def from_the_beginning(config: Config, world_size: int) -> tuple[int, int]:
    before = live_bytes(CPU)
    with every_thread_counted(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as running:
        run = start(config, world_size, None)
        for step in range(2):
            train_step(run, step)
        last = torch.zeros(1)
    first, *_, final = memory_events(event_tree(running), CPU)
    count = final.total - (first.total - first.size)
    # Weights come from NumPy, whose memory torch's allocator hasn't made.
    foreign = sum(shard.nbytes for shard in run.engine.deepspeed.module.parameters())
    return count + foreign, live_bytes(CPU) - before - last.nbytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_caching_allocator_counts(tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    kept = torch.zeros(MIB, device=device)
    before = live_bytes(device)
    assert measure_peak(lambda: (kept + 1) * 2, device) - before == pytest.approx(8 * MIB, abs=4096)
