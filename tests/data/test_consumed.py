import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megamup.config import Config, config_from, dump_config
from megamup.data import consumed
from megamup.data.consumed import changes, check_files, documents_of_step, identity, read_record, record
from megamup.data.corpus import Corpus
from megamup.data.loader import BatchStream
from megamup.data.mixture import open_run_data
from megamup.data.writer import write_corpus
from megamup.errors import MegamupError
from megamup.files import write_json_atomic, write_text_atomic

MakeCorpus = Callable[..., Corpus]
ROOT = Path(__file__).resolve().parents[2]
LENGTHS = {"wiki": [7, 1, 0, 30, 2, 61, 12], "code": [200, 5, 5, 0, 90]}


@pytest.fixture
def corpora(make_corpus: MakeCorpus) -> dict[str, Corpus]:
    """Documents of all lengths in several shards, some empty; every token of both is another one."""
    ids = iter(range(1000))
    return {
        name: make_corpus([[next(ids) for _ in range(n)] for n in lengths], 1000, name=name, shard_bytes=100)
        for name, lengths in LENGTHS.items()
    }


@pytest.fixture
def config(corpora: dict[str, Corpus], tmp_path: Path) -> Config:
    model = {"arch": "gpt", "d_model": 8, "n_layers": 1, "n_heads": 1, "vocab_size": 1000, "max_seq_len": 10}
    sources = [{"prefix": corpora["wiki"].prefix, "weight": 1}, {"prefix": corpora["code"].prefix, "weight": 2}]
    sources[1]["fraction"] = 0.5
    values = {"data": {"train": sources}, "train": {"steps": 20}, "batch": {"global_sequences": 6}}
    return config_from({"model": model, **values, "run": {"dir": str(tmp_path), "name": "run"}})


def write_run(config: Config) -> dict[str, Any]:
    """The run's folder as training leaves it."""
    values = record(config, open_run_data(config))
    write_text_atomic(config.run.folder / "config.yaml", dump_config(config))
    write_json_atomic(config.run.folder / "data.json", values)
    return values


def test_documents_of_a_step_are_those_of_the_batch(config: Config, corpora: dict[str, Corpus]) -> None:
    """Against the tokens that the loader gives: the parts' tokens, one after the other, are the sample."""
    write_run(config)
    data = open_run_data(config)
    streams = [BatchStream(data.train.stream, 6, 1, rank, 2) for rank in range(2)]
    epochs = set()
    for step in range(1, 21):
        samples = documents_of_step(config.run.folder, step)
        given = [batch.window[0].tolist() for stream in streams for batch in stream.micro_batches(step - 1)]
        assert len(samples) == 6
        for sample, tokens in zip(samples, given, strict=True):
            corpus = corpora[sample.source]
            assert sample.prefix == corpus.prefix
            assert corpus.tokens(sample.start, sample.stop).tolist() == tokens
            parts = [corpus.document(part.document)[part.start : part.stop].tolist() for part in sample.parts]
            assert [token for part in parts for token in part] == tokens
            assert all(parts), "a document without a token was not seen"
            epochs.add((sample.source, sample.epoch))
    assert {epoch for name, epoch in epochs if name == "code"} == set(range(6))  # 80 samples of 15


def test_documents_of_a_step_need_no_torch(config: Config) -> None:
    write_run(config)
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "from megamup.data.consumed import documents_of_step\n"
        "print(len(documents_of_step(Path(sys.argv[2]), 3)), 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(ROOT), str(config.run.folder)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "6 False\n"


def test_moved_data_is_found_under_the_record(config: Config, tmp_path: Path) -> None:
    values = write_run(config)
    before = [(sample.source, sample.start) for sample in documents_of_step(config.run.folder, 5)]
    (tmp_path / "moved").mkdir()
    for name in ("wiki", "code"):
        for path in [*tmp_path.glob(f"{name}*.bin"), *tmp_path.glob(f"{name}*.idx"), tmp_path / f"{name}.json"]:
            path.rename(tmp_path / "moved" / path.name)
    with pytest.raises(MegamupError, match="no file"):
        documents_of_step(config.run.folder, 5)
    for source in values["train"]:
        source["prefix"] = str(tmp_path / "moved" / source["name"])
    write_json_atomic(config.run.folder / "data.json", values)
    assert [(sample.source, sample.start) for sample in documents_of_step(config.run.folder, 5)] == before


def test_another_corpus_at_the_place_is_refused(config: Config, make_corpus: MakeCorpus) -> None:
    write_run(config)
    make_corpus([[3] * 200], 1000, name="wiki")
    with pytest.raises(MegamupError, match=r"wiki': content hash [0-9a-f]{64}, but .*run read [0-9a-f]{64}.*restore"):
        documents_of_step(config.run.folder, 1)


def test_tokens_that_changed_where_opening_does_not_look_are_noticed(tmp_path: Path) -> None:
    """Of the same counts, size and manifest: files that were touched are read again before a run goes on with them."""
    write_corpus(str(tmp_path / "big"), [[number % 1000 for number in range(60_000)]], 1000, 999)
    model = {"arch": "gpt", "d_model": 8, "n_layers": 1, "n_heads": 1, "vocab_size": 1000, "max_seq_len": 10}
    values = {"data": {"train": str(tmp_path / "big"), "cache": str(tmp_path / "cache")}, "train": {"steps": 20}}
    config = config_from({"model": model, **values, "run": {"dir": str(tmp_path), "name": "run"}})
    write_run(config)
    check_files(config.run.folder, open_run_data(config))
    os.utime(tmp_path / "big.bin")  # touched, but the same
    check_files(config.run.folder, open_run_data(config))
    assert documents_of_step(config.run.folder, 1)
    with open(tmp_path / "big.bin", "r+b") as file:
        file.seek(40_000)
        file.write(b"\1\0" * 100)
    with pytest.raises(MegamupError, match=r"big\.bin: SHA-256 .*, its manifest says .*: changed since it was written"):
        check_files(config.run.folder, open_run_data(config))
    with pytest.raises(MegamupError, match=r"big\.bin: SHA-256"):
        documents_of_step(config.run.folder, 1)


def test_ranks_that_read_the_same_are_told_so(config: Config, tmp_path: Path, make_corpus: MakeCorpus) -> None:
    """Wherever it lies; and other content, order or shares are told apart."""
    values = write_run(config)
    moved = json.loads(json.dumps(values))
    for source in moved["train"]:
        source |= {"prefix": "/elsewhere", "state": "touched"}
    assert identity(moved) == identity(values)
    for change in ({"seed": 1}, {"train": values["train"][:1]}, {"global_sequences": 7}):
        assert identity(values | change) != identity(values)


def test_which_as_its_user_starts_it(
    config: Config, shards_main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(config)
    call = ["which", "--run", str(config.run.folder), "--step"]
    assert shards_main([*call, "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"step 3 of {config.run.folder}: 6 sequences"
    samples = documents_of_step(config.run.folder, 3)
    told = [line for line in lines if ", epoch " in line]
    for line, sample in zip(told, samples, strict=True):
        assert f"{sample.source}, epoch {sample.epoch}, sample {sample.index}, tokens {sample.start} to" in line
    parts = [line.strip() for line in lines if "document" in line]
    assert parts == [
        f"document {part.document}, its tokens {part.start} to {part.stop}"
        for sample in samples
        for part in sample.parts
    ]
    assert shards_main([*call, "99"]) == 2
    assert "expected 1 to train.steps=20" in capsys.readouterr().err


@pytest.mark.parametrize("step", [0, 21, -3])
def test_steps_that_are_none(config: Config, step: int) -> None:
    write_run(config)
    with pytest.raises(MegamupError, match=rf"step {step} of .*expected 1 to train\.steps=20"):
        documents_of_step(config.run.folder, step)


def test_folders_that_hold_no_run(config: Config, tmp_path: Path) -> None:
    with pytest.raises(MegamupError, match=r"config\.yaml: no such config file"):
        documents_of_step(tmp_path / "nowhere", 1)
    write_run(config)
    path = config.run.folder / "data.json"
    whole = json.loads(path.read_text())
    for content, message in (
        ("{", "not the record of a run's data"),
        ("[]", "not the record"),
        (json.dumps({**whole, "version": 0}), "version 0 of the order of samples, this megamup has 1"),
    ):
        path.write_text(content)
        with pytest.raises(MegamupError, match=message):
            documents_of_step(config.run.folder, 1)
    path.unlink()
    assert read_record(config.run.folder) is None
    with pytest.raises(MegamupError, match=r"no data\.json"):
        documents_of_step(config.run.folder, 1)


def test_the_record_holds_what_determines_the_order(config: Config, corpora: dict[str, Corpus]) -> None:
    values = write_run(config)
    assert read_record(config.run.folder) == values
    assert {key: values[key] for key in ("version", "seed", "seq_len", "global_sequences", "valid")} == {
        "version": consumed.VERSION,
        "seed": 1234,
        "seq_len": 10,
        "global_sequences": 6,
        "valid": [],
    }
    code = next(source for source in values["train"] if source["name"] == "code")
    manifest = corpora["code"].manifest
    assert manifest is not None
    assert code == {
        "name": "code",
        "prefix": corpora["code"].prefix,
        "content_hash": manifest.content_hash,
        "state": corpora["code"].state,
        "tokens": 300,
        "tokenizer_sha256": manifest.tokenizer.sha256,
        "samples": 14,
        "weight": 2.0,
        "fraction": 0.5,
    }


def source(name: str, content: str, **values: Any) -> dict[str, Any]:
    return {"name": name, "prefix": f"/data/{name}", "content_hash": content, "weight": 1.0, **values}


def test_changes() -> None:
    before = {"train": [source("a", "1"), source("b", "2")], "valid": []}
    assert changes(before, before) == []
    moved = {"train": [source("x/b", "2"), source("x/a", "1")], "valid": []}
    assert changes(before, moved) == []
    changed = {"train": [source("a", "9", weight=2.0), source("b", "2")], "valid": []}
    assert changes(before, changed) == [
        "  data.train '/data/a': content_hash '1' there, '9' now",
        "  data.train '/data/a': weight 1.0 there, 2.0 now",
    ]
    other = {"train": [source("a", "1"), source("c", "3")], "valid": [source("v", "4")]}
    assert changes(before, other) == [
        "  data.train: 'b' is gone",
        "  data.train: 'c' is new",
        "  data.valid: 'v' is new",
    ]
    swapped = {"train": [source("a", "2"), source("b", "1")], "valid": []}
    assert changes(before, swapped) == [], "the same content under swapped names is read in the same order"
