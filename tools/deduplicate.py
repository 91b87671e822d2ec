#!/usr/bin/env python3
"""Text without its duplicates, as JSON lines in a folder that preprocess_data.py takes as input.

tools/deduplicate.py --input corpus/ --output data/unique --method exact
tools/deduplicate.py --input wiki.jsonl.gz web/*.parquet --output data/unique --method minhash --threshold 0.8

Of documents that are alike the first stays, in the order of the input; only texts are kept, under the key "text".
exact: equal texts. minhash: texts that share most of their n-grams of words (needs the extra megamup[filters]); a
document that is like another one that is like a third counts as like the third. A report lies beside the output, in
FOLDER.report.json. Interrupted or killed, the same command goes on where it stopped.

On the disk, until the end, it takes 512 bytes a document and 8 for each band (minhash; 24 in all with exact), and the
output; of memory about 50 bytes a document, and a few hundred MB a worker.
"""

import argparse
import os
import sys
import time

from megamup.cli import add_workers, report_errors
from megamup.data.deduplicate.duplicates import Exact, Method, MinHash
from megamup.data.deduplicate.run import Job, Run, report_path
from megamup.data.reading.sources import add_error_argument, add_input_arguments, describe_skipped, find, read_options
from megamup.data.work.executors import make_executor
from megamup.data.work.folder import WorkFolder
from megamup.errors import MegamupError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_input_arguments(parser)
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to write; new or empty")
    parser.add_argument("--method", choices=["exact", "minhash"], required=True, help="what a duplicate is")
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="S",
        help=f"minhash: least share of n-grams in common, of all that either has (default: {MinHash.threshold})",
    )
    parser.add_argument(
        "--ngram", type=int, metavar="N", help=f"minhash: words of an n-gram (default: {MinHash.ngram})"
    )
    parser.add_argument("--compress", action="store_true", help="write zstd")
    add_workers(parser)
    add_error_argument(parser)
    return parser


def method_of(arguments: argparse.Namespace) -> Method:
    given = {name: getattr(arguments, name) for name in ("threshold", "ngram") if getattr(arguments, name) is not None}
    if arguments.method == "minhash":
        return MinHash(**given)
    if given:
        raise MegamupError(f"--{next(iter(given))}: has no meaning with --method exact; leave it out, or take minhash")
    return Exact()


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return report_errors(lambda: run(arguments), "interrupted: what is done is kept; the same command goes on")


def run(arguments: argparse.Namespace) -> None:
    start = time.monotonic()
    method, output = method_of(arguments), os.path.normpath(arguments.output)
    method.signer()  # a package that is missing is found here
    work = WorkFolder(output)
    with work.held():
        spool = work.path / "stdin"
        spool.unlink(missing_ok=True)
        found = find(arguments.input, arguments.suffix, arguments.exclude, spool)
        options = read_options(arguments, arguments.on_error)
        job = Job(output, found, options, method, arguments.compress)
        with make_executor("processes", arguments.workers) as executor:
            report = Run(job, work, executor).run()
    seconds = time.monotonic() - start
    for entry in report["inputs"]:
        print(f"{entry['path']}: {entry['documents']:,} documents, {entry['duplicates']:,} duplicates")
    print(
        f"{output}: {report['kept']:,} of {report['documents']:,} documents, from {len(found.sources):,} files"
        f"{describe_skipped(found)} in {seconds:.1f} s ({found.total_bytes / 1e6 / seconds:.1f} MB/s); "
        f"report in {report_path(output)}"
    )
    if report["unreadable"]:
        print(f"left out {report['unreadable']:,} unreadable documents:")
        print("\n".join(f"  {line}" for line in report["unreadable_named"]))


if __name__ == "__main__":
    sys.exit(main())
