#!/usr/bin/env python3
"""Train a SentencePiece tokenizer, PREFIX.model, that gives every text back exactly.

tools/train_tokenizer.py --input corpus.jsonl --vocab-size 32000 --output data/tok
"""

import argparse
import sys
import time

from megamup.data.readers import describe_skipped, find_files
from megamup.data.tokenizer_training import sample_sentences, train_sentencepiece, write_tokenizer
from megamup.errors import MegamupError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input",
        nargs="+",
        action="extend",
        required=True,
        metavar="F",
        help="text files, folders of them, JSON lines; each also gzipped",
    )
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="pieces, 256 bytes among them")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="PREFIX.model is written")
    parser.add_argument("--type", choices=["bpe", "unigram"], default="bpe", help="default: bpe")
    parser.add_argument("--text-key", default="text", help="key of the text in JSON lines (default: text)")
    parser.add_argument(
        "--max-bytes",
        type=int,
        default=100_000_000,
        metavar="B",
        help="train on at most this much text, taken evenly from all of the input (default: 100 MB)",
    )
    parser.add_argument(
        "--suffix",
        nargs="+",
        action="extend",
        default=[],
        metavar="S",
        help="in folders, read only names that end in one of these",
    )
    parser.add_argument(
        "--exclude",
        nargs="+",
        action="extend",
        default=[],
        metavar="GLOB",
        help="in folders, leave out files and folders whose name or path below the folder matches",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    start = time.monotonic()
    try:
        found = find_files(args.input, args.suffix, args.exclude)
        sample = sample_sentences(found, args.text_key, args.max_bytes)
        print(
            f"training {args.type} of {args.vocab_size:,} pieces on {sample.kept_bytes / 1e6:,.1f} MB "
            f"of {len(found.files):,} files{describe_skipped(found)}",
            file=sys.stderr,
        )
        tokenizer = write_tokenizer(train_sentencepiece(sample.kept, args.vocab_size, args.type), args.output)
    except MegamupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    print(f"{args.output}.model: {tokenizer.vocab_size:,} pieces, in {time.monotonic() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
