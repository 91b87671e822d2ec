"""Training with products in 8-bit floats: its loss against bf16's, and the same model in every layout."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from megamup.config import Config
from megamup.errors import MegamupError
from megamup.kernels import matmul
from megamup.kernels.matmul import Scaled, in_8_bits
from megamup.train.fork import run_ranks
from megamup.train.loop import start, train, train_step
from tests.conftest import MakeConfig, ReadMetrics

BF16 = ("precision=bf16", "train.eval_sequences=8")
FP8 = (*BF16, "kernels.matmul=fp8")
LOSS = 2.5e-3
"""Relative. DeepSeek-V3's 8-bit training stayed within 0.25% of bf16's loss, "well within the acceptable range of
training randomness" (its report, section 3.3); here another seed moves the last losses by 1.8%. Measured: 0.05% in 20
steps, 0.16% in 40."""
NORM = 1e-2
"""Relative, of the gradient's norm: AdamW, and so the loss, hardly sees a gradient that is off by a factor."""
LAYOUTS = 1e-3
"""Relative, of losses: sums in another order are rounded to 8 bits differently; bf16's layouts agree to 3e-4 here."""

Curve = npt.NDArray[np.float64]


def steps(config: Config, world_size: int) -> list[tuple[float, float]]:
    training = start(config, world_size, None)
    records = [train_step(training, step) for step in range(config.train.steps)]
    return [(record["loss"], record["grad_norm"]) for record in records]


def curve(config: Config, world_size: int = 1) -> Curve:
    """Loss and gradient norm: (steps, 2)."""
    return np.array(run_ranks(steps, world_size, config, world_size)[0])


def apart(found: Curve, expected: Curve) -> tuple[float, float]:
    """Largest relative differences of losses and of norms."""
    loss, norm = np.abs(found / expected - 1).max(0)
    return float(loss), float(norm)


@pytest.fixture(scope="module")
def references() -> dict[str, Curve]:
    return {}


def reference(make_config: MakeConfig, known: dict[str, Curve], *overrides: str) -> Curve:
    key = overrides[-1]
    if key not in known:
        known[key] = curve(make_config(*overrides, "run.name=reference"))
    return known[key]


def test_loss_follows_bf16(make_config: MakeConfig, references: dict[str, Curve]) -> None:
    expected, found = (reference(make_config, references, *overrides) for overrides in (BF16, FP8))
    assert expected[-1, 0] < 0.8 * expected[0, 0], "nothing was learnt: the comparison would be of initial weights"
    loss, norm = apart(found, expected)
    assert 1e-5 < loss < LOSS, "8 bits must be seen, and not more than that"
    assert norm < NORM


def unscaled(x: Tensor, dtype: torch.dtype) -> Scaled:
    return Scaled(x.to(dtype), torch.ones(()))


def gradient_unscaled(x: Tensor, dtype: torch.dtype) -> Scaled:
    return (unscaled if dtype == torch.float8_e5m2 else in_8_bits)(x, dtype)


def gradient_off_by_two(x: Tensor, dtype: torch.dtype) -> Scaled:
    scaled = in_8_bits(x, dtype)
    return Scaled(scaled.bits, scaled.unit * (2 if dtype == torch.float8_e5m2 else 1))


def overflowing(x: Tensor, dtype: torch.dtype) -> Scaled:
    scaled = in_8_bits(x, dtype)
    return Scaled((16 * x.float() / scaled.unit).to(dtype), scaled.unit / 16)


@pytest.mark.parametrize("fault", [unscaled, gradient_unscaled, gradient_off_by_two, overflowing])
def test_wrong_scales_are_caught(
    make_config: MakeConfig,
    references: dict[str, Curve],
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[Tensor, torch.dtype], Scaled],
) -> None:
    expected = reference(make_config, references, *BF16)
    monkeypatch.setattr(matmul, "in_8_bits", fault)  # the ranks are forked from here
    if fault is overflowing:
        with pytest.raises(MegamupError, match="diverged"):
            curve(make_config(*FP8))
        return
    loss, norm = apart(curve(make_config(*FP8)), expected)
    assert loss > LOSS or norm > NORM


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (2, ["parallel.tensor=2", "parallel.sequence=true", "train.recompute=selective"]),
        (2, ["parallel.context=2"]),
        (2, ["parallel.pipeline=2", "deepspeed=ds_configs/zero1.json"]),
        (2, ["deepspeed=ds_configs/zero3.json", "train.recompute=full"]),
        (1, ["batch.micro_sequences=8"]),
    ],
)
def test_any_layout_trains_the_same_model(
    make_config: MakeConfig, references: dict[str, Curve], world_size: int, overrides: list[str]
) -> None:
    expected = reference(make_config, references, *FP8)
    loss, norm = apart(curve(make_config(*FP8, *overrides), world_size), expected)
    assert loss < LAYOUTS
    assert norm < NORM


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", ["false", "true"])
@pytest.mark.parametrize("arch", ["llama", "gpt"])
def test_loss_follows_bf16_on_cuda(
    make_config: MakeConfig, read_metrics: ReadMetrics, arch: str, compiled: str
) -> None:
    """A wider and longer one, through the whole trainer: 60 steps."""
    shape = {"d_model": 1024, "n_heads": 16, "n_kv_heads": 16, "d_ff": 2816, "n_layers": 4, "max_seq_len": 512}
    wide = [f"model.arch={arch}", *(f"model.{key}={size}" for key, size in shape.items()), "batch.micro_sequences=8"]
    wide += ["train.steps=60", "schedule.warmup_steps=10", "optim.lr=0.003", f"kernels.compile={compiled}"]
    found, expected = (
        make_config(*overrides, *wide, f"run.name={name}") for name, overrides in (("fp8", FP8), ("bf16", BF16))
    )
    run_ranks(train, 1, expected)
    try:
        run_ranks(train, 1, found)
    except MegamupError as error:
        if "capability" not in str(error):
            raise
        pytest.skip(str(error))
    curves = [np.array([[r["loss"], r["grad_norm"]] for r in read_metrics(config)]) for config in (found, expected)]
    assert curves[1][-1, 0] < 0.7 * curves[1][0, 0]
    loss, _ = apart(curves[0], curves[1])
    assert 1e-5 < loss < 2 * LOSS, "twice the bound for the largest of 60 single steps"
    ends = [curve[-10:, 0].mean() for curve in curves]
    assert ends[0] == pytest.approx(ends[1], rel=LOSS)
