"""Tokenizers by name, and as a folder beside shards."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megamup.data.tokenizer import gpt2, huggingface, sentencepiece, tiktoken
from megamup.data.tokenizer.base import DESCRIPTION, FileTokenizer, Tokenizer
from megamup.data.tokenizer.byte import ByteTokenizer
from megamup.data.tokenizer.huggingface import HuggingFaceTokenizer
from megamup.data.tokenizer.sentencepiece import SentencePieceTokenizer
from megamup.data.tokenizer.tiktoken import TiktokenTokenizer
from megamup.errors import MegamupError
from megamup.files import sync_folder

ACCEPTED = (
    "a SentencePiece .model file, a tokenizer.json, GPT-2's vocab.json (merges.txt beside it), a folder with any of "
    "these, tiktoken:ENCODING, a rank file X.tiktoken[:ENCODING], or `bytes`"
)
TIKTOKEN_PREFIX, TIKTOKEN_SUFFIX = "tiktoken:", ".tiktoken"
CONFIG, VOCAB, MERGES = "tokenizer_config.json", "vocab.json", "merges.txt"

Stored = dict[str, bytes]
KINDS: dict[str, Callable[[str, Stored, str], FileTokenizer]] = {
    ByteTokenizer.kind: lambda name, files, eod: ByteTokenizer(eod),
    SentencePieceTokenizer.kind: lambda name, files, eod: SentencePieceTokenizer(name, files[sentencepiece.MODEL], eod),
    HuggingFaceTokenizer.kind: lambda name, files, eod: HuggingFaceTokenizer(
        name, files[huggingface.TOKENIZER_JSON], eod
    ),
    TiktokenTokenizer.kind: lambda name, files, eod: TiktokenTokenizer(
        name, files[tiktoken.RANKS], files[tiktoken.ENCODING], eod
    ),
}
"""How a stored tokenizer of each kind is made again."""


def load_tokenizer(spec: str, eod: str | None = None) -> FileTokenizer:
    """The tokenizer that `spec` names, with the library that defines its ids as backend.

    Args:
        spec: see `ACCEPTED`, or a folder that `store_tokenizer` wrote.
        eod: text of the end-of-document token. Default: SentencePiece's end of sentence; `eos_token` of a
            tokenizer_config.json beside a tokenizer.json; else the special token that is well known for it.

    Raises:
        MegamupError: unknown spec, missing or broken file, no end-of-document token.
    """
    if spec == ByteTokenizer.kind:
        return ByteTokenizer(eod)
    if spec.startswith(TIKTOKEN_PREFIX):
        return TiktokenTokenizer(spec, *tiktoken.fetch(spec.removeprefix(TIKTOKEN_PREFIX)), eod)
    path, encoding = _split_encoding(spec)
    if path.is_dir():
        return _load_folder(path, eod)
    if not path.is_file():
        file_like = path.suffix in {".model", ".json", TIKTOKEN_SUFFIX} or os.sep in spec
        problem = "no such file or folder" if file_like else "not a known tokenizer"
        raise MegamupError(f"tokenizer {spec!r}: {problem}; expected {ACCEPTED}")
    if path.suffix == TIKTOKEN_SUFFIX:
        return TiktokenTokenizer(path.name, _read(path), tiktoken.encoding_json(encoding or path.stem), eod)
    if path.name == VOCAB:
        return _load_gpt2(path.parent, eod)
    if path.suffix == ".json":
        return _load_json(path, eod)
    return SentencePieceTokenizer(path.name, _read(path), eod)


def store_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer's files to `folder`, whole or not at all; its path is then a spec of an equal tokenizer.

    A folder that holds an equal tokenizer is left as it is.

    Raises:
        MegamupError: the folder can't be written, or what was written doesn't read back.
    """
    if (folder / DESCRIPTION).is_file() and _same(folder, tokenizer):
        return
    beside, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    try:
        for leftover in (beside, old):
            shutil.rmtree(leftover, ignore_errors=True)
        beside.mkdir(parents=True)
        for name, data in tokenizer.files().items():
            with open(beside / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        sync_folder(beside)
        load_tokenizer(str(beside))
        if folder.exists():
            os.rename(folder, old)
        os.rename(beside, folder)
        sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise MegamupError(f"tokenizer folder {str(folder)!r}: cannot be written: {error.strerror}") from error


def _same(folder: Path, tokenizer: Tokenizer) -> bool:
    try:
        return load_tokenizer(str(folder)).sha256 == tokenizer.sha256
    except MegamupError:
        return False


def _split_encoding(spec: str) -> tuple[Path, str | None]:
    """X.tiktoken:ENCODING into its two parts; every other spec is a path."""
    head, colon, encoding = spec.rpartition(":")
    return (Path(head), encoding) if colon and head.endswith(TIKTOKEN_SUFFIX) else (Path(spec), None)


def _load_folder(folder: Path, eod: str | None) -> FileTokenizer:
    if (folder / DESCRIPTION).is_file():
        return _load_stored(folder, eod)
    if (folder / huggingface.TOKENIZER_JSON).is_file():
        return _load_json(folder / huggingface.TOKENIZER_JSON, eod)
    if (folder / VOCAB).is_file() and (folder / MERGES).is_file():
        return _load_gpt2(folder, eod)
    if (folder / sentencepiece.MODEL).is_file():
        return SentencePieceTokenizer(folder.resolve().name, _read(folder / sentencepiece.MODEL), eod)
    raise MegamupError(
        f"tokenizer {str(folder)!r}: this folder holds no {huggingface.TOKENIZER_JSON}, no {VOCAB} with {MERGES} "
        f"and no {sentencepiece.MODEL}; expected {ACCEPTED}"
    )


def _load_stored(folder: Path, eod: str | None) -> FileTokenizer:
    path = folder / DESCRIPTION
    about = _read_json(path)
    kind, name, stored_eod, names = (about.get(key) for key in ("kind", "name", "eod", "files"))
    if kind not in KINDS or not isinstance(name, str) or not isinstance(stored_eod, str) or not isinstance(names, list):
        raise MegamupError(f"{path}: expected a kind ({', '.join(KINDS)}), a name, an eod and a list of files")
    files = {file: _read(folder / file) for file in names}
    tokenizer = KINDS[kind](name, files, stored_eod)
    if tokenizer.sha256 != about.get("sha256"):
        raise MegamupError(
            f"tokenizer {str(folder)!r}: its files are not those that were stored (SHA-256 {tokenizer.sha256[:16]}..., "
            f"expected {str(about.get('sha256'))[:16]}...); copy the whole folder again"
        )
    return tokenizer if eod is None else KINDS[kind](name, files, eod)


def _load_json(path: Path, eod: str | None) -> FileTokenizer:
    if path.name != huggingface.TOKENIZER_JSON:
        return HuggingFaceTokenizer(path.name, _read(path), eod)
    eos = _eos_token(_read_config(path.parent))
    return HuggingFaceTokenizer(path.parent.resolve().name, _read(path), eos if eod is None else eod)


def _load_gpt2(folder: Path, eod: str | None) -> FileTokenizer:
    name, config = folder.resolve().name, _read_config(folder)
    data = gpt2.tokenizer_json(_read(folder / VOCAB), _read(folder / MERGES), config, name)
    return HuggingFaceTokenizer(name, data, _eos_token(config) if eod is None else eod)


def _eos_token(config: dict[str, Any]) -> str | None:
    """`eos_token` of a tokenizer_config.json, which is a text or an added token with its flags."""
    eos = config.get("eos_token")
    content = eos.get("content") if isinstance(eos, dict) else eos
    return content if isinstance(content, str) else None


def _read_config(folder: Path) -> dict[str, Any]:
    return _read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(_read(path))
    except ValueError as error:
        raise MegamupError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise MegamupError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MegamupError(f"tokenizer file {str(path)!r}: cannot be read: {error.strerror}") from error
