"""A profile's summary over all ranks: where the time of a step went (Markdown, JSON), and memory over time drawn."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from megamup.config import Config
from megamup.files import write_bytes_atomic, write_json_atomic, write_text_atomic
from megamup.page import FITTED, GRID, INK, MUTED, dress
from megamup.train.memory import MemoryTrace
from megamup.train.trace import CATEGORIES, STEP, Breakdown, Collective, in_backward, shown_as

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {
    "matmul": "matrix products",
    "attention": "attention",
    "other": "other operations",
    "optimizer": "optimizer",
    "copies": "copies between host and device",
    "collectives": "collectives, exposed",
    "data": "waiting for data",
    "host": "host",
}
MEANING = {
    "cuda": "Times are the device's: kernels first, then collectives while no kernel ran, then waiting for data; "
    "`host` is what is left: the device had nothing to do.",
    "cpu": "Times are the main thread's: its operations first, then collectives while it was in none; `host` is what "
    "is left: Python and dispatch.",
}
POINTS = 500
"""Of the memory timeline, each the largest of its stretch."""


def write(
    folder: Path,
    config: Config,
    steps: range,
    ranks: Sequence[Breakdown],
    memory: MemoryTrace,
    held: Mapping[str, int],
) -> None:
    """Write ``summary.json``, ``summary.md`` and ``memory.svg``.

    Args:
        folder: where to.
        config: the run's.
        steps: that were profiled, from 1.
        ranks: every rank's, in rank order.
        memory: rank 0's.
        held: rank 0's, as `held` gives it.
    """
    found = summary(config, steps, ranks)
    found["memory"] = {
        "peak_bytes": memory.peak,
        "held_bytes": dict(held),
        "at_peak_bytes": dict(at_peak(memory)),
        "timeline": thinned(memory),
    }
    write_json_atomic(folder / "summary.json", found)
    write_bytes_atomic(folder / "memory.svg", drawing(memory, held))
    write_text_atomic(folder / "summary.md", markdown(found))


def summary(config: Config, steps: range, ranks: Sequence[Breakdown]) -> dict[str, Any]:
    """Means over ranks and steps; shares are of the wall time and add up to 100."""
    mean = {name: float(np.mean([rank.time_ms[name] for rank in ranks])) for name in CATEGORIES}
    wall = float(np.mean([rank.wall_ms for rank in ranks]))
    kinds = sorted({kind for rank in ranks for kind in rank.collectives})
    most = {name: max(range(len(ranks)), key=lambda rank: ranks[rank].time_ms[name]) for name in CATEGORIES}
    return {
        "steps": [steps[0], steps[-1]],
        "device": ranks[0].device,
        "ranks": len(ranks),
        "wall_ms": wall,
        "tokens_per_s": 1e3 * config.batch_tokens / wall,
        "time_ms": mean,
        "percent": {name: 100 * ms / wall for name, ms in mean.items()},
        "backward_ms": {name: float(np.mean([rank.backward_ms[name] for rank in ranks])) for name in CATEGORIES},
        "most_on_rank": {name: {"rank": most[name], "ms": ranks[most[name]].time_ms[name]} for name in CATEGORIES},
        "collectives": {kind: asdict(average([rank.collectives.get(kind) for rank in ranks])) for kind in kinds},
        "operations_of_rank_0": [asdict(operation) for operation in ranks[0].operations],
        "by_rank": [{"wall_ms": rank.wall_ms, "time_ms": rank.time_ms} for rank in ranks],
    }


def average(found: Sequence[Collective | None]) -> Collective:
    present = [one for one in found if one is not None]
    return Collective(
        exposed_ms=sum(one.exposed_ms for one in present) / len(found),
        overlapped_ms=sum(one.overlapped_ms for one in present) / len(found),
        calls=sum(one.calls for one in present) / len(found),
    )


# ------------------------------------------------------------------- Markdown


def markdown(found: Mapping[str, Any]) -> str:
    first, last = found["steps"]
    lines = [
        f"# Where the time went: steps {first} to {last}",
        "",
        f"{found['ranks']} rank(s), {found['wall_ms']:.4g} ms a step under the profiler "
        f"({found['tokens_per_s']:,.0f} tokens/s; it costs some). {MEANING[found['device']]}",
        "",
        *table(("part", "ms a step", "%", "backward, ms", "most, ms", "on rank"), parts(found)),
    ]
    if found["collectives"]:
        header = ("collective", "calls a step", "exposed, ms", "under computation, ms")
        rows = [
            (kind, f"{one['calls']:.4g}", f"{one['exposed_ms']:.4g}", f"{one['overlapped_ms']:.4g}")
            for kind, one in found["collectives"].items()
        ]
        lines += [
            "## Collectives, mean of the ranks",
            "",
            "Waiting for a slower rank counts.",
            "",
            *table(header, rows),
        ]
    header = ("operation", "part", "calls a step", "ms a step")
    rows = [
        (f"`{one['name'][:90]}`", TITLES[one["category"]], f"{one['calls']:.4g}", f"{one['ms']:.4g}")
        for one in found["operations_of_rank_0"]
    ]
    lines += ["## Operations of rank 0 that took most, without what they call", "", *table(header, rows, words=2)]
    return "\n".join([*lines, *memory_section(found["memory"])])


def parts(found: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    for name, title in TITLES.items():
        ms, most = found["time_ms"][name], found["most_on_rank"][name]
        if ms:
            backward = f"{found['backward_ms'][name]:.4g}" if found["backward_ms"][name] else ""
            share = f"{found['percent'][name]:.1f}"
            yield title, f"{ms:.4g}", share, backward, f"{most['ms']:.4g}", str(most["rank"])
    yield "all", f"{found['wall_ms']:.4g}", f"{sum(found['percent'].values()):.1f}", "", "", ""


def memory_section(memory: Mapping[str, Any]) -> list[str]:
    rows = [(f"`{name}`", f"{size / 2**20:,.1f}") for name, size in memory["at_peak_bytes"].items()]
    return [
        "## Memory of rank 0",
        "",
        f"At most {memory['peak_bytes'] / 2**20:,.1f} MiB in tensors; what lived then, by what had made it:",
        "",
        *table(("made by", "MiB"), rows),
        "![memory over time](memory.svg)",
        "",
    ]


def table(header: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> list[str]:
    """Markdown's, with an empty line below; columns after the first ``words`` are figures, set to the right."""
    rule = [*("---" for _ in header[:words]), *("---:" for _ in header[words:])]
    return [*("| " + " | ".join(row) + " |" for row in (header, rule, *rows)), ""]


# ------------------------------------------------------------------- memory


def held(engine: Any) -> dict[str, int]:
    """Bytes on the device that stay between steps: weights, and the optimizer's masters and moments.

    Args:
        engine: DeepSpeed's.
    """
    device = next(engine.module.parameters()).device.type
    groups, states = engine.basic_optimizer.param_groups, engine.basic_optimizer.state.values()
    shards = list(engine.module.parameters())
    weights = [*shards, *(shard.ds_tensor for shard in shards if hasattr(shard, "ds_tensor"))]
    state = [master for group in groups for master in group["params"]]
    state += [value for values in states for value in values.values() if isinstance(value, Tensor)]
    seen: set[int] = set()

    def new_bytes(tensors: Iterable[Tensor]) -> int:
        storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == device]
        fresh = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr() not in seen}
        seen.update(fresh)
        return sum(fresh.values())

    return {"weights": new_bytes(weights), "optimizer": new_bytes(state)}


def at_peak(memory: MemoryTrace, most: int = 10) -> Iterable[tuple[str, int]]:
    """What was alive at the peak, by the operation that had allocated it; the smallest in one."""
    made: Counter[str] = Counter()
    for path, size in memory.at_peak.items():
        names = [shown_as(name) for name in path.split(" > ") if not name.startswith(STEP) and not in_backward([name])]
        made[" > ".join(names[:2]) or "outside any operation"] += size
    yield from made.most_common(most)
    if rest := sum(size for _, size in made.most_common()[most:]):
        yield "all others", rest


def thinned(memory: MemoryTrace, points: int = POINTS) -> dict[str, list[float]]:
    """The timeline with at most ``points`` points: seconds, and the largest number of bytes until the next."""
    starts = np.unique(np.linspace(0, len(memory.live), points + 1).astype(int))
    return {
        "time_s": [memory.times_s[start] for start in starts[:-1]],
        "bytes": [max(memory.live[start:end]) for start, end in pairwise(starts.tolist())],
    }


def drawing(memory: MemoryTrace, held: Mapping[str, int]) -> bytes:
    """Live bytes over time above what stays between steps, as SVG."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "memory"}):
        FigureCanvasSVG(figure(memory, held)).print_figure(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def figure(memory: MemoryTrace, held: Mapping[str, int]) -> Figure:
    from matplotlib.figure import Figure

    scale, unit = (2**30, "GiB") if memory.peak >= 2**30 else (2**20, "MiB")
    line = thinned(memory)
    times, live = np.array(line["time_s"]), np.array(line["bytes"]) / scale
    found = Figure(figsize=(9, 3.4), layout="constrained")
    axes = found.subplots()
    dress(axes, "Memory in tensors, rank 0")
    below = 0.0
    for (name, size), color in zip(held.items(), (MUTED, GRID), strict=True):
        above = below + size / scale
        axes.fill_between(times, below, above, color=color, lw=0, label=name, step="post")
        below = above
    rest = "activations, gradients and temporaries"
    axes.fill_between(times, below, live, color=FITTED, alpha=0.35, lw=0, label=rest, step="post")
    axes.step(times, live, color=FITTED, lw=0.8, where="post")
    axes.set_xlabel("seconds", color=INK)
    axes.set_ylabel(unit, color=INK)
    axes.set_ylim(bottom=0)
    found.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8.5, labelcolor=INK)
    return found
