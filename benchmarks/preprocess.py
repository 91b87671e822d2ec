#!/usr/bin/env python3
"""Text to verified token shards: ours beside the libraries that others build on, one run, the same file.

    ./dev bench preprocess [--megabytes 300] [--repeat 3] [--output benchmarks/results/preprocess.md]

Ours is timed as a user meets it: `tools/preprocess_data.py` from its start (interpreter, imports, self-check) to synced
shards that were read back, and then `tools/shards.py verify` as well; about a second of that doesn't grow with the
input. The others are timed at what they do best, texts
already in memory and nothing written, but for datatrove, which is timed reading the same JSON lines and writing its own
tokens. Slow ones get the first part of the file. Peak memory is the largest sum of PSS over our processes.

The text is the novels and C4 of ../shared/corpora, in documents of 0.8 to 12 kB. It repeats after 69 MB, which makes
the word caches of gigatoken look good; so the first 69 MB, in which nothing repeats, are timed alone as well.

Exit code 1 where a bound doesn't hold: byte-level BPE at 80 MB/s on 2 cores, SentencePiece at 90% of the raw encoder's
rate, peak memory under 1 GiB, the same bytes from 1, 2 and 4 workers.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from machine import processor

ROOT = Path(__file__).resolve().parents[1]
CORPORA = ROOT.parent / "shared" / "corpora"
VOCAB = 32_000
SLOW_MB = 20
"""What encoders of a few MB/s get."""
BOUND_BPE, BOUND_SENTENCEPIECE, BOUND_MEMORY = 80.0, 0.90, 1 << 30


@dataclass
class Results:
    """Lines of the table, and the bounds that didn't hold."""

    rows: list[tuple[str, str, float, str]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def add(self, who: str, what: str, rates: list[float], note: str = "") -> float:
        spread = f"{min(rates):.0f} to {max(rates):.0f}" if len(rates) > 1 else ""
        self.rows.append((who, what, median(rates), ", ".join(filter(None, [spread, note]))))
        print(f"{who:28} {what:46} {median(rates):9.1f} MB/s  {self.rows[-1][3]}", flush=True)
        return median(rates)

    def hold(self, claim: str, holds: bool) -> None:
        print(f"{'holds' if holds else 'DOES NOT HOLD'}: {claim}", flush=True)
        if not holds:
            self.broken.append(claim)


def documents() -> Iterator[str]:
    """All text once, in documents of a web page's size, in a fixed random order."""
    generator = random.Random(0)
    texts, _ = texts_of(CORPORA / "c4_sample.jsonl")
    for line in gzip.decompress((CORPORA / "novels.jsonl.gz").read_bytes()).splitlines():
        novel, start = json.loads(line)["text"], 0
        while start < len(novel):
            size = generator.choice([800, 2000, 4000, 12_000])
            texts.append(novel[start : start + size])
            start += size
    generator.shuffle(texts)
    yield from texts


def write_input(path: Path, megabytes: int) -> int:
    """The text as JSON lines, again and again up to the size; returns the bytes in which nothing repeats."""
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in documents()]
    once = sum(map(len, lines))
    size = 0
    with open(path, "wb") as file:
        while size < megabytes * 1_000_000:
            for line in lines:
                size += file.write(line)
                if size >= megabytes * 1_000_000:
                    break
    return min(once, size)


def head(source: Path, target: Path, size: int) -> Path:
    """The first whole lines of a file, at least `size` bytes of them."""
    with open(source, "rb") as lines, open(target, "wb") as file:
        shutil.copyfileobj(_limited(lines, size), file)
        file.write(lines.readline())
    return target


def _limited(file: Any, size: int) -> Any:
    class Limited:
        left = size

        def read(self, length: int) -> bytes:
            data: bytes = file.read(min(length, self.left))
            self.left -= len(data)
            return data

    return Limited()


def tool(*arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stderr[-2000:]}")


def ours(source: Path, output: Path, tokenizer: Path, workers: int, *more: str) -> float:
    """Seconds from the command to verified shards."""
    start = time.perf_counter()
    tool(
        *("tools/preprocess_data.py", "--input", str(source), "--output-prefix", str(output)),
        *("--tokenizer", str(tokenizer), "--workers", str(workers), *more),
    )
    tool("tools/shards.py", "verify", str(output))
    return time.perf_counter() - start


def peak_memory(action: Callable[[], object]) -> int:
    """Largest sum of PSS (shared pages divided among their processes) of all processes below this one, in bytes."""
    peak, stop = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.05):
            total = 0
            for process in psutil.Process().children(recursive=True):
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue
            peak = max(peak, total)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        action()
    finally:
        stop.set()
        watcher.join()
    return peak


def rate(action: Callable[[], object], size: int) -> float:
    start = time.perf_counter()
    action()
    return size / 1e6 / (time.perf_counter() - start)


def limits(results: Results, source: Path, folder: Path, repeat: int) -> None:
    """What the machine could do at most."""
    data = source.read_bytes()
    size, copy = len(data), bytearray(len(data))

    def copy_memory() -> None:
        copy[:] = data

    def write() -> None:
        with open(folder / "copy", "wb") as file:
            file.write(data)
            os.fsync(file.fileno())

    copy_memory()
    results.add("memcpy", "the file's bytes", [rate(copy_memory, size) for _ in range(repeat)])
    results.add("disk", "write and fsync the file's bytes", [rate(write, size) for _ in range(repeat)])
    results.add("disk", "read the file (page cache)", [rate(source.read_bytes, size) for _ in range(repeat)])
    (folder / "copy").unlink()


def texts_of(path: Path) -> tuple[list[str], int]:
    texts = [json.loads(line)["text"] for line in path.read_bytes().splitlines()]
    return texts, sum(len(text.encode()) for text in texts)


def byte_level(
    results: Results, source: Path, once: Path, slow: Path, tokenizer: Path, folder: Path, repeat: int
) -> None:
    """Byte-level BPE, the tokenizers of GPT, Llama 3 and Qwen."""
    size = source.stat().st_size
    what = f"JSONL to verified shards, {size / 1e6:.0f} MB"
    rates = [size / 1e6 / ours(source, folder / "ours", tokenizer, 2) for _ in range(repeat)]
    mean = results.add("megamup, 2 workers", what, rates)
    results.hold(f"byte-level BPE at {BOUND_BPE:.0f} MB/s or more on 2 cores ({mean:.0f})", mean >= BOUND_BPE)
    small = once.stat().st_size
    rates = [small / 1e6 / ours(once, folder / "once", tokenizer, 2) for _ in range(repeat)]
    results.add("megamup, 2 workers", f"the same, {small / 1e6:.0f} MB, nothing repeats", rates)
    memory = peak_memory(lambda: ours(source, folder / "ours", tokenizer, 2))
    results.hold(f"peak memory under 1 GiB on {size / 1e6:.0f} MB ({memory / 2**20:.0f} MiB)", memory < BOUND_MEMORY)
    same_bytes(results, source, tokenizer, folder)
    whole_file(results, source, tokenizer, repeat)
    others(results, slow, tokenizer, folder)


def same_bytes(results: Results, source: Path, tokenizer: Path, folder: Path) -> None:
    hashes = []
    for workers in (1, 2, 4):
        seconds = ours(source, folder / "same", tokenizer, workers)
        files = sorted(path for path in folder.glob("same*") if path.is_file())
        hashes.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in files])
        results.add(f"megamup, {workers} workers", "JSONL to verified shards", [source.stat().st_size / 1e6 / seconds])
    results.hold("1, 2 and 4 workers give the same bytes (.bin, .idx, .json)", hashes[0] == hashes[1] == hashes[2])


def whole_file(results: Results, source: Path, tokenizer: Path, repeat: int) -> None:
    """Megatron's newest path: gigatoken reads the file itself, all of the ids are in memory at once."""
    import gigatoken

    encoder = gigatoken.Tokenizer(str(tokenizer))
    encode = lambda: encoder.encode_files(gigatoken.JsonlFileSource([str(source)]))  # noqa: E731
    rates = [rate(encode, source.stat().st_size) for _ in range(repeat)]
    results.add("gigatoken, 2 threads", "JSONL to ids in memory (whole-file path)", rates)


def others(results: Results, slow: Path, tokenizer: Path, folder: Path) -> None:
    import tiktoken
    import tokenizers

    texts, size = texts_of(slow)
    reference = tokenizers.Tokenizer.from_file(str(tokenizer))
    note = f"first {size / 1e6:.0f} MB"
    results.add(
        "HF tokenizers, 2 threads",
        "encode_batch, texts in memory",
        [rate(lambda: reference.encode_batch(texts), size)],
        note,
    )
    ranks = gpt2_ranks(json.loads(tokenizer.read_text(encoding="utf-8"))["model"]["vocab"])
    encoding = tiktoken.Encoding("benchmark", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    encode = lambda: encoding.encode_ordinary_batch(texts, num_threads=2)  # noqa: E731
    results.add("tiktoken, 2 threads", "encode_ordinary_batch, texts in memory", [rate(encode, size)], note)
    datatrove(results, slow, tokenizer, folder)


GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def gpt2_ranks(vocab: dict[str, int]) -> dict[bytes, int]:
    """Byte strings by rank, as tiktoken wants them, of a vocabulary in GPT-2's printable bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
    pieces = {
        bytes(byte_of[character] for character in piece): rank
        for piece, rank in vocab.items()
        if set(piece) <= byte_of.keys()
    }
    return {piece: rank for rank, piece in enumerate(sorted(pieces, key=pieces.__getitem__))}


def datatrove(results: Results, slow: Path, tokenizer: Path, folder: Path) -> None:
    program = (
        "import sys\n"
        "from datatrove.executor import LocalPipelineExecutor\n"
        "from datatrove.pipeline.readers import JsonlReader\n"
        "from datatrove.pipeline.tokens import DocumentTokenizer\n"
        "source, output, tokenizer = sys.argv[1:]\n"
        "if __name__ == '__main__':\n"
        "    LocalPipelineExecutor(\n"
        "        pipeline=[JsonlReader(source), DocumentTokenizer(output, tokenizer_name_or_path=tokenizer,\n"
        "                  eos_token='<|endoftext|>', shuffle_documents=False)],\n"
        "        tasks=2, workers=2, logging_dir=output + '.log').run()\n"
    )
    parts = folder / "datatrove"  # one file a task is how it divides its work
    parts.mkdir()
    lines = slow.read_bytes().splitlines(keepends=True)
    for part in range(2):
        (parts / f"{part}.jsonl").write_bytes(b"".join(lines[part::2]))
    (folder / "tokenize_with_datatrove.py").write_text(program)
    call = [str(folder / "tokenize_with_datatrove.py"), str(parts), str(folder / "datatrove.out"), str(tokenizer)]
    results.add(
        "datatrove, 2 tasks",
        "DocumentTokenizer, JSONL to its tokens",
        [rate(lambda: tool(*call), slow.stat().st_size)],
        f"first {slow.stat().st_size / 1e6:.0f} MB",
    )


def sentencepiece(results: Results, source: Path, once: Path, kind: str, folder: Path, repeat: int) -> None:
    """Ours with sentencepiece itself, against its raw rate on the same documents: to lists (its default), to arrays."""
    import sentencepiece as library

    model = train(once, kind, folder)
    processor = library.SentencePieceProcessor(model_file=str(model))
    texts, size = texts_of(source)
    lists, arrays, mine = [], [], []
    for _ in range(repeat):
        lists.append(rate(lambda: processor.encode(texts, num_threads=2, out_type=int), size))
        arrays.append(rate(lambda: processor.encode(texts, num_threads=2, out_type="numpy"), size))
        mine.append(size / 1e6 / ours(source, folder / kind, model, 2, "--backend", "reference"))
    note = f"{size / 1e6:.0f} MB"
    results.add("sentencepiece, 2 threads", f"{kind}, texts in memory, to lists", lists, note)
    results.add("sentencepiece, 2 threads", f"{kind}, texts in memory, to arrays", arrays, note)
    results.add("megamup, 2 workers", f"{kind}, JSONL to verified shards by sentencepiece", mine, note)
    share, of_arrays = (median(mine) / median(raw) for raw in (lists, arrays))
    results.hold(
        f"SentencePiece {kind} at {BOUND_SENTENCEPIECE:.0%} of the raw rate or more ({share:.0%}; {of_arrays:.0%} of "
        "that to arrays)",
        share >= BOUND_SENTENCEPIECE,
    )
    if kind == "bpe":
        fast = [size / 1e6 / ours(source, folder / kind, model, 2) for _ in range(repeat)]
        results.add("megamup, 2 workers", f"{kind}, JSONL to verified shards, fastest exact", fast, note)


def train(source: Path, kind: str, folder: Path) -> Path:
    prefix = folder / f"tokenizer-{kind}"
    tool(
        *("tools/train_tokenizer.py", "--input", str(source), "--vocab-size", str(VOCAB), "--output", str(prefix)),
        *("--type", kind, "--max-bytes", "20000000"),
    )
    return prefix.with_suffix(".json" if kind == "byte-bpe" else ".model")


def report(results: Results, megabytes: int) -> str:
    packages = ("gigatoken", "tokenizers", "tiktoken", "sentencepiece", "datatrove", "numpy", "orjson")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    lines = [
        f"`./dev bench preprocess --megabytes {megabytes}`, {date.today()}, {len(os.sched_getaffinity(0))} cores of a "
        f"shared machine ({processor()}), Python {platform.python_version()}, {versions}.",
        "",
        "| who | what | MB/s | range |",
        "|---|---|---|---|",
        *(f"| {who} | {what} | {value:,.1f} | {note} |" for who, what, value, note in results.rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the table here as Markdown")
    arguments = parser.parse_args()
    if not CORPORA.is_dir():
        print(f"skipped: no corpora at {CORPORA}")
        return 0
    results = Results()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "input.jsonl"
        once = head(source, folder / "once.jsonl", write_input(source, arguments.megabytes) - 1)
        slow = head(source, folder / "slow.jsonl", SLOW_MB * 1_000_000)
        limits(results, source, folder, arguments.repeat)
        byte_level(results, source, once, slow, train(once, "byte-bpe", folder), folder, arguments.repeat)
        sentencepiece(results, source, once, "bpe", folder, 1)  # a minute and a half
        sentencepiece(results, source, once, "unigram", folder, arguments.repeat)
    if arguments.output:
        arguments.output.write_text(report(results, arguments.megabytes), encoding="utf-8")
    return 1 if results.broken else 0


if __name__ == "__main__":
    sys.exit(main())
