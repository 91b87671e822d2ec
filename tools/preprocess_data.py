#!/usr/bin/env python3
"""Text to memory-mapped token shards in Megatron's format, PREFIX.bin, PREFIX.idx and a manifest PREFIX.json.

tools/preprocess_data.py --input corpus.jsonl.gz --output-prefix data/c4 --tokenizer tok.model --workers 8
tools/preprocess_data.py --input src/ --suffix .py --exclude test --output-prefix data/code --tokenizer bytes
tools/preprocess_data.py --input hf:allenai/c4:en --output-prefix data/c4 --tokenizer tiktoken:gpt2 --executor ray

Interrupted or killed, the same command goes on where it stopped; the bytes that come out are the same. On a cluster
without Ray, jobs with --part 0/8 ... --part 7/8 share the work, and the same command with --merge ends it.
"""

import argparse
import os
import sys
import time
from contextlib import ExitStack

from megamup.cli import add_shard_size, add_workers, fraction, report_errors
from megamup.data.manifest import Manifest
from megamup.data.preprocess.encode import Encoder
from megamup.data.preprocess.filters import describe_filters
from megamup.data.preprocess.run import Job, Outcome, Run, first_texts
from megamup.data.progress import ByteProgress
from megamup.data.reading.sources import (
    Found,
    add_error_argument,
    add_input_arguments,
    describe_skipped,
    find,
    read_options,
)
from megamup.data.reading.units import plan_units
from megamup.data.tokenizer import Tokenizer, fastest_exact, load_tokenizer
from megamup.data.work.executors import make_executor
from megamup.data.work.folder import WorkFolder
from megamup.errors import MegamupError


def part_of(text: str) -> tuple[int, int]:
    number, _, parts = text.partition("/")
    if not (number.isdigit() and parts.isdigit() and int(number) < int(parts)):
        raise argparse.ArgumentTypeError(f"{text}: expected I/N with I from 0 to N-1, such as 0/8")
    return int(number), int(parts)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_input_arguments(parser)
    parser.add_argument("--output-prefix", required=True, metavar="P", help="corpus to write")
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="SPEC",
        help="a SentencePiece .model, a tokenizer.json, tiktoken:NAME, a .tiktoken rank file, vocab.json beside "
        "merges.txt, or `bytes`",
    )
    parser.add_argument(
        "--eod", metavar="TOKEN", help="token that ends documents, where the tokenizer's files leave it open"
    )
    parser.add_argument(
        "--backend",
        choices=["fastest", "reference"],
        default="fastest",
        help="fastest: a fast library where it is found to give the reference's ids, document by document (default); "
        "reference: the library that the tokenizer's format is of",
    )
    add_workers(parser)
    parser.add_argument(
        "--executor",
        choices=["processes", "ray"],
        default="processes",
        help="ray: a Ray cluster (RAY_ADDRESS, else one on this machine) that shares the file system "
        "of input and output",
    )
    share = parser.add_mutually_exclusive_group()
    share.add_argument(
        "--part", type=part_of, metavar="I/N", help="do only the I-th (from 0) of N parts, for --merge later"
    )
    share.add_argument("--merge", action="store_true", help="make the corpus of parts that are done")
    add_shard_size(parser)
    parser.add_argument(
        "--valid-fraction",
        type=fraction,
        default=0.0,
        metavar="F",
        help="write P_train and P_valid, this share of the documents in P_valid",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of documents for P_valid (default: 0)")
    add_error_argument(parser)
    parser.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="SPEC",
        dest="filters",
        help=f"keep only what passes: {describe_filters()}",
    )
    return parser


def print_report(manifests: dict[str, Manifest], outcome: Outcome, found: Found, seconds: float) -> None:
    for prefix, manifest in manifests.items():
        shards = f" in {len(manifest.shards)} shards" if len(manifest.shards) > 1 else ""
        print(
            f"{prefix}: {manifest.documents:,} documents, {manifest.tokens:,} tokens ({manifest.dtype}){shards}, "
            f"{manifest.text_bytes / manifest.tokens:.2f} bytes per token"
        )
    size = sum(manifest.text_bytes for manifest in manifests.values())
    print(
        f"{size / 1e6:,.1f} MB of text from {len(found.sources):,} files{describe_skipped(found)} "
        f"in {seconds:.1f} s: {size / 1e6 / seconds:.1f} MB/s"
    )
    for reason, count in sorted(outcome.left_out.items()):
        print(f"left out {count:,} documents: {reason}")
    for line in outcome.named:
        print(f"  {line}")
    if outcome.left_out["unreadable"] > len(outcome.named):
        print(f"  and {outcome.left_out['unreadable'] - len(outcome.named):,} more")
    if outcome.inexact_cuts:
        print(
            f"long documents were encoded in parts; at {outcome.inexact_cuts:,} places the tokens beside the cut are "
            "others than those of the whole"
        )


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return report_errors(lambda: run(arguments), "interrupted: what is done is kept; the same command goes on")


def run(arguments: argparse.Namespace) -> None:
    start = time.monotonic()
    prefix = arguments.output_prefix
    if not os.path.basename(prefix):
        raise MegamupError(f"--output-prefix {prefix}: a folder; add a name, such as data")
    part = None if arguments.part is None else arguments.part[0]
    if "-" in arguments.input and (arguments.part or arguments.merge):
        raise MegamupError("--input -: standard input can't be shared by parts; write it to a file first")
    reference = load_tokenizer(arguments.tokenizer, arguments.eod)
    with ExitStack() as stack:
        work = WorkFolder(prefix)
        stack.enter_context(work.held(part))
        found = find(arguments.input, arguments.suffix, arguments.exclude, spool=work.path / "stdin")
        options = read_options(arguments, arguments.on_error)
        units = plan_units(found)
        tokenizer: Tokenizer = reference
        if arguments.backend == "fastest":
            tokenizer = fastest_exact(reference, list(first_texts(units, options)))
        encoder = Encoder(tokenizer, arguments.filters, arguments.valid_fraction, arguments.seed)
        job = Job(prefix, found, units, options, encoder, arguments.shard_size)
        progress = stack.enter_context(ByteProgress("tokenizing", found.total_bytes))
        executor = stack.enter_context(make_executor(arguments.executor, arguments.workers))
        work_on(Run(job, work, executor, progress), arguments, start)


def work_on(run: Run, arguments: argparse.Namespace, start: float) -> None:
    """All of the job, one part of it, or its end."""
    units = range(len(run.job.units))
    if arguments.part:
        number, parts = arguments.part
        run.encode(units[number::parts], assembling=False)
        print(
            f"part {number}/{parts} is done: {len(units[number::parts]):,} of {len(units):,} units; --merge comes last"
        )
        return
    if not arguments.merge:
        run.encode(units, assembling=True)
    manifests = run.finish()
    print_report(manifests, run.outcome, run.job.found, time.monotonic() - start)


if __name__ == "__main__":
    sys.exit(main())
