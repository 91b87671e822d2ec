"""Cutting a step's time: exact on traces made by hand, and against a count of microseconds on random ones."""

from __future__ import annotations

import random
from typing import Any

import pytest

from megamup.train.trace import CATEGORIES, DATA, OPTIMIZER, STEP, Breakdown, Interval, Slice, breakdown, cut, kind

Event = dict[str, Any]


def event(cat: str, name: str, start: float, end: float, tid: int = 1, **args: Any) -> Event:
    return {"ph": "X", "cat": cat, "name": name, "pid": 9, "tid": tid, "ts": start, "dur": end - start, "args": args}


def launched(
    name: str, start: float, end: float, at: float, tid: int = 1, cat: str = "kernel", args: Event | None = None
) -> list[Event]:
    """A kernel on the device and its launch by thread ``tid``."""
    number = len(name) * 1_000_000 + int(1000 * start)
    launch = event("cuda_runtime", "cudaLaunchKernel", at, at + 0.1, tid, correlation=number)
    return [launch, event(cat, name, start, end, tid=7, correlation=number, **(args or {}))]


def gpu_trace() -> dict[str, Any]:
    """100 µs: a product that hides a third of an all-reduce, attention backward, waiting for data, the optimizer."""
    backward = "autograd::engine::evaluate_function: FlashAttnBackward"
    return {
        "distributedInfo": {"pg_config": [{"pg_name": "3", "ranks": [0, 2]}]},
        "traceEvents": [
            event("user_annotation", f"{STEP} 5", 0, 100),
            event("cpu_op", "aten::linear", 1, 5),
            event("cpu_op", "aten::addmm", 2, 4),
            *launched("sm90_xmma_f32", 10, 30, at=3),
            event("cpu_op", backward, 5, 9, tid=2),
            *launched("flash_bwd_kernel", 50, 55, at=6, tid=2),
            *launched("void elementwise", 55, 57, at=8, tid=2),
            *launched(
                "ncclDevKernel_AllReduce_Sum_f32_RING_LL(x)",
                *(20, 50),
                at=4.5,
                args={"Collective name": "allreduce", "Process Group Name": "3"},
            ),
            event("user_annotation", DATA, 56, 70),
            event("user_annotation", OPTIMIZER, 72, 78),
            *launched("multi_tensor_apply_kernel", 80, 90, at=75),
            *launched("Memcpy HtoD (Pinned -> Device)", 90, 92, at=79, cat="gpu_memcpy"),
            {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "pid": 9, "tid": 1, "ts": 3.0},
        ],
    }


def test_gpu_time_is_cut_by_what_the_device_did() -> None:
    found = breakdown(gpu_trace(), {(0, 2): "data"})
    assert (found.device, found.steps) == ("cuda", 1)
    assert found.wall_ms == pytest.approx(0.1)
    expected = {"matmul": 20, "attention": 5, "other": 2, "optimizer": 10, "copies": 2, "collectives": 20, "data": 13}
    expected["host"] = 100 - sum(expected.values())
    assert {name: round(1000 * ms, 6) for name, ms in found.time_ms.items()} == expected
    assert found.backward_ms["attention"] == pytest.approx(0.005)
    assert found.backward_ms["other"] == pytest.approx(0.002)
    assert found.backward_ms["matmul"] == 0
    assert list(found.collectives) == ["all_reduce (data)"]
    reduced = found.collectives["all_reduce (data)"]
    assert reduced.exposed_ms == pytest.approx(0.02)
    assert reduced.overlapped_ms == pytest.approx(0.01)
    assert reduced.calls == 1
    assert found.operations[0].name == "sm90_xmma_f32"


def test_cpu_time_is_the_main_threads() -> None:
    """An asynchronous all-reduce on gloo's thread is hidden by the product, and what is waited for is exposed."""
    events = [
        event("user_annotation", f"{STEP} 1", 0, 100),
        event("user_annotation", DATA, 0, 10),
        event("cpu_op", "aten::stack", 2, 4),
        event("cpu_op", "aten::linear", 20, 40),
        event("cpu_op", "aten::mm", 22, 39),
        event("cpu_op", "c10d::allreduce_", 40, 41),
        event("user_annotation", "gloo:all_reduce", 41, 80, tid=5),
        event("cpu_op", "autograd::engine::evaluate_function: MmBackward0", 45, 61),
        event("cpu_op", "MmBackward0", 46, 60),
        event("cpu_op", "aten::mm", 47, 57),
        event("cpu_op", "## Call CompiledFxGraph abc ##", 82, 85),
        event("user_annotation", OPTIMIZER, 90, 99),
        event("cpu_op", "aten::_fused_adamw_", 91, 98),
    ]
    found = breakdown({"traceEvents": events}, {})
    micro = {name: round(1000 * ms, 6) for name, ms in found.time_ms.items() if ms}
    assert micro == {
        "matmul": 27,
        "other": 3 + 3,
        "optimizer": 7,
        "collectives": 40 - 10,
        "data": 10,
        "host": 100 - 27 - 6 - 7 - 30 - 10,
    }
    assert found.backward_ms["matmul"] == pytest.approx(0.01)
    assert found.collectives["all_reduce"].overlapped_ms == pytest.approx(0.01)
    assert found.collectives["all_reduce"].calls == 1
    product = next(one for one in found.operations if one.name == "aten::mm")
    assert product.calls == 2
    assert product.ms == pytest.approx(0.027)


def by_counting(
    steps: list[Interval], compute: list[Slice], talk: list[Slice], waits: list[Interval]
) -> dict[str, float]:
    """Every microsecond looked at: what was first in order of precedence has it."""
    found = dict.fromkeys(CATEGORIES, 0.0)
    for at in (t + 0.5 for start, end in steps for t in range(int(start), int(end))):
        if any(piece.start < at < piece.end for piece in compute):
            found["compute"] = found.get("compute", 0) + 1
        elif any(piece.start < at < piece.end for piece in talk):
            found["collectives"] += 1
        elif any(start < at < end for start, end in waits):
            found["data"] += 1
        else:
            found["host"] += 1
    return found


@pytest.mark.parametrize("seed", range(20))
def test_parts_add_up_to_the_wall_time_whatever_overlaps(seed: int) -> None:
    rng = random.Random(seed)

    def some(n: int, *categories: str) -> list[Slice]:
        starts = [rng.randrange(200) for _ in range(n)]
        return [Slice(s, s + rng.randrange(1, 30), rng.choice(categories), f"op{s % 5}") for s in starts]

    compute, talk = some(12, "matmul", "other"), some(6, "all_reduce", "all_gather")
    waits = [(piece.start, piece.end) for piece in some(4, "data")]
    steps = [(0.0, 70.0), (70.0, 120.0), (150.0, 190.0)]
    found: Breakdown = cut(steps, compute, talk, waits, 10, "cuda")
    counted = by_counting(steps, compute, talk, waits)
    micro = {name: 1000 * len(steps) * ms for name, ms in found.time_ms.items()}
    assert micro["matmul"] + micro["other"] == pytest.approx(counted.pop("compute"))
    for name in ("collectives", "data", "host"):
        assert micro[name] == pytest.approx(counted[name], abs=1e-6)
    assert sum(found.time_ms.values()) == pytest.approx(found.wall_ms)


def test_a_collective_has_one_name() -> None:
    names = [
        "gloo:all_reduce",
        "c10d::allreduce_",
        "AllReduce",
        "c10d::_allgather_base_",
        "c10d::_reduce_scatter_base_",
    ]
    assert [kind(name) for name in names] == ["all_reduce"] * 3 + ["all_gather", "reduce_scatter"]
    assert kind("c10d::alltoall_base_") == "all_to_all"
    assert {kind(name) for name in ("gloo:send", "c10d::recv_", "SendRecv")} == {"send_recv"}


def test_a_trace_without_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="no range"):
        breakdown({"traceEvents": [event("cpu_op", "aten::mm", 0, 1)]}, {})
