from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from megamup.config import Config, config_from, dump_config
from megamup.data.collate import collate
from megamup.data.corpus import Corpus
from megamup.data.manifest import TokenizerEntry
from megamup.data.mixture import TrainData, ValidData, Wanted, open_run_data, unique_names
from megamup.errors import MegamupError

MakeCorpus = Callable[..., Corpus]


@pytest.fixture
def corpora(make_corpus: MakeCorpus) -> list[Corpus]:
    """Of 1,000, 500 and 200 tokens: all 1, all 2, all 3."""
    return [make_corpus([[n] * (size + 1)], name=f"s{n}") for n, size in ((1, 1000), (2, 500), (3, 200))]


def opened(*wanted: Wanted, seed: int = 0) -> TrainData:
    return TrainData(wanted, seq_len=10, vocab_size=257, seed=seed)


def firsts(data: TrainData, n: int) -> list[int]:
    return [int(token) for token in collate(data.stream, np.arange(n)).window[:, 0]]


def config_of(**data: object) -> Config:
    model = {"arch": "gpt", "d_model": 8, "n_layers": 1, "n_heads": 1, "vocab_size": 257, "max_seq_len": 10}
    return config_from({"model": model, "data": data, "train": {"steps": 1}})


def test_sources_come_in_their_shares(corpora: list[Corpus]) -> None:
    one, two, _ = (corpus.prefix for corpus in corpora)
    found = firsts(opened(Wanted(one, 3), Wanted(two, 1)), 400)
    assert (found.count(1), found.count(2)) == (300, 100)


def test_neither_paths_nor_the_order_of_the_list_have_a_say(make_corpus: MakeCorpus) -> None:
    texts = [list(range(150)), list(range(50, 250)), list(range(100, 201))]
    weights, fractions = [1, 1, 0.5], [1, 0.5, 1]
    here = [make_corpus([text], name=f"here/{n}").prefix for n, text in enumerate(texts)]
    there = [make_corpus([text], name=f"there/{9 - n}").prefix for n, text in enumerate(texts)]
    first = opened(*map(Wanted, here, weights, fractions))
    second = opened(*map(Wanted, there[::-1], weights[::-1], fractions[::-1]))
    windows = [collate(data.stream, np.arange(300)).window for data in (first, second)]
    assert (windows[0] == windows[1]).all()


def test_epochs_by_source(corpora: list[Corpus]) -> None:
    one, two, _ = (corpus.prefix for corpus in corpora)
    data = opened(Wanted(one, 3), Wanted(two, 1, fraction=0.5))  # 100 and 25 samples
    assert data.epochs(400) == {"s1": 3.0, "s2": 4.0}
    assert data.metrics(200) == {"epochs_s1": 1.5, "epochs_s2": 2.0}
    assert opened(Wanted(two)).metrics(25) == {"epochs": 0.5}


def test_where_a_sample_comes_from(corpora: list[Corpus]) -> None:
    one, two, _ = (corpus.prefix for corpus in corpora)
    data = opened(Wanted(one, 3), Wanted(two, 1))
    positions, seen = np.arange(100, 400), set()
    for place, epoch, sample, window in zip(
        *data.locate(positions), collate(data.stream, positions).window, strict=True
    ):
        source = data.sources[place]
        assert source.samples.corpus.tokens(sample * 10, sample * 10 + 11).tolist() == window.tolist()
        seen.add((source.name, int(epoch)))
    assert seen == {("s1", 0), ("s1", 1), ("s1", 2), ("s2", 0), ("s2", 1)}


def test_what_a_run_reads_in_words(corpora: list[Corpus]) -> None:
    one, two, three = (corpus.prefix for corpus in corpora)
    train = [{"prefix": one, "weight": 3}, {"prefix": two, "weight": 1, "fraction": 0.5}]
    valid = [{"prefix": three}, {"prefix": two}]
    assert open_run_data(config_of(train=train, valid=valid)).summary(404) == [
        "data.train s1: 1,001 tokens, 100 samples of 10, 75% of the batches, 3.03 epochs in this run",
        "data.train s2: 501 tokens, 25 samples of 10 (fraction 0.5), 25% of the batches, 4.04 epochs in this run; "
        "warning: past 4 epochs repeated tokens teach less than new ones (Muennighoff et al. 2023)",
        "data.valid s3: 201 tokens",
        "data.valid s2: 501 tokens; warning: trained on, so that its loss says nothing of new text",
    ]


def test_a_fraction_of_all_sources_or_of_one(corpora: list[Corpus]) -> None:
    one, two, _ = (corpus.prefix for corpus in corpora)
    train = [{"prefix": one}, {"prefix": two, "fraction": 0.2}]
    data = open_run_data(config_of(train=train, fraction=0.5)).train
    assert sorted(len(source.samples) for source in data.sources) == [10, 50]
    assert len(open_run_data(config_of(train=one, fraction=0.5)).train.stream) == 50


def test_equal_corpora_are_refused(make_corpus: MakeCorpus) -> None:
    one, two = (make_corpus([[1, 2, 3] * 9], name=name).prefix for name in ("one", "two"))
    with pytest.raises(
        MegamupError, match=r"data\.train: '.*one' and '.*two' hold the same tokens.*sum of their weights"
    ):
        opened(Wanted(one), Wanted(two))
    with pytest.raises(MegamupError, match=r"data\.valid: .*hold the same tokens"):
        open_run_data(config_of(train=one, valid=[{"prefix": one}, {"prefix": two}]))


@pytest.mark.parametrize("key", ["train", "valid"])
def test_one_tokenizer_for_all(make_corpus: MakeCorpus, key: str) -> None:
    tokenizers = [TokenizerEntry("old.model", "a" * 64), TokenizerEntry("new.model", "b" * 64)]
    one, two = (
        make_corpus([[n] * 30], name=f"s{n}", tokenizer=tokenizer).prefix for n, tokenizer in enumerate(tokenizers)
    )
    bare = make_corpus([[7] * 30], name="bare", manifest=False).prefix
    data = {"train": [{"prefix": bare}, {"prefix": one}], "valid": [{"prefix": bare}]}
    assert open_run_data(config_of(**data)).valid, "what Megatron made doesn't tell"
    data[key] = [*data[key], {"prefix": two}]
    message = r"'.*s0' was made with tokenizer 'old\.model' \(aaaaaaaaaaaa\), '.*s1' with 'new\.model' \(bbbbbbbbbbbb\)"
    with pytest.raises(MegamupError, match=message):
        open_run_data(config_of(**data))


def test_a_missing_corpus() -> None:
    with pytest.raises(MegamupError, match="no file 'absent"):
        opened(Wanted("absent"))


def test_hashes_go_where_the_config_says(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    bare = make_corpus([[7] * 30], name="bare", manifest=False).prefix
    open_run_data(config_of(train=bare, cache=str(tmp_path / "mine")))
    assert list((tmp_path / "mine").iterdir())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": "a", "fraction": 0}, r"data\.fraction=0: .*greater than 0"),
        ({"train": "a", "fraction": 1.5}, r"data\.fraction=1\.5: .*less than or equal to 1"),
        ({"train": [{"prefix": "a", "fraction": 2}]}, r"data\.train\.0\.fraction=2"),
        ({"train": "a", "prefetch": 0}, r"data\.prefetch=0"),
        (
            {"train": "a", "valid": [{"prefix": "b", "weight": 2}, {"prefix": "c"}]},
            r"weights \[2\.0, 1\.0\].*must be equal",
        ),
        ({"train": "a", "valid": [{"prefix": "b", "fraction": 0.5}]}, r"valid: a fraction has no effect"),
    ],
)
def test_config_that_makes_no_sense(data: dict[str, object], message: str) -> None:
    with pytest.raises(MegamupError, match=message):
        config_of(**data)


def test_named_sets_are_read_apart(corpora: list[Corpus]) -> None:
    one, two, three = (corpus.prefix for corpus in corpora)
    config = config_of(train=one, valid={"books": three, "code": [two, one]})
    assert config_from(yaml.safe_load(dump_config(config))) == config
    data = open_run_data(config)
    assert data.valid
    assert [(each.name, len(each.stream)) for each in data.valid.sets] == [("books", 21), ("code", 51 + 101)]
    assert data.summary(1)[1:] == [
        "data.valid s3 (books): 201 tokens",
        "data.valid s2 (code): 501 tokens",
        "data.valid s1 (code): 1,001 tokens; warning: trained on, so that its loss says nothing of new text",
    ]
    listed = open_run_data(config_of(train=one, valid=[{"prefix": three}, {"prefix": two}])).valid
    assert listed
    assert [(each.name, len(each.stream)) for each in listed.sets] == [("valid", 21 + 51)]
    with pytest.raises(MegamupError, match=r"data\.valid: .*hold the same tokens"):
        open_run_data(config_of(train=one, valid={"books": two, "code": [three, two]}))


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({"c4-en": "a"}, r"data\.valid: 'c4-en': expected a name of letters, digits and _, as it becomes part of"),
        ({2024: "a"}, r"data\.valid: 2024: expected a name of letters"),
        ({"books": []}, r"data\.valid: books: \[\]: expected the prefix of a corpus, or a list of prefixes"),
        ({"books": {"prefix": "a"}}, r"data\.valid: books: {'prefix': 'a'}: expected the prefix"),
        ({"books": ["a", 3]}, r"data\.valid: books: \['a', 3\]: expected the prefix"),
        ({}, r"data\.valid: {}: expected a set by its name"),
    ],
)
def test_sets_that_make_no_sense(sets: dict[object, object], message: str) -> None:
    with pytest.raises(MegamupError, match=message) as caught:
        config_of(train="a", valid=sets)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prefixes", "names"),
    [
        (["/data/wiki"], ["wiki"]),
        (["/data/wiki", "/data/code"], ["wiki", "code"]),
        (["/data/a/train", "/data/b/train", "/data/b/other"], ["a/train", "b/train", "b/other"]),
        (["/a/x/train", "/b/x/train"], ["a/x/train", "b/x/train"]),
        (["/train", "/a/train"], ["train", "a/train"]),
    ],
)
def test_names_tell_sources_apart(prefixes: list[str], names: list[str]) -> None:
    assert unique_names(prefixes) == names


def test_the_same_documents_in_other_shards_are_the_same(make_corpus: MakeCorpus) -> None:
    """As after `tools/shards.py split`: neither read twice, nor held out without a word."""
    documents = [list(range(start, start + 10)) for start in range(0, 900, 10)]
    whole, cut = make_corpus(documents, 1004, name="whole"), make_corpus(documents, 1004, name="cut", shard_bytes=300)
    assert len(cut.shards) > 3
    with pytest.raises(MegamupError, match=r"'.*whole' and '.*cut' hold the same tokens"):
        opened(Wanted(whole.prefix), Wanted(cut.prefix))
    valid = ValidData({"valid": [cut.prefix]}, seq_len=10, vocab_size=1004)
    assert "warning: trained on" in valid.summary([whole])[0]
    other = make_corpus([*documents[:-1], [1] * 10], 1004, name="other")
    assert "warning" not in valid.summary([other])[0]
