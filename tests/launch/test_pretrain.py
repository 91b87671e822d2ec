"""The program as users start it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from megamup.config import dump_config

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = str(ROOT / "launch" / "pretrain.py")


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**inherited, "PATH": path, **environment}
    )


def test_wrong_config_is_one_message_from_one_rank_without_torch(make_config: Any, tmp_path: Path) -> None:
    """Every rank refuses; the first of a host says why, and none has imported torch to find out."""
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(make_config()))
    command = [sys.executable, "-X", "importtime", PRETRAIN, "--local_rank=0", str(file), "optim.lrr=1"]
    first, second = run(command, LOCAL_RANK="0"), run(command, LOCAL_RANK="1")
    assert (first.returncode, second.returncode) == (2, 2)
    told = [line for line in first.stderr.splitlines() if not line.startswith("import time:")]
    assert told == ["error: optim.lrr: unknown key; did you mean optim.lr?"]
    assert not [line for line in second.stderr.splitlines() if not line.startswith("import time:")]
    imported = {line.rsplit("|", 1)[1].strip() for line in first.stderr.splitlines() if "|" in line}
    assert "megamup.config" in imported
    assert not imported & {"torch", "deepspeed"}


def test_impossible_layout_is_refused_before_ranks_meet(make_config: Any, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(make_config("parallel.tensor=2")))
    refused = run([sys.executable, PRETRAIN, str(file)], RANK="0", WORLD_SIZE="3")
    assert refused.returncode == 2
    assert "error: parallel: tensor=2 x pipeline=1 = 2 ranks a replica, but 3 ranks were started" in refused.stderr


def test_deepspeed_launcher_trains_on_two_ranks(make_config: Any, tmp_path: Path, read_metrics: Any) -> None:
    config = make_config("train.steps=4", "parallel.tensor=2", "train.log_every=2")
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(config))
    port = str(29600 + os.getpid() % 1000)
    command = ["deepspeed", "--num_gpus", "2", "--master_port", port, PRETRAIN, str(file), "run.name=launched"]
    ended = run(command)
    assert ended.returncode == 0, ended.stderr[-2000:]
    launched = config.model_copy(update={"run": config.run.model_copy(update={"name": "launched"})})
    assert [record["step"] for record in read_metrics(launched)] == [1, 2, 4]
    assert "step 4/4" in ended.stdout
