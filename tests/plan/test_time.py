"""The step's time against arithmetic by hand, and how it moves with layout and cluster."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megamup.cluster import Cluster, parse_cluster
from megamup.config import Config, config_from
from megamup.errors import MegamupError
from megamup.flops import flops_per_token
from megamup.plan import search, stage_parameters
from megamup.plan.layout import Layout, layout_of
from megamup.plan.rates import HOP_SECONDS, LINK_SHARE, MEMORY_SHARE, OP_SECONDS, RUNNING_SHARE, Rates, rates_of
from megamup.plan.time import StepTime, step_time
from megamup.plan.work import Work

H100 = parse_cluster("configs/clusters/h100.yaml,nodes=8")
LLAMA_8B = {"arch": "llama", "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "d_ff": 14_336}


def config_of(**sections: Any) -> Config:
    values: dict[str, Any] = {
        "model": {**LLAMA_8B, "vocab_size": 128_256, "max_seq_len": 8192},
        "data": {"train": "shard"},
        "train": {"steps": 1},
        "batch": {"global_sequences": 64},
        "precision": "bf16",
        "deepspeed": "ds_configs/zero1.json",
    }
    return config_from(values | sections)


def layout(ranks: int = 8, **sections: Any) -> Layout:
    return layout_of(config_of(**sections), ranks)


def timed(ranks: int = 8, cluster: Cluster = H100, changes: dict[str, Any] | None = None, **sections: Any) -> StepTime:
    config = config_of(**sections)
    at = replace(layout_of(config, ranks), **(changes or {}))
    return step_time(config.model, config.lengths, at, cluster, tuple(stage_parameters(config)))


def rates() -> Rates:
    return rates_of(H100, layout(64))


# ------------------------------------------------------------------- rates


def test_product_by_hand() -> None:
    """Large: its FLOPs at the share of the peak. One row: the weight's bytes."""
    seconds = 2 * 8192**3 / (989e12 * 0.803 * RUNNING_SHARE)
    assert rates().product(8192, 8192, 8192, 2) == pytest.approx(seconds + OP_SECONDS)
    weight = 2 * (8192 * 8192 + 2 * 8192) / (3.35e12 * MEMORY_SHARE * RUNNING_SHARE)
    assert rates().product(1, 8192, 8192, 2) == pytest.approx(weight + OP_SECONDS)


@pytest.mark.parametrize(
    ("b", "m", "n", "k", "teraflops"),
    [
        (1, 512, 512, 512, 40.7),
        (1, 1024, 1024, 256, 82.0),
        (4, 512, 512, 1024, 237.1),
        (1, 4096, 256, 4096, 376.2),
        (4, 512, 4096, 512, 442.2),
        (2, 512, 4096, 2048, 627.2),
        (1, 4096, 4096, 1024, 677.4),
        (2, 2048, 4096, 4096, 779.3),
    ],
)
def test_small_products_are_less_efficient(
    monkeypatch: pytest.MonkeyPatch, b: int, m: int, n: int, k: int, teraflops: float
) -> None:
    """Products alone on an H100, from XLA's matmul_interpolator_data.h (sm_90, bf16), over a factor of 19 in speed."""
    monkeypatch.setattr("megamup.plan.rates.RUNNING_SHARE", 1.0)
    alone = rates_of(H100, layout(8)).product(m, n, k, 2, batch=b)
    assert 2 * b * m * n * k / alone / 1e12 == pytest.approx(teraflops, rel=0.25)


def test_collectives_by_hand() -> None:
    """A ring passes (n-1)/n of the bytes on each rank; one that leaves the node does so through all its adapters."""
    one, at = 1e9, rates()
    assert at.gather(one, 1, 1) == 0
    assert at.gather(one, 8, 1) == pytest.approx(OP_SECONDS + one * 7 / 8 / (450e9 * LINK_SHARE))
    hops = OP_SECONDS + 6 * HOP_SECONDS
    assert at.gather(one, 64, 1) == pytest.approx(hops + one * 63 / 64 / (400e9 * LINK_SHARE))
    across = OP_SECONDS + 3 * HOP_SECONDS  # eight apart: one adapter each
    assert at.gather(one, 8, 8) == pytest.approx(across + one * 7 / 8 / (50e9 * LINK_SHARE))
    assert at.all_reduce(one, 8, 8) == 2 * at.gather(one, 8, 8)
    assert at.exchange(one, 16, 1) == pytest.approx(OP_SECONDS + 4 * HOP_SECONDS + one * 8 / 16 / (50e9 * LINK_SHARE))
    assert at.send(one, 4) < at.send(one, 8)


@pytest.mark.parametrize(
    "key", ["memory_bandwidth", "node_bandwidth", "network_bandwidth", "devices_per_node", "matmul"]
)
def test_a_missing_rate_is_an_error_and_no_guess(key: str) -> None:
    missing: dict[str, Any] = {key: None}
    with pytest.raises(MegamupError, match=rf"cluster\.{key}: missing"):
        timed(64, replace(H100, **missing))


@pytest.mark.parametrize("name", ["a100", "h100", "h200"])
def test_shipped_clusters_give_a_time(name: str) -> None:
    assert 35 < timed(64, parse_cluster(f"configs/clusters/{name}.yaml,nodes=8")).mfu < 70


def test_b200_asks_for_the_one_rate_that_nobody_measured() -> None:
    file = "configs/clusters/b200.yaml,nodes=8"
    with pytest.raises(MegamupError, match=r"cluster\.matmul: missing.*add matmul=VALUE"):
        timed(64, parse_cluster(file))
    assert timed(64, parse_cluster(f"{file},matmul=0.75")).seconds < timed(64).seconds


def test_one_device_needs_no_network() -> None:
    alone = replace(H100, devices=1, node_bandwidth=None, network_bandwidth=None)
    assert timed(1, alone, batch={"global_sequences": 1}).seconds > 0


def test_fp32_and_fp8_have_peaks_of_their_own() -> None:
    fp32, bf16 = timed(precision="fp32"), timed()
    assert fp32.terms["matrix products"] / bf16.terms["matrix products"] == pytest.approx(989 / 67, rel=0.02)
    fp8 = timed(kernels={"matmul": "fp8"})
    assert 0.5 < fp8.terms["matrix products"] / bf16.terms["matrix products"] < 0.75
    with pytest.raises(MegamupError, match=r"cluster\.fp8_peak"):
        timed(cluster=parse_cluster("configs/clusters/a100.yaml,nodes=1"), kernels={"matmul": "fp8"})


# ------------------------------------------------------------------- a step


def test_terms_add_up_and_mfu_is_palms() -> None:
    step = timed()
    assert step.seconds == sum(step.terms.values())
    assert step.tokens == 64 * 8192
    per_token = 6 * (8.03e9 - 128_256 * 4096) + 12 * 32 * 4096 * 8192  # all parameters but the lookup
    assert step.mfu == pytest.approx(100 * step.tokens_per_s * per_token / (8 * 989e12), rel=1e-3)
    assert step.bound == "matrix products"
    assert max(step.terms.values()) == step.terms[step.bound]


def test_products_of_a_block_by_hand() -> None:
    """Forward 2, backward 4 FLOPs for each weight and token, all at the rate of large products."""
    work = Work(config_of().model, 8192, layout(), rates())
    passes = work.linears()
    weights = 4096 * (4096 + 2 * 1024 + 4096 + 3 * 14_336)
    flops = 2 * weights * work.tokens
    assert passes.forward.products == pytest.approx(flops / rates().flops, rel=0.02)
    assert passes.backward.products == pytest.approx(2 * flops / rates().flops, rel=0.02)
    assert passes.forward.tensor == passes.backward.tensor == 0


def test_fused_attention_computes_half_and_moves_no_scores() -> None:
    at = layout()
    model = config_of().model
    fused = Work(model, 8192, at, rates()).attention()
    flops = 2 * 32 * 8192**2 * 128 * at.micro_sequences
    assert fused.forward.attention == pytest.approx(flops / rates().flops / 0.75 * (8192 + 512) / 8192, rel=1e-3)
    assert fused.backward.attention == pytest.approx(2.5 * fused.forward.attention, rel=1e-3)
    plain = Work(model, 8192, replace(at, fused_attention=False), rates()).attention()
    assert plain.forward.attention > 3 * fused.forward.attention


T5_3B = {"arch": "t5", "d_model": 1024, "n_layers": 24, "n_heads": 32, "d_head": 128, "d_ff": 16_384}
T5 = {**T5_3B, "activation": "relu", "vocab_size": 32_128, "max_seq_len": 512}


def test_products_of_a_decoders_block_by_hand() -> None:
    """Cross-attention's keys and values are of the encoder's tokens, all else of the decoder's."""
    at, model = layout(1, model=T5), config_of(model=T5).model
    work = Work(model, (512, 128), at, rates(), cross=True)
    own, of_memory = 1024 * (6 * 4096 + 2 * 16_384), 1024 * 2 * 4096
    flops = 2 * at.micro_sequences * (own * 128 + of_memory * 512)
    assert work.tokens == 128 * at.micro_sequences
    assert work.linears().forward.products == pytest.approx(flops / rates().flops, rel=0.05)
    assert work.linears().backward.products == pytest.approx(2 * flops / rates().flops, rel=0.05)


def test_an_encoder_sees_both_ways() -> None:
    """Twice the scores of a causal mask."""
    shape = {**LLAMA_8B, "vocab_size": 128_256, "max_seq_len": 8192}
    at = layout()
    causal, both = (
        Work(config_of(model={**shape, "arch": arch}).model, 8192, at, rates()).attention().forward.attention
        for arch in ("llama", "bert")
    )
    assert both == pytest.approx(2 * causal, rel=1e-3)


def test_relative_positions_cost_attention_its_speed_and_memory_traffic() -> None:
    at = layout(1, model=T5)
    relative, none = (
        Work(config_of(model={**T5, "positions": kind}).model, (512, 128), at, rates()).attention()
        for kind in ("relative", "none")
    )
    assert relative.forward.attention == pytest.approx(2 * none.forward.attention, rel=0.01)
    assert relative.forward.memory > 0
    assert none.forward.memory == 0
    cross = [
        Work(config_of(model={**T5, "positions": kind}).model, (512, 128), at, rates(), cross=True).cross_attention()
        for kind in ("relative", "none")
    ]
    assert cross[0] == cross[1]  # which has no biases


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_two_stacks_in_a_pipeline(stages: int) -> None:
    """MFU is of the tokens of both; a decoder's stage has fewer to work on, and the encoder's wait less for it."""
    sections: dict[str, Any] = {"model": T5, "batch": {"global_sequences": 64, "micro_sequences": 8}}
    step = timed(stages, parallel={"pipeline": stages}, **sections)
    config = config_of(**sections)
    within, across = config.seq_len, config.decoder_len
    assert step.tokens == 64 * (within + across)
    per_token = flops_per_token(config.model, (within, across), "palm")
    assert step.mfu == pytest.approx(100 * step.tokens_per_s * per_token / (stages * 989e12))
    assert 0.9 * step.mfu < step.hfu <= step.mfu * 1.1
    assert ("pipeline bubble" in step.terms) is (stages > 1)
    equal = timed(stages, parallel={"pipeline": stages}, **sections, objective={"decoder_len": 512})
    assert step.seconds < equal.seconds


def test_traits_change_what_stands_between_products() -> None:
    """A parallel block has one norm and sums once; query-key norms are two more."""
    shape = {**LLAMA_8B, "vocab_size": 128_256, "max_seq_len": 8192}
    plain, parallel, normed, ungated = (
        Work(config_of(model={**shape, **trait}).model, 8192, layout(), rates()).between().forward.memory
        for trait in ({}, {"parallel_block": True}, {"qk_norm": True}, {"activation": "relu2"})
    )
    assert parallel < plain < normed
    assert ungated < plain


def test_experts_pay_for_no_step() -> None:
    with pytest.raises(MegamupError, match=r"model\.moe=8 experts"):
        search(config_of(model={**LLAMA_8B, "vocab_size": 128, "max_seq_len": 64, "moe": {"experts": 8}}), H100)


def test_recomputation_is_another_forward_pass() -> None:
    none, full, second = (timed(train={"steps": 1, "recompute": how}) for how in ("none", "full", 2))
    blocks = 2 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 14_336) * 32
    readout = 2 * 4096 * 128_256
    assert full.terms["matrix products"] / none.terms["matrix products"] == pytest.approx(
        (4 * blocks + 3 * readout) / (3 * (blocks + readout)), rel=0.01
    )
    assert second.seconds == pytest.approx((none.seconds + full.seconds) / 2)
    assert none.seconds < timed(train={"steps": 1, "recompute": "selective"}).seconds < second.seconds
    assert full.mfu < none.mfu
    assert full.hfu > none.hfu


@pytest.mark.parametrize(("stages", "batch"), [(2, 64), (4, 64), (4, 256)])
def test_bubble_of_equal_stages(stages: int, batch: int) -> None:
    """(p-1)/m of the work (Narayanan et al. 2021, section 2.2), and that over v with v pieces on a rank."""
    model = {**LLAMA_8B, "vocab_size": 128, "max_seq_len": 8192}  # no readout to speak of
    sections: dict[str, Any] = {
        "model": model,
        "parallel": {"pipeline": stages},
        "batch": {"global_sequences": batch, "micro_sequences": 1},
    }
    step = timed(stages, **sections)
    busy = step.seconds - step.terms["pipeline bubble"] - step.terms["pipeline sends"]
    assert step.terms["pipeline bubble"] / busy == pytest.approx((stages - 1) / batch, rel=0.01)
    pieces = timed(stages, changes={"virtual_stages": 2}, **sections)
    assert pieces.terms["pipeline bubble"] == pytest.approx(step.terms["pipeline bubble"] / 2, rel=0.01)
    assert pieces.terms["pipeline sends"] == pytest.approx(2 * step.terms["pipeline sends"])


def test_a_heavy_readout_holds_up_the_pipeline() -> None:
    """The last stage of 4 has 8 blocks and a readout of 525M weights: the others wait for it."""
    sections: dict[str, Any] = {"parallel": {"pipeline": 4}, "batch": {"global_sequences": 64, "micro_sequences": 1}}
    step = timed(4, **sections)
    lighter = timed(4, model={**LLAMA_8B, "vocab_size": 128, "max_seq_len": 8192}, **sections)
    assert step.terms["matrix products"] > 1.2 * lighter.terms["matrix products"]


def test_sequence_parallelism_moves_the_same_bytes_and_streams_fewer() -> None:
    """Korthikanti et al. 2022, section 4.2.2: forward as many; backward the inputs are gathered behind products."""
    at = layout(parallel={"tensor": 8})
    model = config_of().model
    plain = Work(model, 8192, at, rates())
    cut = Work(model, 8192, replace(at, sequence=True), rates())
    assert cut.linears().forward.tensor == pytest.approx(plain.linears().forward.tensor)
    assert cut.between().forward.memory < 0.5 * plain.between().forward.memory


def test_tensor_traffic_hides_behind_products_only_where_it_is_started_early() -> None:
    early = timed(parallel={"tensor": 8})
    late = timed(parallel={"tensor": 8}, changes={"overlap_tensor": False})
    assert 0 < early.terms["tensor network"] < late.terms["tensor network"]
    assert early.terms["matrix products"] == late.terms["matrix products"]


def test_tensor_axis_across_nodes_is_bound_by_its_network() -> None:
    step = timed(
        32, parallel={"tensor": 32}, model={**LLAMA_8B, "n_kv_heads": 32, "vocab_size": 128_256, "max_seq_len": 8192}
    )
    assert step.bound == "tensor network"


@pytest.mark.parametrize("overlap", [False, True])
def test_zero_stages_by_hand(overlap: bool) -> None:
    """8B parameters over 64 ranks, four micro batches: what crosses the network, and what of it shows; of what runs
    behind products, that is a block's."""
    ring, share = 8.03e9 * 63 / 64 / (400e9 * LINK_SHARE), 1 / 32 if overlap else 1.0
    seen = {}
    for stage in (0, 1, 2, 3):
        batch = {"global_sequences": 256, "micro_sequences": 1}
        step = timed(64, changes={"overlap_data": overlap}, deepspeed=f"ds_configs/zero{stage}.json", batch=batch)
        seen[stage] = step.terms["data network"] / ring
    assert seen[0] == pytest.approx(2 * 4 * share, rel=0.01)  # fp32 both ways
    assert seen[1] == pytest.approx(2 * 2 * share + 2, rel=0.01)
    assert seen[2] == pytest.approx(4 * 2 * 2 * share + 2, rel=0.01)
    each_block = 4 * 2 * 31 * (OP_SECONDS + 6 * HOP_SECONDS) / ring  # gathered twice a micro batch, by itself
    assert seen[3] == pytest.approx((4 * (2 + 4) + each_block) * share, rel=0.01)


@pytest.mark.parametrize(
    ("stage", "asked", "pipeline", "overlaps"),
    [
        (1, {}, 1, False),
        (1, {"overlap_comm": True}, 1, False),  # in bf16
        (2, {"overlap_comm": True}, 1, True),
        (1, {"overlap_comm": True}, 2, False),
        (0, {}, 1, True),
        (0, {}, 2, False),
        (3, {}, 1, True),
        (3, {"overlap_comm": False}, 1, False),
    ],
)
def test_what_overlaps_is_deepspeeds_choice(
    tmp_path: Path, stage: int, asked: dict[str, bool], pipeline: int, overlaps: bool
) -> None:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage, **asked}}))
    assert layout(8, deepspeed=str(file), parallel={"pipeline": pipeline}).overlap_data is overlaps


@pytest.mark.parametrize(("named", "stage", "size"), [(None, 0, 4), ("bf16", 0, 2), ("fp32", 2, 4), (None, 2, 2)])
def test_gradients_are_sent_as_deepspeed_is_told(tmp_path: Path, named: str | None, stage: int, size: int) -> None:
    file = tmp_path / "zero.json"
    told = {} if named is None else {"communication_data_type": named}
    file.write_text(json.dumps({"zero_optimization": {"stage": stage}, **told}))
    assert layout(8, deepspeed=str(file)).gradient_bytes == size


def test_a_slow_network_shows() -> None:
    slow = replace(H100, network_bandwidth=1e9)
    assert timed(64, deepspeed="ds_configs/zero3.json").bound == "matrix products"
    assert timed(64, slow, deepspeed="ds_configs/zero3.json").bound == "data network"


def test_context_axis_cuts_a_sequence() -> None:
    """Half the tokens on a rank, the same step of all; the exchange is what it costs."""
    one = timed(8, batch={"global_sequences": 8})
    two = timed(8, batch={"global_sequences": 8}, parallel={"context": 2})
    assert two.terms["attention"] == pytest.approx(one.terms["attention"], rel=0.01)
    assert two.terms["context network"] > 0
    assert "context network" not in one.terms


def test_offload_has_no_time(tmp_path: Path) -> None:
    file = tmp_path / "offload.json"
    file.write_text('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}')
    with pytest.raises(MegamupError, match="offload_optimizer: the time of a step that waits for the host"):
        layout(deepspeed=str(file))


def test_latency_rules_small_models() -> None:
    """Of a step of 8 positions hardly anything is work: every operation takes its least."""
    model = {"arch": "llama", "d_model": 64, "n_layers": 2, "n_heads": 2, "vocab_size": 128, "max_seq_len": 8}
    step = timed(1, model=model, batch={"global_sequences": 1})
    operations = step.seconds / OP_SECONDS
    assert operations == pytest.approx(round(operations), abs=1)
    assert math.isclose(step.mfu, 0, abs_tol=0.1)
