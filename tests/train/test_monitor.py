"""What the monitor reports of a step: the same in every layout, right by hand, and without a trace in the training."""

from __future__ import annotations

import json
import math
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from megamup.config import Config
from megamup.kernels.attention import reference
from megamup.kernels.rotary import Rotation, rotate
from megamup.models.attention import CoreAttention
from megamup.models.blocks import Block
from megamup.mup import attention_scale
from megamup.parallel.layers import spec_of
from megamup.parameters import parameters
from megamup.scales import BlockScales
from megamup.train import monitor
from megamup.train.batches import read
from megamup.train.coordinates import attention_logits
from megamup.train.engine import weigh
from megamup.train.fork import run_ranks
from megamup.train.loop import Training, start, train, train_step

PREFIXES = ("update_ratio_", "attention_logit_max", "output_logit_max", "activation_rms_")
ROLES = {
    "llama": {"embedding", "query", "key_value", "hidden", "residual_out", "readout", "gain"},
    "gpt": {"embedding", "query", "key_value", "hidden", "residual_out", "gain", "bias"},
}
# (tensor, pipeline, data, ZeRO stage)
LAYOUTS = [(2, 1, 1, 0), (1, 2, 1, 0), (1, 1, 2, 1), (1, 1, 2, 2), (1, 1, 2, 3)]


def monitored(record: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in record.items() if key.startswith(PREFIXES)}


def layout(tensor: int, pipeline: int, data: int, zero: int) -> tuple[str, ...]:
    """Overrides; the first micro batches of all data ranks are together the whole batch."""
    return (
        f"parallel.tensor={tensor}",
        f"parallel.pipeline={pipeline}",
        f"deepspeed=ds_configs/zero{zero}.json",
        f"batch.micro_sequences={8 // data}",
        "train.steps=3",
        "train.monitor_every=1",
        "data.valid=null",
    )


@pytest.fixture(scope="module")
def references() -> dict[str, list[dict[str, float]]]:
    return {}


def test_an_embedding_that_stages_share_is_measured_once(make_config: Any, read_metrics: Any) -> None:
    """t5 with its decoder on the second stage, which embeds that stack's tokens with a copy of the first one's."""
    model = ("model.arch=t5", "model.vocab_size=272", "objective.sentinels=8", "model.n_layers=3")
    found = []
    for pipeline in (1, 2):
        config = make_config(*model, "model.n_decoder_layers=1", *layout(1, pipeline, 1, 0), f"run.name={pipeline}")
        run_ranks(train, pipeline, config)
        found.append([monitored(record) for record in read_metrics(config)])
    for alone, cut in zip(*found, strict=True):
        assert cut == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (2, ["parallel.tensor=2", "parallel.sequence=true"]),
        (2, ["parallel.pipeline=2"]),
        (2, ["parallel.context=2"]),
        (2, ["batch.micro_sequences=4", "deepspeed=ds_configs/zero3.json"]),
    ],
)
def test_the_loss_of_pairs_is_reported_alike(
    make_config: Any, read_metrics: Any, ranks: int, overrides: list[str]
) -> None:
    pairs = ("model.arch=bert", "model.vocab_size=272", "model.pair_head=true", "objective.pairs=sentence_order")
    short = (*layout(1, 1, 1, 0), "model.n_kv_heads=4", "run.name=alone")
    alone, config = make_config(*pairs, *short), make_config(*pairs, *short, "run.name=cut", *overrides)
    run_ranks(train, 1, alone)
    run_ranks(train, ranks, config)
    found, expected = ([record["pair_loss"] for record in read_metrics(each)] for each in (config, alone))
    assert found == pytest.approx(expected, rel=1e-5)
    assert 0.3 < expected[0] < 1.5  # two classes, not learnt yet
    assert expected[0] != expected[-1]


@pytest.mark.parametrize("arch", ["gpt", "llama"])
@pytest.mark.parametrize(("tensor", "pipeline", "data", "zero"), LAYOUTS)
def test_every_layout_reports_the_same(
    make_config: Any, read_metrics: Any, references: Any, arch: str, tensor: int, pipeline: int, data: int, zero: int
) -> None:
    if arch not in references:
        alone = make_config(f"model.arch={arch}", *layout(1, 1, 1, 0), "run.name=alone")
        run_ranks(train, 1, alone)
        references[arch] = [monitored(record) for record in read_metrics(alone)]
    config = make_config(f"model.arch={arch}", *layout(tensor, pipeline, data, zero))
    run_ranks(train, tensor * pipeline * data, config)
    stream = {f"activation_rms_{name}" for name in ("embedding", "blocks.0", "blocks.1", "final_norm")}
    expected = {f"update_ratio_{role}" for role in ROLES[arch]} | stream | set(monitor.MAXIMA)
    for step, (record, alone) in enumerate(zip(read_metrics(config), references[arch], strict=True), start=1):
        found = monitored(record)
        # Before the first update all biases are zero: a ratio would have no basis.
        assert set(found) == expected - ({"update_ratio_bias"} if step == 1 else set())
        assert found == pytest.approx(alone, rel=1e-4)
        assert min(found.values()) > 0


@pytest.mark.parametrize(
    ("tensor", "pipeline", "data", "zero"), [(1, 1, 2, 0), (1, 2, 2, 1), (2, 1, 2, 2), (2, 1, 2, 3)]
)
def test_every_weight_is_one_ranks(make_config: Any, tensor: int, pipeline: int, data: int, zero: int) -> None:
    """Replicas and the tied weight are counted once, the padding of ZeRO's parts never (81 biases on two ranks)."""
    config = make_config("model.arch=gpt", "model.d_ff=162", *layout(tensor, pipeline, data, zero))
    ranks = run_ranks(counted_sizes, tensor * pipeline * data, config, tensor * pipeline * data)
    total = {role: sum(rank.get(role, 0) for rank in ranks) for role in ROLES["gpt"]}
    expected = dict.fromkeys(ROLES["gpt"], 0)
    for parameter in parameters(config.model).values():
        expected[parameter.role] += parameter.size
    assert total == expected


def counted_sizes(config: Config, world_size: int) -> dict[str, int]:
    run = start(config, world_size, None)
    sizes: dict[str, int] = {}
    for master in monitor.masters(run.engine, run.mesh):
        assert master.flat.dtype == torch.float32
        sizes[master.role] = sizes.get(master.role, 0) + master.size
    return sizes


def test_figures_equal_those_by_hand(make_config: Any) -> None:
    """From plain copies of the weights around the step, and all logits of its first micro batch at once."""
    config = make_config("train.steps=3", "train.monitor_every=3", "batch.micro_sequences=2", "train.log_every=10")
    found, expected = run_ranks(one_step_by_hand, 1, config)[0]
    assert found == pytest.approx(expected, rel=1e-5)


def one_step_by_hand(config: Config) -> tuple[dict[str, float], dict[str, float]]:
    run = start(config, 1, None)
    for step in range(2):
        train_step(run, step)
    shards = list(run.engine.deepspeed.module.parameters())
    before = [shard.detach().double() for shard in shards]
    expected = forward_by_hand(run, step=2)
    found = monitored(train_step(run, 2))
    squares: dict[str, list[float]] = {}
    for shard, old in zip(shards, before, strict=True):
        sums = squares.setdefault(spec_of(shard).role, [0.0, 0.0])
        sums[0] += float(old.square().sum())
        sums[1] += float((shard.detach().double() - old).square().sum())
    return found, expected | {f"update_ratio_{role}": math.sqrt(new / old) for role, (old, new) in squares.items()}


def forward_by_hand(run: Training, step: int) -> dict[str, float]:
    batch, _ = weigh(read(run.train_data, step), run.mesh, run.device)
    expected, attention = {}, [0.0]
    x: Tensor = batch[0].inputs["tokens"]
    with torch.no_grad():
        for layer, name in zip(
            run.engine.deepspeed.module.layers,
            ("embedding", "blocks.0", "blocks.1", "final_norm", "readout"),
            strict=True,
        ):
            if isinstance(layer, Block):
                attention.append(largest_logit(run.config, layer, x))
            x = layer(x).logits() if name == "readout" else layer(x)
            expected[f"activation_rms_{name}"] = float(x.square().mean().sqrt())
    del expected["activation_rms_readout"]
    return expected | {"attention_logit_max": max(attention), "output_logit_max": float(x.abs().max())}


def largest_logit(config: Config, block: Block, x: Tensor) -> float:
    model, attention = config.model, block.attention
    x = block.attention_norm(x)
    query = (x @ attention.query.weight.T).unflatten(-1, (model.n_heads, -1)).transpose(1, 2)
    key = (x @ attention.key.weight.T).unflatten(-1, (model.n_kv_heads, -1)).transpose(1, 2)
    query, key = (rotate(part, Rotation(model.rope_theta)) for part in (query, key))
    key = key.repeat_interleave(model.n_heads // model.n_kv_heads, dim=1)
    logits = attention_scale(config) * torch.einsum("bhqd,bhkd->bhqk", query, key)
    return float(logits.tril().abs().max())


@pytest.mark.parametrize("at_a_time", [1, 500, 2**24])
def test_largest_logit_is_that_of_all_rows_together(monkeypatch: pytest.MonkeyPatch, at_a_time: int) -> None:
    """However many rows at a time; GQA's heads meet their own keys, and what the mask hides has no say."""
    monkeypatch.setattr(monitor, "AT_A_TIME", at_a_time)
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, 37, 8, generator=generator) for heads in (6, 2))
    key[:, :, -1] *= 100  # the future of every query but the last
    query[:, :, -1] = 0
    core = CoreAttention("core", BlockScales(attention_logits=-0.3), reference)
    expected = float(attention_logits(core, query, key).abs().max())
    assert float(monitor.largest_attention_logit(query, key, -0.3)) == pytest.approx(expected, rel=1e-6)
    assert expected < 20 < float((0.3 * query @ key.repeat_interleave(3, 1).mT).abs().max())


@pytest.mark.parametrize("at_a_time", [7, 2**24])
def test_squares_of_any_pieces(monkeypatch: pytest.MonkeyPatch, at_a_time: int) -> None:
    monkeypatch.setattr(monitor, "AT_A_TIME", at_a_time)
    x = torch.randn(10, 11, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert float(monitor.squares(x)) == pytest.approx(float(x.double().square().sum()), rel=1e-6)
    assert float(monitor.squares(x[:0])) == 0


@pytest.mark.parametrize(("zero", "ranks"), [(0, 1), (3, 2)])
def test_monitoring_is_seen_in_its_steps_alone(make_config: Any, read_metrics: Any, zero: int, ranks: int) -> None:
    """Its steps are always logged; losses and norms are, bit for bit, those of the run without."""
    common = ("train.steps=6", "train.eval_every=3", f"deepspeed=ds_configs/zero{zero}.json")
    watched = make_config(*common, "train.monitor_every=2", "train.log_every=5", "run.name=watched")
    plain = make_config(*common, "train.monitor_every=0", "run.name=plain")
    for config in (watched, plain):
        run_ranks(train, ranks, config)
    with_figures, without = read_metrics(watched), {record["step"]: record for record in read_metrics(plain)}
    assert [record["step"] for record in with_figures] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in with_figures if monitored(record)] == [2, 4, 6]
    assert not any(monitored(record) for record in without.values())
    for record in with_figures:
        assert [record[key] for key in ("loss", "grad_norm")] == [
            without[record["step"]][key] for key in ("loss", "grad_norm")
        ]


@pytest.mark.parametrize("zero", [1, 3])
def test_bf16_updates_are_the_masters(make_config: Any, read_metrics: Any, zero: int) -> None:
    """Steps that all round away in the bf16 parameters are reported at the size they have in fp32."""
    small = ("optim.lr=1e-6", "schedule.warmup_steps=0", "train.steps=2", "train.monitor_every=1", "data.valid=null")
    fp32 = make_config(*small, "run.name=fp32")
    bf16 = make_config(*small, "precision=bf16", f"deepspeed=ds_configs/zero{zero}.json")
    run_ranks(train, 1, fp32)
    run_ranks(train, 2, bf16)
    for expected, found in zip(read_metrics(fp32), read_metrics(bf16), strict=True):
        for role in ROLES["llama"]:
            key = f"update_ratio_{role}"
            assert 0 < found[key] < 2**-9, "no update here is half a unit in the last place"
            assert found[key] == pytest.approx(expected[key], rel=0.05)


def test_resumed_run_may_be_watched_closer(make_config: Any, read_metrics: Any) -> None:
    """And the figures after a restored checkpoint are those of the run that was never stopped."""
    common = ("train.steps=4", "train.save_every=2", "deepspeed=ds_configs/zero1.json", "data.valid=null")
    unbroken = make_config(*common, "train.monitor_every=1", "run.name=unbroken")
    run_ranks(train, 2, unbroken)
    first = make_config(*common, "train.monitor_every=0")
    run_ranks(train, 2, first)
    shutil.rmtree(first.run.folder / "checkpoints" / "step-00000004")
    run_ranks(train, 2, make_config(*common, "train.monitor_every=1"))
    figures = [monitored(record) for record in read_metrics(first)]
    assert figures[:2] == [{}, {}]
    assert figures[2:] == [monitored(record) for record in read_metrics(unbroken)][2:]


def test_figures_reach_tensorboard(make_config: Any) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = make_config("train.steps=2", "train.monitor_every=2", "log.tensorboard=true", "data.valid=null")
    last = run_ranks(train, 1, config)[0]
    read = events.EventAccumulator(str(config.run.folder / "tensorboard")).Reload()
    assert monitored(last)
    assert monitored(last).keys() <= set(read.Tags()["scalars"])
    assert json.loads(json.dumps(last)) == last
