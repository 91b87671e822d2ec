"""Joining the process group that a launcher (deepspeed, torchrun, srun, a fork) has prepared in the environment."""

from __future__ import annotations

import logging
import os
import socket

import deepspeed
import torch
import torch.distributed as dist


def world_size() -> int:
    """Ranks that the launcher started; 1 where there is none. Known before any process group exists."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1)


def rank() -> int:
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)


def local_world_size() -> int:
    """Ranks on this host (torchrun, DeepSpeed's launcher and Slurm each have a name for it)."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")
    return int(next((os.environ[name] for name in names if os.environ.get(name, "").isdigit()), 1))


def has_cuda() -> bool:
    return torch.cuda.is_available()


def join() -> torch.device:
    """Join the world and return this rank's device: its CUDA device (NCCL), or the CPU (gloo)."""
    os.environ.setdefault("RANK", str(rank()))
    os.environ.setdefault("WORLD_SIZE", str(world_size()))
    os.environ.setdefault("LOCAL_RANK", str(local_rank()))
    if world_size() == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        if "MASTER_PORT" not in os.environ:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    cuda = has_cuda()
    if cuda:
        torch.cuda.set_device(local_rank())
    elif "OMP_NUM_THREADS" not in os.environ:  # else every rank takes all cores, and they wait for each other
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world_size()))
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed's shared-memory all-reduce serves inference only, and is built by a C++ compiler for over a minute
    # (or fails where there is none): training never calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        deepspeed.init_distributed("nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False)
    return torch.device("cuda", local_rank()) if cuda else torch.device("cpu")
