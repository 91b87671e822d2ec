"""Peak memory of a training step, to the byte: what the plan is held to, and the profile's timeline.

On CUDA the caching allocator keeps count. On a CPU the resident size says little (the C library keeps what was freed,
and forked ranks share pages), so torch's profiler reports every allocation of its CPU allocator, also those within an
operation; what was there before is counted from the live tensors. What libraries allocate past torch isn't seen.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

MEASURED = "megamup.train.memory: measured step"
SETTLING_S = 0.05
"""Until threads of collectives have let go of what they sent."""


@dataclass(frozen=True)
class Event:
    """One allocation (positive) or release (negative) of torch's allocator."""

    time_ns: int
    size: int
    address: int
    total: int
    """The allocator's count after it, of what it has been told of."""
    made_by: tuple[str, ...]
    """Ranges and operations that it happened in, outermost first."""


@dataclass(frozen=True)
class MemoryTrace:
    """Live bytes of a device over a step: at the start and after every allocation and release."""

    times_s: list[float]
    """Since the first entry."""
    live: list[int]
    """Bytes, of the same length."""
    at_peak: dict[str, int]
    """What was alive at the peak, in bytes: by the operation that had allocated it, largest first; ``before the step``:
    what was alive when the step began and still was."""

    @property
    def peak(self) -> int:
        return max(self.live)


def measure_peak(step: Callable[[], object], device: torch.device) -> int:
    """Largest number of bytes that tensors on ``device`` take at any moment of a step.

    The step runs twice and the second is measured: the first one makes what stays (optimizer state, buckets).
    """
    if device.type == "cuda":
        step()
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device)
    return trace_memory(step).peak


def trace_memory(step: Callable[[], object]) -> MemoryTrace:
    """`measure_peak` on the CPU, with all that led to it. Releases of what is older than the count aren't reported, and
    would be missed in the first step; in the second nothing so old is released."""
    cpu = torch.device("cpu")
    with every_thread_counted(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
        with record_function(MEASURED):
            step()
        time.sleep(SETTLING_S)
        last = torch.empty(1)  # an event with the final count
    roots = event_tree(profiled)
    begun = next(node.start_time_ns for node in nodes(roots) if node.name == MEASURED)
    found = replay(memory_events(roots, cpu), live_bytes(cpu), begun)
    del last
    return found


def timeline(profiled: profile, alive_after: int, device: torch.device) -> MemoryTrace:
    """Live bytes over a finished profile that was made with ``profile_memory=True``.

    Args:
        profiled: the profile, after its end.
        alive_after: `live_bytes` at its end. On a CPU, what was older than the profile and released during it is
            missing before, and so are, without `every_thread_counted`, releases in threads of collectives.
    """
    return replay(memory_events(event_tree(profiled), device), alive_after, begun=0)


@contextlib.contextmanager
def every_thread_counted() -> Iterator[None]:
    """Let the CPU allocator count what threads allocate and release that the profiler doesn't follow, such as those of
    collectives, which often are the last to hold what was sent: a flag of torch's that has no name in Python."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    flag = ctypes.c_bool.in_dll(library, "FLAGS_caffe2_report_cpu_memory_usage")
    before, flag.value = flag.value, True
    try:
        yield
    finally:
        flag.value = before


def live_bytes(device: torch.device) -> int:
    """Bytes of all storages that live tensors refer to, each counted once."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    storages: dict[int, int] = {}
    for found in gc.get_objects():
        # Subclasses hold their memory in plain tensors, or have none (the compiler's fakes).
        if type(found) in (torch.Tensor, torch.nn.Parameter) and found.layout == torch.strided:
            # A gradient that nobody has looked at is no Python object yet.
            for tensor in (found, found.grad) if found.is_leaf else (found,):
                if tensor is not None and tensor.device.type == device.type:
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def event_tree(profiled: profile) -> Any:
    return profiled.profiler.kineto_results.experimental_event_tree()  # type: ignore[union-attr]


def nodes(roots: Any) -> Iterator[Any]:
    """The profiler's events, each before what happened inside it."""
    stack = list(reversed(roots))
    while stack:
        node = stack.pop()
        yield node
        stack.extend(reversed(node.children))


def memory_events(roots: Any, device: torch.device) -> list[Event]:
    found = []
    for node in nodes(roots):
        of = node.extra_fields
        if hasattr(of, "alloc_size") and of.device.type == device.type:
            made_by = tuple(ancestors(node))[::-1]
            found.append(Event(node.start_time_ns, of.alloc_size, of.ptr, of.total_allocated, made_by))
    return sorted(found, key=lambda event: event.time_ns)


def ancestors(node: Any) -> Iterator[str]:
    while (node := node.parent) is not None:
        if node.name != MEASURED:
            yield node.name


def replay(events: list[Event], alive_after: int, begun: int) -> MemoryTrace:
    """Live bytes from ``begun`` (ns) on, such that they end at ``alive_after``."""
    if not events:
        return MemoryTrace([0.0], [alive_after], {"before the step": alive_after})
    uncounted = alive_after - events[-1].total
    measured = [event for event in events if event.time_ns >= begun]
    first = measured[0]
    times, live = [begun or first.time_ns], [uncounted + first.total - first.size]
    blocks: dict[int, Event] = {}
    at_peak, peak = dict(blocks), live[0]
    for event in measured:
        if event.size > 0:
            blocks[event.address] = event
        else:
            blocks.pop(event.address, None)
        times.append(event.time_ns)
        live.append(uncounted + event.total)
        if live[-1] > peak:
            peak, at_peak = live[-1], dict(blocks)
    return MemoryTrace([1e-9 * (when - times[0]) for when in times], live, by_maker(at_peak, peak))


def by_maker(blocks: dict[int, Event], peak: int) -> dict[str, int]:
    """Bytes by what had allocated them, of blocks that were there at the peak."""
    made: Counter[str] = Counter()
    for block in blocks.values():
        made[" > ".join(block.made_by) or "?"] += block.size
    made["before the step"] = peak - sum(made.values())
    return dict(made.most_common())
