"""torch.compile by region: each block is compiled on its own, and as all blocks are alike, once for all of them.

Compiling the model as a whole would take longer with every layer, and end at DeepSpeed's hooks; between blocks they
stay as they are. What was compiled is kept on disk by torch, so that the next start of the same model reads it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch._dynamo.utils import counters, get_compilation_metrics, set_compilation_metrics_limit

from megamup.config import Config
from megamup.data.cache import default_folder
from megamup.models.blocks import Block
from megamup.parallel.loss import CrossEntropy
from megamup.parameters import stacks

VARIANTS = 8
"""Graphs that blocks may differ in beyond one a layer: evaluation has no gradients, and a last batch may be smaller."""


def compile_blocks(module: nn.Module, config: Config) -> None:
    """Compile every block's forward in place, and what the loss does with logits; names, parameters and hooks stay.

    ``fullgraph``: a block that can't be one graph is an error, not a slower run.
    """
    keep_in(cache_folder(config))
    # u-μP's residual factors, and recomputing every k-th block, make layers differ; evaluation has graphs of its own.
    graphs = 4 * sum(stack.layers for stack in stacks(config.model)) + VARIANTS
    torch._dynamo.config.recompile_limit = graphs
    torch._dynamo.config.accumulated_recompile_limit = max(256, graphs)
    set_compilation_metrics_limit(2 * graphs)  # else torch forgets the seconds of all but the last 64
    for part in module.modules():
        if isinstance(part, Block):
            part.forward = torch.compile(part.forward, dynamic=False, fullgraph=True)  # type: ignore[method-assign]
        elif isinstance(part, CrossEntropy):
            part.rows_of_logits = torch.compile(part.rows_of_logits, dynamic=False, fullgraph=True)


def keep_in(folder: Path) -> None:
    """Have torch keep what it compiles in ``folder``, unless the user names another by TORCHINDUCTOR_CACHE_DIR.

    Torch itself sets that variable to its default, in the temporary folder, as soon as anything asks for it.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # seconds of imports

    default = default_cache_dir()
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default) == default:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def cache_folder(config: Config) -> Path:
    return Path(config.data.cache or default_folder()) / "compiled"


@contextlib.contextmanager
def eager(active: bool = True) -> Iterator[None]:
    """Run blocks uncompiled inside, so that hooks on the modules within them are called."""
    if not active:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@dataclass(frozen=True)
class Compiled:
    """What this process has compiled so far."""

    seconds: float
    graphs: int
    """Forwards that differ; each has its backward."""
    cached: int
    """Of forwards and backwards, those that were read from disk."""

    @classmethod
    def now(cls) -> Compiled:
        microseconds = sum(metrics.duration_us or 0 for metrics in get_compilation_metrics())
        cached = counters["inductor"]["fxgraph_cache_hit"]
        return cls(microseconds / 1e6, counters["stats"]["unique_graphs"], cached)

    def __str__(self) -> str:
        return f"compiled blocks in {self.seconds:.1f} s: {self.graphs} graphs, {self.cached} parts read from disk"
