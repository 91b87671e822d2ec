"""Forked ranks: results, failures, and what a fork leaves behind."""

from __future__ import annotations

import gc
import os
import signal
import time

import pytest
import torch
import torch._inductor.config
import torch.distributed as dist
from torch._inductor.async_compile import AsyncCompile
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from megamup.errors import MegamupError
from megamup.train import distributed
from megamup.train.fork import RankError, Ranks, run_ranks


def told() -> tuple[int, int, int]:
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), torch.get_num_threads()


def test_results_come_in_rank_order() -> None:
    assert run_ranks(told, 3) == [(0, 3, 1), (1, 3, 1), (2, 3, 1)]
    assert run_ranks(told, 1, threads=2) == [(0, 1, 2)]


def fail_on(rank: int, error: Exception) -> None:
    if int(os.environ["RANK"]) == rank:
        raise error
    time.sleep(600)


def test_a_failing_rank_ends_the_others() -> None:
    start = time.monotonic()
    with pytest.raises(MegamupError, match="a wrong key"):
        run_ranks(fail_on, 2, 1, MegamupError("a wrong key"))
    with pytest.raises(RankError, match=r"rank 0 failed:\n(.|\n)*ZeroDivisionError: by zero"):
        run_ranks(fail_on, 2, 0, ZeroDivisionError("by zero"))
    assert time.monotonic() - start < 30


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_rank_is_said_to_be() -> None:
    with pytest.raises(RankError, match="rank 0 died without a word"):
        run_ranks(die, 1)


def meet() -> None:
    distributed.join()
    dist.barrier()


def collect() -> int:
    return gc.collect()


def test_the_parent_has_no_thread_that_forks_could_meet() -> None:
    """One that looks up a host name during a fork leaves the child with the resolver locked: it hangs in its first
    connection."""
    before = threads()
    with Ranks(meet, 3) as joined:
        while not joined.poll(None):
            assert threads() == before
    assert threads() == before


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_the_parents_garbage_is_left_alone() -> None:
    """A store owns a thread; destroyed in a fork, where that thread is not, it waits for ever or aborts."""
    gc.collect()
    gc.disable()  # else the parent might collect them first
    try:
        for _ in range(4):
            store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            cycle: list[object] = [store]
            cycle.append(cycle)
            del cycle, store
            with Ranks(collect, 1) as collecting:
                assert collecting.poll(30), "the rank hangs in a destructor"
    finally:
        gc.enable()
        gc.collect()  # here, where the stores' threads are: no later fork is to meet them


def compile_something() -> int:
    return int(AsyncCompile.submit(lambda: 3).result(timeout=30))


def test_ranks_compile_after_the_parent_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's threads aren't forked: a rank that believed in its parent's would wait for them for ever."""
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 2)
    assert compile_something() == 3
    assert run_ranks(compile_something, 2) == [3, 3]
