#!/usr/bin/env python3
"""A run as a Hugging Face model: ``tools/export_hf.py RUN[@STEP] --output DIR``.

RUN is a run's folder, its checkpoint of any layout; DIR gets safetensors, config.json, generation_config.json and the
tokenizer's files. μP's multipliers are folded into the weights, so that the unmodified class of transformers computes
the same logits: GPT-2, Llama, Mistral, Qwen 2 and 3, Mixtral, BERT or T5.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megamup.cli import report_errors


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", metavar="RUN[@STEP]", help="a run's folder; default its last checkpoint")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of tensors (%(default)s)")
    arguments = parser.parse_args(argv)
    return report_errors(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    from megamup.convert.hf.exporting import export_run  # imports torch and DeepSpeed, for seconds

    print("\n".join(export_run(arguments.run, arguments.output, arguments.dtype)))


if __name__ == "__main__":
    sys.exit(main())
