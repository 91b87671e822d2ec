#!/usr/bin/env python3
"""Is this μP, in every layout? Coordinate checks and transfer experiments, with the claims that they test.

    ./dev study mup

Checks every module's output over widths 64 to 2048 on (tensor, pipeline) = (1,1), (2,1), (1,2), (2,2), for a Llama and
a GPT, and that sp fails; trains learning rate against width, depth, batch and tokens (configs/studies/mup/). Everything
goes below runs/mup; what is finished is not run again. The report is runs/mup/report.html, and its figures go to
benchmarks/results/mup_study.md. Exit code 1 where a claim does not hold.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from platform import machine, python_version
from typing import Any

import deepspeed
import torch

from megamup.cli import report_errors
from megamup.config import dump_config, load_config
from megamup.experiments.coord_check import as_json, check_width, lines
from megamup.experiments.coord_page import figure as draw_check
from megamup.experiments.coord_page import html as check_page
from megamup.experiments.curves import transfer_of
from megamup.experiments.transfer import Claim, Conclusion, Transfer, conclusions, markdown
from megamup.experiments.transfer_page import figure, html
from megamup.files import write_json_atomic, write_text_atomic
from megamup.sweep import complete, load_study, write_results

ROOT = Path(__file__).resolve().parents[1]
OUT = Path("runs/mup")
RESULTS = ROOT / "benchmarks" / "results"
WIDTHS = (64, 128, 256, 512, 1024, 2048)
STEPS = 10
LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2))
TOLERANCE = 0.1
BETWEEN_LAYOUTS = 1e-3
"""Largest difference between the slopes of two layouts."""
ARCHS = {
    "llama": ("configs/transfer.yaml", "configs/coord_check.yaml"),
    "gpt": ("configs/transfer.yaml", "configs/coord_check.yaml", "configs/coord_check_gpt.yaml"),
}
STUDIES: dict[str, tuple[Claim, ...]] = {
    "width": (
        Claim("mup", "|shift|", "<", 0.5, (64, 512)),
        Claim("sp", "|shift|", ">", 1.0, (64, 512)),
    ),
    "depth": (Claim("completep", "|shift|", "<", 0.5, (2, 16)),),
    "batch": (),
    "tokens": (),
}
"""Studies of configs/studies/mup and what each is to show."""

Found = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """One coordinate check of the study."""

    arch: str
    parametrization: str
    tensor: int
    pipeline: int

    @property
    def name(self) -> str:
        return f"{self.arch}-{self.parametrization}-tensor{self.tensor}-pipeline{self.pipeline}"


def coordinate_check(layout: Layout, widths: tuple[int, ...]) -> Found:
    """Run one check, or read it where this very one was run before."""
    overrides = [
        f"mup.parametrization={layout.parametrization}",
        f"parallel.tensor={layout.tensor}",
        f"parallel.pipeline={layout.pipeline}",
    ]
    config = load_config(ARCHS[layout.arch], overrides)
    folder = OUT / "coordinates" / layout.name
    path = folder / "coord_check.json"
    if path.is_file():
        before: Found = json.loads(path.read_text(encoding="utf-8"))
        if (before["config"], before["sizes"], before["steps"]) == (dump_config(config), list(widths), STEPS):
            return before
    print(f"coordinate check: {layout.name}", flush=True)
    check = check_width(config, widths, STEPS, tolerance=TOLERANCE)
    print(list(lines(check))[-1], flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    draw_check(check).savefig(folder / "coord_check.png", dpi=130, facecolor="white")
    write_text_atomic(folder / "coord_check.html", check_page(check))
    write_json_atomic(path, as_json(check))
    return as_json(check)


def steepest(check: Found) -> float:
    """The largest judged slope of a check, by size."""
    judged = [s["rms"][0] for s in check["slopes"].values() if s["judged_at_init"]]
    judged += [s["change"][-1] for s in check["slopes"].values() if s["judged_change"] != "no"]
    return max(float("inf") if slope is None else abs(float(slope)) for slope in judged)


def apart(one: Found, other: Found) -> float:
    """The largest difference between two checks' slopes of any module at any step."""
    assert one["slopes"].keys() == other["slopes"].keys(), "the layouts have other modules"
    gap: float = max(
        math.inf if (a is None) != (b is None) else abs((a or 0.0) - (b or 0.0))
        for module, slopes in one["slopes"].items()
        for key in ("rms", "change")
        for a, b in zip(slopes[key], other["slopes"][module][key], strict=True)
    )
    return gap


def coordinate_claims(widths: tuple[int, ...]) -> list[Conclusion]:
    """Every layout is flat under mup and has the slopes of one rank; sp is not flat."""
    found, span = [], f"widths {widths[0]} to {widths[-1]}"
    for arch in ARCHS:
        one = coordinate_check(Layout(arch, "mup", 1, 1), widths)
        for tensor, pipeline in LAYOUTS:
            check = coordinate_check(Layout(arch, "mup", tensor, pipeline), widths)
            where = f"{arch}, tensor={tensor}, pipeline={pipeline}"
            worst = steepest(check)
            found.append(Conclusion(f"{where}: |slope| <= {TOLERANCE:g} over {span}", worst, worst <= TOLERANCE))
            if (tensor, pipeline) != (1, 1):
                gap = apart(one, check)
                claim = f"{where}: slopes differ from one rank's by < {BETWEEN_LAYOUTS:g}"
                found.append(Conclusion(claim, gap, gap < BETWEEN_LAYOUTS))
        control = steepest(coordinate_check(Layout(arch, "sp", 1, 1), widths))
        found.append(Conclusion(f"{arch}, sp: not flat over {span}", control, control > TOLERANCE))
    return found


def transfer(name: str) -> tuple[Transfer, list[Conclusion]]:
    """Run or finish one study of learning rates, and read it."""
    study, base = load_study(ROOT / "configs" / "studies" / "mup" / f"{name}.yaml")
    assert study.curves is not None
    planned, promoted = complete(study, base)
    write_results(study, planned, promoted)
    found = transfer_of(study.curves, planned, study.metric)
    figure(found, OUT / name / "curves.png")
    return found, conclusions(found, STUDIES[name])


def environment() -> dict[str, str]:
    return {
        "date": str(date.today()),
        "machine": f"{machine()}, {os.cpu_count()} cores, torch {torch.__version__}, DeepSpeed {deepspeed.__version__}",
        "python": python_version(),
        "command": "./dev study mup",
        "data": "that Python's standard library (tools/demo.py --shards-only), a vocabulary of 1,024",
    }


def summary(claims: list[Conclusion], transfers: list[Transfer]) -> str:
    """The results as Markdown."""
    verdicts = {True: "holds", False: "**does not hold**", None: "not known"}
    where = environment()
    found = [f"{where['date']}, {where['machine']}, Python {where['python']}, `{where['command']}`.", ""]
    found += ["| claim | value | |", "|---|---|---|"]
    for claim in claims:
        value = "-" if claim.value is None else f"{claim.value:.3g}"
        found.append("| " + claim.claim.replace("|", "\\|") + f" | {value} | {verdicts[claim.holds]} |")
    for each in transfers:
        found += ["", f"## Learning rate against {each.axis}", "", markdown(each)]
    return "\n".join(found).rstrip() + "\n"


def run(widths: tuple[int, ...], studies: list[str]) -> bool:
    """Everything; True where all claims hold."""
    subprocess.run([sys.executable, str(ROOT / "tools" / "demo.py"), "--shards-only"], check=True)
    OUT.mkdir(parents=True, exist_ok=True)
    claims = coordinate_claims(widths)
    transfers = []
    for name in studies:
        found, tested = transfer(name)
        transfers.append(found)
        claims += tested
    write_text_atomic(OUT / "report.html", html(transfers, "μP proven under sharding", environment(), claims))
    text = summary(claims, transfers)
    print(text)
    if widths == WIDTHS and studies == list(STUDIES):  # the committed figures are of the whole study only
        RESULTS.mkdir(exist_ok=True)
        write_text_atomic(RESULTS / "mup_study.md", text)
        for name, each in zip(studies, transfers, strict=True):
            figure(each, RESULTS / f"mup_{name}.png")
        write_json_atomic(RESULTS / "mup_study.json", {"transfers": [each.as_json() for each in transfers]})
    print(f"report: {OUT / 'report.html'}")
    return all(claim.holds for claim in claims)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=WIDTHS[-1], help="leave out coordinate checks of larger widths")
    parser.add_argument("--studies", nargs="*", choices=list(STUDIES), default=list(STUDIES), help="default: all")
    arguments = parser.parse_args(argv)
    widths = tuple(width for width in WIDTHS if width <= arguments.largest)
    held: list[bool] = []
    again = "interrupted; ./dev study mup goes on with what is not finished"
    code = report_errors(lambda: held.append(run(widths, arguments.studies)), again)
    return code or int(not held[0])


if __name__ == "__main__":
    sys.exit(main())
