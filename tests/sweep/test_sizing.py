"""Ladders: what a budget pays for. Pure arithmetic, checked against the FLOPs that the runs' metrics will count."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from pydantic import TypeAdapter

from megamup.config import Config, config_from, merge, parse_override
from megamup.errors import MegamupError
from megamup.flops import flops_per_token
from megamup.parameters import count
from megamup.sweep.ladder import AnyLadder
from megamup.sweep.sizing import LEAST_STEPS, Rung, rungs

BASE: dict[str, Any] = {
    "model": {"arch": "llama", "d_model": 48, "n_layers": 2, "n_heads": 3, "d_ff": 144, "vocab_size": 512},
    "data": {"train": "a", "valid": "b"},
    "batch": {"global_sequences": 8},
    "optim": {"lr": 0.01},
    "train": {"steps": 100},
}
BASE["model"]["max_seq_len"] = 64
LADDERS: dict[str, dict[str, Any]] = {
    "equal": {"kind": "scale_N", "budget": 1e14, "sizes": 5, "tokens_per_parameter": 2},
    "proportional": {"kind": "scale_N", "budget": 1e16, "tokens": "proportional"},
    "deeper": {"kind": "scale_N", "budget": 1e16, "aspect": 24},
    "scale_D": {"kind": "scale_D", "budget": 1e14, "tokens_per_parameter": 3},
    "isoflop": {"kind": "isoflop", "budget": 1e16},
    "critical_batch": {"kind": "critical_batch", "budget": 1e14, "batches": [2, 4, 8, 16, 32]},
}


def base(*overrides: str) -> Config:
    values: dict[str, Any] = {}
    merge(values, BASE)
    for override in overrides:
        merge(values, parse_override(override))
    return config_from(values)


def ladder(name: str, **keys: Any) -> AnyLadder:
    found: AnyLadder = TypeAdapter(AnyLadder).validate_python(LADDERS[name] | keys)
    return found


def expand(name: str, *overrides: str, copies: int = 1, tuning: int = 0, **keys: Any) -> list[Rung]:
    return rungs(ladder(name, **keys), base(*overrides), copies=copies, tuning=tuning, corpus_tokens=10**12)


def configs(found: list[Rung], *overrides: str) -> list[Config]:
    return [base(*overrides, *(f"{key}={value}" for key, value in rung.settings.items())) for rung in found]


def flops(config: Config) -> float:
    return flops_per_token(config.model, config.seq_len, config.train.flops_convention) * config.tokens


@pytest.mark.parametrize("name", LADDERS)
@pytest.mark.parametrize("factor", [1, 37, 1e4])
def test_runs_cost_the_budget_but_for_whole_steps(name: str, factor: float) -> None:
    budget = LADDERS[name]["budget"] * factor
    found = expand(name, copies=2, tuning=3, budget=budget)
    each = [flops(config) for config in configs(found)]
    total = 2 * sum(each) + 3 * each[-1]
    assert 0.95 * budget < total <= budget
    assert len({rung.name for rung in found}) == len(found)
    assert min(rung.settings["train.steps"] for rung in found) >= LEAST_STEPS


@pytest.mark.parametrize("convention", ["6N", "palm", "chinchilla"])
def test_flops_are_of_the_runs_convention(convention: str) -> None:
    override = f"train.flops_convention={convention}"
    found = configs(expand("equal", override), override)
    assert 0.97e14 < sum(map(flops, found)) <= 1e14


@pytest.mark.parametrize("name", LADDERS)
def test_a_larger_budget_never_buys_a_smaller_model(name: str) -> None:
    widest = [expand(name, budget=2**i * LADDERS[name]["budget"])[0].settings["model.d_model"] for i in range(8)]
    assert widest == sorted(widest)
    assert widest[-1] > widest[0]


def test_models_are_one_shape_at_many_widths() -> None:
    override = "model={n_heads: 6, n_kv_heads: 2, d_model: 96, d_ff: 256}"
    for config in configs(expand("equal", override, budget=1e16), override):
        model = config.model
        assert model.d_head == 16
        assert (model.d_model, model.n_heads) == (model.n_kv_heads * 48, model.n_kv_heads * 3)
        assert model.d_ff % 16 == 0
        assert model.d_ff / model.d_model == pytest.approx(256 / 96, abs=16 / model.d_model)
        assert model.n_layers == 2


def test_a_ratio_that_can_be_kept_is_kept_exactly() -> None:
    override = "model={n_heads: 2, d_model: 16, d_ff: 48}"
    for config in configs(expand("equal", override, budget=1e14), override):
        assert config.model.d_ff == 3 * config.model.d_model
        assert config.model.d_head == 8


def test_tensor_ranks_can_share_every_model() -> None:
    overrides = ("parallel.tensor=2", "model={n_heads: 4, d_model: 64, d_ff: 192}")
    found = configs(expand("equal", *overrides, budget=1e15), *overrides)  # a config refuses what can't be shared
    assert {config.model.n_heads % 2 for config in found} == {0}


def test_depth_grows_with_width_by_the_aspect() -> None:
    for config in configs(expand("deeper")):
        assert config.model.n_layers == round(config.model.d_model / 24)


def test_a_decoder_s_depth_and_an_expert_s_width_grow_along() -> None:
    override = "model={arch: t5, n_decoder_layers: 4, moe: {experts: 2, d_expert: 24}}"
    for config in configs(expand("deeper", override), override):
        model = config.model
        assert model.moe is not None
        assert model.n_decoder_layers == 2 * model.n_layers
        assert model.moe.d_expert == model.d_model // 2


def test_widths_are_in_equal_ratios_and_see_the_same_tokens() -> None:
    found = configs(expand("equal", budget=1e17, span=4))
    widths = [config.model.d_model for config in found]
    assert widths[0] / widths[-1] == pytest.approx(4, rel=0.05)
    assert [a / b for a, b in pairwise(widths)] == pytest.approx([4**0.25] * 4, rel=0.05)
    assert len({config.tokens for config in found}) == 1
    assert 2 <= found[0].tokens / count(found[0].model)["non_embedding"] < 2.5


def test_each_size_sees_its_own_tokens_where_they_are_proportional() -> None:
    ratios = [c.tokens / count(c.model)["non_embedding"] for c in configs(expand("proportional", budget=1e17))]
    assert ratios == pytest.approx([ratios[0]] * 5, rel=0.01)
    assert 20 <= ratios[0] < 22


def test_runs_of_a_budget_have_equal_flops_around_the_ratio_asked_for() -> None:
    found = configs(expand("isoflop", budget=1e17, budgets=4, ratio=2, sizes=5, span=3, tokens_per_parameter=20))
    by_flops = sorted(found, key=flops)
    groups = [by_flops[i : i + 5] for i in range(0, 20, 5)]
    levels = [[flops(config) for config in group] for group in groups]
    for level in levels:
        assert max(level) / min(level) < 1.01
    assert [b[0] / a[0] for a, b in pairwise(levels)] == pytest.approx([2, 2, 2], rel=0.01)
    for group in groups:
        ratios = sorted(config.tokens / count(config.model)["non_embedding"] for config in group)
        assert ratios[0] < 20 < ratios[-1]
        assert math.sqrt(ratios[0] * ratios[-1]) == pytest.approx(20, rel=0.15)
        widths = {config.model.d_model for config in group}
        assert len(widths) == 5
        assert max(widths) / min(widths) == pytest.approx(3, rel=0.1)


def test_batches_scale_rates_by_the_root_and_tokens_by_the_critical_batch() -> None:
    found = configs(expand("critical_batch", budget=1e16, batches=[2, 8, 32], rates=[0.5, 1]))
    rates = {batch: sorted(c.optim.lr for c in found if c.batch.global_sequences == batch) for batch in (2, 8, 32)}
    assert rates == {2: [0.0025, 0.005], 8: [0.005, 0.01], 32: [0.01, 0.02]}
    assert len({config.model.d_model for config in found}) == 1
    least = found[-1].tokens / (1 + 2 / 8)
    for config in found:  # E = E_min (1 + B/B'), B' = 8 the middle of the batches
        assert config.tokens == pytest.approx(least * (1 + config.batch.global_sequences / 8), rel=0.01)


def test_shares_of_the_data_are_repeated_as_often_as_asked() -> None:
    corpus = 10**9
    found = rungs(ladder("scale_D", budget=1e16, epochs=[1, 4, 16]), base(), corpus_tokens=corpus)
    made = configs(found)
    epochs = [config.tokens / (config.data.fraction * corpus) for config in made]
    assert sorted(epochs) == pytest.approx([1, 1, 4, 4, 16, 16], rel=0.01)
    sizes = sorted({config.model.d_model for config in made})
    assert len(sizes) == 2
    assert sizes[1] / sizes[0] == pytest.approx(2, rel=0.1)
    assert made[-1].model.d_model == sizes[0]
    assert epochs[-1] == pytest.approx(1, rel=0.01)  # the last is what tuning runs


def test_too_little_data_is_an_error_that_says_how_much() -> None:
    with pytest.raises(MegamupError, match=r"ladder\.epochs: 1 epochs .* data\.train has 1,000,000; lower the budget"):
        rungs(ladder("scale_D", budget=1e16), base(), corpus_tokens=10**6)


def test_warm_up_logs_and_evaluations_are_shares_of_each_run() -> None:
    for config in configs(expand("proportional", budget=1e17, warmup=0.1, logs=50, evaluations=8)):
        steps = config.train.steps
        assert config.schedule.warmup_steps == round(0.1 * steps)
        assert steps / config.train.log_every == pytest.approx(50, rel=0.1)
        assert steps // config.train.eval_every == 8
    assert expand("equal")[0].settings["train.eval_every"] == 0


@pytest.mark.parametrize("name", LADDERS)
def test_a_budget_too_small_names_the_least_that_is_enough(name: str) -> None:
    with pytest.raises(MegamupError, match=r"ladder\.budget: 1e\+06 FLOPs are too few; .* \(width 48\)") as failure:
        expand(name, budget=1e6, copies=2, tuning=2)
    least = float(str(failure.value).split("at least ")[1].split(",")[0])
    found = expand(name, budget=least, copies=2, tuning=2)
    assert found[-1].settings["model.d_model"] == 48
    with pytest.raises(MegamupError, match="too few"):
        expand(name, budget=0.85 * least, copies=2, tuning=2)


def test_more_sizes_than_widths_are_refused() -> None:
    with pytest.raises(MegamupError, match="no budget is enough for so many sizes; lower sizes, or raise span"):
        expand("equal", "model={n_heads: 1, d_model: 1024}", sizes=200, span=1.01)
