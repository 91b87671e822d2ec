"""``megamup NAME ...``: the programs of tools/ and launch/, where the package is installed without its checkout.

What the programs share is here too: how they end, and the types of their arguments.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import cast

from megamup.errors import MegamupError, OneRankError
from megamup.shipped import ROOTS


def report_errors(action: Callable[[], None], interrupted: str = "interrupted") -> int:
    """Run a program's body; what the user should know of its end goes to stderr as one message.

    Returns:
        The exit code: 0; 2 after an error in what the user gave; 130 after Ctrl-C, which prints ``interrupted``.
    """
    try:
        action()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (head, say) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (MegamupError, OSError) as error:
        if tells(error):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    return 0


def tells(error: Exception) -> bool:
    """Whether this process should report an error: where a launcher started several, all of them find the same fault
    in what the user gave, and one a host says so; a `OneRankError` or the system's may be this one's alone."""
    first = (os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0") == "0"
    return first or isinstance(error, OneRankError | OSError)


def fraction(text: str) -> float:
    """An argument between 0 and 1."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a number between 0 and 1")
    return value


def positive(text: str) -> int:
    """An argument that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a positive number")
    return value


def byte_size(text: str) -> int:
    """An argument in bytes, with a unit if it likes: 500MB, 2GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2] or " ")) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a size such as 500MB or 2GiB")
    return size


def add_workers(parser: argparse.ArgumentParser) -> None:
    """--workers of the programs that share work among processes."""
    parser.add_argument(
        "--workers",
        type=positive,
        default=len(os.sched_getaffinity(0)),
        help="processes, without effect on the output (default: the cores, %(default)s)",
    )


def add_shard_size(parser: argparse._ActionsContainer, default: str | None = "16GB") -> None:
    """--shard-size of the programs that write shards."""
    parser.add_argument(
        "--shard-size",
        type=byte_size,
        default=default,
        metavar="S",
        help="largest .bin, such as 500MB; more than one shard is numbered P-00000, P-00001, ..."
        + (f" (default: {default})" if default else ""),
    )


def programs() -> dict[str, Path]:
    """Programs by name: inside the package in a wheel, beside it in a checkout."""
    found: dict[str, Path] = {}
    for root in ROOTS:
        for folder in ("tools", "launch"):
            found |= {path.stem: path for path in sorted((root / folder).glob("[!_]*.py"))}
    return found


def load_program(path: Path) -> ModuleType:
    """A program's file as a module, known by name: worker processes look functions up there."""
    spec = importlib.util.spec_from_file_location(f"megamup_program_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    known = programs()
    if not arguments or arguments[0] not in known:
        print(f"usage: megamup NAME ...\nNAME: {', '.join(sorted(known))}", file=sys.stderr)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    path = known[arguments[0]]
    sys.argv = [f"megamup {arguments[0]}", *arguments[1:]]
    return cast(int, load_program(path).main(arguments[1:]))


if __name__ == "__main__":
    sys.exit(main())
