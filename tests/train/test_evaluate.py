"""What is told of held-out text, while a model trains and afterwards."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megamup.cli import load_program
from megamup.config import Config
from megamup.data.corpus import TextCounts
from megamup.data.manifest import TokenizerEntry
from megamup.data.shards import token_dtype
from megamup.data.writer import CorpusWriter
from megamup.errors import MegamupError
from megamup.train.evaluate import SetLoss, together, valid_metrics
from megamup.train.evaluate_run import Evaluation, evaluate_run
from megamup.train.fork import run_ranks
from megamup.train.loop import train

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = {"books": 700, "one": 300, "two": 1000}
BYTES = {"books": 1234, "one": 500, "two": 0}  # of one of them it isn't known
WORDS = {"books": 211, "one": 90, "two": 170}


@pytest.fixture
def corpora(tmp_path: Path) -> dict[str, str]:
    """Prefixes of held-out corpora by name."""
    for seed, (name, length) in enumerate(LENGTHS.items()):
        ids = np.random.default_rng(seed).integers(1, 250, length)
        with CorpusWriter(str(tmp_path / name), token_dtype(256)) as writer:
            writer.add(ids.astype(np.uint16), [length])
            writer.finish(
                vocab_size=256,
                eod_id=0,
                tokenizer=TokenizerEntry("t", "b" * 64) if name == "two" else TokenizerEntry.unknown(),
                text_bytes=BYTES[name],
                text_words=WORDS[name],
            )
    return {name: str(tmp_path / name) for name in LENGTHS}


def test_figures_of_a_uniform_guess() -> None:
    """Over bytes it costs 8 bits each, whatever the tokens were that they were told in."""
    nats = 1000 * math.log(256)
    found = SetLoss("s", nats, targets=400, text=TextCounts(1000, 200)).figures
    assert found == pytest.approx(
        {
            "loss": 2.5 * math.log(256),
            "perplexity": 256**2.5,
            "bits_per_byte": 8,
            "byte_perplexity": 256,
            "word_perplexity": 256**5,
        }
    )
    assert set(SetLoss("s", nats, 400, TextCounts(0, 200)).figures) == {"loss", "perplexity", "word_perplexity"}


def test_a_perplexity_that_no_float_holds_is_left_out() -> None:
    """One word of a text without spaces, say."""
    found = SetLoss("s", 2000.0, targets=500, text=TextCounts(1500, 1)).figures
    assert set(found) == {"loss", "perplexity", "bits_per_byte", "byte_perplexity"}
    assert json.loads(json.dumps(found)) == found


def test_all_together_counts_each_target_once() -> None:
    sets = [SetLoss("a", 30.0, 10, TextCounts(40, 8)), SetLoss("b", 10.0, 30, TextCounts(60, 0))]
    whole = together(sets)
    assert whole.loss == 1.0
    assert whole.bits_per_byte == pytest.approx(0.4 / math.log(2))
    assert whole.text == TextCounts(100, 0), "the words of one set aren't known"
    named = valid_metrics(sets)
    assert (named["valid_loss"], named["valid_loss_a"], named["valid_loss_b"]) == (1.0, 3.0, 1 / 3)
    assert "valid_word_perplexity_a" in named
    assert "valid_word_perplexity" not in named
    assert set(valid_metrics(sets[:1])) == {f"valid_{figure}" for figure in sets[0].figures}, "one set needs no name"


def test_a_run_tells_of_each_set_and_of_all(make_config: Any, corpora: dict[str, str]) -> None:
    sets = f"{{books: {corpora['books']}, code: [{corpora['one']}, {corpora['two']}]}}"
    small = ("train.steps=2", "schedule.warmup_steps=0")
    record = run_ranks(train, 2, make_config(*small, f"data.valid={sets}"))[0]
    books, code = record["valid_loss_books"], record["valid_loss_code"]
    assert record["valid_loss"] == pytest.approx((700 * books + 1300 * code) / 2000, rel=1e-9)
    assert record["valid_perplexity_books"] == pytest.approx(math.exp(books))
    assert record["valid_bits_per_byte_books"] == pytest.approx(700 * books / math.log(2) / 1234)
    assert record["valid_word_perplexity_books"] == pytest.approx(math.exp(700 * books / 211))
    assert record["valid_word_perplexity"] == pytest.approx(math.exp(2000 * record["valid_loss"] / 471))
    assert not {"valid_bits_per_byte", "valid_bits_per_byte_code"} & set(record), "bytes of `two` aren't known"
    listed = ", ".join(f"{{prefix: {prefix}}}" for prefix in corpora.values())
    whole = run_ranks(train, 1, make_config(*small, f"data.valid=[{listed}]", "run.name=list"))[0]
    assert whole["valid_loss"] == pytest.approx(record["valid_loss"], rel=1e-5)
    assert not [key for key in whole if key.startswith("valid_loss_")]


def test_a_part_of_the_text_tells_no_bytes(make_config: Any, corpora: dict[str, str]) -> None:
    """Of 11 and 5 sequences the first 8 are a batch, which is all of the smaller set."""
    config = make_config(
        "train.steps=1",
        "schedule.warmup_steps=0",
        f"data.valid={{books: {corpora['books']}, one: {corpora['one']}}}",
        "train.eval_sequences=1",
    )
    record = run_ranks(train, 1, config)[0]
    told = {key for key in record if key.startswith("valid_bits_per_byte")}
    assert told == {"valid_bits_per_byte_one"}
    assert record["valid_loss"] == pytest.approx(
        (512 * record["valid_loss_books"] + 300 * record["valid_loss_one"]) / 812, rel=1e-9
    )


TRAINED = ("train.steps=3", "train.save_every=2", "schedule.warmup_steps=0")


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, ()),
        (2, ("parallel.tensor=2", "deepspeed=ds_configs/zero1.json", "precision=bf16")),
        (2, ("parallel.pipeline=2", "deepspeed=ds_configs/zero1.json")),
        (2, ("deepspeed=ds_configs/zero3.json",)),
    ],
)
def test_a_checkpoint_has_the_loss_that_the_run_had(
    make_config: Any, corpora: dict[str, str], ranks: int, layout: tuple[str, ...]
) -> None:
    config = make_config(*TRAINED, *layout, f"data.valid={{books: {corpora['books']}, one: {corpora['one']}}}")
    record = run_ranks(train, ranks, config)[0]
    found, *others = run_ranks(evaluate_run, ranks, str(config.run.folder))
    assert found is not None
    assert others == [None] * (ranks - 1)
    assert valid_metrics(found.losses) == {key: value for key, value in record.items() if key.startswith("valid_")}
    assert (found.step, [each.name for each in found.losses]) == (3, ["books", "one"])


@pytest.fixture
def trained(make_config: Any, corpora: dict[str, str]) -> Config:
    config: Config = make_config(*TRAINED, f"data.valid={corpora['books']}")
    run_ranks(train, 1, config)
    return config


def evaluated(run: str, *changes: str) -> Evaluation:
    (found,) = run_ranks(evaluate_run, 1, run, changes)
    assert found is not None
    return found


def test_other_sets_at_an_earlier_step(trained: Config, corpora: dict[str, str], read_metrics: Any) -> None:
    folder = trained.run.folder
    change = f"data.valid={{code: [{corpora['one']}]}}"
    early = evaluated(f"{folder}@2", change, "batch.global_sequences=2")
    assert (early.step, [each.name for each in early.losses], early.losses[0].targets) == (2, ["code"], 300)
    late = evaluated(str(folder), change)
    assert early.losses[0].loss != late.losses[0].loss
    written = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
    assert [(each["step"], each["set"], each["data"]) for each in written] == [
        (2, "code", [corpora["one"]]),
        (3, "code", [corpora["one"]]),
    ]
    assert written[1]["loss"] == late.losses[0].loss
    assert written[1]["bits_per_byte"] == pytest.approx(300 * late.losses[0].loss / math.log(2) / 500)
    assert len(read_metrics(trained)) == 3, "the run's own metrics are as they were"


def evaluate_as_its_user(*arguments: str) -> int:
    code: int = load_program(ROOT / "tools" / "evaluate.py").main(list(arguments))
    return code


def test_the_program(trained: Config, corpora: dict[str, str], capfd: pytest.CaptureFixture[str]) -> None:
    folder = str(trained.run.folder)
    capfd.readouterr()
    sets = f"data.valid={{one: {corpora['one']}, two: {corpora['two']}}}"
    assert run_ranks(evaluate_as_its_user, 1, folder, sets)[0] == 0
    title, heading, *rows = capfd.readouterr().out.splitlines()[-5:]
    assert title == f"{folder} after step 3: loss in nats, perplexity per token, byte and word"
    assert heading.split("  ")[-1] == "bits per byte"
    assert [row.split()[0] for row in rows] == ["one", "two", "all"]
    assert [len(row.split()) for row in rows] == [7, 5, 6], "of `two`, and so of all, no bytes are known"
    assert run_ranks(evaluate_as_its_user, 1, folder, sets, "--json")[0] == 0
    told = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert [each["set"] for each in told["sets"]] == ["one", "two", None]
    assert f"{told['sets'][0]['loss']:.4f}" in rows[0]


@pytest.mark.parametrize(
    ("run", "changes", "message"),
    [
        ("{folder}@1", [], r"run: no checkpoint of step 1; there are 2, 3"),
        ("{folder}x", [], r"runx: no config\.yaml there; expected the folder of a run"),
        ("{folder}", ["optim.lr=1"], r"optim\.lr=1: expected a key that an evaluation may change: data\.valid"),
        ("{folder}", ["data.valid=null"], r"the run has no data\.valid; give data\.valid=PREFIX"),
        ("{folder}", ["data.valid={a-b: x}"], r"data\.valid: 'a-b': expected a name of letters"),
        ("{folder}", ["data.valid=nowhere"], r"no file 'nowhere\.json'"),
    ],
)
def test_what_cannot_be_evaluated(trained: Config, run: str, changes: list[str], message: str) -> None:
    with pytest.raises(MegamupError, match=message):
        evaluate_run(run.format(folder=trained.run.folder), changes)
    assert not (trained.run.folder / "evaluation.jsonl").exists()


def test_more_ranks_than_the_checkpoint_was_written_by(trained: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MegamupError, match="was written with world_size=1, this run has world_size=2"):
        evaluate_run(str(trained.run.folder))


def test_text_in_tokens_of_another_tokenizer(trained: Config, corpora: dict[str, str]) -> None:
    path = trained.run.folder / "data.json"
    values = json.loads(path.read_text())
    values["train"][0]["tokenizer_sha256"] = "c" * 64
    path.write_text(json.dumps(values))
    message = r"two' was made with tokenizer 't' \(b+\), the run learnt tokens of another"
    with pytest.raises(MegamupError, match=message):
        evaluate_run(str(trained.run.folder), [f"data.valid={corpora['two']}"])


@pytest.mark.parametrize(
    ("changes", "least", "most"),
    [
        (("model.arch=bert", "model.vocab_size=320"), 30, 60),  # 15% of 300
        (("model.arch=t5", "model.vocab_size=320", "objective.sentinels=20"), 40, 130),
        (("objective.kind=prefix",), 60, 240),
    ],
)
def test_only_what_an_objective_makes_a_target_counts(
    make_config: Any, corpora: dict[str, str], changes: tuple[str, ...], least: int, most: int
) -> None:
    """So that nothing can be told of bytes and words; and the same targets count on every layout and for every seed."""
    found = {}
    for seed, ranks in ((1, 1), (2, 2)):
        name = f"run.name={seed}"
        config = make_config(*TRAINED, *changes, f"data.valid={corpora['one']}", f"run.seed={seed}", name)
        record = run_ranks(train, ranks, config)[0]
        evaluation = run_ranks(evaluate_run, ranks, str(config.run.folder))[0]
        assert evaluation is not None
        (found[seed],) = evaluation.losses
        assert {key for key in record if key.startswith("valid_")} == {"valid_loss", "valid_perplexity"}
        assert record["valid_loss"] == found[seed].loss
    assert found[1].targets == found[2].targets
    assert least < found[1].targets < most
