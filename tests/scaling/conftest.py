"""Run folders as the trainer writes them, whose losses follow a law that the tests know."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from megamup.cli import load_program

ROOT = Path(__file__).resolve().parents[2]

TRUTH = {"a": 40.0, "b": -0.11, "c": 1.75}

MakeRun = Callable[..., Path]


def true_loss(flops: float) -> float:
    """The law that the ladder's final losses lie on."""
    return TRUTH["a"] * math.pow(flops, TRUTH["b"]) + TRUTH["c"]


@pytest.fixture
def truth() -> dict[str, float]:
    """The parameters of the law that the ladder's final losses lie on, in C."""
    return dict(TRUTH)


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A maker of run folders: `make_run("w256", parameters=1e6)`; the rest has defaults to vary."""

    def make(
        name: str,
        *,
        parameters: float = 1e6,
        steps: int = 100,
        last_step: int | None = None,
        noise: float = 0.0,
        convention: str = "6N",
        valid_loss: bool = True,
        schedule: str = "constant",
        samples: dict[str, tuple[int, float]] | None = None,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        config = {"run": {"name": name}, "train": {"steps": steps}, "optim": {"lr": 2e-3}}
        config["schedule"] = {"kind": schedule, "warmup_steps": steps // 5}
        folder.joinpath("config.yaml").write_text(yaml.safe_dump(config))
        if samples is not None:  # of each source: how many of 64 tokens, and its weight
            train = [{"name": key, "samples": count, "weight": weight} for key, (count, weight) in samples.items()]
            folder.joinpath("data.json").write_text(json.dumps({"version": 1, "seq_len": 64, "train": train}))
        counts = {"total": int(parameters * 1.5), "non_embedding": int(parameters)}
        environment = {"flops_convention": convention, "parameters": counts}
        folder.joinpath("environment.json").write_text(json.dumps(environment))
        tokens_per_step = 20 * parameters / steps
        lines = []
        for step in range(1, (last_step or steps) + 1):
            tokens = step * tokens_per_step
            flops = 6 * parameters * tokens
            # The curve falls to the law's loss at the end of the run.
            final = true_loss(6 * parameters * 20 * parameters) * (1 + noise)
            loss = final + 4 * math.exp(-8 * step / steps) - 4 * math.exp(-8)
            record = {
                "step": step,
                "tokens": tokens,
                "flops": flops,
                "loss": loss,
                "lr": 1e-3,
                "grad_norm": 1.0,
            }
            lines.append(json.dumps(record | {"tokens_per_s": 1e5, "mfu_percent": 40.0}))
            if valid_loss and step % 50 == 0:
                lines.append(json.dumps({"step": step, "valid_loss": loss}))
        folder.joinpath("metrics.jsonl").write_text("\n".join(lines) + "\n")
        return folder

    return make


@pytest.fixture
def ladder(make_run: MakeRun) -> list[Path]:
    """Six runs, w64 to w2048, over 2.5 decades of parameters, with noise of up to 0.3% of the loss."""
    noise = [0.002, -0.003, 0.003, -0.001, -0.002, 0.001]
    return [make_run(f"w{64 * 2**i}", parameters=1e6 * 10 ** (i / 2), noise=noise[i]) for i in range(len(noise))]


@pytest.fixture(scope="session")
def tool() -> ModuleType:
    """`tools/scaling.py` as a module."""
    return load_program(ROOT / "tools" / "scaling.py")


@pytest.fixture(scope="session")
def published() -> Path:
    """The folder of published training runs beside the checkout."""
    folder = ROOT.parent / "shared" / "scaling_data"
    if not folder.is_dir():
        pytest.skip("published runs (../shared/scaling_data) are not on this machine")
    return folder
