#!/usr/bin/env python3
"""A Hugging Face model as a run that training starts from: ``tools/import_hf.py DIR --output RUN [a.b=c ...]``.

DIR holds config.json and safetensors of GPT-2, Llama, Mistral, Qwen 2 or 3, Mixtral, BERT or T5. RUN gets config.yaml,
to which ``launch/pretrain.py RUN/config.yaml data.train=... train.steps=...`` adds the data, and the weights, which
any layout reads. Values a.b=c go into the config: mup.parametrization=sp is its default, and with another one weights
are divided by its multipliers, so that the model computes the same.
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
    parser.add_argument("model", type=Path, metavar="DIR", help="a folder, as save_pretrained writes it")
    parser.add_argument("--output", type=Path, required=True, metavar="RUN", help="a new folder")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="keys of the config")
    arguments = parser.parse_intermixed_args(argv)
    return report_errors(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    from megamup.convert.hf.importing import import_folder  # imports torch, for seconds

    print("\n".join(import_folder(arguments.model, arguments.output, arguments.overrides)))


if __name__ == "__main__":
    sys.exit(main())
