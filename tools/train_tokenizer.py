#!/usr/bin/env python3
"""Train a tokenizer that gives every text back exactly.

bpe, unigram: a SentencePiece model, PREFIX.model    byte-bpe: byte-level BPE as GPT-2's, a tokenizer.json, PREFIX.json

tools/train_tokenizer.py --input corpus.jsonl --vocab-size 32000 --output data/tok --type byte-bpe
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from megamup.cli import report_errors
from megamup.data.reading.sources import add_input_arguments, describe_skipped, find, read_options
from megamup.data.tokenizer_training import (
    ended_by_interrupt,
    sample_text,
    sentences,
    stretches,
    train_byte_bpe,
    train_sentencepiece,
    write_tokenizer,
)
from megamup.errors import MegamupError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_input_arguments(parser)
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="tokens, 256 bytes among them")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="PREFIX.model or PREFIX.json is written")
    parser.add_argument("--type", choices=["bpe", "unigram", "byte-bpe"], default="bpe", help="default: bpe")
    parser.add_argument(
        "--pattern",
        choices=["gpt2", "llama3"],
        help="of byte-bpe: how text is split before merging (default: gpt2); llama3 takes digits by three",
    )
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
    byte_level = arguments.type == "byte-bpe"
    if arguments.pattern and not byte_level:
        raise MegamupError(f"--pattern {arguments.pattern}: expected with --type byte-bpe only, not {arguments.type}")
    with tempfile.TemporaryDirectory() as folder:
        found = find(arguments.input, arguments.suffix, arguments.exclude, spool=Path(folder, "stdin"))
        divide = stretches if byte_level else sentences
        sample = sample_text(found, read_options(arguments), arguments.max_bytes, divide)
    print(
        f"training {arguments.type} of {arguments.vocab_size:,} tokens on {sample.kept_bytes / 1e6:,.1f} MB "
        f"of {len(found.sources):,} files{describe_skipped(found)}",
        file=sys.stderr,
    )
    with ended_by_interrupt():
        if byte_level:
            data = train_byte_bpe(sample.kept, arguments.vocab_size, arguments.pattern or "gpt2")
        else:
            data = train_sentencepiece(sample.kept, arguments.vocab_size, arguments.type)
    path = Path(f"{arguments.output}.{'json' if byte_level else 'model'}")
    tokenizer = write_tokenizer(data, path)
    print(f"{path}: {tokenizer.vocab_size:,} tokens, in {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    sys.exit(main())
