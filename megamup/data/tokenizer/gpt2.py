"""GPT-2's vocab.json and merges.txt, as a tokenizer.json."""

from __future__ import annotations

import json
from typing import Any

from megamup.errors import MegamupError

CLASSES = {"GPT2Tokenizer", "GPT2TokenizerFast", "RobertaTokenizer", "RobertaTokenizerFast"}
"""Of `tokenizer_config.json`: others have such files too, but split text in other ways before merging."""


def byte_characters() -> list[str]:
    """The characters that stand for bytes 0 to 255 in byte-level vocabularies: printable ones for themselves, the
    others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 0x100 + others.index(byte)) for byte in range(256)]


def tokenizer_json(vocab: bytes, merges: bytes, config: dict[str, Any], name: str) -> bytes:
    """A tokenizer.json of GPT-2's two files.

    Entries of the vocabulary that no merge makes are special tokens.

    Args:
        vocab: vocab.json, ids by token.
        merges: merges.txt, a pair of tokens a line.
        config: the tokenizer_config.json beside them, `{}` without one.
        name: for messages.

    Raises:
        MegamupError: not such files, or they contradict each other, or belong to another kind of tokenizer.
    """
    made_by = config.get("tokenizer_class")
    if made_by is not None and made_by not in CLASSES:
        raise MegamupError(
            f"tokenizer {name!r}: these files are of a {made_by}, which splits text in another way than GPT-2; "
            "expected its tokenizer.json (transformers: AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER))"
        )
    try:
        ids = json.loads(vocab)
        lines = merges.decode("utf-8").split("\n")
    except ValueError as error:
        raise MegamupError(f"tokenizer {name!r}: not a vocab.json and merges.txt: {error}") from error
    if not isinstance(ids, dict) or not all(type(number) is int for number in ids.values()):
        raise MegamupError(f"tokenizer {name!r}: expected ids by token in vocab.json")
    pairs = [line.rstrip("\r").split(" ") for line in lines if line.strip() and not line.startswith("#version")]
    if wrong := next((pair for pair in pairs if len(pair) != 2), None):
        raise MegamupError(f"tokenizer {name!r}: {' '.join(wrong)!r} in merges.txt: expected two tokens a line")
    made = {left + right for left, right in pairs} | set(byte_characters())
    if missing := made - ids.keys():
        raise MegamupError(
            f"tokenizer {name!r}: {len(missing):,} bytes or merges have no id in vocab.json, the first "
            f"{min(missing)!r}; expected the two files of one byte-level BPE"
        )
    return json.dumps(_byte_level_bpe(ids, pairs, made, bool(config.get("add_prefix_space"))), indent=1).encode()


def _byte_level_bpe(
    ids: dict[str, int], merges: list[list[str]], made: set[str], add_prefix_space: bool
) -> dict[str, Any]:
    level = {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    specials = sorted((number, token) for token, number in ids.items() if token not in made)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": token, **flags} for number, token in specials],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": ids,
            "merges": merges,
        },
    }
