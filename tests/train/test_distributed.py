"""What launchers export, read as ranks."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megamup.train import distributed

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_NODELIST": "gpu-[03-04,07]",
}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, *SRUN):
        monkeypatch.delenv(name, raising=False)


def ranks() -> tuple[int, int, int]:
    return distributed.rank(), distributed.local_rank(), distributed.world_size()


def test_no_launcher_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks() == (0, 0, 1)
    monkeypatch.setenv("SLURM_NTASKS", "4")  # an allocation, but no srun
    assert ranks() == (0, 0, 1)


def test_torchruns_names_go_before_slurms(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**SRUN, "RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert ranks() == (2, 0, 4)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu-[03-04,07]", "gpu-03"), ("n1", "n1"), ("a[12,14],b7", "a12"), ("n1,n2", "n1")],
)
def test_srun_meets_at_the_first_node(monkeypatch: pytest.MonkeyPatch, nodes: str, first: str) -> None:
    import os

    for name, value in {**SRUN, "SLURM_STEP_NODELIST": nodes}.items():
        monkeypatch.setenv(name, value)
    assert ranks() == (5, 1, 8)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    distributed.set_meeting_place()
    assert os.environ["MASTER_ADDR"] == first
    assert os.environ["MASTER_PORT"] == str(20_000 + 123456 % 20_000)


ALONE = """
import os, torch, torch.distributed as dist
from megamup.train import distributed
distributed.join()
x = torch.ones(1)
dist.all_reduce(x)
print(int(x), dist.get_world_size(), "MASTER_PORT" in os.environ)
"""


def test_a_lone_rank_opens_no_port() -> None:
    """Another process could take it between its choice and its use."""
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "1", "False"]
