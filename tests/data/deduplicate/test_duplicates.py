"""Signatures tell the similarity of documents, and their bands find all that are alike."""

import json
import math
import random
import struct
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from megamup.data.deduplicate.duplicates import (
    WORD,
    Exact,
    Method,
    MinHash,
    Signature,
    SignatureFiles,
    first_equals,
    write_signatures,
)
from megamup.data.reading.cuts import cut
from megamup.errors import MegamupError

LoadTexts = Callable[[int], list[str]]
Sign = Callable[..., Signature]


@pytest.fixture
def texts(corpus: Callable[[str], Path]) -> LoadTexts:
    """The first texts of the C4 sample that have 200 words or more."""

    def load(count: int) -> list[str]:
        with open(corpus("c4_sample.jsonl"), encoding="utf-8") as file:
            every = (json.loads(line)["text"] for line in file)
            return [text for text in every if len(text.split()) >= 200][:count]

    return load


def sign(method: Method, documents: Sequence[str | Sequence[str]]) -> Signature:
    """Signatures of documents, each a text or several. Shape (documents, slots)."""
    signer, rows = method.signer(), []
    for document in documents:
        for text in [document] if isinstance(document, str) else document:
            signer.add(text)
        rows.append(signer.finish())
    return np.array(rows)


def ngrams(text: str, words: int = 5) -> set[tuple[str, ...]]:
    found = WORD.findall(text.lower())
    return {tuple(found[place : place + words]) for place in range(len(found) - words + 1)}


def similarity(left: str, right: str) -> float:
    one, other = ngrams(left), ngrams(right)
    return len(one & other) / len(one | other)


def with_words_replaced(text: str, every: int, word: str = "replaced") -> str:
    words = text.split()
    words[every // 2 :: every] = [word] * len(words[every // 2 :: every])
    return " ".join(words)


def firsts_of(
    folder: Path, method: Method, signatures: Signature, counts: Sequence[int] = (), at_once: int = 1 << 20
) -> list[int]:
    counts = counts or [len(signatures)]
    paths = [folder / f"{piece}.signatures" for piece in range(len(counts))]
    for path, some in zip(paths, np.split(signatures, np.cumsum(counts)[:-1]), strict=True):
        write_signatures(path, iter(some), method)
    firsts: list[int] = first_equals(SignatureFiles(paths, counts, method), at_once).tolist()
    return firsts


def test_equal_minhashes_estimate_the_common_ngrams(texts: LoadTexts) -> None:
    pytest.importorskip("rensa")
    originals = texts(100)
    for every in (200, 50, 20, 10):
        changed = [with_words_replaced(text, every) for text in originals]
        estimates = (sign(MinHash(), originals) == sign(MinHash(), changed)).mean(axis=1)
        truths = np.array([similarity(*pair) for pair in zip(originals, changed, strict=True)])
        errors = estimates - truths
        assert abs(errors.mean()) < 0.015  # the mean of 100 errors of at most 0.044 each
        assert errors.std() < 0.055


@pytest.mark.parametrize("threshold", [0.7, 0.8, 0.9])
def test_what_is_clearly_above_the_threshold_is_found_and_what_is_clearly_below_stays(
    threshold: float, texts: LoadTexts, tmp_path: Path
) -> None:
    pytest.importorskip("rensa")
    originals = texts(100)
    method = MinHash(threshold)
    counts = {True: 0, False: 0}
    for every in (1000, 500, 300, 200, 100, 60, 40, 25, 15, 10):
        documents = originals + [with_words_replaced(text, every) for text in originals]
        firsts = firsts_of(tmp_path, method, sign(method, documents))
        assert firsts[:100] == list(range(100))  # none of these is like another
        for place, first in enumerate(firsts[100:]):
            truth = similarity(originals[place], documents[100 + place])
            if abs(truth - threshold) > 4 * math.sqrt(truth * (1 - truth) / method.slots):
                counts[truth > threshold] += 1
                assert (first == place) == (truth > threshold), truth
    assert min(counts.values()) > 100


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0])
def test_pairs_at_the_threshold_have_a_band_in_common(threshold: float) -> None:
    method = MinHash(threshold)
    bands = method.slots // method.rows
    assert 1 - (1 - threshold**method.rows) ** bands >= 0.99 or method.rows == 1
    assert method.least >= threshold * method.slots > method.least - 1
    rng = np.random.default_rng(0)
    equal: npt.NDArray[np.bool_] = rng.random((20_000, bands, method.rows)) < threshold
    have_one = np.any(np.all(equal, axis=2), axis=1)
    assert have_one.mean() > 0.985 or method.rows == 1


def linked_in_plain_python(signatures: Signature, method: Method) -> list[int]:
    """The first of each document's cluster, by looking at every pair that has a band in common."""
    firsts = list(range(len(signatures)))
    for left, right in combinations(range(len(signatures)), 2):
        equal = signatures[left] == signatures[right]
        bands = equal[: len(equal) // method.rows * method.rows].reshape(-1, method.rows)
        if bands.all(axis=1).any() and equal.sum() >= method.least:
            low, high = sorted((firsts[left], firsts[right]))
            firsts = [low if first == high else first for first in firsts]
    return firsts


@pytest.mark.parametrize("seed", range(3))
def test_clusters_are_those_of_all_pairs_however_the_work_is_divided(seed: int, tmp_path: Path) -> None:
    """Chains, too: documents that are changed step by step until the last has little of the first."""
    rng = np.random.default_rng(seed)
    method = MinHash(0.8)
    documents = [rng.integers(0, 1 << 32, method.slots, dtype=np.uint32)]
    while len(documents) < 120:
        copy = documents[rng.integers(len(documents))].copy()
        changed = rng.choice(method.slots, rng.choice([0, 5, 15, 30, 128]), replace=False)
        copy[changed] = rng.integers(0, 1 << 32, len(changed), dtype=np.uint32)
        documents.append(copy)
    signatures = np.array(documents)
    expected = linked_in_plain_python(signatures, method)
    assert 10 < len(set(expected)) < 110
    assert firsts_of(tmp_path, method, signatures) == expected
    assert firsts_of(tmp_path, method, signatures, [50, 0, 1, 69], at_once=40) == expected


def test_the_same_clusters_as_datatroves_pipeline(texts: LoadTexts, tmp_path: Path) -> None:
    """Not its choice of the document that stays, which isn't the first one."""
    pytest.importorskip("rensa")
    pytest.importorskip("spacy")
    dedup = pytest.importorskip("datatrove.pipeline.dedup.minhash")
    document = pytest.importorskip("datatrove.data").Document
    hashing = pytest.importorskip("datatrove.utils.hashing").HashConfig(hash_fc="sha1")
    originals = texts(40)
    documents = originals + [with_words_replaced(text, 150) for text in originals[::2]] + originals[::4]
    random.Random(0).shuffle(documents)

    config = dedup.MinhashConfig(hash_config=hashing)
    folders = [str(tmp_path / name) for name in ("signatures", "pairs", "clusters")]
    signing = dedup.MinhashDedupSignature(folders[0], config)
    signing.run(document(text, str(place)) for place, text in enumerate(documents))
    for bucket in range(config.num_buckets):
        dedup.MinhashDedupBuckets(folders[0], folders[1], config=config).run(None, bucket, config.num_buckets)
    dedup.MinhashDedupCluster(folders[1], folders[2], config, save_cluster_id=True).run()
    pairs = struct.iter_unpack("<2I", (Path(folders[2]) / "000000.clusters").read_bytes())
    theirs: dict[int, set[int]] = {}
    for place, cluster in pairs:
        theirs.setdefault(cluster, set()).add(place)

    firsts = firsts_of(tmp_path, MinHash(), sign(MinHash(), documents))
    ours: dict[int, set[int]] = {}
    for place, first in enumerate(firsts):
        ours.setdefault(first, set()).add(place)
    assert sorted(map(sorted, theirs.values())) == sorted(
        sorted(members) for members in ours.values() if len(members) > 1
    )
    assert len(theirs) >= 20


@pytest.mark.parametrize("method", [Exact(), MinHash()])
def test_documents_in_parts_have_the_signature_of_the_whole(method: Method, texts: LoadTexts) -> None:
    pytest.importorskip("rensa")
    whole = "\n".join(texts(20))
    parts, rest = [], whole
    while len(rest) > 1000:
        at = cut(rest[:1000])
        parts.append(rest[:at])
        rest = rest[at:]
    parts.append(rest)
    assert len(parts) > 10
    signatures = sign(method, [whole, parts, whole, ["", whole, ""]])
    assert (signatures == signatures[0]).all()


def test_exact_tells_apart_what_differs_in_one_character(texts: LoadTexts, tmp_path: Path) -> None:
    text = texts(1)[0]
    documents = ["", text, text + " ", text.replace("e", "é", 1), text, "", "x", text + " "]
    assert firsts_of(tmp_path, Exact(), sign(Exact(), documents)) == [0, 1, 2, 3, 1, 0, 6, 2]


def test_minhash_of_documents_without_ngrams(tmp_path: Path) -> None:
    """These have nothing that could be in common but all of their text."""
    pytest.importorskip("rensa")
    documents = ["", "!!!", "😀", "Four words are few.", "four words are few", "!!!", "", "Four words are few."]
    assert firsts_of(tmp_path, MinHash(), sign(MinHash(), documents)) == [0, 1, 2, 3, 4, 1, 0, 3]


def test_minhash_looks_past_case_punctuation_and_space(tmp_path: Path) -> None:
    pytest.importorskip("rensa")
    documents = [
        "It was the best of times; it was the worst of times.",
        "IT WAS THE BEST OF TIMES\n\n it was the worst of — times",
    ]
    assert firsts_of(tmp_path, MinHash(1.0), sign(MinHash(1.0), documents)) == [0, 0]


@pytest.mark.parametrize(
    "text",
    [
        "委员会将于星期四再次开会讨论预算并决定如何分配资金以及由谁来负责监督执行情况和结果",
        "คณะกรรมการจะประชุมอีกครั้งในวันพฤหัสบดีเพื่อหารือเรื่องงบประมาณและตัดสินใจว่าจะจัดสรรเงินอย่างไร",
        "委員会は予算について話し合うため、木曜日に再び会合を開き、資金の配分方法を決定します。",
    ],
)
def test_scripts_without_spaces_have_many_ngrams(text: str) -> None:
    assert len(ngrams(text)) > 25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 0.0}, "--threshold 0.0: expected a similarity from 0.1 to 1"),
        ({"threshold": 80}, "--threshold 80: expected a similarity"),
        ({"ngram": 0}, "--ngram 0: expected 1 word or more"),
    ],
)
def test_bad_settings(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(MegamupError, match=message):
        MinHash(**arguments)  # type: ignore[arg-type]
