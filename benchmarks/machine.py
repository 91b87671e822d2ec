"""What every table of measurements says of where it was made: processor, cores, device, versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from datetime import date
from pathlib import Path


def processor() -> str:
    """The processor's model as Linux names it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_name() -> str:
    """The first CUDA device's name, else the processor's."""
    import torch  # benchmarks of the data path need none

    return str(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else processor()


def versions(*packages: str) -> str:
    """``name version`` of each package that is installed, separated by commas."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(found)


def headline(command: str, *packages: str, also: str = "") -> str:
    """One line under a table's title: command, date, machine, versions, and how busy the machine is.

    Args:
        command: that makes the table.
        packages: whose versions matter.
        also: a version that isn't this environment's.
    """
    load = f", load {os.getloadavg()[0]:.1f} before" if hasattr(os, "getloadavg") else ""
    return (
        f"`{command}`, {date.today()}, {cores()} cores of {processor()}{load}; "
        f"Python {platform.python_version()}, {', '.join(filter(None, [versions(*packages), also]))}."
    )


def matrix_peak(seconds: float = 1.0, size: int = 1024) -> float:
    """FLOP/s of the fastest fp32 product of (size, size) matrices on this process's threads."""
    import torch

    a, b = torch.randn(size, size), torch.randn(size, size)
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        begun = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best
