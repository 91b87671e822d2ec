#!/usr/bin/env python3
"""A large model's μP config from its standard one and a tuned proxy: ``tools/convert_config_to_mup.py -i CONFIG.yaml``.

The input is a config of megamup or a GPT-style params file of the Cerebras Model Zoo; comments in the output say where
each value comes from. The options are those of Cerebras' converter.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megamup.cli import report_errors
from megamup.convert.config import Proxy, convert_file


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add, embedding = parser.add_argument, Proxy.embedding_multiplier
    add("-i", "--input_yaml", type=Path, required=True, help="config of the target model")
    add("-d_base", "--base_layer_width", type=int, default=Proxy.d_model, help="the proxy's d_model (%(default)s)")
    add("-lr_base", "--base_lr", type=float, default=Proxy.lr, help="the proxy's best peak rate (%(default)s)")
    add("-std_base", "--base_init_std", type=float, default=Proxy.init_std, help="its initial deviation (%(default)s)")
    add("-m_base", "--m_embed", type=float, default=embedding, help="its embeddings' multiplier (%(default)s)")
    add("-o", "--output_yaml", type=Path, help="default: the input's name with _mup before its suffix, beside it")
    arguments = parser.parse_args(argv)
    return report_errors(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    proxy = Proxy(arguments.base_layer_width, arguments.base_lr, arguments.base_init_std, arguments.m_embed)
    print(convert_file(arguments.input_yaml, proxy, arguments.output_yaml))


if __name__ == "__main__":
    sys.exit(main())
