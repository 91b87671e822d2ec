"""Ranks forked from this process: one import of torch and DeepSpeed for any number of runs on one host.

The `deepspeed` launcher is how runs are started; a launch costs 15-20 s of imports, which trials of a sweep and tests
of ranks don't pay. Fork before CUDA is initialised.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class RankError(RuntimeError):
    """A rank failed; the message holds its traceback."""


def run_ranks(function: Callable[..., T], world_size: int, *arguments: Any, threads: int = 1) -> list[T]:
    """Call ``function(*arguments)`` on forked ranks; return their results in rank order.

    Each rank finds RANK, WORLD_SIZE and a rendezvous in its environment, as under a launcher. When one fails, the
    others are ended.

    Args:
        threads: CPU threads of each rank.

    Raises:
        RankError: a rank raised or died.
        Exception: the rank's own exception, where it can be carried over (a MegamupError, say).
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # a port that nobody can take
    fork = multiprocessing.get_context("fork")
    pipes: list[Connection] = []
    processes = []
    for rank in range(world_size):
        receive, send = fork.Pipe(duplex=False)
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        process = fork.Process(target=_rank, args=(send, environment, threads, function, arguments))
        process.start()
        send.close()
        pipes.append(receive)
        processes.append(process)
    try:
        return _collect(pipes)
    finally:
        for process in processes:
            process.terminate()  # those that ended are not harmed
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
                process.join()


def _collect(pipes: list[Connection]) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        for pipe in wait(list(waiting)):
            assert isinstance(pipe, Connection)
            rank = waiting[pipe]
            try:
                failed, outcome = pipe.recv()
            except EOFError:
                raise RankError(f"rank {rank} died without a word (killed, or out of memory)") from None
            if failed:
                raise outcome
            results[rank] = outcome
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    pipe: Connection, environment: dict[str, str], threads: int, function: Callable[..., Any], arguments: Any
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(threads)
    try:
        outcome = (False, function(*arguments))
    except Exception as error:
        described = RankError(f"rank {environment['RANK']} failed:\n{traceback.format_exc()}")
        outcome = (True, error if type(error).__module__.startswith("megamup") else described)
    pipe.send(outcome)
    pipe.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # no destructors: a process group may still have a peer that failed
