"""A tokenizer.json in which no text is a special token.

Libraries look for the names of special tokens in text, some in more than one way: as added tokens, as pieces of a
Unigram model, as whole words, as what merges give. Here each special token gets a name that no text holds, so that
`</s>` in a document is four characters. Ids stay.
"""

from __future__ import annotations

import json
from collections.abc import Set
from typing import Any

HIDDEN = "\U0010ffff"  # no character, by Unicode's promise


def text_only(config: dict[str, Any], special: Set[str], *, keep_special: bool) -> str:
    """The JSON of `config` with the `special` tokens hidden, and encoding nothing but text.

    Padding, truncation, post-processing (which would add tokens) and dropout (which would draw lots) are off.

    Args:
        config: a tokenizer.json.
        special: names of tokens that no text may become.
        keep_special: list them among the added tokens. tokenizers numbers these by their place in the list;
            gigatoken looks for all of them in text.
    """
    model = dict(config["model"])
    model["dropout"] = None
    if isinstance(model["vocab"], dict):
        model["vocab"] = {_hide(piece, special): number for piece, number in model["vocab"].items()}
    else:
        model["vocab"] = [[_hide(piece, special), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in special:
        model["unk_token"] = _hide(model["unk_token"], special)
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if special.isdisjoint(_joined(merge))]
    added = [
        {**token, "content": _hide(token["content"], special), "special": token["content"] in special}
        for token in config.get("added_tokens") or []
        if keep_special or token["content"] not in special
    ]
    off = {"padding": None, "truncation": None, "post_processor": None}
    return json.dumps({**config, **off, "added_tokens": added, "model": model})


def _hide(piece: str, special: Set[str]) -> str:
    return f"{HIDDEN}{piece}{HIDDEN}" if piece in special else piece


def _joined(merge: str | list[str]) -> tuple[str, str, str]:
    """Both sides of a merge and what it gives; tokenizer.json has had two ways to write it."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right, left + right
