"""The tokenizer's files as `AutoTokenizer` reads them, where a tokenizer.json can say the same, and those of a model
that is imported."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megamup.config import Config
from megamup.data.manifest import Manifest
from megamup.data.tokenizer import FileTokenizer, load_tokenizer
from megamup.data.tokenizer.base import require
from megamup.data.tokenizer.gpt2 import byte_characters
from megamup.data.tokenizer.probes import TEXTS
from megamup.errors import MegamupError

JSON, CONFIG, SPIECE = "tokenizer.json", "tokenizer_config.json", "tokenizer.model"
FOLDER = "tokenizer"
"""Of an imported run."""
COPIED = (
    *(JSON, CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt"),
    *(SPIECE, "spiece.model", "chat_template.jinja"),
)


@dataclass(frozen=True)
class TokenizerFiles:
    """What an export says of the tokenizer."""

    files: dict[str, bytes] = field(default_factory=dict)
    eod_id: int | None = None
    notes: tuple[str, ...] = ()
    """What can't be said in such files."""


def exported(config: Config) -> TokenizerFiles:
    """Of the tokenizer that made the training corpus, by its manifest; else of the model that the run began from."""
    notes = []
    for source in config.data.train_sources:
        path = Path(f"{source.prefix}.json")
        if not path.is_file():
            where = "" if path.is_absolute() else f" below {Path.cwd()} (export where training ran)"
            notes.append(f"{path}: not there{where}, so the tokenizer isn't known")
            continue
        manifest = Manifest.read(path)
        if manifest.tokenizer.folder is None:
            notes.append(f"{path}: names no tokenizer's folder; only the end-of-document id is known")
            return TokenizerFiles(eod_id=manifest.eod_id, notes=(*notes, NONE_WRITTEN))
        folder = path.parent / manifest.tokenizer.folder
        if not folder.is_dir():
            notes.append(f"{folder}: not there; only the end-of-document id is known")
            return TokenizerFiles(eod_id=manifest.eod_id, notes=(*notes, NONE_WRITTEN))
        found = load_tokenizer(str(folder))
        if found.sha256 != manifest.tokenizer.sha256:
            raise MegamupError(
                f"{folder} holds another tokenizer ({found.sha256[:12]}) than the one that made {path} "
                f"({manifest.tokenizer.sha256[:12]}); put that one there, or move the folder away to export without one"
            )
        return files_of(found, config.model.max_seq_len)
    kept = config.run.folder / FOLDER
    if kept.is_dir():
        return TokenizerFiles({path.name: path.read_bytes() for path in sorted(kept.iterdir())}, notes=tuple(notes))
    return TokenizerFiles(notes=(*notes, NONE_WRITTEN))


NONE_WRITTEN = "no tokenizer files were written: the model takes ids"


def files_of(tokenizer: FileTokenizer, max_seq_len: int) -> TokenizerFiles:
    stored = {name: data for name, data in tokenizer.files().items() if name in COPIED}
    notes: list[str] = []
    described = as_json(tokenizer, notes)
    if described is None:
        return TokenizerFiles(stored, tokenizer.eod_id, tuple(notes))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end(tokenizer, described),
        "model_max_length": max_seq_len,
        "clean_up_tokenization_spaces": False,
    }
    stored |= {JSON: described, CONFIG: json.dumps(settings, indent=2, ensure_ascii=False).encode() + b"\n"}
    return TokenizerFiles(stored, tokenizer.eod_id, tuple(notes))


def end(tokenizer: FileTokenizer, described: bytes) -> str:
    """The end-of-document token's text."""
    (found,) = (t["content"] for t in json.loads(described)["added_tokens"] if t["id"] == tokenizer.eod_id)
    return str(found)


def as_json(tokenizer: FileTokenizer, notes: list[str]) -> bytes | None:
    """A tokenizer.json of the same ids, or None and a note that says why not."""
    if tokenizer.kind == "huggingface":
        data = tokenizer.files()[JSON]
        if json.loads(data).get("post_processor") not in (None, {"type": "ByteLevel"}):
            notes.append(f"{JSON}: its post-processor may add tokens to a text, which the training corpus has none of")
        return data
    if tokenizer.kind == "bytes":
        return of_bytes(tokenizer.eod_id)
    if tokenizer.kind == "sentencepiece":
        return of_sentencepiece(tokenizer, notes)
    notes.append(
        f"tokenizer {tokenizer.name!r} is of the kind {tokenizer.kind}, which has no tokenizer.json; no tokenizer "
        "files were written: give the same tokenizer from elsewhere"
    )
    return None


def of_bytes(eod_id: int) -> bytes:
    """Bytes as a byte-level BPE without merges, whose end of document is no text."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    model = {"type": "BPE", "vocab": vocabulary | {"<|endoftext|>": eod_id}, "merges": [], "ignore_merges": False}
    return tokenizer_json(model, "<|endoftext|>", eod_id, pre_tokenizer=level, decoder=level)


def tokenizer_json(model: dict[str, Any], eod: str, eod_id: int, **parts: Any) -> bytes:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    whole = {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")),
        "added_tokens": [{"id": eod_id, "content": eod, **flags}],
        "model": model,
    }
    return json.dumps(whole | parts, ensure_ascii=False).encode()


SPACE = "\u2581"


def of_sentencepiece(tokenizer: FileTokenizer, notes: list[str]) -> bytes | None:
    """A SentencePiece model in the form of a tokenizer.json, if that gives its ids."""
    model = tokenizer.files()[SPIECE]
    try:
        found = require("gigatoken").Tokenizer.from_sentencepiece(model)._hf_config()
    except (RuntimeError, ValueError):  # it knows no unigram models
        found = unigram(model, tokenizer.eod_id)
    steps = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}]
    found["decoder"] = {"type": "Sequence", "decoders": [*steps, {"type": "Fuse"}]}
    data = json.dumps(found, ensure_ascii=False).encode()
    # Names of special tokens are tokens in a text to transformers, and text to us; ▁ is a space to it.
    marks = [token["content"] for token in found["added_tokens"]]
    ended = any(token["id"] == tokenizer.eod_id for token in found["added_tokens"])
    texts = [text for text in TEXTS if SPACE not in text and not any(mark in text for mark in marks)]
    theirs = require("tokenizers").Tokenizer.from_str(data.decode())
    if not ended or any(
        theirs.encode(text, add_special_tokens=False).ids != tokenizer.encode(text).tolist() for text in texts
    ):
        notes.append(f"{SPIECE} has no tokenizer.json of the same ids; the model file alone was written")
        return None
    return data


def unigram(model: bytes, eod_id: int) -> dict[str, Any]:
    """A unigram model that keeps text as it is. (Whether it does is seen by its ids.)"""
    processor = require("sentencepiece").SentencePieceProcessor()
    processor.load_from_serialized_proto(model)
    size = range(processor.get_piece_size())
    vocabulary = [[processor.id_to_piece(piece), processor.get_score(piece)] for piece in size]
    described = {"type": "Unigram", "vocab": vocabulary, "unk_id": processor.unk_id(), "byte_fallback": True}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    whole = tokenizer_json(described, vocabulary[eod_id][0], eod_id, normalizer=spaces)
    return dict(json.loads(whole))


def copy_tokenizer(theirs: Path, folder: Path) -> list[str]:
    """Copy a model's tokenizer files to ``folder``; returns their names."""
    found = [name for name in COPIED if (theirs / name).is_file()]
    if found:
        folder.mkdir(parents=True)
    for name in found:
        shutil.copyfile(theirs / name, folder / name)
    return found


def special_ids(theirs: Path) -> dict[str, int]:
    """Ids of the tokens that are added to a model's vocabulary, and of those in a vocab.txt, by text."""
    found: dict[str, int] = {}
    if (theirs / "vocab.txt").is_file():
        lines = (theirs / "vocab.txt").read_text(encoding="utf-8").splitlines()
        found = {token: number for number, token in enumerate(lines)}
    if (theirs / JSON).is_file():
        try:
            added = json.loads((theirs / JSON).read_text(encoding="utf-8")).get("added_tokens") or []
            found |= {str(token["content"]): int(token["id"]) for token in added}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MegamupError(f"{theirs / JSON}: not a tokenizer.json ({error!r})") from None
    return found
