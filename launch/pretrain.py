#!/usr/bin/env python3
"""Train a model: ``deepspeed --num_gpus N launch/pretrain.py CONFIG.yaml [MORE.yaml ...] [a.b=c ...]``.

Also under torchrun and srun, or on its own as one rank. Started again with the same command, a run goes on from its
last checkpoint.
"""

from __future__ import annotations

import argparse
import os
import sys

from megamup.config import load_config, split_arguments
from megamup.errors import MegamupError, OneRankError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="+", help="YAML files, merged left to right, then a.b=c overrides")
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)  # the launcher's
    arguments = parser.parse_args(argv)
    files, overrides = split_arguments(arguments.config)
    try:
        config = load_config(files, overrides)
        from megamup.train.loop import train  # torch and DeepSpeed, after the config is known to be right

        train(config)
    except MegamupError as error:
        # Every rank finds the same fault in config, data and folder; later ones may be one rank's own.
        rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
        if rank == "0" or isinstance(error, OneRankError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
