"""Training on CUDA with NCCL; run by ./dev gpu."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from megamup.train.fork import run_ranks
from megamup.train.loop import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_device_learns_and_reports_its_peak(make_config: Any, read_metrics: Any, zero: int, precision: str) -> None:
    config = make_config(f"precision={precision}", f"deepspeed=ds_configs/zero{zero}.json", "train.save_every=10")
    run_ranks(train, 1, config)
    records = read_metrics(config)
    assert records[-1]["loss"] < 0.9 * records[0]["loss"]
    assert 0 < records[-1]["memory_peak_gib"] < 4
    environment = json.loads((config.run.folder / "environment.json").read_text())
    assert torch.cuda.get_device_name() in environment["peak_basis"]


def test_cuda_follows_the_cpu(make_config: Any, read_metrics: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same initial weights and samples: fp32 losses of both devices agree to the rounding of their products."""
    on_gpu, on_cpu = make_config("run.name=gpu"), make_config("run.name=cpu")
    run_ranks(train, 1, on_gpu)
    monkeypatch.setattr("megamup.train.distributed.has_cuda", lambda: False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    run_ranks(train, 1, on_cpu)
    for gpu, cpu in zip(read_metrics(on_gpu), read_metrics(on_cpu), strict=True):
        assert gpu["loss"] == pytest.approx(cpu["loss"], rel=1e-3)
