#!/usr/bin/env python3
"""Loss and perplexity of a trained model on held-out text: ``tools/evaluate.py RUN[@STEP] [a.b=c ...]``.

Of the run's own ``data.valid`` or of another, such as ``data.valid={books: P, code: [P1, P2]}``: per token, byte and
word. A run of several ranks is evaluated under the launcher with as many (``torchrun --nproc-per-node N
tools/evaluate.py ...``). What it prints is added to RUN/evaluation.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys

from megamup.cli import report_errors


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN[@STEP]", help="folder of a run; default its last checkpoint")
    parser.add_argument("changes", nargs="*", metavar="a.b=c", help="keys of its config, such as data.valid")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)  # the launcher's
    arguments = parser.parse_intermixed_args(argv)
    return report_errors(lambda: show(arguments))


def show(arguments: argparse.Namespace) -> None:
    from megamup.train.evaluate_run import (
        evaluate_run,  # torch and DeepSpeed, after the arguments are known to be right
    )

    found = evaluate_run(arguments.run, arguments.changes)
    if found is not None:
        print(json.dumps(found.as_json()) if arguments.json else "\n".join(found.lines()), flush=True)


if __name__ == "__main__":
    sys.exit(main())
