"""gigatoken in place of the reference backend, where it gives the same ids.

gigatoken is some thirty times faster and reimplements what it replaces, so its ids are never taken on trust: all that
can be compared in a second is compared before the first document (`fastest_exact`), and some of every piece of input
after that (`spot_check`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from itertools import compress, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megamup.data.cache import default_folder
from megamup.data.tokenizer import probes
from megamup.data.tokenizer.base import FastBackendError, FileTokenizer, Ids, Lengths, Tokenizer, panics_as_errors
from megamup.errors import MegamupError
from megamup.files import write_json_atomic

CHECKED_CHARACTERS = 1 << 20
"""Of the first documents, compared by `fastest_exact`."""
SWEEP = 1
"""Of the characters and texts that a sweep compares: another number forgets what earlier ones found."""
MOST_DISPUTED = 10_000
"""Characters; where the backends differ in more, they don't do the same."""
REFRESH_CHARACTERS = 16 << 20
ROOM_BYTES = 256 << 20
"""gigatoken remembers every word it has seen (up to 7 bytes a byte of random text). Each `REFRESH_CHARACTERS` it is
made anew if the process has grown by more than `ROOM_BYTES`."""


class CheckedTokenizer:
    """A tokenizer that encodes with gigatoken where that is exact, and with its reference elsewhere.

    Args:
        reference: defines the ids.
        fast: encode with gigatoken.
        disputed: characters in which the two differ; texts with one of them go to the reference.
        reason: why `fast` is false.
        lossless: decoding gave back each text of the sample.
    """

    def __init__(self, reference: FileTokenizer, fast: bool, disputed: str, reason: str, lossless: bool) -> None:
        self.reference, self.fast, self.disputed = reference, fast, disputed
        self.reason, self.lossless = reason, lossless
        self.name, self.sha256, self.eod_id = reference.name, reference.sha256, reference.eod_id
        self.vocab_size = reference.vocab_size
        self._disputed = CharacterSet(disputed)
        self._gigatoken: Gigatoken | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return CheckedTokenizer, (self.reference, self.fast, self.disputed, self.reason, self.lossless)

    @property
    def backend(self) -> str:
        return f"gigatoken {importlib.metadata.version('gigatoken')}" if self.fast else self.reference.backend

    @property
    def note(self) -> str:
        """What the check found, in words; '' where nothing is worth a word."""
        found = [f"gigatoken is not used: {self.reason}"] if self.reason else []
        if self.disputed:
            few = len(self.disputed) <= 8
            which = repr(self.disputed) if few else f"one of {len(self.disputed):,} rare characters"
            found.append(f"texts with {which} are left to {self.reference.backend}")
        if not self.lossless:
            found.append("decoding does not give back every text")
        if not self.seamless:
            found.append("a document of many megabytes gets other tokens where it is cut")
        return "; ".join(found)

    @property
    def seamless(self) -> bool:
        """Whether a text cut before a space or line break has the ids of the whole.

        Not where the tokenizer puts a space before each text.
        """
        encode = self.reference.encode
        return all(
            np.array_equal(encode(head + tail), np.concatenate([encode(head), encode(tail)]))
            for head, tail in (("one", " two"), ("one", "\ntwo"))
        )

    def encode(self, text: str) -> Ids:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> tuple[Ids, Lengths]:
        if not self.fast:
            return self.reference.encode_batch(texts)
        if self._gigatoken is None:
            self._gigatoken = Gigatoken(self.reference)
        odd = [self.disputed != "" and self._disputed.meets(text) for text in texts]
        if not any(odd):
            return self._gigatoken.encode_batch(texts)
        return self._encode_by_both(texts, np.array(odd))

    def _encode_by_both(self, texts: list[str], odd: npt.NDArray[np.bool_]) -> tuple[Ids, Lengths]:
        """Encode, those where `odd` is true with the reference."""
        assert self._gigatoken is not None
        lengths = np.empty(len(texts), np.int64)
        left, lengths[odd] = self.reference.encode_batch(list(compress(texts, odd)))
        sure, lengths[~odd] = self._gigatoken.encode_batch(list(compress(texts, ~odd)))
        ids = np.empty(len(left) + len(sure), sure.dtype)
        is_left = np.repeat(odd, lengths)
        ids[is_left], ids[~is_left] = left, sure
        return ids, lengths

    def decode(self, ids: Ids) -> str:
        return self.reference.decode(ids)

    def files(self) -> dict[str, bytes]:
        return self.reference.files()


class CharacterSet:
    """Characters beyond ASCII, looked for in texts at most of the speed of reading them."""

    def __init__(self, characters: str) -> None:
        self._characters = frozenset(characters)
        self._first_units = np.zeros(1 << 16, dtype=bool)
        self._first_units[[int.from_bytes(each.encode("utf-16-le")[:2], "little") for each in characters]] = True

    def meets(self, text: str) -> bool:
        """Whether `text` holds one of the characters."""
        if text.isascii():
            return False
        units = np.frombuffer(text.encode("utf-16-le"), np.uint16)
        return bool(self._first_units.take(units).any()) and not self._characters.isdisjoint(text)


class Gigatoken:
    """gigatoken in one thread and bounded memory."""

    def __init__(self, reference: FileTokenizer) -> None:
        self._reference = reference
        self._renew()

    def _renew(self) -> None:
        self._tokenizer = self._reference.gigatoken()
        self._characters = 0
        self._start_bytes = resident_bytes()

    def encode_batch(self, texts: list[str]) -> tuple[Ids, Lengths]:
        if self._characters >= REFRESH_CHARACTERS:
            self._characters = 0
            if resident_bytes() - self._start_bytes > ROOM_BYTES:
                self._renew()
        self._characters += sum(map(len, texts))
        layout = self._tokenizer.encode_batch(texts, parallel=False).layout
        offsets = np.asarray(layout.offsets)
        ids: Ids = np.asarray(layout.content.data)[offsets[0] : offsets[-1]]
        return ids, np.diff(offsets)


def fastest_exact(tokenizer: FileTokenizer, sample: Sequence[str]) -> CheckedTokenizer:
    """`tokenizer`, encoding with gigatoken where that gives its ids.

    Compared are `sample` (its first `CHECKED_CHARACTERS`), texts and characters known to tell tokenizers apart, and the
    tokenizer's own special and added tokens in text. Characters alone in which the two differ (Unicode tables of
    different years) are left to the reference; any other difference rules gigatoken out.

    Args:
        tokenizer: as `load_tokenizer` gives it.
        sample: the first documents.
    """
    texts = _first(sample)
    reference = tokenizer.encode_batch(texts)
    lossless = all(tokenizer.decode(ids) == text for ids, text in zip(_split(*reference), texts, strict=True))
    try:
        with panics_as_errors("gigatoken"):
            trial = CheckedTokenizer(tokenizer, True, "", "", lossless)
            trial = CheckedTokenizer(tokenizer, True, _disputed_characters(trial), "", lossless)
            _compare(trial, probes.probes(tokenizer.marks()))
            _compare(trial, texts, reference)
    except FastBackendError as refusal:
        return CheckedTokenizer(tokenizer, False, "", str(refusal), lossless)
    except Exception as error:  # gigatoken raises RuntimeError and ValueError for what it doesn't support
        return CheckedTokenizer(tokenizer, False, "", str(error).splitlines()[0], lossless)
    return trial


def spot_check(tokenizer: Tokenizer, text: str) -> None:
    """Compare a fast backend with its reference on `text`, a few thousand characters.

    Raises:
        MegamupError: their ids differ.
    """
    if isinstance(tokenizer, CheckedTokenizer) and tokenizer.fast:
        try:
            _compare(tokenizer, [text])
        except FastBackendError as error:
            raise MegamupError(
                f"tokenizer {tokenizer.name!r}: {error}; its tokens can't be trusted. Tokenize with "
                "--backend reference, and report this text"
            ) from error


def _first(sample: Sequence[str]) -> list[str]:
    """The first `CHECKED_CHARACTERS` of `sample`."""
    taken: list[str] = []
    room = CHECKED_CHARACTERS
    for text in sample:
        taken.append(text[:room])
        room -= len(taken[-1])
        if not room:
            break
    return taken


def _disputed_characters(trial: CheckedTokenizer) -> str:
    """What `_sweep` finds. It takes a second, so it is remembered for a tokenizer and versions of the libraries."""
    state = (SWEEP, trial.sha256, trial.backend, trial.reference.backend, unicodedata.unidata_version)
    entry = default_folder() / f"disputed-{hashlib.sha256(repr(state).encode()).hexdigest()}.json"
    with suppress(OSError, ValueError, TypeError):
        return str(json.loads(entry.read_bytes())["characters"])
    found = _sweep(trial)
    with suppress(OSError):
        write_json_atomic(entry, {"characters": found})
    return found


def _sweep(trial: CheckedTokenizer) -> str:
    """Characters that the two backends encode differently.

    Raises:
        FastBackendError: too many.
    """
    found: list[str] = []
    rest = probes.characters()
    while block := list(islice(rest, 256)):
        if _differences(trial, ["".join(map(probes.settings, block))]):
            found += [block[place] for place in _differences(trial, list(map(probes.settings, block)))]
        if len(found) > MOST_DISPUTED or (found and found[0].isascii()):
            raise FastBackendError(f"its ids differ from those of {trial.reference.backend} for common characters")
    if np.array_equal(trial.reference.encode("e\u0301"), trial.reference.encode("\u00e9")):  # it composes
        found += probes.late_compositions()
    return "".join(sorted(set(found)))


def _differences(trial: CheckedTokenizer, texts: list[str], reference: tuple[Ids, Lengths] | None = None) -> list[int]:
    """Places in `texts` where the two backends give different ids; `reference` are those of one, if known."""
    ours, theirs = trial.encode_batch(texts), reference or trial.reference.encode_batch(texts)
    pairs = zip(_split(*ours), _split(*theirs), strict=True)
    return [place for place, (one, other) in enumerate(pairs) if not np.array_equal(one, other)]


def _split(ids: Ids, lengths: Lengths) -> list[Ids]:
    return np.split(ids, np.cumsum(lengths)[:-1]) if len(lengths) else []


def _compare(trial: CheckedTokenizer, texts: list[str], reference: tuple[Ids, Lengths] | None = None) -> None:
    """Raise where the two backends give different ids.

    Raises:
        FastBackendError: they do; says on which text, and where in it.
    """
    if not (different := _differences(trial, texts, reference)):
        return
    text = min((texts[place] for place in different), key=len)
    ours, theirs = trial.encode(text), trial.reference.encode(text)
    same = min(len(ours), len(theirs))
    first = int(np.argmin(np.append(ours[:same] == theirs[:same], False)))
    position = len(trial.decode(theirs[:first]))
    raise FastBackendError(
        f"{trial.backend} and {trial.reference.backend} differ from about character {position:,} of "
        f"{_shorten(text, position)} on: {_list(ours, first)} against {_list(theirs, first)}"
    )


def _shorten(text: str, position: int) -> str:
    start = max(0, position - 20)
    part = text[start : start + 60]
    return ascii(part) if len(part) == len(text) else f"...{part!a}..."


def _list(ids: Ids, first: int) -> str:
    return f"ids {ids[first : first + 8].tolist()}"


def resident_bytes() -> int:
    """Memory of this process, 0 where the system doesn't say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
