"""Ranks forked from this process: one import of torch and DeepSpeed for any number of runs on one host.

The `deepspeed` launcher is how runs are started; a launch costs 15-20 s of imports, which trials of a sweep and tests
of ranks don't pay. Fork before CUDA is initialised.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar, cast

import torch
import torch._dynamo  # the first optimizer imports it: seconds that every rank would pay
from torch.distributed import TCPStore  # type: ignore[attr-defined]

T = TypeVar("T")
KEPT: list[object] = []
"""What lives as long as the process: rank 0's store."""


class RankError(RuntimeError):
    """A rank failed; the message holds its traceback."""


class Ranks(Generic[T]):
    """``function(*arguments)`` on ``world_size`` forked ranks, which find RANK, WORLD_SIZE and a rendezvous in their
    environment, as under a launcher. Use as a context: leaving it ends what still runs.

    Args:
        threads: CPU threads of each rank.
        log: file that takes the ranks' stdout and stderr; default: this process's own.
    """

    def __init__(
        self,
        function: Callable[..., T],
        world_size: int,
        *arguments: Any,
        threads: int = 1,
        log: str | None = None,
    ) -> None:
        # A port that nobody can take in between: this process listens, rank 0 serves. The store isn't this process's,
        # since its thread looks up host names, and a fork during that leaves the child glibc's resolver locked.
        meeting = socket.create_server(("127.0.0.1", 0), backlog=max(world_size, 8))
        self.results: dict[int, T] = {}
        self.pipes: list[Connection] = []
        self.processes = []
        fork = multiprocessing.get_context("fork")
        for rank in range(world_size):
            receive, send = fork.Pipe(duplex=False)
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "OMP_NUM_THREADS": str(threads),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(meeting.getsockname()[1]),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
            target = (send, environment, threads, log, meeting, function, arguments)
            process = fork.Process(target=_rank, args=target)
            process.start()
            send.close()
            self.pipes.append(receive)
            self.processes.append(process)
        meeting.close()

    def poll(self, timeout_s: float | None = 0.0) -> bool:
        """Take in what ranks have to say, waiting up to ``timeout_s``; True once all are done.

        Raises:
            RankError: a rank raised or died.
            MegamupError: a rank raised it.
        """
        waiting = {pipe: rank for rank, pipe in enumerate(self.pipes) if rank not in self.results}
        for pipe in wait(list(waiting), timeout_s):
            rank = waiting[cast(Connection, pipe)]
            try:
                failed, outcome = pickle.loads(cast(Connection, pipe).recv_bytes())
            except EOFError:
                raise RankError(f"rank {rank} died without a word (killed, or out of memory)") from None
            if failed:
                raise outcome
            self.results[rank] = outcome
        return len(self.results) == len(self.pipes)

    def __enter__(self) -> Ranks[T]:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.terminate()  # one that ended isn't harmed
        for process in self.processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
                process.join()


def run_ranks(function: Callable[..., T], world_size: int, *arguments: Any, threads: int = 1) -> list[T]:
    """Call ``function(*arguments)`` on forked ranks and return their results in rank order; raises as `Ranks.poll`."""
    with Ranks(function, world_size, *arguments, threads=threads) as ranks:
        while not ranks.poll(None):
            pass
        return [ranks.results[rank] for rank in range(world_size)]


def serve(meeting: socket.socket) -> TCPStore:
    """The store at which the ranks meet, on a socket that listens already."""
    port, listening = meeting.getsockname()[1], os.dup(meeting.fileno())
    return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listening)


def _rank(
    pipe: Connection,
    environment: dict[str, str],
    threads: int,
    log: str | None,
    meeting: socket.socket,
    function: Callable[..., Any],
    arguments: Any,
) -> None:
    # The parent's garbage is not collected here: a destructor could wait for a thread that the fork left behind.
    gc.freeze()
    os.environ.update(environment)
    torch.set_num_threads(threads)
    if compiler := sys.modules.get("torch._inductor.async_compile"):
        compiler.AsyncCompile.pool.cache_clear()  # threads that compiled for the parent, and aren't forked
    if log is not None:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
    if environment["RANK"] == "0":
        KEPT.append(serve(meeting))
    meeting.close()
    try:
        outcome = (False, function(*arguments))
    except Exception as error:
        described = RankError(f"rank {environment['RANK']} failed:\n{traceback.format_exc()}")
        outcome = (True, error if type(error).__module__.startswith("megamup.") else described)
    pipe.send_bytes(pickle.dumps(outcome))  # torch's own pickling would share memory with a process that ends
    pipe.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # no destructors: a process group may still have a peer that failed
