#!/usr/bin/env python3
"""Text to memory-mapped token shards in Megatron's format, PREFIX.bin, PREFIX.idx and a manifest PREFIX.json.

tools/preprocess_data.py --input corpus.jsonl.gz --output-prefix data/c4 --tokenizer tok.model --workers 8
tools/preprocess_data.py --input src/ --suffix .py --exclude test --output-prefix data/code --tokenizer bytes
"""

import argparse
import os
import sys
import time

from megamup.cli import report_errors
from megamup.data.preprocess import Encoder, Report, preprocess
from megamup.data.readers import Found, add_input_arguments, describe_skipped, find_files
from megamup.data.tokenizer import load_tokenizer
from megamup.errors import MegamupError


def fraction(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a number between 0 and 1")
    return value


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a positive number")
    return value


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_input_arguments(parser)
    parser.add_argument("--output-prefix", required=True, metavar="P", help="shard to write")
    parser.add_argument("--tokenizer", required=True, metavar="SPEC", help="a SentencePiece .model file, or `bytes`")
    parser.add_argument(
        "--workers",
        type=positive,
        default=len(os.sched_getaffinity(0)),
        help="processes that tokenize, without effect on the output (default: the cores, %(default)s)",
    )
    parser.add_argument(
        "--valid-fraction",
        type=fraction,
        default=0.0,
        metavar="F",
        help="write P_train and P_valid, this share of the documents in P_valid",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of documents for P_valid (default: 0)")
    parser.add_argument(
        "--on-error",
        choices=["stop", "skip"],
        default="stop",
        help="on a document that isn't UTF-8 or valid JSON: stop (default), or leave it out and report it",
    )
    return parser


def print_report(report: Report, found: Found, seconds: float) -> None:
    for prefix, shard in report.shards.items():
        print(
            f"{prefix}: {shard.documents:,} documents, {shard.tokens:,} tokens ({shard.dtype}), "
            f"{shard.text_bytes / shard.tokens:.2f} bytes per token"
        )
    size = sum(shard.text_bytes for shard in report.shards.values())
    print(
        f"{size / 1e6:,.1f} MB of text from {len(found.files):,} files{describe_skipped(found)} "
        f"in {seconds:.1f} s: {size / 1e6 / seconds:.1f} MB/s"
    )
    if report.empty:
        print(f"skipped {report.empty:,} empty documents")
    if report.unreadable:
        print(f"skipped {report.unreadable:,} unreadable documents:")
        print("\n".join(f"  {reason}" for reason in report.named))
        if report.unreadable > len(report.named):
            print(f"  and {report.unreadable - len(report.named):,} more")


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return report_errors(lambda: run(arguments), "interrupted: nothing was written")


def run(arguments: argparse.Namespace) -> None:
    start = time.monotonic()
    if not os.path.basename(arguments.output_prefix):
        raise MegamupError(f"--output-prefix {arguments.output_prefix}: a folder; add a name, such as data")
    tokenizer = load_tokenizer(arguments.tokenizer)
    found = find_files(arguments.input, arguments.suffix, arguments.exclude)
    encoder = Encoder(tokenizer, arguments.text_key, arguments.valid_fraction, arguments.seed, arguments.on_error)
    report = preprocess(found, encoder, arguments.output_prefix, arguments.workers)
    print_report(report, found, time.monotonic() - start)


if __name__ == "__main__":
    sys.exit(main())
