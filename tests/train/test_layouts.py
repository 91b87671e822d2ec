"""Any layout trains the same model: losses, gradient norms and initial weights against one rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from megamup.config import Config
from megamup.parallel.layers import spec_of
from megamup.parameters import parameters
from megamup.train.evaluate import evaluate, together
from megamup.train.fork import run_ranks
from megamup.train.loop import Training, start, train_step

Curve = list[tuple[float, float]]
Shards = dict[str, list[tuple[int, npt.NDArray[Any]]]]

# (tensor, pipeline, data, ZeRO stage)
LAYOUTS = [
    (2, 1, 1, 0),
    (1, 2, 1, 0),
    (1, 1, 2, 0),
    (2, 2, 1, 0),
    (2, 1, 2, 0),
    (1, 2, 2, 0),
    (1, 1, 2, 1),
    (1, 1, 2, 2),
    (1, 1, 2, 3),
    (2, 1, 2, 1),
    (2, 1, 2, 2),
    (2, 1, 2, 3),
    (1, 2, 2, 1),
    (2, 2, 1, 1),
]
MODELS = {
    "llama": ("model.arch=llama", "optim.grad_clip=0.24"),  # clipping acts on some steps, not on all
    "gpt": ("model.arch=gpt", "optim.grad_clip=0.5"),
    "bert": ("model.arch=bert", "model.vocab_size=264", "optim.grad_clip=2.5"),
    "t5": ("model.arch=t5", "model.vocab_size=272", "objective.sentinels=8", "optim.grad_clip=0.5"),
    "bert, pairs": (
        "model.arch=bert",
        "model.vocab_size=272",
        "model.pair_head=true",
        "objective.pairs=sentence_order",
        "objective.z_loss=0.001",
        "optim.grad_clip=2.5",
    ),
    "t5, documents": (
        "model.arch=t5",
        "model.vocab_size=272",
        "objective.sentinels=8",
        "objective.decoder_len=16",
        "model.tie_embeddings=true",
        "data.documents=true",
        "optim.grad_clip=2.0",
    ),
}
ARCHS = ["llama", "gpt", "bert", "t5"]
VARIED = ["llama", "bert, pairs", "t5, documents"]


def run(config: Config, world_size: int) -> tuple[Curve, float, Shards]:
    """20 steps on this rank: (loss, gradient norm) of each, the final evaluation, and the initial shards."""
    training = start(config, world_size, None)
    initial = local_shards(training)
    records = [train_step(training, step) for step in range(config.train.steps)]
    curve = [(record["loss"], record["grad_norm"]) for record in records]
    return curve, records[-1]["valid_loss"], initial


def local_shards(training: Training) -> Shards:
    """{global name: [(tensor rank, values)]}; ZeRO-3's are gathered over the data axis first."""
    import deepspeed

    found: Shards = {}
    shards = [shard for shard in training.engine.deepspeed.module.parameters() if hasattr(shard, "spec")]
    with deepspeed.zero.GatheredParameters(shards):
        for shard in shards:
            found[spec_of(shard).name] = [(training.mesh.tensor.rank, shard.detach().clone().numpy())]
    return found


def gathered(config: Config, ranks: list[Shards]) -> dict[str, npt.NDArray[Any]]:
    """The logical tensors from every rank's shards; replicas must agree bit for bit."""
    whole = {}
    for name, spec in parameters(config.model).items():
        pieces: dict[int, npt.NDArray[Any]] = {}
        for rank in ranks:
            for tensor_rank, values in rank.get(name, []):
                place = tensor_rank if spec.partition_dim is not None else 0
                assert np.array_equal(pieces.setdefault(place, values), values), f"replicas of {name} differ"
        ordered = [pieces[place] for place in sorted(pieces)]
        whole[name] = ordered[0] if spec.partition_dim is None else np.concatenate(ordered, spec.partition_dim)
        assert whole[name].shape == spec.shape
    return whole


# Sequence and context parallelism, and everything that computes the same in another way.
VARIANTS = [
    (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    (4, ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2", "deepspeed=ds_configs/zero1.json"]),
    (4, ["parallel.tensor=2", "parallel.sequence=true", "deepspeed=ds_configs/zero3.json"]),
    (2, ["parallel.context=2"]),
    (4, ["parallel.context=2", "deepspeed=ds_configs/zero2.json"]),
    (4, ["parallel.context=2", "parallel.pipeline=2", "deepspeed=ds_configs/zero1.json"]),
    (
        4,
        [
            "parallel.context=2",
            "parallel.tensor=2",
            "parallel.sequence=true",
            "deepspeed=ds_configs/zero1.json",
            "model.n_kv_heads=4",
        ],
    ),
    (1, ["train.recompute=full", "kernels.cross_entropy=reference"]),
    (2, ["train.recompute=selective", "parallel.tensor=2", "parallel.sequence=true"]),
    (2, ["train.recompute=2", "parallel.pipeline=2", "kernels.attention=reference"]),
    (2, ["train.recompute=full", "deepspeed=ds_configs/zero3.json"]),
]

Reference = tuple[Curve, float, dict[str, npt.NDArray[Any]]]
References = dict[tuple[str, ...], Reference]


@pytest.fixture(scope="module")
def references() -> References:
    return {}


def reference(make_config: Any, known: References, *model: str) -> Reference:
    """What one rank makes of a model, given as overrides of the config."""
    if model not in known:
        config = make_config(*model, "run.name=reference")
        curve, valid_loss, shards = run_ranks(run, 1, config, 1)[0]
        known[model] = curve, valid_loss, gathered(config, [shards])
    return known[model]


@pytest.mark.parametrize(("tensor", "pipeline", "data", "zero"), LAYOUTS)
def test_layout_trains_the_models_of_one_rank(
    make_config: Any, references: References, tensor: int, pipeline: int, data: int, zero: int
) -> None:
    layout = [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}", f"deepspeed=ds_configs/zero{zero}.json"]
    assert_trains_the_same(make_config, references, ARCHS, tensor * pipeline * data, layout)


@pytest.mark.parametrize(("world_size", "overrides"), VARIANTS)
def test_variant_trains_the_models_of_one_rank(
    make_config: Any, references: References, world_size: int, overrides: list[str]
) -> None:
    assert_trains_the_same(make_config, references, VARIED, world_size, overrides)


def run_all(configs: dict[str, Config], world_size: int) -> dict[str, tuple[Curve, float, Shards]]:
    """Several models, one after another on the same ranks."""
    return {name: run(config, world_size) for name, config in configs.items()}


def assert_trains_the_same(
    make_config: Any, references: References, models: list[str], world_size: int, overrides: list[str]
) -> None:
    """Each model on this layout against one rank."""
    own = [key for key in overrides if key.startswith("model.")]
    known = {name: reference(make_config, references, *MODELS[name], *own) for name in models}
    configs = {name: make_config(*MODELS[name], *overrides, f"run.name={name}") for name in models}
    ranks = run_ranks(run_all, world_size, configs, world_size)
    for name in models:
        assert_same(configs[name], [rank[name] for rank in ranks], known[name])


def assert_same(config: Config, ranks: list[tuple[Curve, float, Shards]], known: Reference) -> None:
    """Losses, norms, evaluation and initial weights of one rank; clipping acted on some steps."""
    expected, expected_valid, expected_weights = known
    curve, valid_loss, _ = ranks[0]
    assert all(rank[0] == curve for rank in ranks), "ranks disagree on the global loss or norm"
    assert expected[-1][0] < 0.9 * expected[0][0], "nothing was learnt: the comparison would be of initial weights"
    norms = [norm for _, norm in expected]
    assert min(norms) < config.optim.grad_clip < max(norms), "clipping must both act and not act"
    np.testing.assert_allclose([loss for loss, _ in curve], [loss for loss, _ in expected], rtol=1e-5)
    np.testing.assert_allclose([norm for _, norm in curve], norms, rtol=1e-4)
    np.testing.assert_allclose(valid_loss, expected_valid, rtol=1e-5)

    weights = gathered(config, [rank[2] for rank in ranks])
    different = [name for name in weights if not np.array_equal(weights[name], expected_weights[name])]
    assert weights.keys() == expected_weights.keys()
    assert not different, "initial weights depend on the layout"


@pytest.mark.parametrize(
    ("tensor", "pipeline", "data", "zero"),
    [(1, 1, 1, 0), (2, 1, 1, 0), (1, 2, 1, 0), (1, 1, 2, 1), (1, 1, 2, 2), (1, 1, 2, 3), (1, 2, 2, 1), (2, 2, 1, 1)],
)
def test_bf16_follows_fp32_in_every_engine(
    make_config: Any, references: References, tensor: int, pipeline: int, data: int, zero: int
) -> None:
    """Compute in bf16, accumulation and masters in fp32: losses stay within bf16's rounding of the fp32 run's."""
    expected, _, _ = reference(make_config, references, "model.arch=llama", MODELS["llama"][1])
    config = make_config(
        "precision=bf16",
        MODELS["llama"][1],
        f"parallel.tensor={tensor}",
        f"parallel.pipeline={pipeline}",
        f"deepspeed=ds_configs/zero{zero}.json",
    )
    world_size = tensor * pipeline * data
    curve, _, shards = run_ranks(run_bf16, world_size, config, world_size)[0]
    np.testing.assert_allclose([loss for loss, _ in curve], [loss for loss, _ in expected], rtol=5e-3)
    assert shards == ({"torch.float32"} if zero == 0 else {"torch.bfloat16"})


def run_bf16(config: Config, world_size: int) -> tuple[Curve, float, set[str]]:
    training = start(config, world_size, None)
    records = [train_step(training, step) for step in range(config.train.steps)]
    losses = evaluate(training.held_out, training.engine, config, training.mesh, training.device)
    moments = [state["exp_avg"].dtype for state in training.engine.deepspeed.basic_optimizer.state.values()]
    assert set(moments) == {torch.float32}, "AdamW makes its moments of the masters' type"
    dtypes = {str(shard.dtype) for shard in training.engine.deepspeed.module.parameters() if hasattr(shard, "spec")}
    return [(record["loss"], record["grad_norm"]) for record in records], together(losses).loss, dtypes


def test_micro_batches_do_not_change_the_model(make_config: Any, references: References) -> None:
    expected, _, _ = reference(make_config, references, "model.arch=llama", MODELS["llama"][1])
    for micro in (1, 8):
        curve, _, _ = run_ranks(
            run, 1, make_config(MODELS["llama"][1], f"batch.micro_sequences={micro}", f"run.name=micro{micro}"), 1
        )[0]
        np.testing.assert_allclose([loss for loss, _ in curve], [loss for loss, _ in expected], rtol=1e-5)


def test_uneven_stages_hold_the_same_parameter_groups(make_config: Any, references: References) -> None:
    """Three blocks on three stages: the middle one has no embedding, readout or final norm (DeepSpeed #1522)."""
    one = run_ranks(run, 1, make_config("model.n_layers=3", "run.name=one"), 1)[0]
    for zero in (0, 1):
        config = make_config(
            "model.n_layers=3",
            "parallel.pipeline=3",
            "mup.eta.vector=0.5",
            "mup.eta.embedding=2",
            "mup.eta.readout=3",
            "mup.eta.hidden=1",
            "mup.eta.residual_out=0.7",
            f"deepspeed=ds_configs/zero{zero}.json",
            f"run.name=three{zero}",
        )
        alone = config.model_copy(
            update={
                "parallel": config.parallel.model_copy(update={"pipeline": 1}),
                "run": config.run.model_copy(update={"name": f"alone{zero}"}),
            }
        )
        ranks = run_ranks(run, 3, config, 3)
        expected = run_ranks(run, 1, alone, 1)[0]
        np.testing.assert_allclose([x for x, _ in ranks[0][0]], [x for x, _ in expected[0]], rtol=1e-5)
        np.testing.assert_allclose([x for _, x in ranks[0][0]], [x for _, x in expected[0]], rtol=1e-4)
        assert abs(expected[0][-1][0] - one[0][-1][0]) > 1e-3, "the rates by role had no effect"
