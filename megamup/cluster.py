"""The devices that a run gets: how many, how fast, how joined, at what price. Only what is known is filled in.

Read by what allocates a budget (megamup/scaling/allocation.py) and by what predicts a step's time (megamup/plan/).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from megamup import shipped
from megamup.config import parse_override, read_yaml
from megamup.errors import MegamupError
from megamup.flops import known_peak


@dataclass(frozen=True)
class Cluster:
    """Devices, how well they will be used and what they cost; what is None isn't known."""

    devices: int
    peak: float
    """FLOP/s of one device: dense matrix products in bf16, as its data sheet says."""
    mfu: float | None = None
    """Percent; from a run on such devices (`tools/scaling.py mfu`)."""
    price: float | None = None
    """Of one device for one hour, in the currency that the user thinks in."""
    device: str | None = None
    """Its name, as the vendor's data sheet has it."""
    kind: Literal["cuda", "cpu"] = "cuda"
    """What runs on it: which kernels ``auto`` takes."""
    devices_per_node: int | None = None
    """Devices that ``node_bandwidth`` joins."""
    memory: float | None = None
    """Bytes of one device."""
    memory_bandwidth: float | None = None
    """Bytes/s between one device and its memory."""
    node_bandwidth: float | None = None
    """Bytes/s that one device sends to others of its node while it receives as many (NVLink: half of the data sheet's
    figure, which counts both directions)."""
    network_bandwidth: float | None = None
    """Bytes/s that one device sends to other nodes while it receives as many (its network adapter)."""
    matmul: float | None = None
    """Share of the peak that large matrix products reach, measured."""
    fp32_peak: float | None = None
    """FLOP/s of one device in fp32, without TF32."""
    fp8_peak: float | None = None
    """FLOP/s of one device's dense products in 8-bit floats."""
    fp8_matmul: float | None = None
    """Share of ``fp8_peak`` that large products reach, measured."""
    op_seconds: float | None = None
    """What an operation takes however small it is; default that of GPUs (megamup/plan/rates.py)."""

    @property
    def flops_per_s(self) -> float | None:
        """What a training run gets of the whole cluster."""
        return None if self.mfu is None else self.devices * self.peak * self.mfu / 100


TEXTS = ("device", "kind")
LEAST_MEMORY = 1e6
"""Bytes; less is a number of gigabytes."""
NUMBERS = ("devices", "nodes", *(f.name for f in fields(Cluster) if f.name not in ("devices", *TEXTS)))
WHOLE = ("devices", "nodes", "devices_per_node")
SHARES = ("matmul", "fp8_matmul")


def parse_cluster(text: str, devices: int | None = None) -> Cluster:
    """A cluster from ``--cluster``: ``devices=512,peak=989e12,mfu=40,price=2.5``, or a YAML file of such keys,
    overridden by what follows it: ``configs/clusters/h100.yaml,nodes=64,mfu=40``.

    Keys: ``devices``, or ``nodes`` and ``devices_per_node``; ``peak``, FLOP/s of one device, or ``device``, a name
    whose bf16 peak is known (megamup/flops.py); ``mfu``, percent; ``price`` of a device for an hour; and `Cluster`'s.

    Args:
        devices: their number where the text doesn't say it.

    Raises:
        MegamupError: no such file, an unknown key, a number that can't be, or no devices or peak.
    """
    first, *rest = parts = text.split(",")
    if not all(rest):
        raise MegamupError(
            f"--cluster: {text!r} has nothing after a comma; expected a key and a value there, such as price=2.5"
        )
    values: dict[str, Any] = {}
    if "=" not in first:
        if shipped.find(first) is None:
            known = ", ".join(shipped.listing("configs/clusters", ".yaml"))
            raise MegamupError(
                f"--cluster: {first!r} is no file and no key=value; expected such as devices=512,peak=989e12,mfu=40, "
                f"or one of {known}"
            )
        values, parts = read_yaml(Path(first)), rest
    for part in parts:
        values |= parse_override(part)
    return _cluster(values, devices)


def _cluster(values: dict[str, Any], otherwise: int | None) -> Cluster:
    given = _numbers(values)
    devices = given.pop("devices", None)
    nodes = given.pop("nodes", None)
    if nodes is not None:
        if devices is not None or "devices_per_node" not in given:
            raise MegamupError("cluster.nodes: goes with devices_per_node, in place of devices; give one or the other")
        devices = nodes * given["devices_per_node"]
    devices = devices or otherwise
    if devices is None:
        raise MegamupError("cluster.devices: missing; add devices=N, or nodes=N to a file that has devices_per_node")
    name = None if values.get("device") is None else str(values["device"])
    peak = given.pop("peak", None) or (known_peak(name, "bf16") if name else None)
    if peak is None:
        raise MegamupError(
            f"cluster.peak: missing, and no bf16 peak is known for device {name!r}; add peak=FLOP/s of one device"
        )
    kind = values.get("kind", "cuda")
    if kind not in ("cuda", "cpu"):
        raise MegamupError(f"cluster.kind: {kind!r}; expected cuda or cpu")
    per_node = given.pop("devices_per_node", None)
    return Cluster(
        devices=int(devices),
        peak=peak,
        device=name,
        kind=kind,
        devices_per_node=None if per_node is None else int(per_node),
        **given,
    )


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """The keys that are numbers, checked one by one."""
    unknown = sorted(set(values) - {*NUMBERS, *TEXTS})
    if unknown:
        raise MegamupError(f"cluster.{unknown[0]}: unknown key; expected one of {', '.join((*TEXTS, *NUMBERS))}")
    given = {key: positive(values[key], f"cluster.{key}") for key in NUMBERS if values.get(key) is not None}
    for key in WHOLE:
        if key in given and given[key] != int(given[key]):
            raise MegamupError(f"cluster.{key}: {given[key]:g} is no whole number; expected one")
    if given.get("memory", LEAST_MEMORY) < LEAST_MEMORY:
        raise MegamupError(f"cluster.memory: {given['memory']:g} is in bytes, and no device has so few; 80 GB is 80e9")
    if given.get("mfu", 1) > 100:
        raise MegamupError(f"cluster.mfu: {given['mfu']:g} is over 100; expected percent, such as 40")
    for key in SHARES:
        if given.get(key, 1) > 1:
            raise MegamupError(f"cluster.{key}: {given[key]:g} is over 1; expected a share of the peak, such as 0.8")
    return given


def positive(value: Any, where: str) -> float:
    """`value` as a float. Raises MegamupError where it isn't finite and above 0."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise MegamupError(f"{where}: {value!r} is no amount; expected a finite number above 0")
    return number
