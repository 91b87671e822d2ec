"""Every AdamW that can be chosen is torch's to rounding, honours each group's own values, and calls its hooks."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from megamup.config import Config
from megamup.errors import MegamupError
from megamup.train.fork import run_ranks
from megamup.train.loop import start, train, train_step
from megamup.train.optim import CPU_ADAM, FUSED_ADAM, TORCH, adamw, adamw_backend, build_lacks


@pytest.fixture(scope="module", autouse=True)
def built_once() -> Iterator[None]:
    """DeepSpeed compiles its optimizer for a minute or more: kept between runs of the tests, unlike their own cache."""
    folder = Path.home() / ".cache" / "torch_extensions" / f"megamup-tests-{sys.version_info.minor}-{torch.__version__}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", os.environ.get("TORCH_EXTENSIONS_DIR", str(folder)))
        yield


needs_cpu_adam = pytest.mark.skipif(build_lacks(CPU_ADAM) is not None, reason=f"{build_lacks(CPU_ADAM)}")
needs_fused_adam = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or build_lacks(FUSED_ADAM) is not None, reason="needs CUDA and its toolkit"
    ),
]


def groups(device: str, dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    """Three groups that differ in everything; sizes that no vector width divides."""
    generator = torch.Generator().manual_seed(0)

    def shards(*sizes: int) -> list[nn.Parameter]:
        return [nn.Parameter(torch.randn(size, generator=generator).to(device, dtype)) for size in sizes]

    return [
        {"params": shards(1000, 17), "lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1},
        {"params": shards(4099), "lr": 1e-3, "betas": (0.8, 0.99), "eps": 1e-3, "weight_decay": 0.0},
        {"params": shards(33), "lr": 1e-1, "betas": (0.9, 0.95), "eps": 1e-5, "weight_decay": 1.0},
    ]


def stepped(make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer], device: str, dtype: torch.dtype) -> Any:
    """Weights after ten steps whose rates follow a schedule, as float64 on the host."""
    optimizer = make(groups(device, dtype))
    generator = torch.Generator().manual_seed(1)
    for step in range(10):
        for group, factor in zip(optimizer.param_groups, (1.0, 0.9**step, 0.5), strict=True):
            group["lr"] *= factor
            for shard in group["params"]:
                shard.grad = torch.randn(shard.shape, generator=generator).to(device, dtype)
        optimizer.step()
    return [shard.detach().double().cpu() for group in optimizer.param_groups for shard in group["params"]]


def reference(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, foreach=False, fused=False)


@pytest.mark.parametrize(
    ("backend", "device"),
    [
        (TORCH, "cpu"),
        pytest.param(CPU_ADAM, "cpu", marks=needs_cpu_adam),
        pytest.param(TORCH, "cuda", marks=needs_fused_adam),
        pytest.param(FUSED_ADAM, "cuda", marks=needs_fused_adam),
    ],
)
def test_steps_are_those_of_float64_to_rounding(backend: str, device: str) -> None:
    expected = stepped(reference, "cpu", torch.float64)
    found = stepped(lambda own: adamw(own, backend), device, torch.float32)
    for ours, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("backend", [TORCH, pytest.param(CPU_ADAM, marks=needs_cpu_adam)])
def test_hooks_run_around_each_step(backend: str) -> None:
    """Clipping (ZeRO 0) and the monitor hang on them."""
    seen = []
    optimizer = adamw(groups("cpu"), backend)
    shard = optimizer.param_groups[0]["params"][0]
    before = shard.detach().clone()
    optimizer.register_step_pre_hook(lambda *_: seen.append(bool((shard == before).all())))
    optimizer.register_step_post_hook(lambda *_: seen.append(bool((shard == before).any())))
    shard.grad = torch.ones_like(shard)
    optimizer.step()
    assert seen == [True, False]


@pytest.mark.parametrize("decay_mode", ["constant", "torch"])
@needs_cpu_adam
def test_deepspeeds_trains_the_same_model(make_config: Any, decay_mode: str) -> None:
    common = ("train.steps=8", "data.valid=null", f"optim.decay_mode={decay_mode}", "optim.weight_decay=0.01")
    ours = run_ranks(losses, 1, make_config(*common, "run.name=torch"), 1)[0]
    theirs = run_ranks(losses, 1, make_config(*common, "kernels.optimizer=deepspeed", "run.name=deepspeed"), 1)[0]
    assert (ours[0], theirs[0]) == ("AdamW", "DeepSpeedCPUAdam")
    assert theirs[1] == pytest.approx(ours[1], rel=1e-5)


def losses(config: Config, world_size: int) -> tuple[str, list[float]]:
    training = start(config, world_size, None)
    found = [train_step(training, step) for step in range(config.train.steps)]
    monitored = [value for record in found for name, value in record.items() if name.startswith("update_ratio")]
    assert all(value > 0 for value in monitored)
    name = type(training.engine.deepspeed.basic_optimizer).__name__
    return name, [value for record in found for value in (record["loss"], record["grad_norm"])] + monitored


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [2, 3])
def test_offloading_trains_the_same_model(make_config: Any, stage: int, precision: str) -> None:
    """DeepSpeed's optimizer where it can be built, torch's otherwise, and the monitor sees its updates."""
    common = ("train.steps=6", "train.monitor_every=3", "data.valid=null", f"precision={precision}")
    stays, goes = (
        run_ranks(losses, 2, make_config(*common, f"deepspeed=ds_configs/{file}.json", f"run.name={file}"), 2)[0]
        for file in (f"zero{stage}", f"zero{stage}_offload")
    )
    assert stays[0] == "AdamW"
    assert goes[0] == ("DeepSpeedCPUAdam" if build_lacks(CPU_ADAM) is None else "AdamW")
    assert len(goes[1]) > 12
    assert goes[1] == pytest.approx(stays[1], rel=1e-4 if precision == "fp32" else 2e-2)


def test_an_offloaded_run_resumes_bit_for_bit(make_config: Any, read_metrics: Any) -> None:
    common = (
        "schedule.kind=constant",
        "train.save_every=3",
        "data.valid=null",
        "deepspeed=ds_configs/zero3_offload.json",
    )
    whole = make_config("train.steps=6", "run.name=whole", *common)
    run_ranks(train, 2, whole)
    for steps in (3, 6):
        resumed = make_config(f"train.steps={steps}", "run.name=resumed", *common)
        run_ranks(train, 2, resumed)
    found, expected = ([record["loss"] for record in read_metrics(config)] for config in (resumed, whole))
    assert found == expected
    assert len(found) == 6


def test_auto_needs_no_compiler(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, offloaded = make_config(), make_config("deepspeed=ds_configs/zero2_offload.json")
    asked = make_config("kernels.optimizer=deepspeed")
    assert adamw_backend(plain, "cpu") == adamw_backend(plain, "cuda") == TORCH
    if build_lacks(CPU_ADAM) is None:
        assert adamw_backend(offloaded, "cuda") == adamw_backend(asked, "cpu") == CPU_ADAM
    found = shutil.which
    monkeypatch.setattr("shutil.which", lambda name: None if name == "c++" else found(name))
    monkeypatch.delenv("CXX", raising=False)
    assert adamw_backend(offloaded, "cuda") == TORCH
    with pytest.raises(
        MegamupError, match=r"kernels\.optimizer=deepspeed: .*CPUAdam can't run here: there is no C\+\+"
    ):
        adamw_backend(asked, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA it may run")
def test_a_gpu_optimizer_without_its_toolkit_says_so(make_config: Any) -> None:
    with pytest.raises(MegamupError, match=r"FusedAdam can't run here: there is no CUDA toolkit"):
        adamw_backend(make_config("kernels.optimizer=deepspeed"), "cuda")


@pytest.mark.parametrize(("stage", "key"), [(0, "offload_optimizer"), (2, "offload_param")])
def test_offloading_that_would_do_nothing_is_refused(make_config: Any, tmp_path: Any, stage: int, key: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(f'{{"zero_optimization": {{"stage": {stage}, "{key}": {{"device": "cpu"}}}}}}')
    with pytest.raises(MegamupError, match=rf"{key} has no effect at stage {stage}"):
        make_config(f"deepspeed={path}")
