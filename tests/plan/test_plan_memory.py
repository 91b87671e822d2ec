"""The plan's bytes against the allocator's, in every layout; and what they follow from."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megamup.config import Config
from megamup.parallel import loss
from megamup.plan import ends, memory, stage_parameters, zero
from megamup.plan.activations import BlockTape, block_footprint
from megamup.plan.memory import stages
from megamup.plan.state import inventory
from megamup.plan.tape import Op, Tape
from megamup.plan.zero import settings, state
from megamup.train import overlap
from megamup.train.fork import run_ranks
from megamup.train.loop import start, train_step
from megamup.train.memory import measure_peak

TOLERANCE = 0.05
SHAPE = (
    "model.d_model=128", "model.n_layers=3", "model.d_ff=352", "model.vocab_size=512", "train.steps=9",
    "batch.micro_sequences=2",
)  # fmt: skip
BUCKET = 100_000
"""Elements: at DeepSpeed's default of 5e8 there would be little else to measure."""


def zero_file(folder: Path, stage: int, **keys: int) -> str:
    """A DeepSpeed config with buckets of a small model's size."""
    path = folder / f"zero{stage}.json"
    buckets = {"reduce_bucket_size": BUCKET} if stage else {}
    path.write_text(json.dumps({"zero_optimization": {"stage": stage, **buckets, **keys}}))
    return f"deepspeed={path}"


def peak(config: Config, world_size: int) -> int:
    """Of this rank, over the second step."""
    training = start(config, world_size, None)
    steps = iter(range(2))
    return measure_peak(lambda: train_step(training, next(steps)), training.device)


def error(config: Config, world_size: int) -> float:
    """Of the plan, relative to the rank that took most."""
    measured = max(run_ranks(peak, world_size, config, world_size))
    planned = memory(config, world_size, "cpu").total
    return planned / measured - 1


@pytest.mark.parametrize(
    ("arch", "tensor", "pipeline", "data", "stage"),
    [
        ("llama", 1, 1, 1, 0),
        ("llama", 1, 1, 2, 1),
        ("llama", 1, 1, 2, 2),
        ("llama", 1, 1, 2, 3),
        ("llama", 2, 1, 1, 0),
        ("llama", 1, 2, 1, 0),
        ("llama", 1, 2, 1, 1),
        ("gpt", 1, 1, 1, 0),
        ("gpt", 1, 1, 2, 2),
        ("gpt", 2, 1, 1, 0),
        ("gpt", 2, 2, 1, 0),
        ("bert", 1, 1, 1, 0),
        ("bert", 2, 1, 1, 0),
        ("bert", 2, 1, 2, 1),
        ("bert", 1, 1, 2, 2),
        ("t5", 1, 1, 1, 0),
        ("t5", 2, 1, 1, 0),
        ("t5", 2, 1, 2, 1),
        ("t5", 1, 2, 1, 0),
        ("t5", 1, 1, 2, 2),
    ],
)
def test_total_is_what_the_allocator_counts(
    make_config: Any, tmp_path: Path, arch: str, tensor: int, pipeline: int, data: int, stage: int
) -> None:
    layout = (f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}", zero_file(tmp_path, stage))
    config = make_config(f"model.arch={arch}", *SHAPE, *layout)
    assert abs(error(config, tensor * pipeline * data)) < TOLERANCE


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        (("train.recompute=selective",), 1),
        (("train.recompute=full",), 1),
        (("train.recompute=2",), 1),
        (("batch.micro_sequences=8",), 1),
        (("kernels.attention=reference",), 1),
        (("kernels.cross_entropy=reference", "model.vocab_size=2048"), 1),
        (("parallel.tensor=2", "parallel.sequence=true"), 2),
        (("parallel.context=2",), 2),
    ],
)
def test_and_so_with_what_changes_activations(
    make_config: Any, tmp_path: Path, overrides: tuple[str, ...], world_size: int
) -> None:
    assert abs(error(make_config(*SHAPE, zero_file(tmp_path, 0), *overrides), world_size)) < TOLERANCE


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.arch=bert", "batch.micro_sequences=8", "train.recompute=full"),
        ("model.arch=bert", "objective.pairs=sentence_order", "model.pair_head=true", "train.recompute=selective"),
        ("model.arch=bert", "precision=bf16"),
        ("model.arch=t5", "batch.micro_sequences=8"),
        ("model.arch=t5", "batch.micro_sequences=8", "kernels.attention=reference"),
        ("model.arch=t5", "batch.micro_sequences=8", "train.recompute=selective"),
        ("model.arch=t5", "batch.micro_sequences=8", "train.recompute=full", "model.n_decoder_layers=2"),
        ("model.arch=t5", "precision=bf16", "model.tie_embeddings=true", "model.vocab_size=2048"),
        ("model.qk_norm=true",),
        ("model.parallel_block=true",),
        ("model.norm_place=after",),
        ("model.activation=relu2",),
        ("model.activation=geglu",),
        ("model.arch=gpt", "model.activation=relu", "model.norm=rms", "model.qk_norm=true"),
        ("model.logit_soft_cap=30", "model.vocab_size=4096"),
    ],
    ids=", ".join,
)
def test_and_so_with_every_trait(make_config: Any, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    assert abs(error(make_config(*SHAPE, zero_file(tmp_path, 0), *overrides), 1)) < TOLERANCE


@pytest.mark.parametrize(("stage", "data"), [(0, 1), (1, 2), (2, 2), (3, 2)])
def test_and_so_in_bf16(make_config: Any, tmp_path: Path, stage: int, data: int) -> None:
    config = make_config(*SHAPE, "precision=bf16", zero_file(tmp_path, stage))
    assert abs(error(config, data)) < TOLERANCE


@pytest.mark.parametrize("micro", [1, 4])
def test_weights_that_zero_3_cuts_are_gathered(make_config: Any, tmp_path: Path, micro: int) -> None:
    """By default DeepSpeed cuts no parameter of less than 1e5 elements, which here are all."""
    cut = zero_file(tmp_path, 3, stage3_param_persistence_threshold=100)
    assert abs(error(make_config(*SHAPE, cut, f"batch.micro_sequences={micro}"), 2)) < TOLERANCE


def test_a_wrong_count_of_activations_would_be_seen(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(*SHAPE, zero_file(tmp_path, 0))
    monkeypatch.setattr(BlockTape, "gated", lambda self, gate, up, size: self.add(gate, up, to="inner", size=size))
    block_footprint.cache_clear()
    try:
        assert error(config, 1) < -TOLERANCE  # of an MLP's four tensors three are forgotten
    finally:
        block_footprint.cache_clear()


def test_fused_cross_entropy_removes_the_logits(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In small: at most 2^14 logits at a time of 2^21. The figure for a vocabulary of 128k: ./dev bench memory."""
    assert ends.LOGITS_AT_A_TIME == loss.LOGITS_AT_A_TIME
    monkeypatch.setattr(ends, "LOGITS_AT_A_TIME", {"cpu": 2**14})
    monkeypatch.setattr(loss, "LOGITS_AT_A_TIME", {"cpu": 2**14})
    size = ("model.vocab_size=4096", "model.d_model=64", "model.n_layers=1", "batch.micro_sequences=8")
    peaks = {}
    for backend in ("reference", "fused"):
        config = make_config(*SHAPE, *size, f"kernels.cross_entropy={backend}", zero_file(tmp_path, 0))
        peaks[backend] = run_ranks(peak, 1, config, 1)[0]
        assert abs(memory(config, 1, "cpu").total / peaks[backend] - 1) < TOLERANCE
    logits = 4 * 8 * config.seq_len * config.model.vocab_size
    assert peaks["reference"] - peaks["fused"] > 0.6 * logits


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("arch", ["llama", "gpt", "bert", "t5"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("bf16", 0), ("bf16", 1), ("bf16", 2), ("bf16", 3)])
def test_total_is_what_the_caching_allocator_counts(
    make_config: Any, tmp_path: Path, arch: str, recompute: str, precision: str, stage: int
) -> None:
    """At a size at which cuBLAS' workspace, which is torch's too, is small, and without what may not be installed."""
    kernels = [f"kernels.{op}=torch" for op in ("norm", "mlp", "rotary")] + ["kernels.cross_entropy=fused"]
    size = (
        "model.d_model=1024", "model.n_layers=6", "model.n_heads=16", "model.n_kv_heads=4", "model.d_ff=2816",
        "model.vocab_size=512",
    )  # fmt: skip
    config = make_config(
        f"model.arch={arch}", *size, *kernels, f"precision={precision}", "batch.global_sequences=1024",
        "batch.micro_sequences=512", f"train.recompute={recompute}", zero_file(tmp_path, stage),
        "train.steps=9",
    )  # fmt: skip
    measured = run_ranks(peak, 1, config, 1)[0]
    assert memory(config, 1, "cuda").total == pytest.approx(measured, rel=TOLERANCE)


# ------------------------------------------------------------------- what it follows from


def test_state_is_cut_as_zero_says(make_config: Any, tmp_path: Path) -> None:
    """Rajbhandari et al. (2020), figure 1, in bf16 and with fp32 gradients; ZeRO 3 where no parameter stays whole."""
    ranks = 4
    for stage, (weights, gradients, optimizer) in {1: (2, 4, 3), 2: (2, 1, 3), 3: (0.5, 1, 3)}.items():
        file = zero_file(tmp_path, stage, stage3_param_persistence_threshold=0)
        config = make_config("precision=bf16", "batch.micro_sequences=1", file)
        (total,) = stage_parameters(config)
        found = memory(config, ranks)
        assert found.weights == pytest.approx(weights * total, rel=1e-3)
        assert found.gradients == pytest.approx(gradients * total, rel=1e-3)
        assert found.optimizer == pytest.approx(optimizer * total, rel=1e-3)


def test_buckets_have_their_full_size_however_small_the_model(make_config: Any) -> None:
    config = make_config("deepspeed=ds_configs/zero2.json")
    bucket = settings(config).reduce_bucket
    assert bucket > 100 * stage_parameters(config)[0]
    assert memory(config, 2).total > 4 * bucket


def test_what_zero_0_sends_at_a_time_is_the_overlap_s_own() -> None:
    assert zero.OVERLAPPED_ELEMENTS == overlap.BUCKET
    assert zero.IN_FLIGHT == overlap.IN_FLIGHT + 1  # the next is flattened before the oldest is waited for


def test_an_early_stage_keeps_a_micro_batch_for_every_later_one(make_config: Any) -> None:
    config = make_config("model.n_layers=4", "parallel.pipeline=4", "batch.micro_sequences=1")
    assert [stage.in_flight for stage in stages(config, 4, "cpu")] == [4, 3, 2, 1]
    few = make_config("model.n_layers=4", "parallel.pipeline=4", "batch.micro_sequences=4")
    assert [stage.in_flight for stage in stages(few, 4, "cpu")] == [2, 2, 2, 1]


def test_a_stage_holds_what_the_inventory_gives_it(make_config: Any, tmp_path: Path) -> None:
    config = make_config("model.n_layers=4", "parallel.pipeline=2", "parallel.tensor=2", zero_file(tmp_path, 1))
    held = inventory(config.model, 2, 2)
    alone = inventory(config.model, 1, 1)[0]
    assert 2 * sum(h.total for h in held) > alone.total > sum(h.total for h in held)  # norms are whole on each
    assert held[0].total == stage_parameters(config)[0]
    found = state(config, held[0], 2, settings(config), on_cpu=True)
    assert found.optimizer == 12 * (held[0].total // 2)


def test_recomputation_keeps_less_and_peaks_lower(make_config: Any) -> None:
    big = ("model.d_model=1024", "model.n_layers=24", "model.n_heads=16", "model.n_kv_heads=16")
    total = {
        kind: memory(make_config(*big, f"train.recompute={kind}", "batch.micro_sequences=8"), 1)
        for kind in ("none", "2", "selective", "full")
    }
    order = [total[kind] for kind in ("full", "2", "none")]
    assert sorted(order, key=lambda found: found.total) == order
    assert total["full"].activations < total["selective"].activations < total["none"].activations
    # Korthikanti et al. (2022), equation 6 without dropout: a block's input is all of it
    config = make_config(*big, "train.recompute=full", "batch.micro_sequences=8")
    blocks = [piece for piece in stages(config, 1, "cpu")[0].pieces if piece.layer.kind == "block"]
    assert {piece.new.kept for piece in blocks} == {8 * config.seq_len * 1024 * 4}


def test_a_tape_replays_a_product() -> None:
    """y = gelu(x W): autograd keeps x and the product."""
    tape = Tape("x", 10, [Op(("x",), "h", 40, saves=("x",), weight=7), Op(("h",), "y", 40, saves=("h",))])
    found = tape.footprint()
    assert (found.kept, found.forward, found.weights) == (50, 90, 7)
    assert found.backward == 50 + 40 + 40  # the gradients of y and h
    assert Tape("x", 10, tape.ops).footprint("full").kept == 10


def test_a_plan_is_quick(make_config: Any) -> None:
    """The search asks for thousands."""
    shape = ("model.d_model=8192", "model.n_layers=80", "model.n_heads=64", "model.n_kv_heads=8", "model.d_ff=28672")
    config = make_config(*shape, "parallel.tensor=2", "parallel.pipeline=4", "batch.global_sequences=64")
    memory(config, 16)
    begun = time.perf_counter()
    for _ in range(20):
        memory(config, 16)
    assert (time.perf_counter() - begun) / 20 < 0.01, "seconds"
