"""Coordinate check: is this config, in this layout, maximally updated at every width (or depth)?

Models of growing size train some steps on the config's own data. Under μP the size of every module's output at
initialization, and of its change since, is independent of width (Yang et al. 2022, appendix D.1), so the slope of
log RMS on log width is zero. What shrinks at initialization by design (logits, what starts at zero) is judged by its
change alone.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from megamup.config import Config, config_from, dump_config
from megamup.errors import MegamupError

Axis = Literal["width", "depth"]
Grow = Literal["heads", "d_head"]
Judgement = Literal["flat", "not lazy", "no"]
"""``not lazy``: may not shrink with size."""
Rms = dict[str, list[tuple[float, float]]]
"""{module: (RMS, RMS of the change) at initialization and after each step}."""


@dataclass(frozen=True)
class Slopes:
    """Of one module: log RMS on log size, by step. None where an RMS is zero, as a zero start's."""

    module: str
    rms: list[float | None]
    change: list[float | None]
    judged_at_init: bool
    judged_change: Judgement

    def outside(self, tolerance: float) -> list[str]:
        """What of it leaves the tolerance: ``init``, ``change``."""
        found = []
        init, change = self.rms[0], self.change[-1]
        if self.judged_at_init and (init is None or abs(init) > tolerance):
            found.append("init")
        shrinks = change is None or change < -tolerance
        grows = change is not None and change > tolerance
        if (shrinks and self.judged_change != "no") or (grows and self.judged_change == "flat"):
            found.append("change")
        return found


@dataclass(frozen=True)
class Check:
    """One coordinate check, whole."""

    config: Config
    axis: Axis
    sizes: tuple[int, ...]
    tolerance: float
    seeds: int
    rms: dict[int, Rms]
    """By size; geometric means over the seeds."""
    slopes: list[Slopes]

    @property
    def flat(self) -> bool:
        return not any(slope.outside(self.tolerance) for slope in self.slopes)


# --------------------------------------------------------------------------- the models


def at_width(config: Config, width: int, grow: Grow = "heads", fixed_kv: bool = False) -> Config:
    """The config at another ``d_model``: d_ff in proportion, more heads (or larger ones), the base as it is.

    Raises:
        MegamupError: the width doesn't hold whole heads, or d_ff or the key heads come out broken.
    """
    model = config.model
    values = config.model_dump(mode="json")
    changed: dict[str, int] = {"d_model": width, "d_ff": proportional("d_ff", model.d_ff, width, model.d_model)}
    if grow == "d_head":
        changed["d_head"] = proportional("d_head", model.d_head, width, model.d_model)
    else:
        changed["n_heads"] = proportional("n_heads", model.n_heads, width, model.d_model)
        if not fixed_kv:
            changed["n_kv_heads"] = proportional("n_kv_heads", model.n_kv_heads, width, model.d_model)
    values["model"] |= changed
    if model.moe is not None and model.moe.d_expert is not None:
        inner = proportional("moe.d_expert", model.moe.d_expert, width, model.d_model)
        values["model"]["moe"]["d_expert"] = inner
    if config.mup.parametrization != "umup":
        keys = ["d_model", "d_ff", "n_heads", "n_kv_heads", "d_head"]  # no base given: the config's own model is it
        if config.mup.base.d_model is not None:
            keys = ["n_kv_heads"] if fixed_kv else []
        fill_base(values, config, keys)
    return checked(values, f"width {width}")


def at_depth(config: Config, n_layers: int) -> Config:
    """The config with another number of layers; without a base depth, the config's own is the base."""
    values = config.model_dump(mode="json")
    values["model"]["n_layers"] = n_layers
    if config.model.n_decoder_layers is not None:
        values["model"]["n_decoder_layers"] = proportional_depth(config.model.n_decoder_layers, n_layers, config)
    if config.mup.parametrization != "umup":
        fill_base(values, config, ["n_layers"])
    return checked(values, f"depth {n_layers}")


def proportional_depth(decoder: int, n_layers: int, config: Config) -> int:
    """Blocks of a decoder that keeps its share."""
    whole, rest = divmod(decoder * n_layers, config.model.n_layers)
    if rest or whole == 0:
        raise MegamupError(
            f"--depths {n_layers}: model.n_decoder_layers={decoder} of n_layers={config.model.n_layers} would become "
            f"{decoder * n_layers / config.model.n_layers:g}; use depths that keep it whole"
        )
    return whole


def fill_base(values: dict[str, Any], config: Config, keys: Sequence[str]) -> None:
    """Write the config's own shape into what its base leaves out, so that it doesn't follow the size."""
    base = values["mup"]["base"]
    for key in keys:
        if base[key] is None:
            base[key] = getattr(config.model, key)


def proportional(key: str, value: int, width: int, d_model: int) -> int:
    whole, rest = divmod(value * width, d_model)
    if rest or whole == 0:
        raise MegamupError(
            f"--widths {width}: model.{key}={value} of d_model={d_model} would become {value * width / d_model:g}; "
            f"use widths that keep it whole"
        )
    return whole


def checked(values: dict[str, Any], what: str) -> Config:
    try:
        return config_from(values)
    except MegamupError as error:
        raise MegamupError(f"{what}: {error}") from None


def short_run(config: Config, steps: int, seed: int) -> Config:
    """The same model trained ``steps`` steps at the peak rate, for its coordinates."""
    values = config.model_dump(mode="json")
    values["data"]["valid"] = None
    values["train"] |= {"steps": steps, "eval_every": 0, "eval_sequences": None}
    values["schedule"] |= {"kind": "constant", "warmup_steps": 0}
    values["run"]["seed"] = config.run.seed + seed
    return config_from(values)


# --------------------------------------------------------------------------- measuring


def measure(variants: dict[int, Config], steps: int, seeds: int, world_size: int) -> dict[int, Rms]:
    """Train every size (the largest first: what doesn't fit fails early) and return its coordinates."""
    found: dict[int, Rms] = {}
    total = sum(variants) * seeds
    every_s = 0.5 if sys.stderr.isatty() else 10
    with tqdm(total=total, desc="coordinate check", unit="size", leave=False, mininterval=every_s) as bar:
        for size in sorted(variants, reverse=True):
            bar.set_postfix(size=size, refresh=False)
            runs = []
            for seed in range(seeds):
                runs.append(run(short_run(variants[size], steps, seed), world_size))
                bar.update(size)
            found[size] = mean(runs)
    return {size: found[size] for size in variants}


def run(config: Config, world_size: int) -> Rms:
    """Coordinates of one model, on forked ranks of this host."""
    from megamup.train.coordinates import coordinates
    from megamup.train.fork import run_ranks

    threads = max(1, (os.cpu_count() or 1) // world_size)
    steps = run_ranks(coordinates, world_size, config, threads=threads)[0]
    return {name: [(step[name].rms, step[name].change) for step in steps] for name in steps[0]}


def mean(runs: Sequence[Rms]) -> Rms:
    """Geometric mean over seeds, as the fit is in logarithms."""

    def middle(values: Sequence[float]) -> float:
        return math.exp(sum(map(math.log, values)) / len(values)) if all(value > 0 for value in values) else 0.0

    return {
        name: [
            (middle([run[name][step][0] for run in runs]), middle([run[name][step][1] for run in runs]))
            for step in range(len(runs[0][name]))
        ]
        for name in runs[0]
    }


# --------------------------------------------------------------------------- judging


def slope(sizes: Sequence[int], values: Sequence[float]) -> float | None:
    """Least-squares slope of log value on log size; None where a value is zero or not finite."""
    if min(values) <= 0 or not np.all(np.isfinite(values)):
        return None
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def fit(rms: dict[int, Rms], judged: Callable[[str], tuple[bool, Judgement]]) -> list[Slopes]:
    sizes = list(rms)
    first = rms[sizes[0]]
    found = []
    for name, steps in first.items():
        by_step = [[rms[size][name][step] for size in sizes] for step in range(len(steps))]
        sizes_rms = [slope(sizes, [pair[0] for pair in pairs]) for pairs in by_step]
        changes = [slope(sizes, [pair[1] for pair in pairs]) for pairs in by_step]
        found.append(Slopes(name, sizes_rms, changes, *judged(name)))
    return found


def shrinks_at_init(config: Config, grow: Grow, fixed_kv: bool) -> tuple[str, ...]:
    """Endings of the modules whose output at initialization falls with width by design."""
    zero, found = config.mup.zero_init, ["readout", "moe.router"]  # they sum n random terms, divided by n
    if zero.query:
        found += [".query", ".query_norm"]
    if zero.query or grow == "d_head":  # q·k over d_head, of vectors not correlated yet
        found += [".logits"]
    if fixed_kv:  # see mup.py: keys and values of fixed size are a kind of readout
        found += [".key", ".value", ".logits", ".core", ".output"]
    if zero.residual_out:
        found += [".output", ".down", ".moe"]
    return tuple(found)


def embedding_side(config: Config) -> tuple[str, ...]:
    """Beginnings of the modules that change as the embedding does. u-μP lets it learn ever slower, its rate being over
    √d_model (Blake et al. 2024, section 4.4), which shows up to the first attention."""
    inside = ("attention_norm", "attention.query", "attention.key", "attention.value", "attention.logits")
    return ("embedding", *(f"blocks.0.{name}" for name in inside))


def check_width(
    config: Config,
    widths: Sequence[int],
    steps: int = 10,
    seeds: int = 1,
    tolerance: float = 0.1,
    grow: Grow = "heads",
    fixed_kv: bool = False,
) -> Check:
    """Train and judge. Raises MegamupError where a width is impossible, before anything is trained."""
    variants = sizes_of(widths, "--widths", lambda width: at_width(config, width, grow, fixed_kv))
    rms = measure(variants, steps, seeds, ranks(config))
    shrinking = shrinks_at_init(config, grow, fixed_kv)

    slowed = embedding_side(config) if config.mup.parametrization == "umup" else ()

    def judged(name: str) -> tuple[bool, Judgement]:
        return not name.endswith(shrinking), "no" if name.startswith(slowed) else "flat"

    return Check(config, "width", tuple(variants), tolerance, seeds, rms, fit(rms, judged))


def check_depth(
    config: Config, depths: Sequence[int], steps: int = 10, seeds: int = 1, tolerance: float = 0.1
) -> Check:
    """The same over depth. Blocks are compared at equal shares of it: half way and last.

    The residual stream there is to change alike at every depth. Inside the blocks only CompleteP promises anything:
    that no branch turns lazy, as depth-μP's do (Dey et al. 2025); few blocks change a little less than many.
    """
    variants = sizes_of(depths, "--depths", lambda depth: at_depth(config, depth))
    measured = measure(variants, steps, seeds, ranks(config))
    rms = {depth: ends(found) for depth, found in measured.items()}
    inner = config.mup.depth == "completep"
    shrinking = shrinks_at_init(config, "heads", fixed_kv=False)

    def judged(name: str) -> tuple[bool, Judgement]:
        stream = name.removeprefix("encoder.").removeprefix("decoder.").count(".") < 2
        return (inner or stream) and not name.endswith(shrinking), "flat" if stream else "not lazy" if inner else "no"

    return Check(config, "depth", tuple(variants), tolerance, seeds, rms, fit(rms, judged))


def ends(found: Rms) -> Rms:
    """The blocks half way and last of each stack, under names that every depth has."""
    renamed: Rms = {}
    depths: dict[str, int] = {}
    for stack, layer, _ in filter(None, map(in_stack, found)):
        depths[stack] = max(depths.get(stack, 0), layer + 1)
    for name, values in found.items():
        if (place := in_stack(name)) is None:
            renamed[name] = values
            continue
        stack, layer, inside = place
        for block, end in (((depths[stack] + 1) // 2 - 1, "half"), (depths[stack] - 1, "last")):
            if layer == block:
                renamed[f"{stack}blocks.{end}{inside}"] = values
    return renamed


def in_stack(name: str) -> tuple[str, int, str] | None:
    """``decoder.blocks.3.mlp.up`` -> (``decoder.``, 3, ``.mlp.up``); None of what is in no block."""
    found = re.fullmatch(r"((?:\w+\.)?)blocks\.(\d+)(.*)", name)
    return (found[1], int(found[2]), found[3]) if found else None


def sizes_of(sizes: Sequence[int], flag: str, variant: Callable[[int], Config]) -> dict[int, Config]:
    if len(set(sizes)) < 2:
        raise MegamupError(f"{flag} {','.join(map(str, sizes))}: a slope needs at least two different sizes")
    return {size: variant(size) for size in sorted(set(sizes))}


def ranks(config: Config) -> int:
    return config.parallel.replica_ranks


# --------------------------------------------------------------------------- showing


def as_json(check: Check) -> dict[str, Any]:
    return {
        "axis": check.axis,
        "sizes": list(check.sizes),
        "steps": len(check.slopes[0].rms) - 1,
        "tolerance": check.tolerance,
        "seeds": check.seeds,
        "flat": check.flat,
        "layout": check.config.parallel.model_dump(),
        "parametrization": check.config.mup.parametrization,
        "slopes": {
            slope.module: {
                "rms": slope.rms,
                "change": slope.change,
                "judged_at_init": slope.judged_at_init,
                "judged_change": slope.judged_change,
                "outside": slope.outside(check.tolerance),
            }
            for slope in check.slopes
        },
        "rms": {
            str(size): {name: [list(map(finite, pair)) for pair in steps] for name, steps in found.items()}
            for size, found in check.rms.items()
        },
        "config": dump_config(check.config),
    }


def finite(value: float) -> float | None:
    """What JSON has a word for."""
    return value if math.isfinite(value) else None


def lines(check: Check) -> Iterator[str]:
    """The table as text."""
    steps = len(check.slopes[0].rms) - 1
    width = max(len(slope.module) for slope in check.slopes)
    low, high = check.sizes[0], check.sizes[-1]
    yield f"{'slope of log RMS on log ' + check.axis:<{width}}  {'output':>8}{'change':>9}    change's RMS"
    yield f"{'':<{width}}  {'at init':>8}{f'step {steps}':>9}    {f'{low}':>9}{f'{high}':>10}"
    for found in check.slopes:
        first, last = (check.rms[size][found.module][-1][1] for size in (low, high))
        init = shown(found.rms[0]) if found.judged_at_init else f"({shown(found.rms[0])})"
        change = shown(found.change[-1]) if found.judged_change != "no" else f"({shown(found.change[-1])})"
        wrong = found.outside(check.tolerance)
        mark = f"  <- {' and '.join(wrong)} not flat" if wrong else ""
        yield f"{found.module:<{width}}  {init:>8}{change:>9}    {first:>9.3g}{last:>10.3g}{mark}"
    bad = sum(bool(found.outside(check.tolerance)) for found in check.slopes)
    verdict = "flat" if check.flat else f"NOT flat: {bad} of {len(check.slopes)} modules are outside"
    bound = f"|slope| <= {check.tolerance:g}; (..) is not judged"
    yield f"{check.config.mup.parametrization}, {check.config.parallel.label}: {verdict} ({bound})"


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"
