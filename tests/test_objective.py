"""The section `objective`: defaults by architecture, lengths, special ids, and what doesn't go together."""

from typing import Any

import pytest

from megamup.config import Config, config_from
from megamup.errors import MegamupError
from megamup.objective import denoised, special_ids

MODEL = {"d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 32128, "max_seq_len": 512}


def config(arch: str, objective: dict[str, Any] | None = None, **changes: Any) -> Config:
    model = MODEL | {"arch": arch} | changes.pop("model", {})
    values: dict[str, Any] = {"model": model, "data": {"train": "x"} | changes.pop("data", {}), "train": {"steps": 10}}
    return config_from(values | ({"objective": objective} if objective else {}) | changes)


@pytest.mark.parametrize(
    ("arch", "kind"), [("gpt", "causal"), ("llama", "causal"), ("bert", "mlm"), ("t5", "span_corruption")]
)
def test_an_architecture_has_its_own_objective(arch: str, kind: str) -> None:
    found = config(arch)
    assert found.objective.kind == kind
    assert config_from(found.model_dump(mode="json")) == found
    rebuilt = Config(model=found.model, data=found.data, train=found.train)
    assert rebuilt.objective == found.objective
    assert config(arch, {"z_loss": 1e-4}).objective.kind == kind


def test_lengths_of_t5s_pretraining() -> None:
    found = config("t5", batch={"global_sequences": 128})
    assert (found.raw_len, found.seq_len, found.decoder_len) == (568, 512, 114)
    assert found.batch_tokens == 128 * (512 + 114)
    assert found.tokens == 10 * found.batch_tokens
    longer = config("t5", {"decoder_len": 120})
    assert (longer.raw_len, longer.decoder_len) == (568, 120)


def test_lengths_of_others() -> None:
    for arch in ("gpt", "llama", "bert"):
        found = config(arch)
        assert (found.raw_len, found.decoder_len, found.sequence_tokens) == (512, 0, 512)
    pairs = config("bert", {"pairs": "sentence_order"}, model={"pair_head": True})
    assert (pairs.raw_len, pairs.sequence_tokens) == (509, 512)
    prefix = config("t5", {"kind": "prefix", "prefix_share": 0.75})
    assert (prefix.raw_len, prefix.decoder_len) == (511 + 170, 171)
    ul2 = config("t5", {"kind": "ul2"})
    assert [each.inputs for each in denoised(ul2.objective, 512)] == [512] * 7
    assert ul2.decoder_len == max(each.targets for each in denoised(ul2.objective, 512)) == 512


def test_special_ids_are_the_highest() -> None:
    assert special_ids(config("bert").objective, 32128, 512) == {"mask_id": 32127}
    pairs = config("bert", {"pairs": "next_sentence", "mask_id": 103}, model={"pair_head": True})
    ids = special_ids(pairs.objective, 32128, 512)
    assert ids == {"mask_id": 103, "sep_id": 102, "cls_id": 101}, "BERT's own"
    found = special_ids(config("t5", {"first_sentinel": 32099}).objective, 32128, 512)
    assert list(found.values()) == list(range(32099, 31999, -1)), "T5's own"
    found = special_ids(config("t5", {"kind": "ul2"}).objective, 32128, 512)
    assert len(found) == 127 + 3, "as many as a sample of density 1/2 has spans"
    assert found["mode R"] == 32127 - 127


@pytest.mark.parametrize(
    ("arch", "objective", "changes", "parts"),
    [
        ("gpt", {"kind": "mlm"}, {}, ["objective.kind=mlm", "model.arch=gpt", "causal or prefix"]),
        ("bert", {"kind": "causal"}, {}, ["objective.kind=causal", "expected mlm"]),
        ("bert", {"kind": "electra"}, {}, ["objective.kind='electra'", "mlm"]),
        ("gpt", {"mask_share": 0.3}, {}, ["mask_share has no effect with kind=causal", "mlm"]),
        ("bert", {"mean_span": 4.0}, {}, ["mean_span has no effect with kind=mlm", "span_corruption"]),
        ("bert", {"sep_id": 5}, {}, ["sep_id has no effect with pairs=none"]),
        ("bert", {"replace": [0.8, 0.1, 0.2]}, {}, ["replace=[0.8, 0.1, 0.2]", "sum to 1"]),
        ("bert", {"replace": [1.1, -0.1, 0.0]}, {}, ["replace", "sum to 1"]),
        ("bert", {"mask_share": 1.0}, {}, ["objective.mask_share=1.0", "less than 1"]),
        ("bert", {"pairs": "next_sentence"}, {}, ["pairs=next_sentence", "pair_head=false", "both or neither"]),
        ("bert", None, {"model": {"pair_head": True}}, ["pairs=none", "pair_head=true"]),
        ("bert", {"mask_id": 40000}, {}, ["mask_id=40000 is outside model.vocab_size=32128"]),
        (
            "bert",
            {"pairs": "next_sentence", "cls_id": 7, "sep_id": 7},
            {"model": {"pair_head": True}},
            ["holds an id twice"],
        ),
        (
            "bert",
            {"pairs": "next_sentence"},
            {"model": {"pair_head": True}, "data": {"documents": True}},
            ["data.documents=true doesn't go with objective.pairs=next_sentence"],
        ),
        ("t5", {"kind": "ul2"}, {"data": {"documents": True}}, ["data.documents=true", "kind=ul2 of t5"]),
        ("t5", {"kind": "prefix"}, {"data": {"documents": True}}, ["data.documents=true", "kind=prefix of t5"]),
        ("t5", {"decoder_len": 100}, {}, ["objective.decoder_len=100 is shorter", "expected 114 or more"]),
        ("t5", {"noise_density": 0.6}, {}, ["objective.decoder_len=682", "longer than model.max_seq_len=512"]),
        ("t5", {"sentinels": 20}, {}, ["objective.sentinels=20", "28 spans"]),
        ("t5", {"noise_density": 0.9}, {}, ["no text fills", "lower density"]),
        ("t5", None, {"data": {"seq_len": 2}}, ["data.seq_len=2", "no text fills it"]),
        ("t5", None, {"model": {"vocab_size": 80}}, ["20 special ids", "below 0", "vocab_size=80"]),
        ("t5", {"start_id": 99999}, {}, ["start_id=99999 is outside"]),
        ("t5", None, {"parallel": {"context": 4}}, ["objective.decoder_len=114", "4 equal stretches", "116"]),
        ("llama", {"kind": "prefix", "prefix_share": 0.3}, {}, ["prefix_share", "no effect with model.arch=llama"]),
        ("bert", None, {"data": {"seq_len": 1}}, ["data.seq_len=1 is too short"]),
        ("bert", {"z_loss": -1.0}, {}, ["objective.z_loss=-1.0"]),
        ("bert", {"masks": 1}, {}, ["objective.masks", "unknown key", "mask_id"]),
    ],
)
def test_what_does_not_go_together(
    arch: str, objective: dict[str, Any] | None, changes: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(MegamupError) as caught:
        config(arch, objective, **changes)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)
