"""Any layout trains the same mixture of experts, auxiliary losses included."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from megamup.config import Config, micro_batches
from megamup.errors import MegamupError
from megamup.parameters import parameters
from megamup.train import checkpoint
from megamup.train.fork import run_ranks
from megamup.train.loop import start, train, train_step
from tests.parallel.test_layers import gather
from tests.train.test_layouts import Curve, References, Shards, assert_same, local_shards, reference, run
from tests.train.test_resume import computed

MODEL = (
    "model.arch=llama",
    "model.n_kv_heads=4",
    "model.moe={experts: 4, top_k: 2, d_expert: 80, shared: 1, balance: 0.1, router_z: 0.01}",
    "mup.sigma.readout=0.2",
    "optim.grad_clip=0.45",  # acts on some steps, not on all
)
LAYOUTS = [
    (2, ["parallel.tensor=2"]),
    (2, ["parallel.pipeline=2"]),
    (2, ["parallel.context=2"]),
    (2, ["deepspeed=ds_configs/zero3.json"]),
    (1, ["batch.micro_sequences=8"]),
    (4, ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2", "deepspeed=ds_configs/zero1.json"]),
]


@pytest.fixture(scope="module")
def references() -> References:
    return {}


@pytest.mark.parametrize(("world_size", "overrides"), LAYOUTS)
def test_layout_trains_the_experts_of_one_rank(
    make_config: Any, references: References, world_size: int, overrides: list[str]
) -> None:
    known, config = reference(make_config, references, *MODEL), make_config(*MODEL, *overrides)
    assert_same(config, run_ranks(run, world_size, config, world_size), known)


SHARED_OUT = [
    (2, ["parallel.expert=2"]),
    (4, ["parallel.expert=2"]),
    (4, ["parallel.expert=4", "batch.micro_sequences=1"]),
    (4, ["parallel.expert=2", "parallel.tensor=2", "parallel.sequence=true"]),
    (4, ["parallel.expert=4", "parallel.context=2"]),
    (4, ["parallel.expert=2", "parallel.pipeline=2"]),
    (2, ["parallel.expert=2", "train.recompute=full"]),
    (2, ["parallel.expert=2", "deepspeed=ds_configs/zero1.json"]),
    (4, ["parallel.expert=2", "deepspeed=ds_configs/zero2.json"]),
    (4, ["parallel.expert=2", "parallel.tensor=2", "deepspeed=ds_configs/zero2.json"]),
    (4, ["parallel.expert=2", "parallel.pipeline=2", "deepspeed=ds_configs/zero1.json"]),
]


def run_shared_out(config: Config, world_size: int) -> tuple[Curve, float, Shards]:
    """As `run`, with the initial experts of all ranks together; each rank holds its own."""
    training = start(config, world_size, None)
    initial = local_shards(training)
    for name, spec in parameters(config.model).items():
        for place, (tensor_rank, values) in enumerate(initial.get(name, [])):
            if spec.of_experts:
                assert len(values) * config.parallel.expert == spec.shape[0]
                whole = gather(torch.from_numpy(values), 0, training.mesh.expert).numpy()
                initial[name][place] = tensor_rank, whole
    records = [train_step(training, step) for step in range(config.train.steps)]
    return [(record["loss"], record["grad_norm"]) for record in records], records[-1]["valid_loss"], initial


@pytest.mark.parametrize(("world_size", "overrides"), SHARED_OUT)
def test_experts_shared_out_train_as_on_one_rank(
    make_config: Any, references: References, world_size: int, overrides: list[str]
) -> None:
    known, config = reference(make_config, references, *MODEL), make_config(*MODEL, *overrides)
    assert_same(config, run_ranks(run_shared_out, world_size, config, world_size), known)


WATCHED = ("moe_balance", "moe_z", "moe_max_share")


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (2, ["parallel.tensor=2", "parallel.sequence=true"]),
        (2, ["parallel.pipeline=2"]),
        (2, ["batch.micro_sequences=4"]),
        (2, ["parallel.context=2"]),
    ],
)
def test_routers_are_watched_alike(make_config: Any, read_metrics: Any, world_size: int, overrides: list[str]) -> None:
    """Means over layers and sequences. (The largest share is a stretch's where context ranks cut the sequence.)"""
    short = ("train.steps=3", "train.monitor_every=1", "data.valid=null", "batch.micro_sequences=8")
    alone, config = make_config(*MODEL, *short, "run.name=alone"), make_config(*MODEL, *short, *overrides)
    run_ranks(train, 1, alone)
    run_ranks(train, world_size, config)
    for record, expected in zip(read_metrics(config), read_metrics(alone), strict=True):
        for name in WATCHED[:2]:
            assert record[name] == pytest.approx(expected[name], rel=1e-5)
        assert 0.25 <= record["moe_max_share"] <= 0.5
        assert record["moe_balance"] > 1.0


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, ["parallel.expert=2"]),
        (4, ["parallel.expert=2", "parallel.pipeline=2"]),
        (4, ["parallel.expert=2", "deepspeed=ds_configs/zero1.json"]),
        (2, ["parallel.expert=2", "deepspeed=ds_configs/zero2.json"]),
    ],
)
def test_experts_shared_out_resume_bit_for_bit(
    make_config: Any, read_metrics: Any, ranks: int, layout: list[str]
) -> None:
    """Each rank's experts and their moments are in the checkpoint, of which DeepSpeed writes the first replica's."""
    keys = (*MODEL, *layout, "train.steps=6", "train.save_every=3", "data.valid=null")
    unbroken, resumed = make_config(*keys, "run.name=unbroken"), make_config(*keys, "run.name=resumed")
    for config in (unbroken, resumed):
        run_ranks(train, ranks, config)
    shutil.rmtree(resumed.run.folder / "checkpoints" / "step-00000006")
    run_ranks(train, ranks, resumed)
    assert computed(read_metrics(resumed)) == computed(read_metrics(unbroken))
    saved = resumed.run.folder / "checkpoints" / "step-00000006"
    assert len(list(saved.glob("experts_*"))) == (2 if "zero1" in str(layout) else ranks)
    with pytest.raises(MegamupError, match="expert=2, this run has expert=1"):
        checkpoint.check(saved, make_config(*MODEL, *layout, "parallel.expert=1"), ranks)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.moe=null", "parallel.expert=2"], "no effect without model.moe"),
        (["parallel.expert=3"], "model.moe.experts=4 is not divisible by parallel.expert=3"),
        (["parallel.expert=2", "deepspeed=ds_configs/zero3.json"], "is ZeRO 3, .* use ds_configs/zero2.json"),
        (["parallel.expert=2", "deepspeed=ds_configs/zero1.json", "precision=bf16"], "another gradient norm"),
        (["parallel.expert=2", "kernels.compile=true"], "kernels.compile=true needs fixed shapes"),
        (["model.moe.d_expert=81", "parallel.tensor=2"], "the next that is: 82"),
    ],
)
def test_layouts_that_experts_do_not_have_are_refused(make_config: Any, overrides: list[str], message: str) -> None:
    with pytest.raises(MegamupError, match=message):
        make_config(*MODEL, *overrides)


def test_a_world_that_expert_ranks_do_not_divide_is_refused(make_config: Any) -> None:
    config = make_config(*MODEL, "parallel.expert=2")
    with pytest.raises(MegamupError, match=r"parallel.expert=2 does not divide the 1 ranks .* use one of \[1\]"):
        micro_batches(config, 1)
