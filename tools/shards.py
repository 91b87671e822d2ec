#!/usr/bin/env python3
"""Look into token shards, verify, copy and make them, and ask a run which documents it saw.

tools/shards.py info data/c4                                 tools/shards.py verify data/c4_train data/c4_valid
tools/shards.py head data/c4 -n 2                            tools/shards.py merge data/a data/b --output data/ab
tools/shards.py split data/ab --output data/cut --shard-size 1GB
tools/shards.py split data/ab --output data/held --valid-fraction 0.01
tools/shards.py from-nanogpt train.bin --output data/owt --tokenizer tiktoken:gpt2
tools/shards.py which --run runs/small --step 100 --decode
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from megamup.cli import add_shard_size, fraction, positive, report_errors
from megamup.data.corpus import Corpus
from megamup.data.manifest import Manifest, TokenizerEntry
from megamup.data.progress import ByteProgress
from megamup.errors import MegamupError

SHOWN = 200
"""Characters of a sample that `which --decode` shows."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    one = verb("info", info, "what a corpus holds")
    one.add_argument("prefix", nargs="+", metavar="P")
    one = verb(
        "verify", verify, "read all of it: checksums, index, ids, tokenizer; exit code 2 where something is wrong"
    )
    one.add_argument("prefix", nargs="+", metavar="P")
    one = verb("head", head, "the first documents, decoded")
    one.add_argument("prefix", metavar="P")
    one.add_argument("-n", type=positive, default=1, metavar="N", help="documents (default: 1)")
    one.add_argument("--tokens", type=positive, default=200, metavar="T", help="tokens of each (default: 200)")
    one.add_argument("--tokenizer", metavar="SPEC", help="default: the one stored beside the shards")
    one = verb("merge", merge, "several corpora one after the other, as one")
    one.add_argument("prefix", nargs="+", metavar="P")
    add_output(one)
    add_shard_size(one)
    one = verb("split", split, "the same documents in other shards, or divided in OUTPUT_train and OUTPUT_valid")
    one.add_argument("prefix", metavar="P")
    add_output(one)
    how = one.add_mutually_exclusive_group(required=True)
    add_shard_size(how, default=None)
    how.add_argument("--valid-fraction", type=fraction, metavar="F", help="share of the documents in OUTPUT_valid")
    one.add_argument("--seed", type=int, default=0, help="of the choice of documents for OUTPUT_valid (default: 0)")
    one = verb("from-nanogpt", from_nanogpt, "nanoGPT's raw uint16 train.bin (or llm.c's) as a corpus")
    one.add_argument("file", metavar="F")
    add_output(one)
    add_shard_size(one)
    one.add_argument(
        "--vocab-size", type=int, default=50257, help="where no --tokenizer tells (default: GPT-2's 50257)"
    )
    one.add_argument("--eod-id", type=int, default=50256, help="where no --tokenizer tells (default: GPT-2's 50256)")
    one = verb("which", which, "the documents that a step of a run saw")
    one.add_argument("--run", required=True, metavar="R", dest="run_folder", help="the run's folder")
    one.add_argument("--step", type=int, required=True, metavar="K", help="as metrics.jsonl counts, from 1")
    one.add_argument("--decode", action="store_true", help="show the beginning of each sample's text")
    return parser


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", required=True, metavar="P", help="prefix of the corpus to write")
    parser.add_argument("--tokenizer", metavar="SPEC", help="of the ids, for files without a manifest that names it")


def info(arguments: argparse.Namespace) -> None:
    for prefix in arguments.prefix:
        corpus = Corpus(prefix)
        ends = [(piece.min(), piece.max()) for piece in corpus.lengths()]
        shortest, longest = min(low for low, _ in ends), max(high for _, high in ends)
        print(f"{prefix}: {len(corpus):,} documents, {corpus.n_tokens:,} tokens ({corpus.dtype.name})")
        print(f"  document lengths: {shortest:,} to {longest:,}, mean {corpus.n_tokens / len(corpus):,.0f}")
        if corpus.manifest is None:
            print("  no manifest: made by another program")
            continue
        describe(corpus.manifest)
        for shard in corpus.manifest.shards:
            print(
                f"  shard {shard.name}: {shard.documents:,} documents, {shard.tokens:,} tokens, "
                f"SHA-256 {shard.bin_sha256}"
            )


def describe(manifest: Manifest) -> None:
    tokenizer = manifest.tokenizer
    print(
        f"  tokenizer {tokenizer.name}, {manifest.vocab_size:,} ids (largest used {manifest.max_id:,}), "
        f"SHA-256 {tokenizer.sha256}"
    )
    if tokenizer.backend:
        print(f"  encoded by {tokenizer.backend}" + (f"; {tokenizer.note}" if tokenizer.note else ""))
    if manifest.text_bytes:
        print(
            f"  {manifest.text_bytes / 1e6:,.1f} MB of text, "
            f"{manifest.text_bytes / manifest.tokens:.2f} bytes per token"
            + (f", {manifest.text_words:,} words" if manifest.text_words else "")
        )
    for source in manifest.sources:
        print("  from " + ", ".join(f"{key} {value}" for key, value in source.items()))
    for reason, count in manifest.left_out.items():
        print(f"  left out: {count:,} documents, {reason}")


def verify(arguments: argparse.Namespace) -> None:
    from megamup.data.corpus_tools import verify as verify_corpus

    for prefix in arguments.prefix:
        corpus = Corpus(prefix)
        with progress("verifying", [corpus]) as bar:
            verify_corpus(corpus, bar.advance)
        print(f"{prefix}: {len(corpus):,} documents, {corpus.n_tokens:,} tokens: {checked(corpus)}")


def checked(corpus: Corpus) -> str:
    """What `verify` has found right."""
    if corpus.manifest is None:
        return "index is right; no manifest tells checksums"
    if corpus.manifest.tokenizer.folder is None:
        return "checksums, index and ids are right; no tokenizer lies beside it"
    return "checksums, index, ids and tokenizer are right"


def progress(label: str, corpora: list[Corpus]) -> ByteProgress:
    shards = [shard for corpus in corpora for shard in corpus.shards]
    return ByteProgress(
        label, sum(path.stat().st_size for shard in shards for path in (shard.bin_path, shard.idx_path))
    )


def head(arguments: argparse.Namespace) -> None:
    from megamup.data import corpus_tools

    corpus = Corpus(arguments.prefix)
    if arguments.tokenizer:
        tokenizer = corpus_tools.vocabulary([corpus], arguments.tokenizer).tokenizer
    else:
        tokenizer = corpus_tools.stored_tokenizer(corpus)
    if tokenizer is None:
        raise MegamupError(f"{arguments.prefix!r} has no tokenizer beside it; name one with --tokenizer")
    for index in range(min(arguments.n, len(corpus))):
        ids = corpus.document(index)
        more = f", the first {arguments.tokens:,} shown" if len(ids) > arguments.tokens else ""
        print(f"--- document {index}: {len(ids):,} tokens{more}")
        print(tokenizer.decode(ids[: arguments.tokens]))


def merge(arguments: argparse.Namespace) -> None:
    from megamup.data import corpus_tools

    corpora = [Corpus(prefix) for prefix in arguments.prefix]
    meaning = corpus_tools.vocabulary(corpora, arguments.tokenizer)
    with progress("merging", corpora) as bar:
        manifest = corpus_tools.merge(corpora, arguments.output, meaning, arguments.shard_size, bar.advance)
    tell(arguments.output, manifest)


def split(arguments: argparse.Namespace) -> None:
    from megamup.data import corpus_tools

    if arguments.valid_fraction is None:
        arguments.prefix = [arguments.prefix]
        merge(arguments)
        return
    corpus = Corpus(arguments.prefix)
    meaning = corpus_tools.vocabulary([corpus], arguments.tokenizer)
    outputs = (f"{arguments.output}_train", f"{arguments.output}_valid")
    manifests = corpus_tools.split(corpus, outputs, arguments.valid_fraction, arguments.seed, meaning)
    for output, manifest in zip(outputs, manifests, strict=True):
        tell(output, manifest)


def from_nanogpt(arguments: argparse.Namespace) -> None:
    from megamup.data.corpus_tools import Vocabulary
    from megamup.data.corpus_tools import from_nanogpt as convert
    from megamup.data.tokenizer import load_tokenizer

    if arguments.tokenizer:
        meaning = Vocabulary.of(load_tokenizer(arguments.tokenizer))
    else:
        meaning = Vocabulary(arguments.vocab_size, arguments.eod_id, TokenizerEntry.unknown())
    tell(arguments.output, convert(Path(arguments.file), arguments.output, meaning, arguments.shard_size))


def which(arguments: argparse.Namespace) -> None:
    from megamup.data.consumed import documents_of_step
    from megamup.data.corpus_tools import stored_tokenizer

    samples = documents_of_step(Path(arguments.run_folder), arguments.step)
    corpora = {prefix: Corpus(prefix) for prefix in {sample.prefix for sample in samples}}
    tokenizers = {prefix: stored_tokenizer(corpus) for prefix, corpus in corpora.items()} if arguments.decode else {}
    print(f"step {arguments.step} of {arguments.run_folder}: {len(samples)} sequences")
    for place, sample in enumerate(samples):
        print(
            f"{place:5} {sample.source}, epoch {sample.epoch}, sample {sample.index}, "
            f"tokens {sample.start} to {sample.stop}"
        )
        for part in sample.parts:
            print(f"        document {part.document}, its tokens {part.start} to {part.stop}")
        tokenizer = tokenizers.get(sample.prefix)
        if tokenizer is not None:
            print(f"        {tokenizer.decode(corpora[sample.prefix].tokens(sample.start, sample.stop))[:SHOWN]!r}")


def tell(prefix: str, manifest: Manifest) -> None:
    shards = f" in {len(manifest.shards)} shards" if len(manifest.shards) > 1 else ""
    print(f"{prefix}: {manifest.documents:,} documents, {manifest.tokens:,} tokens ({manifest.dtype}){shards}")


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return report_errors(lambda: arguments.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
