"""Joining the process group that a launcher (deepspeed, torchrun, srun, a fork) has prepared in the environment."""

from __future__ import annotations

import logging
import os
import re

import deepspeed
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from megamup.train.host_memory import keep_freed_memory


def launched(name: str, slurm_name: str, default: int) -> int:
    """An integer that deepspeed and torchrun export as ``name``, and srun as ``slurm_name``.

    Slurm's names count inside a step only: a plain process of an allocation of four tasks is one rank.
    """
    if name in os.environ:
        return int(os.environ[name])
    in_step = "SLURM_STEP_ID" in os.environ and "WORLD_SIZE" not in os.environ
    return int(os.environ[slurm_name]) if in_step and slurm_name in os.environ else default


def world_size() -> int:
    """Ranks that the launcher started; 1 where there is none. Known before any process group exists."""
    return launched("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", 1)


def rank() -> int:
    return launched("RANK", "SLURM_PROCID", 0)


def local_rank() -> int:
    return launched("LOCAL_RANK", "SLURM_LOCALID", 0)


def set_meeting_place() -> None:
    """MASTER_ADDR and MASTER_PORT where srun has started the ranks, which sets neither."""
    if "MASTER_ADDR" not in os.environ:
        nodes = os.environ.get("SLURM_STEP_NODELIST", "localhost")
        # The first of `a[03-07,9],b`: rank 0 runs there.
        first = re.sub(r"\[(\w+)[^]]*\].*", r"\1", nodes).split(",")[0]
        os.environ["MASTER_ADDR"] = first
        job = int(os.environ.get("SLURM_JOB_ID", 0)) + int(os.environ.get("SLURM_STEP_ID", 0))
        os.environ.setdefault("MASTER_PORT", str(20_000 + job % 20_000))


def local_world_size() -> int:
    """Ranks on this host (torchrun, DeepSpeed's launcher and Slurm each have a name for it)."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")
    return int(next((os.environ[name] for name in names if os.environ.get(name, "").isdigit()), 1))


def has_cuda() -> bool:
    return torch.cuda.is_available()


def join() -> torch.device:
    """Join the world and return this rank's device: its CUDA device (NCCL), or the CPU (gloo)."""
    alone = world_size() == 1 and "MASTER_PORT" not in os.environ
    if not alone:
        set_meeting_place()
    found = {"RANK": rank(), "LOCAL_RANK": local_rank(), "WORLD_SIZE": world_size()}  # the last hides Slurm's names
    os.environ.update({name: str(value) for name, value in found.items()})
    cuda = has_cuda()
    if cuda:
        torch.cuda.set_device(local_rank())
    else:
        keep_freed_memory()
    if (
        not cuda and "OMP_NUM_THREADS" not in os.environ
    ):  # else every rank takes all cores, and they wait for each other
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world_size()))
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed's shared-memory all-reduce serves inference only, and is built by a C++ compiler for over a minute
    # (or fails where there is none): training never calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if cuda else "gloo"
    if not dist.is_initialized():
        if alone:  # nobody to meet: no port, which another process could have taken by now
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    return torch.device("cuda", local_rank()) if cuda else torch.device("cpu")


def all_equal(digest: str, device: torch.device) -> bool:
    """Whether all ranks have the same hex digest. Collective."""
    mine = torch.tensor([int(digest[:15], 16)], dtype=torch.int64, device=device)
    lowest, highest = mine.clone(), mine.clone()
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    return bool(lowest == highest)
