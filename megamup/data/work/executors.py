"""Where units are worked on: processes of this machine, or the machines of a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, Literal, Protocol, TypeVar

from megamup.errors import MegamupError

Result = TypeVar("Result")
ExecutorName = Literal["processes", "ray"]


class Executor(Protocol):
    """Runs calls elsewhere; leaving it as a context manager drops those that haven't begun and waits for the others."""

    workers: int

    def __enter__(self) -> Executor: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]: ...


def make_executor(name: ExecutorName, workers: int) -> Executor:
    """Raises MegamupError where Ray is asked for and isn't there."""
    return RayExecutor(workers) if name == "ray" else Processes(workers)


class Processes:
    """Worker processes of this machine.

    They are forked from a server that has imported what they need and has no threads: starting them is cheap, and
    nothing of this process's state reaches them.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["megamup.data.preprocess.worker"])
        self._pool = ProcessPoolExecutor(workers, context, initializer=_watch_parent)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Submit with Ctrl-C held back meanwhile.

        Ctrl-C reaches all processes of a terminal. Workers that `submit` starts inherit the held signal, so it is the
        parent alone that stops, and then stops them.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return self._pool.submit(function, *arguments)
        except BrokenProcessPool as error:  # reported where results are
            future: Future[Result] = Future()
            future.set_exception(error)
            return future
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _watch_parent() -> None:
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A killed parent can't stop its workers: they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class RayExecutor:
    """Tasks of one core each on a Ray cluster: the one that RAY_ADDRESS names, else one started on this machine.

    The work folder and the input must be on a file system that all its machines share, and megamup installed there.
    Ray runs a task again whose machine is lost.
    """

    def __init__(self, workers: int) -> None:
        try:
            import ray
        except ImportError as error:
            raise MegamupError("--executor ray: Ray is not installed; pip install 'megamup[ray]'") from error
        self._ray = ray
        self._owned = not ray.is_initialized()
        if self._owned:
            address = os.environ.get("RAY_ADDRESS")
            _check_reachable(address or "")
            ray.init(
                address=address,
                log_to_driver=False,
                configure_logging=False,
                include_dashboard=None if address else False,
                **({} if address else {"num_cpus": workers}),
            )
        self.workers = workers
        self._call = ray.remote(num_cpus=1, max_retries=3)(_call)

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        if self._owned:
            self._ray.shutdown()

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        future: Future[Result] = Future()

        def settle(done: Future[Result]) -> None:
            error = done.exception()
            if error is None:
                future.set_result(done.result())
            else:
                future.set_exception(getattr(error, "cause", None) or error)  # Ray's own prints the worker's traceback

        self._call.remote(function, *arguments).future().add_done_callback(settle)
        return future


def _check_reachable(address: str) -> None:
    """Ray itself waits for minutes where nobody answers.

    Raises:
        MegamupError: nobody does.
    """
    match = re.fullmatch(r"(?:ray://)?(.+):(\d+)", address)
    if match is None:  # none, or `auto`
        return
    try:
        socket.create_connection((match[1], int(match[2])), timeout=10).close()
    except OSError as error:
        raise MegamupError(
            f"RAY_ADDRESS={address}: no Ray cluster answers there ({error}); start it (ray start --head), or unset "
            "RAY_ADDRESS for one on this machine"
        ) from error


def _call(function: Callable[..., Result], *arguments: Any) -> Result:
    return function(*arguments)
