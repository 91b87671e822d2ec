"""Imports run one way, and what needs no torch starts without it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# config <- mup, flops <- plan, scaling | parallel, kernels <- models <- train <- launch, tools
GROUND = {"errors", "files", "shipped", "deepspeed_file", "fields", "model", "objective"}
TABLE = GROUND | {"sections", "config", "parameters", "scales", "mup", "umup", "flops", "cluster", "kernel_rules"}
MODELS = TABLE | {"parallel", "kernels"}
TRAIN = MODELS | {"models", "data"}
TOP = TRAIN | {"train", "plan", "page", "convert", "scaling", "sweep", "experiments", "cli"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "files": set(),
    "shipped": set(),
    "fields": set(),
    "model": {"fields"},
    "objective": {"fields"},
    "deepspeed_file": {"errors", "files", "shipped"},
    "sections": {"errors", "fields"},
    "config": GROUND | {"sections", "kernel_rules"},
    "kernel_rules": {"config"},
    "parameters": GROUND | {"sections", "config"},
    "scales": set(),
    "umup": GROUND | {"sections", "config", "parameters", "scales"},
    "mup": GROUND | {"sections", "config", "parameters", "scales", "umup"},
    "flops": GROUND | {"sections", "config", "parameters"},
    "cluster": GROUND | {"sections", "config", "parameters", "flops"},
    "plan": TABLE,
    "page": set(),
    "scaling": TABLE | {"page"},
    "parallel": TABLE | {"kernels"},
    "kernels": TABLE,
    "data": {"errors", "files", "config", "objective"},
    "models": MODELS,
    "train": TRAIN | {"scaling", "page"},
    "convert": TABLE,
    "convert.hf": TRAIN | {"train", "convert"},
    "sweep": TOP,
    "experiments": TOP,
    "cli": TOP,
    "tools": TOP,
    "launch": TOP,
}
"""Unit -> units of the package that it may import; its own modules always."""

TORCH_FREE = {
    "__init__",
    "errors",
    "files",
    "deepspeed_file",
    "fields",
    "model",
    "objective",
    "sections",
    "config",
    "parameters",
    "scales",
    "mup",
    "umup",
}
TORCH_FREE |= {"flops", "cluster", "kernel_rules", "plan", "cli"}
TORCH_FREE |= {"shipped", "sweep", "page", "scaling", "experiments", "convert", "data"}
WITH_TORCH = {"data.loader"}
PARTS = {"convert.hf"}
"""Packages below a unit that are units of their own, with torch."""
HEAVY = {"torch", "deepspeed", "optuna"}


def sources() -> Iterator[tuple[str, str]]:
    """(dotted name below the package, text) of every module, and of every program as ``tools.NAME``."""
    for path in sorted((ROOT / "megamup").rglob("*.py")):
        parts = path.relative_to(ROOT / "megamup").with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts), path.read_text("utf-8")
    for folder in ("tools", "launch"):
        for path in sorted((ROOT / folder).glob("*.py")):
            yield f"{folder}.{path.stem}", path.read_text("utf-8")


def imported(nodes: Iterator[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield base
            if base == "megamup" or base.startswith(("megamup.", ".")):  # the names may be modules
                yield from (f"{base}.{alias.name}" for alias in node.names)


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported: no function bodies, nothing for type checkers only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from at_import(child)


def unit_of(name: str) -> str:
    return next((part for part in PARTS if f"{name}.".startswith(f"{part}.")), name.split(".")[0])


def violations(name: str, text: str) -> list[str]:
    """What a module imports against the direction, or of torch where it may not."""
    tree, unit, found = ast.parse(text), unit_of(name), set[str]()
    for target in imported(ast.walk(tree)):
        if target.startswith("."):
            found.add(f"{name} imports {target} by a relative path")
        elif target.startswith("megamup."):
            other = target.split(".")[1]
            if other in ALLOWED and other != unit and other not in ALLOWED.get(unit, set()):
                found.add(f"{name} imports megamup.{other}")
    if unit in TORCH_FREE and name not in WITH_TORCH:
        for target in imported(at_import(tree)):
            parts = target.split(".")
            below = ".".join(parts[1:])
            if parts[0] in HEAVY:
                found.add(f"{name} imports {parts[0]} at module level")
            elif parts[0] == "megamup" and (
                below in WITH_TORCH
                or unit_of(below) in PARTS
                or (parts[1:2] and parts[1] in ALLOWED and parts[1] not in TORCH_FREE)
            ):
                found.add(f"{name} imports {target}, which imports torch, at module level")
    return sorted(found)


def test_every_module_is_of_a_known_unit() -> None:
    units = {name.split(".")[0] for name, _ in sources()}
    assert units - {"__init__"} <= set(ALLOWED)
    assert len(units) > 15


def test_imports_run_one_way() -> None:
    assert [line for name, text in sources() for line in violations(name, text)] == []


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("mup", "import torch", "mup imports torch at module level"),
        ("config", "from megamup.mup import table", "config imports megamup.mup"),
        ("config", "from megamup import mup", "config imports megamup.mup"),
        ("models.blocks", "def f() -> None:\n    import megamup.train.loop", "models.blocks imports megamup.train"),
        ("data.shards", "from megamup.parameters import count", "data.shards imports megamup.parameters"),
        (
            "data.samples",
            "try:\n    import torch\nexcept ImportError: ...",
            "data.samples imports torch at module level",
        ),
        ("sweep", "from megamup.train.loop import train", "sweep imports megamup.train, which"),
        ("data.blend", "from megamup.data.loader import x", "data.blend imports megamup.data.loader, which"),
        ("kernels.norm", "from megamup.parallel.mesh import Mesh", "kernels.norm imports megamup.parallel"),
        ("scaling.fit", "from .laws import LAWS", "scaling.fit imports .laws by a relative path"),
        ("plan", "class A:\n    from deepspeed import x", "plan imports deepspeed at module level"),
    ],
)
def test_the_checker_sees_a_violation(name: str, text: str, expected: str) -> None:
    assert any(line.startswith(expected.removesuffix(", which")) for line in violations(name, text))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sweep", "def f() -> None:\n    import torch"),
        ("scaling.figures", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("data.loader", "import torch"),
        ("mup", "from megamup.parameters import parameters"),
        ("train.loop", "import torch\nfrom megamup.models.build import build_network"),
    ],
)
def test_the_checker_lets_the_rest_pass(name: str, text: str) -> None:
    assert violations(name, text) == []


@pytest.mark.parametrize(
    "program",
    ["preprocess_data", "scaling", "plan", "train_tokenizer", "sweep", "convert_config_to_mup", "coord_check"],
)
def test_a_program_that_needs_no_torch_starts_without_it(program: str) -> None:
    command = [sys.executable, "-X", "importtime", str(ROOT / "tools" / f"{program}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "usage" in done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    modules = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}
    assert "megamup" in modules
    assert modules & HEAVY == set()
