#!/usr/bin/env python3
"""Train a model: ``deepspeed --num_gpus N launch/pretrain.py CONFIG.yaml [MORE.yaml ...] [a.b=c ...]``.

Also under torchrun and srun, or on its own as one rank. Started again with the same command, a run goes on from its
last checkpoint.
"""

from __future__ import annotations

import argparse
import sys

from megamup.cli import tells
from megamup.config import load_config, split_arguments
from megamup.errors import MegamupError


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
    except (MegamupError, OSError) as error:
        if tells(error):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint (train.save_every)", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
