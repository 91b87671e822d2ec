"""tiktoken's encodings: a file of ranks, and a pattern and special tokens that OpenAI keeps in code."""

from __future__ import annotations

import base64
import binascii
import json
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from megamup.data.tokenizer.base import (
    FastBackendError,
    FileTokenizer,
    Ids,
    Lengths,
    choose_eod,
    join_ids,
    panics_as_errors,
    require,
)
from megamup.errors import MegamupError

RANKS, ENCODING = "ranks.tiktoken", "encoding.json"
EOT = "<|endoftext|>"
FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
EOP = "<|endofprompt|>"

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
CL100K_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"""
    r"""|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
)
O200K_PATTERN = "|".join(
    [
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""\p{N}{1,3}""",
        r""" ?[^\s\p{L}\p{N}]+[\r\n/]*""",
        r"""\s*[\r\n]+""",
        r"""\s+(?!\S)""",
        r"""\s+""",
    ]
)


class Encoding(NamedTuple):
    pattern: str
    special: dict[str, int]


ENCODINGS = {
    "gpt2": Encoding(GPT2_PATTERN, {EOT: 50256}),
    "r50k_base": Encoding(GPT2_PATTERN, {EOT: 50256}),
    "p50k_base": Encoding(GPT2_PATTERN, {EOT: 50256}),
    "cl100k_base": Encoding(
        CL100K_PATTERN, {EOT: 100257, **dict(zip(FIM, range(100258, 100261), strict=True)), EOP: 100276}
    ),
    "o200k_base": Encoding(O200K_PATTERN, {EOT: 199999, EOP: 200018}),
}
"""What a rank file of this name lacks. Fixed here, as tiktoken rewrites its patterns for speed, and they are hashed."""

GIGATOKEN_PATTERNS = {GPT2_PATTERN: "gpt2", CL100K_PATTERN: "gpt4", O200K_PATTERN: "o200k"}


class TiktokenTokenizer(FileTokenizer):
    """An encoding of tiktoken. No text becomes a special token.

    Args:
        name: for people.
        ranks: a rank file, a line `base64(token) rank` for each token.
        encoding: JSON of its `pattern` and `special` tokens.
        eod: the end-of-document token, a special token; default: the one that is well known for it.

    Raises:
        MegamupError: not a rank file, or no such token.
    """

    kind: ClassVar[str] = "tiktoken"
    package: ClassVar[str] = "tiktoken"

    def __init__(self, name: str, ranks: bytes, encoding: bytes, eod: str | None = None) -> None:
        parsed, special = parse_ranks(ranks, name), json.loads(encoding)["special"]
        eod = choose_eod(name, eod, list(special))
        super().__init__(name, {RANKS: ranks, ENCODING: encoding}, eod)
        if taken := set(parsed.values()) & set(special.values()):
            raise MegamupError(
                f"tokenizer {name!r}: {len(taken):,} ranks are ids of this encoding's special tokens, the first "
                f"{min(taken):,}; expected the encoding that the file belongs to"
            )
        self._special = special
        self.eod_id = special[eod]
        self.vocab_size = max(*parsed.values(), *special.values()) + 1

    @cached_property
    def _processor(self) -> Any:
        return require("tiktoken").Encoding(
            self.name,
            pat_str=json.loads(self._files[ENCODING])["pattern"],
            mergeable_ranks=parse_ranks(self._files[RANKS], self.name),
            special_tokens=self._special,
        )

    def encode_batch(self, texts: list[str]) -> tuple[Ids, Lengths]:
        encode = self._processor.encode_to_numpy
        with panics_as_errors("tiktoken"):
            return join_ids((encode(text, disallowed_special=()) for text in texts), np.uint32)

    def decode(self, ids: Ids) -> str:
        special = list(self._special.values())
        values = np.asarray(ids)
        return str(self._processor.decode(values[~np.isin(values, special)].tolist()))

    def marks(self) -> list[str]:
        return list(self._special)

    def gigatoken(self) -> Any:
        pattern = GIGATOKEN_PATTERNS.get(json.loads(self._files[ENCODING])["pattern"])
        if pattern is None:
            raise FastBackendError("it doesn't know the pattern of this encoding")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, RANKS)
            path.write_bytes(self._files[RANKS])
            return require("gigatoken").Tokenizer.from_tiktoken(path, pattern, {})


def parse_ranks(data: bytes, name: str) -> dict[bytes, int]:
    """Ranks by token.

    Raises:
        MegamupError: a line isn't `base64(token) rank`, a rank stands twice, or a byte has no rank.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise MegamupError(
                f"tokenizer {name!r}: line {number:,}: expected a token in base64 and its rank, found {line[:60]!r}"
            ) from error
    if len(set(ranks.values())) < len(ranks) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise MegamupError(f"tokenizer {name!r}: a rank stands twice or a byte has none; expected a whole rank file")
    return ranks


def encoding_json(name: str, encoding: Encoding | None = None) -> bytes:
    """The pattern and special tokens of a known encoding as JSON.

    Raises:
        MegamupError: unknown.
    """
    encoding = encoding or ENCODINGS.get(name)
    if encoding is None:
        raise MegamupError(
            f"tiktoken encoding {name!r}: a rank file has no pattern of its own; name one that it was made for, "
            f"FILE.tiktoken:ENCODING, one of: {', '.join(ENCODINGS)}"
        )
    return json.dumps(encoding._asdict(), indent=1, ensure_ascii=False).encode()


def fetch(encoding: str) -> tuple[bytes, bytes]:
    """The rank file and the JSON of an encoding that tiktoken knows, from its cache or the network.

    Raises:
        MegamupError: unknown, or its file is neither there nor to be had.
    """
    tiktoken = require("tiktoken")
    names = tiktoken.list_encoding_names()
    if encoding not in names:
        raise MegamupError(f"tokenizer 'tiktoken:{encoding}': no such encoding; expected one of: {', '.join(names)}")
    try:
        whole = require("tiktoken.registry").ENCODING_CONSTRUCTORS[encoding]()
    except (OSError, ValueError) as error:
        raise MegamupError(
            f"tokenizer 'tiktoken:{encoding}': tiktoken can't get its files ({type(error).__name__}); without a "
            "network, set TIKTOKEN_CACHE_DIR to a folder in which tiktoken has stored them, or give the rank file "
            f"itself: FILE.tiktoken:{encoding}"
        ) from error
    ranks = sorted(whole["mergeable_ranks"].items(), key=lambda item: item[1])
    lines = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks)
    own = Encoding(whole["pat_str"], whole["special_tokens"])
    return lines, encoding_json(encoding, ENCODINGS.get(encoding, own))
