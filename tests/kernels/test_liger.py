"""Liger's Triton kernels on a CPU: interpreted.py in a process of its own, since Triton decides when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megamup.kernels import mlp, norm, rotary
from tests.kernels.comparison import Function, draw, heads

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")


def test_liger_is_the_reference_through_the_interpreter() -> None:
    program = Path(__file__).with_name("interpreted.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(program)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=root)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout


@pytest.mark.parametrize(
    ("function", "n_inputs"),
    [
        (lambda x, w: norm.liger_rms_norm(x, w, 0.1), 2),
        (lambda x, w, b: norm.liger_layer_norm(x, w, b, 0.1), 3),
        (lambda q, k: rotary.liger_rotate(q, k, rotary.Rotation(500.0)), 0),
        (lambda gate, up: mlp.liger_swiglu(gate, up), -1),
        (lambda gate, up: mlp.liger_geglu_tanh(gate, up), -1),
    ],
    ids=["rms_norm", "layer_norm", "rotate", "swiglu", "geglu_tanh"],
)
def test_liger_is_traced_into_one_graph(function: Function, n_inputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernel in it, on a machine that torch takes for one with a GPU; there is none to run it."""
    torch.compiler.reset()
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    kernels: list[str] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
        targets = [str(node.target) for part in parts for node in part.graph.nodes]
        kernels.extend(target for target in targets if "triton_kernel_wrapper" in target)
        raise InterruptedError

    weights = [draw(48, seed=2).float() for _ in range(n_inputs - 1)]
    inputs = [draw(2, 7, 48).float(), *weights] if n_inputs > 0 else [x.float() for x in heads(6, 2)[:2]]
    if n_inputs < 0:
        inputs = [draw(2, 7, 48, seed=seed).float() for seed in range(2)]
    with pytest.raises(Exception, match="InterruptedError"):
        torch.compile(function, fullgraph=True, dynamic=False, backend=keep)(*(x.requires_grad_() for x in inputs))
    assert len(kernels) == 2  # forward and backward
