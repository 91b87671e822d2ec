"""Where the time of a step went, from a Chrome trace of torch's profiler: pure arithmetic over intervals.

The wall time of a step is cut into parts that don't overlap, so that they add up to it. With a GPU they are the
device's: kernels first, then collectives while no kernel runs (exposed; under kernels they cost nothing), then waiting
for data, and what is left is the host's: the device had nothing to do. Without one they are the main thread's: its
operations, collectives while it is in none of them, and so on; what is left is Python and dispatch.

The format is the Trace Event Format as libkineto writes it: times and durations in microseconds, kernels tied to their
launches by ``args.correlation``.
"""

from __future__ import annotations

import bisect
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

STEP, DATA, OPTIMIZER = "megamup step", "data", "optimizer"
"""Names of the ranges that the trainer marks."""

CATEGORIES = ("matmul", "attention", "other", "optimizer", "copies", "collectives", "data", "host")
"""``other``: all other operations of the model; ``copies``: between host and device."""

MATMUL = re.compile(r"(aten|mkl|mkldnn|onednn|torchao)::_*(\w*mm_?|\w*linear_pointwise|mkl_linear)$")
MATMUL_KERNEL = re.compile(r"gemm|cutlass|nvjet|cublas|xmma|triton_tem_fused_\w*mm", re.IGNORECASE)
ATTENTION = re.compile(r"attention|attn|fmha|sdpa|flash_(fwd|bwd|fprop|bprop)", re.IGNORECASE)
COMPILED = "## Call CompiledFxGraph"
"""Inductor's range around a compiled graph; on a CPU its fused loops have no event of their own."""

Event = Mapping[str, Any]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Slice:
    """A stretch of time, in microseconds, spent on one thing."""

    start: float
    end: float
    category: str
    """Of CATEGORIES; for a collective its kind, such as ``all_reduce``."""
    name: str
    backward: bool = False
    call: int | None = None
    """Which event it is a part of; None where another event stands for the same call."""


@dataclass
class Collective:
    exposed_ms: float = 0.0
    """While nothing was computed: what it cost."""
    overlapped_ms: float = 0.0
    """Under computation."""
    calls: float = 0.0


@dataclass(frozen=True)
class Operation:
    name: str
    category: str
    calls: float
    ms: float


@dataclass
class Breakdown:
    """Means of one rank's steps."""

    steps: int
    device: str
    """``cuda`` (the device's time) or ``cpu`` (the main thread's)."""
    wall_ms: float
    time_ms: dict[str, float]
    """By category; adds up to ``wall_ms``."""
    backward_ms: dict[str, float]
    """What of it was in the backward pass."""
    collectives: dict[str, Collective] = field(default_factory=dict)
    """By kind and, where the trace says which ranks took part, axis of the mesh."""
    operations: list[Operation] = field(default_factory=list)
    """Largest first."""


def breakdown(trace: Mapping[str, Any], axes: Mapping[tuple[int, ...], str], top: int = 10) -> Breakdown:
    """Cut the steps of a trace.

    Args:
        trace: a parsed Chrome trace with a range STEP for each step, and DATA and OPTIMIZER inside.
        axes: {ranks of a process group: what to call it}.
        top: number of operations to list.

    Raises:
        ValueError: the trace holds no step.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X" and "dur" in event]
    marks = [event for event in events if event["name"].startswith(STEP) and event["cat"] == "user_annotation"]
    if not marks:
        raise ValueError(f"the trace holds no range {STEP!r}: nothing ran inside the profile")
    threads = {thread: leaves(group) for thread, group in host_events(events).items()}
    on_device = any(event["cat"] == "kernel" for event in events)
    if on_device:
        compute, collectives = device_slices(events, threads, groups(trace, axes))
    else:
        compute, collectives = host_slices(events, threads.get(thread_of(marks[0]), []))
    waits = [interval(event) for event in events if event["name"] == DATA and event["cat"] == "user_annotation"]
    return cut([interval(mark) for mark in marks], compute, collectives, waits, top, "cuda" if on_device else "cpu")


def cut(
    steps: Sequence[Interval],
    compute: Sequence[Slice],
    collectives: Sequence[Slice],
    waits: Iterable[Interval],
    top: int,
    device: str,
) -> Breakdown:
    """Share the wall time of the steps out, in milliseconds a step."""
    once, talk = disjoint(compute), disjoint(collectives)
    busy = [(piece.start, piece.end) for piece in once]
    taken = union([*busy, *((piece.start, piece.end) for piece in talk)])
    idle = without([Slice(start, end, "data", DATA) for start, end in union(waits)], taken)
    once, idle = inside(once, steps), inside(idle, steps)
    called = inside(collectives, steps)
    talked = shared(called, inside(talk, steps), inside(without(talk, busy), steps), len(steps))
    unit = 1e-3 / len(steps)
    time_ms, backward_ms = dict.fromkeys(CATEGORIES, 0.0), dict.fromkeys(CATEGORIES, 0.0)
    for piece in (*once, *idle):
        time_ms[piece.category] += unit * (piece.end - piece.start)
        backward_ms[piece.category] += unit * (piece.end - piece.start) * piece.backward
    time_ms["collectives"] = sum(collective.exposed_ms for collective in talked.values())
    wall_ms = unit * sum(end - start for start, end in steps)
    time_ms["host"] = wall_ms - sum(time_ms.values())
    return Breakdown(len(steps), device, wall_ms, time_ms, backward_ms, talked, largest(once, len(steps), top))


def shared(
    calls: Iterable[Slice], talk: Iterable[Slice], exposed: Iterable[Slice], steps: int
) -> dict[str, Collective]:
    """Collectives by kind, means a step."""
    found = defaultdict[str, Collective](Collective)
    for piece in talk:
        found[piece.category].overlapped_ms += 1e-3 / steps * (piece.end - piece.start)
    for piece in exposed:
        found[piece.category].exposed_ms += 1e-3 / steps * (piece.end - piece.start)
    for piece in calls:
        found[piece.category].calls += (piece.call is not None) / steps
    for collective in found.values():
        collective.overlapped_ms = max(0.0, collective.overlapped_ms - collective.exposed_ms)
    return dict(found)


def largest(slices: Iterable[Slice], steps: int, top: int) -> list[Operation]:
    """Operations or kernels that took most time, without what they called; means a step."""
    ms, calls = defaultdict[tuple[str, str], float](float), defaultdict[tuple[str, str], set[int | None]](set)
    for piece in slices:
        ms[piece.name, piece.category] += 1e-3 / steps * (piece.end - piece.start)
        calls[piece.name, piece.category].add(piece.call)
    longest = sorted(ms, key=lambda key: -ms[key])[:top]
    return [Operation(name, what, len(calls[name, what]) / steps, ms[name, what]) for name, what in longest]


# ------------------------------------------------------------------- intervals


def interval(event: Event) -> Interval:
    return event["ts"], event["ts"] + event["dur"]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points of time, as sorted intervals that don't touch."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def disjoint(slices: Iterable[Slice]) -> list[Slice]:
    """Sorted, and where two overlap (streams side by side) the earlier one keeps the time."""
    found: list[Slice] = []
    reached = float("-inf")
    for piece in sorted(slices, key=lambda piece: (piece.start, piece.end)):
        start = max(piece.start, reached)
        if piece.end > start:
            found.append(replace(piece, start=start))
            reached = piece.end
    return found


def without(slices: Iterable[Slice], taken: Iterable[Interval]) -> list[Slice]:
    """What of sorted, disjoint slices lies outside ``taken``."""
    blocks, found, at = union(taken), list[Slice](), 0
    for piece in slices:
        start = piece.start
        while at < len(blocks) and blocks[at][1] <= start:
            at += 1
        here = at
        while here < len(blocks) and blocks[here][0] < piece.end:
            if blocks[here][0] > start:
                found.append(replace(piece, start=start, end=blocks[here][0]))
            start = max(start, blocks[here][1])
            here += 1
        if piece.end > start:
            found.append(replace(piece, start=start))
    return found


def inside(slices: Iterable[Slice], windows: Sequence[Interval]) -> list[Slice]:
    """The slices clipped to windows that are sorted and don't overlap."""
    starts, found = [start for start, _ in windows], []
    for piece in slices:
        at = max(0, bisect.bisect_right(starts, piece.start) - 1)
        while at < len(windows) and windows[at][0] < piece.end:
            start, end = max(piece.start, windows[at][0]), min(piece.end, windows[at][1])
            if end > start:
                found.append(replace(piece, start=start, end=end))
            at += 1
    return found


# ------------------------------------------------------------------- threads of the host


@dataclass(frozen=True)
class Leaf:
    """A stretch in which a thread was in the same ranges and operations, outermost first."""

    start: float
    end: float
    event: int
    """Number of the innermost one."""
    stack: tuple[str, ...]


def thread_of(event: Event) -> tuple[Any, Any]:
    return event["pid"], event["tid"]


def host_events(events: Iterable[Event]) -> dict[tuple[Any, Any], list[Event]]:
    """Operations and ranges by thread; what gloo's own threads do is no thread's work."""
    threads = defaultdict[tuple[Any, Any], list[Event]](list)
    for event in events:
        if event["cat"] in ("cpu_op", "user_annotation"):
            threads[thread_of(event)].append(event)
    return dict(threads)


def leaves(events: Iterable[Event]) -> list[Leaf]:
    """Cut a thread's nested events into stretches, each with the events around it."""
    found: list[Leaf] = []
    open_events: list[tuple[float, int, tuple[str, ...]]] = []  # (end, event, names of it and of those around it)
    at = 0.0

    def advance(to: float) -> None:
        nonlocal at
        if open_events and to > at:
            found.append(Leaf(at, to, *open_events[-1][1:]))
        at = max(at, to)

    for call, event in enumerate(sorted(events, key=lambda event: (event["ts"], -event["dur"]))):
        start, end = interval(event)
        while open_events and open_events[-1][0] <= start:
            advance(open_events[-1][0])
            open_events.pop()
        advance(start)
        at = start
        end = min(end, open_events[-1][0]) if open_events else end  # clocks are rounded: a child stays inside
        around = open_events[-1][2] if open_events else ()
        open_events.append((end, call, (*around, event["name"])))
    while open_events:
        advance(open_events[-1][0])
        open_events.pop()
    return found


def operation(name: str) -> bool:
    """Whether an event computes; autograd's nodes and Python functions only call what does."""
    if name.startswith(COMPILED):
        return True
    return "::" in name and not name.startswith(("autograd::", "torch::autograd", "c10d::", "_c10d"))


@lru_cache(2**14)
def category(stack: tuple[str, ...], kernel: str = "") -> str:
    """Of CATEGORIES: what an operation, or a kernel that was launched from there, works on."""
    if OPTIMIZER in stack:
        return "optimizer"
    if ATTENTION.search(kernel) or any(ATTENTION.search(name) for name in stack if operation(name)):
        return "attention"
    if MATMUL_KERNEL.search(kernel) or any(MATMUL.match(name) for name in stack):
        return "matmul"
    return "other"


def shown_as(name: str) -> str:
    return "compiled graph" if name.startswith(COMPILED) else name  # else with a hash, different for each graph


def in_backward(stack: Iterable[str]) -> bool:
    return any(name.startswith("autograd::engine::evaluate_function") for name in stack)


def communicates(name: str) -> bool:
    return name.startswith(("c10d::", "gloo:"))


def host_slices(events: Iterable[Event], main: Iterable[Leaf]) -> tuple[list[Slice], list[Slice]]:
    """(computation of the main thread, collectives of all threads)."""
    compute = []
    for leaf in main:
        name = leaf.stack[-1]
        if DATA in leaf.stack:
            compute.append(Slice(leaf.start, leaf.end, "data", DATA, call=leaf.event))
        elif operation(name) and not any(communicates(other) for other in leaf.stack):
            shown = "compiled graph" if name.startswith(COMPILED) else name
            compute.append(
                Slice(leaf.start, leaf.end, category(leaf.stack), shown, in_backward(leaf.stack), leaf.event)
            )
    talk = []
    for call, event in enumerate(events):
        name = event["name"]
        if communicates(name):  # gloo works on it, on a thread of its own, for longer than c10d takes to ask
            counted = call if name.startswith("c10d::") else None
            talk.append(Slice(*interval(event), kind(name), name, call=counted))
    return compute, talk


# ------------------------------------------------------------------- a GPU's streams


def device_slices(
    events: Sequence[Event], threads: Mapping[tuple[Any, Any], list[Leaf]], named: Mapping[str, str]
) -> tuple[list[Slice], list[Slice]]:
    """(kernels and copies, NCCL's kernels) of all streams; a kernel is of what launched it."""
    launches = {
        event["args"]["correlation"]: event
        for event in events
        if event["cat"] in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    starts = {thread: [leaf.start for leaf in found] for thread, found in threads.items()}

    def launched_in(event: Event) -> tuple[str, ...]:
        launch = launches.get(event.get("args", {}).get("correlation"))
        if launch is None or thread_of(launch) not in threads:
            return ()
        found = threads[thread_of(launch)]
        leaf = found[max(0, bisect.bisect_right(starts[thread_of(launch)], launch["ts"]) - 1)]
        return leaf.stack if leaf.start <= launch["ts"] <= leaf.end else ()

    compute, talk = [], []
    for call, event in enumerate(events):
        name, (start, end), what = event["name"], interval(event), event["cat"]
        if what == "kernel" and name.startswith("nccl"):
            talk.append(Slice(start, end, nccl_kind(event, named), name, call=call))
        elif what in ("kernel", "gpu_memset", "gpu_memcpy"):
            stack = launched_in(event)
            crosses = what == "gpu_memcpy" and ("HtoD" in name or "DtoH" in name)
            worked_on = "copies" if crosses else category(stack, name)
            compute.append(Slice(start, end, worked_on, name, in_backward(stack), call))
    return compute, talk


def groups(trace: Mapping[str, Any], axes: Mapping[tuple[int, ...], str]) -> dict[str, str]:
    """{process group's name in the trace: axis}."""
    listed = trace.get("distributedInfo", {}).get("pg_config", [])
    return {
        str(group["pg_name"]): axes[tuple(group["ranks"])] for group in listed if tuple(group.get("ranks", ())) in axes
    }


def nccl_kind(event: Event, named: Mapping[str, str]) -> str:
    """Such as ``all_reduce (data)``, from what the event says of its collective, else from the kernel's name."""
    args = event.get("args", {})
    found = kind(str(args.get("Collective name") or re.sub(r"^nccl\w*?Kernel_", "", event["name"]).split("_")[0]))
    axis = named.get(str(args.get("Process Group Name", "")))
    return f"{found} ({axis})" if axis else found


def kind(name: str) -> str:
    """One name for a collective's many: ``gloo:all_reduce``, ``c10d::allreduce_``, NCCL's ``AllReduce``."""
    bare = re.sub(r"[^a-z]", "", name.split(":")[-1].lower())
    for word in ("reduce_scatter", "all_reduce", "all_gather", "all_to_all", "broadcast", "barrier", "gather"):
        if word.replace("_", "") in bare:
            return word
    return "send_recv" if bare.startswith(("send", "recv", "coalesced")) else bare
