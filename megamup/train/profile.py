"""A profile of some steps on request (``train.profile: [10, 15]``): traces, where the time went, and memory over time.

In the run's folder under ``profile/``: ``summary.md`` and ``summary.json`` (all ranks; profile_summary.py),
``memory.svg`` (rank 0), and ``rank-N.json.gz``, a Chrome trace (chrome://tracing, ui.perfetto.dev) of each rank of the
first replica: the others do the same on other samples. A resumed run profiles what of the steps is still to come.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from megamup.config import Config
from megamup.errors import OneRankError
from megamup.files import write_bytes_atomic
from megamup.parallel.mesh import Mesh
from megamup.train import profile_summary
from megamup.train.engine import Engine
from megamup.train.memory import every_thread_counted, live_bytes, timeline
from megamup.train.metrics import Recorder
from megamup.train.trace import OPTIMIZER, STEP, Breakdown, breakdown


class Profiler:
    """``with profiler.step(12): ...`` around everything that step 12 is. Collective in the profile's last step."""

    def __init__(self, config: Config, mesh: Mesh, engine: Engine, recorder: Recorder, done: int) -> None:
        first, last = config.train.profile or (0, -1)
        self.steps = range(max(first, done + 1), last + 1)
        self.folder = config.run.folder / "profile"
        self.config, self.mesh, self.engine, self.recorder = config, mesh, engine, recorder
        self.running: profile | None = None
        self.counting = contextlib.ExitStack()

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Profile what runs inside, if ``step`` (from 1) is to be profiled.

        What the profile itself costs before and after isn't in the throughput; that steps are slower under it, is.
        """
        if step not in self.steps:
            yield
            return
        if self.running is None:
            with self.recorder.pause("profile"):
                self.running = self.begin()
        with record_function(f"{STEP} {step}"):
            yield
        if step == self.steps[-1]:
            with self.recorder.pause("profile"):
                self.finish(self.running)
            self.running = None

    def begin(self) -> profile:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what the step before still does isn't the first step's
            activities.append(ProfilerActivity.CUDA)
        deepspeed = self.engine.deepspeed
        take_step = deepspeed._take_model_step  # clipping, the optimizer, ZeRO's gathering of new weights

        def marked(*arguments: Any, **keywords: Any) -> Any:
            with record_function(OPTIMIZER):
                return take_step(*arguments, **keywords)

        deepspeed._take_model_step = marked
        self.counting.enter_context(every_thread_counted())
        running = profile(activities=activities, profile_memory=True)
        running.start()
        return running

    def finish(self, running: profile) -> None:
        """Stop, write this rank's files and the summary of all ranks'. Collective.

        Raises:
            OneRankError: the folder can't be written.
        """
        del self.engine.deepspeed._take_model_step  # the class's own again
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        last = torch.empty(1, device=device())  # an event with the final count of bytes
        running.stop()
        self.counting.close()
        alive = live_bytes(device())
        del last
        text = chrome_trace(running)
        trace = json.loads(text)
        found = breakdown(trace, axes(self.mesh))
        everyone: list[Breakdown] = [found] * dist.get_world_size()
        dist.all_gather_object(everyone, found)
        try:
            if self.mesh.data.rank == 0:
                write_bytes_atomic(self.folder / f"rank-{dist.get_rank()}.json.gz", gzip.compress(text, 6))
            if dist.get_rank() == 0:
                memory = timeline(running, alive, device())
                held = profile_summary.held(self.engine.deepspeed)
                profile_summary.write(self.folder, self.config, self.steps, everyone, memory, held)
        except OSError as error:
            raise OneRankError(
                f"{self.folder}: the profile cannot be written ({error.strerror}); free space on that disk and start "
                "the same command again"
            ) from error


def chrome_trace(running: profile) -> bytes:
    """The finished profile as JSON; torch writes it to files only."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        running.export_chrome_trace(str(path))
        return path.read_bytes()


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def axes(mesh: Mesh) -> dict[tuple[int, ...], str]:
    """{ranks of a process group: the axis of the mesh that they lie along}."""
    named = {
        "tensor": mesh.tensor,
        "context": mesh.context,
        "pipeline": mesh.pipeline,
        "data": mesh.data,
        "data x context": mesh.replicas,
        "expert": mesh.expert,
        "replicas of experts": mesh.holders,
        "model": mesh.model,
    }
    found = {tuple(range(dist.get_world_size())): "all ranks"}
    for name, axis in reversed(named.items()):  # where two are of the same ranks, the first names them
        if axis.group is not None:
            found[tuple(dist.get_process_group_ranks(axis.group))] = name
    return found
