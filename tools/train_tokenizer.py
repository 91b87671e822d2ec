#!/usr/bin/env python3
"""Train a SentencePiece tokenizer, PREFIX.model, that gives every text back exactly.

tools/train_tokenizer.py --input corpus.jsonl --vocab-size 32000 --output data/tok
"""

import argparse
import sys
import time

from megamup.cli import report_errors
from megamup.data.readers import add_input_arguments, describe_skipped, find_files
from megamup.data.tokenizer_training import sample_sentences, train_sentencepiece, write_tokenizer


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_input_arguments(parser)
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="pieces, 256 bytes among them")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="PREFIX.model is written")
    parser.add_argument("--type", choices=["bpe", "unigram"], default="bpe", help="default: bpe")
    parser.add_argument(
        "--max-bytes",
        type=int,
        default=100_000_000,
        metavar="B",
        help="train on at most this much text, taken evenly from all of the input (default: 100 MB)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return report_errors(lambda: run(arguments), "interrupted: nothing was written")


def run(arguments: argparse.Namespace) -> None:
    start = time.monotonic()
    found = find_files(arguments.input, arguments.suffix, arguments.exclude)
    sample = sample_sentences(found, arguments.text_key, arguments.max_bytes)
    print(
        f"training {arguments.type} of {arguments.vocab_size:,} pieces on {sample.kept_bytes / 1e6:,.1f} MB "
        f"of {len(found.files):,} files{describe_skipped(found)}",
        file=sys.stderr,
    )
    model = train_sentencepiece(sample.kept, arguments.vocab_size, arguments.type)
    tokenizer = write_tokenizer(model, arguments.output)
    print(f"{arguments.output}.model: {tokenizer.vocab_size:,} pieces, in {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    sys.exit(main())
