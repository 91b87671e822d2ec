"""What every tokenizer is."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from megamup.errors import MegamupError

Ids = npt.NDArray[np.integer[Any]]
Lengths = npt.NDArray[np.int64]

DESCRIPTION = "megamup.json"
"""The file of a stored tokenizer that says what the others are."""


class Tokenizer(Protocol):
    """What the pipeline asks of a tokenizer.

    Instances are sent to worker processes: they pickle as the contents of their files, and load the library that
    encodes where it is first used. One thread encodes, as workers are processes.
    """

    @property
    def name(self) -> str:
        """For people: where it came from."""

    @property
    def sha256(self) -> str:
        """Of all that determines ids, so equal hashes mean equal ids; neither paths nor the backend count."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def eod_id(self) -> int:
        """The end-of-document token: no text encodes to it and it decodes to nothing."""

    @property
    def backend(self) -> str:
        """Library that encodes, with its version."""

    @property
    def note(self) -> str:
        """What a check of the backend found; '' where nothing is worth a word."""

    def encode(self, text: str) -> Ids:
        """Ids of `text`, without end-of-document. Shape (tokens,)."""

    def encode_batch(self, texts: list[str]) -> tuple[Ids, Lengths]:
        """Ids of all texts one after the other, and how many each has. Shapes (tokens,), (texts,)."""

    def decode(self, ids: Ids) -> str: ...

    def files(self) -> dict[str, bytes]:
        """Contents by file name: a folder of these is a spec of an equal tokenizer."""


class FastBackendError(Exception):
    """gigatoken can't take a tokenizer, or gives other ids than its reference; says why."""


class FileTokenizer(ABC):
    """A tokenizer that a few files and an end-of-document token define.

    Args:
        name: for people.
        files: contents by file name.
        eod: text of the end-of-document token.
    """

    kind: ClassVar[str]
    """Names the class in `DESCRIPTION`."""
    package: ClassVar[str]
    """Whose library encodes."""
    vocab_size: int
    eod_id: int
    note = ""

    def __init__(self, name: str, files: Mapping[str, bytes], eod: str) -> None:
        self.name, self.eod = name, eod
        self._files = dict(files)
        described = {file: hashlib.sha256(data).hexdigest() for file, data in sorted(self._files.items())}
        self.sha256 = hashlib.sha256(json.dumps([self.kind, eod, described]).encode()).hexdigest()

    @property
    def backend(self) -> str:
        return f"{self.package} {importlib.metadata.version(self.package)}"

    def encode(self, text: str) -> Ids:
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> tuple[Ids, Lengths]: ...

    @abstractmethod
    def decode(self, ids: Ids) -> str: ...

    def files(self) -> dict[str, bytes]:
        about = {"kind": self.kind, "name": self.name, "eod": self.eod, "sha256": self.sha256}
        described = json.dumps({**about, "files": sorted(self._files)}, indent=2, ensure_ascii=False)
        return {**self._files, DESCRIPTION: described.encode() + b"\n"}

    def marks(self) -> list[str]:
        """Texts that the tokenizer treats in a way of their own: special tokens, added tokens."""
        return [self.eod]

    @abstractmethod
    def gigatoken(self) -> Any:
        """A `gigatoken.Tokenizer` that should give the same ids.

        Raises:
            FastBackendError: there is none; other exceptions are gigatoken's own refusals.
        """

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_processor"}


def require(package: str) -> Any:
    """The module of an optional package.

    Raises:
        MegamupError: it isn't installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MegamupError(
            f"package {package!r} is needed and can't be imported ({error}): pip install 'megamup[data]'"
        ) from error


@contextmanager
def panics_as_errors(library: str) -> Iterator[None]:
    """Turns a panic of a library in Rust, which Python sees as a BaseException, into an error.

    Raises:
        MegamupError: the library panicked.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise MegamupError(f"{library} broke off: {error}; a text of megabytes without a break can do that") from error


def join_ids(parts: Iterable[Ids], dtype: npt.DTypeLike) -> tuple[Ids, Lengths]:
    """Ids of texts one after the other, and their lengths. Shapes (tokens,), (texts,)."""
    listed = list(parts)
    lengths = np.fromiter(map(len, listed), np.int64, len(listed))
    return np.concatenate([np.empty(0, dtype), *listed], dtype=dtype), lengths


def check_eod(name: str, eod: str, candidates: list[str]) -> str:
    """`eod`, where it is one of `candidates`.

    Raises:
        MegamupError: it isn't.
    """
    if eod not in candidates:
        raise MegamupError(
            f"tokenizer {name!r}: --eod {eod!r} is none of its special tokens; "
            f"expected {describe_candidates(candidates)}"
        )
    return eod


def describe_candidates(candidates: list[str]) -> str:
    listed = ", ".join(candidates[:20]) or "none: it has no special token"
    return f"one of: {listed}" + (f" and {len(candidates) - 20:,} more" if len(candidates) > 20 else "")


WELL_KNOWN_EODS = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>", "<EOT>", "[EOS]")


def choose_eod(name: str, given: str | None, candidates: list[str]) -> str:
    """The end-of-document token: the one given, else the only well-known one among `candidates`.

    Raises:
        MegamupError: the one given is no candidate; or none was given, and no or several candidates are well known.
    """
    if given is not None:
        return check_eod(name, given, candidates)
    known = [eod for eod in WELL_KNOWN_EODS if eod in candidates]
    if len(known) != 1:
        found = f"could be each of {', '.join(known)}" if known else "is not known"
        raise MegamupError(
            f"tokenizer {name!r}: its end-of-document token {found}; name it with --eod TOKEN, "
            f"{describe_candidates(known or candidates)}"
        )
    return known[0]
