"""From a config and corpora to batches: what the whole path gives, on any number of ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megamup.config import Config, config_from, dump_config
from megamup.data.consumed import documents_of_step, identity, record
from megamup.data.corpus import Corpus
from megamup.data.loader import BatchStream, TensorBatch
from megamup.data.manifest import TokenizerEntry
from megamup.data.mixture import RunData, open_run_data
from megamup.data.tokenizer import ByteTokenizer, store_tokenizer
from megamup.data.writer import write_corpus
from megamup.errors import MegamupError
from megamup.files import write_json_atomic, write_text_atomic

EOD = 256
SHAPE = {"d_model": 8, "n_layers": 1, "n_heads": 1, "vocab_size": 400, "max_seq_len": 32}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "causal": {"model": {"arch": "llama"}, "data": {"documents": True}},
    "prefix": {"model": {"arch": "gpt"}, "objective": {"kind": "prefix"}},
    "mlm": {"model": {"arch": "bert"}, "data": {"documents": True}, "objective": {"ngram": 3, "whole_word": True}},
    "next_sentence": {"model": {"arch": "bert", "pair_head": True}, "objective": {"pairs": "next_sentence"}},
    "sentence_order": {"model": {"arch": "bert", "pair_head": True}, "objective": {"pairs": "sentence_order"}},
    "span_corruption": {"model": {"arch": "t5"}, "data": {"documents": True}},
    "prefix of t5": {"model": {"arch": "t5"}, "objective": {"kind": "prefix"}},
    "ul2": {"model": {"arch": "t5"}, "objective": {"kind": "ul2"}},
}


@pytest.fixture
def prefixes(tmp_path: Path, prose: str) -> tuple[str, str]:
    """Two corpora of bytes with their tokenizer: prose in documents of many lengths."""
    tokenizer = ByteTokenizer()
    found = []
    for name, repeats in (("train", 40), ("valid", 7)):
        text = (prose * repeats).encode()
        ends = np.cumsum(np.random.default_rng(repeats).integers(5, 120, len(text) // 50))
        documents = [[*part.tolist(), EOD] for part in np.split(np.frombuffer(text, np.uint8), ends[ends < len(text)])]
        store_tokenizer(tokenizer, tmp_path / "tokenizer")
        entry = TokenizerEntry("bytes", tokenizer.sha256, "tokenizer")
        write_corpus(str(tmp_path / name), documents, 257, EOD, entry)
        found.append(str(tmp_path / name))
    return found[0], found[1]


def config_of(prefixes: tuple[str, str], tmp_path: Path, name: str, **changes: Any) -> Config:
    wanted = OBJECTIVES[name]
    data = {"train": prefixes[0], "valid": prefixes[1]} | wanted.get("data", {})
    return config_from(
        {
            "model": SHAPE | wanted["model"] | changes.pop("model", {}),
            "data": data | changes.pop("data", {}),
            "objective": wanted.get("objective", {}) | changes.pop("objective", {}),
            "train": {"steps": 20},
            "batch": {"global_sequences": 12},
            "run": {"dir": str(tmp_path), "name": "run"} | changes,
        }
    )


def rows(streams: list[BatchStream], step: int) -> list[list[int]]:
    return [row for stream in streams for batch in stream.micro_batches(step) for row in batch.window.tolist()]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_batches_are_the_same_on_any_layout(prefixes: tuple[str, str], tmp_path: Path, name: str) -> None:
    data = open_run_data(config_of(prefixes, tmp_path, name))

    def streams(ranks: int, micro: int) -> list[BatchStream]:
        stream = data.train.stream
        return [BatchStream(stream, 12, micro, rank, ranks, objective=data.objective) for rank in range(ranks)]

    expected = rows(streams(1, 12), 7)
    assert len({tuple(row) for row in expected}) == 12
    for ranks, micro in ((1, 3), (2, 3), (3, 2), (4, 1)):
        assert rows(streams(ranks, micro), 7) == expected


@pytest.mark.parametrize("name", OBJECTIVES)
def test_shapes_are_those_of_the_config(prefixes: tuple[str, str], tmp_path: Path, name: str) -> None:
    """Of every step, in training and evaluation; all ids are the model's."""
    config = config_of(prefixes, tmp_path, name)
    data = open_run_data(config)
    assert data.valid is not None
    train = BatchStream(data.train.stream, 12, 12, objective=data.objective)
    valid = BatchStream(data.valid.sets[0].stream, 12, 12, objective=data.valid_objective)
    batches = [
        batch for stream in (train, valid) for step in range(len(stream)) for batch in stream.micro_batches(step)
    ]
    targets = config.decoder_len or config.seq_len
    for batch in batches:
        assert batch.tokens.shape == (12, config.seq_len)
        assert batch.targets.shape == (12, targets)
        ids = [value for key, value in batch.inputs.items() if key.endswith("tokens")]
        assert all(0 <= int(value.min()) <= int(value.max()) < 400 for value in ids)
        assert -1 <= int(batch.targets.min()) <= int(batch.targets.max()) < 400
        assert batch.n_targets == int((batch.targets >= 0).sum())
    assert sum(batch.n_targets for batch in batches) > 0
    keys = {"tokens"} | ({"decoder_tokens"} if config.decoder_len else set())
    keys |= {"documents"} if config.data.documents else set()
    keys |= {"decoder_documents"} if config.data.documents and config.decoder_len else set()
    keys |= {"token_types", "pair"} if config.model.pair_head else set()
    assert set(batches[0].inputs) == keys


def held_out(data: RunData) -> list[TensorBatch]:
    assert data.valid is not None
    stream = BatchStream(data.valid.sets[0].stream, 12, 12, objective=data.valid_objective)
    return [batch for step in range(len(stream)) for batch in stream.micro_batches(step)]


@pytest.mark.parametrize("name", ["mlm", "span_corruption"])
def test_seeds_train_on_other_masks_and_are_evaluated_on_the_same(
    prefixes: tuple[str, str], tmp_path: Path, name: str
) -> None:
    one, other = (open_run_data(config_of(prefixes, tmp_path, name, seed=seed)) for seed in (1, 2))
    assert [batch.window.tolist() for batch in held_out(one)] == [batch.window.tolist() for batch in held_out(other)]
    trained = [rows([BatchStream(data.train.stream, 12, 12, objective=data.objective)], 0) for data in (one, other)]
    assert trained[0] != trained[1]


def test_an_epoch_masks_anew(prefixes: tuple[str, str], tmp_path: Path) -> None:
    """The same text, twice: other tokens of it are targets."""
    data = open_run_data(config_of(prefixes, tmp_path, "mlm"))
    samples = len(data.train.stream)
    stream = BatchStream(data.train.stream, samples, samples, objective=data.objective)
    seen = []
    for epoch in range(2):
        (batch,) = stream.micro_batches(epoch)
        _, epochs, places = data.train.locate(np.arange(samples) + epoch * samples)
        assert set(epochs.tolist()) == {epoch}
        masks = dict(zip(places.tolist(), (batch.targets >= 0).tolist(), strict=True))
        seen.append([masks[place] for place in range(samples)])
    assert np.mean([one == other for one, other in zip(*seen, strict=True)]) < 0.1


def test_whole_words_of_the_corpus_tokenizer(prefixes: tuple[str, str], tmp_path: Path) -> None:
    config = config_of(prefixes, tmp_path, "mlm", objective={"ngram": 1, "replace": (1.0, 0.0, 0.0)})
    data = open_run_data(config)
    (batch,) = BatchStream(data.train.stream, 12, 12, objective=data.objective).micro_batches(0)
    spaces = {0x20, 0x0A}
    for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        original = [target if target >= 0 else token for token, target in zip(tokens, targets, strict=True)]
        for place in range(1, len(original)):
            if not spaces & {original[place - 1], original[place]} and EOD not in original[place - 1 : place + 1]:
                assert (targets[place] >= 0) == (targets[place - 1] >= 0), "two bytes of one word"


def test_whole_words_need_a_tokenizer(make_corpus: Callable[..., Corpus], tmp_path: Path) -> None:
    prefix = make_corpus([[1] * 300]).prefix
    with pytest.raises(MegamupError, match=r"whole_word=true: no tokenizer lies beside .*corpus'"):
        open_run_data(config_of((prefix, prefix), tmp_path, "mlm"))


def test_special_ids_are_none_of_text(prefixes: tuple[str, str], tmp_path: Path) -> None:
    config = config_of(prefixes, tmp_path, "sentence_order", model={"vocab_size": 259})
    with pytest.raises(MegamupError, match=r"id 256, which text of .*train' may hold .*vocab_size=259 to 260 or more"):
        open_run_data(config)
    open_run_data(config_of(prefixes, tmp_path, "sentence_order", model={"vocab_size": 260}))
    with pytest.raises(MegamupError, match=r"mask_id is id 97,"):
        open_run_data(config_of(prefixes, tmp_path, "mlm", objective={"mask_id": 97}))
    with pytest.raises(MegamupError, match=r"sentinel 43 is id 256"):
        open_run_data(config_of(prefixes, tmp_path, "span_corruption", model={"vocab_size": 300}))


def test_documents_must_end_alike(make_corpus: Callable[..., Corpus], tmp_path: Path) -> None:
    one, other = make_corpus([[1] * 300], 257, name="one"), make_corpus([[1] * 299], 300, name="other")
    sources = [{"prefix": one.prefix}, {"prefix": other.prefix}]
    config = config_of(("", one.prefix), tmp_path, "causal", data={"train": sources, "valid": None})
    with pytest.raises(MegamupError, match=r"of '.*one' end with token 256, those of '.*other' with 299"):
        open_run_data(config)
    plain = config_of(("", one.prefix), tmp_path, "causal", data={"train": sources, "valid": None, "documents": False})
    open_run_data(plain)


def test_the_record_names_the_objective_unless_it_is_causal(prefixes: tuple[str, str], tmp_path: Path) -> None:
    """A causal run's record is what it was before there were others, so that those are resumed."""
    records = {}
    for name in OBJECTIVES:
        config = config_of(prefixes, tmp_path, name)
        records[name] = record(config, open_run_data(config))
        assert records[name]["seq_len"] == config.raw_len
        assert ("objective" in records[name]) == (name != "causal")
    assert set(records["causal"]) == {"version", "seed", "seq_len", "global_sequences", "train", "valid"}
    assert len({identity(values) for values in records.values()}) == len(records)


@pytest.mark.parametrize("name", ["mlm", "span_corruption", "prefix"])
def test_documents_of_a_step_are_those_that_were_read(prefixes: tuple[str, str], tmp_path: Path, name: str) -> None:
    config = config_of(prefixes, tmp_path, name, objective={"mask_share": 1e-9} if name == "mlm" else {})
    data = open_run_data(config)
    write_text_atomic(config.run.folder / "config.yaml", dump_config(config))
    write_json_atomic(config.run.folder / "data.json", record(config, data))
    corpus = data.train.corpora[0]
    (batch,) = BatchStream(data.train.stream, 12, 12, objective=data.objective).micro_batches(2)
    for sample, tokens in zip(documents_of_step(config.run.folder, 3), batch.tokens.tolist(), strict=True):
        text = corpus.tokens(sample.start, sample.stop).tolist()
        if name == "prefix":
            assert tokens == text[:-1]
        elif name == "mlm":
            assert sum(read != token for read, token in zip(tokens, text, strict=True)) <= 1
        else:
            assert len(text) == config.raw_len
            assert tokens[0] == text[0]
            kept = [token for token in tokens[:-1] if token < 300]
            place = iter(text)
            assert all(token in place for token in kept), "in the order of the text"
