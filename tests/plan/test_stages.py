"""What each pipeline stage holds: the list of layers cut as DeepSpeed cuts it, and the parameters of the layers."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
from deepspeed.runtime.utils import partition_balanced

from megamup.model import Model, Moe
from megamup.models.blocks import Block
from megamup.models.build import context, cross_entropy, model_layers
from megamup.parallel.mesh import SINGLE
from megamup.parameters import count, parameters
from megamup.plan import stage_parameters
from megamup.plan.state import Layer, inventory, layers, owners, stage_layers

SHAPE: dict[str, Any] = {"d_model": 8, "n_heads": 2, "vocab_size": 16, "max_seq_len": 4}


def model(arch: str, **keys: Any) -> Model:
    return Model(arch=arch, **{**SHAPE, "n_layers": 2, **keys})


@pytest.mark.parametrize("arch", ["gpt", "t5"])
@pytest.mark.parametrize("n_layers", range(1, 8))
def test_stages_are_deepspeeds(arch: str, n_layers: int) -> None:
    for others in range(1, 5) if arch == "t5" else [None]:
        found = layers(model(arch, n_layers=n_layers, n_decoder_layers=others))
        blocks = [int(layer.kind == "block") for layer in found]
        for pipeline in range(1, sum(blocks) + 1):
            cut = stage_layers(model(arch, n_layers=n_layers, n_decoder_layers=others), pipeline)
            edges = [0, *accumulate(len(of_stage) for of_stage in cut)]
            assert edges == [int(edge) for edge in partition_balanced(blocks, pipeline)]


@pytest.mark.parametrize("arch", ["gpt", "llama", "bert", "t5"])
def test_the_list_is_the_models(make_config: Any, arch: str) -> None:
    """The same blocks in the same order, each with the parameters that it has."""
    config = make_config(f"model.arch={arch}", "model.n_layers=3")
    built_from = context(config, SINGLE)
    specs = model_layers(built_from, config, cross_entropy(built_from, config))
    built = [spec.build() for spec in specs if spec.module is Block]
    planned = [layer for layer in layers(config.model) if layer.kind == "block"]
    assert [block.name for block in built] == [layer.stack.block(layer.number) for layer in planned]
    for block, layer in zip(built, planned, strict=True):
        names = {parameter.spec.name for parameter in block.parameters()}  # type: ignore[attr-defined]
        assert names == {name for name in parameters(config.model) if owners(config.model, name) == [layer]}


def test_two_stacks_share_one_embedding() -> None:
    """Where they are on different stages each has it, and a tied readout too."""
    untied, tied = model("t5"), model("t5", tie_embeddings=True)
    table = 16 * 8
    for pipeline, copies in ((1, 0), (2, 0), (3, 0), (4, 1)):
        held = inventory(untied, 1, pipeline)
        assert sum(h.total for h in held) == count(untied)["total"] + copies * table
    more = [sum(h.total for h in inventory(tied, 1, n)) - count(tied)["total"] for n in (1, 2, 4)]
    assert more == [0, table, 2 * table]
    assert owners(tied, "embedding.token")[-1].kind == "head"


def test_what_stands_between_the_stacks_goes_with_the_encoders_last_block() -> None:
    first, second = stage_layers(model("t5"), 2)
    assert [layer.kind for layer in first] == ["start", "block", "block", "memory", "start"]
    assert [layer.kind for layer in second] == ["block", "block", "head"]
    assert owners(model("t5"), "decoder.relative.weight") == [first[-1]]
    assert owners(model("t5"), "encoder.final_norm.weight") == [first[-2]]
    assert owners(model("t5"), "decoder.final_norm.weight") == [second[-1]]


def test_berts_transform_is_whole_on_every_tensor_rank() -> None:
    found = model("bert", pair_head=True)
    cut = sum(p.size for p in parameters(found).values() if p.partition_dim is not None)
    (half,) = inventory(found, 2, 1)
    assert half.total == count(found)["total"] - cut // 2
    last = inventory(found, 1, 2)[1].sizes
    assert {8 * 8, 8 * 2}.issubset(last)  # transform and pooler, the pair classifier
    assert owners(found, "embedding_norm.weight") == [Layer("start", layers(found)[0].stack)]


def test_expert_ranks_share_out_experts_alone() -> None:
    found = model("llama", moe=Moe(experts=4, shared=1))
    (whole,), (shared,) = inventory(found, 1, 1), inventory(found, 1, 1, 2)
    routed = sum(p.size for p in parameters(found).values() if ".moe.experts." in p.name)
    assert routed == 2 * 4 * 3 * 8 * found.d_ff
    assert whole.total == count(found)["total"]
    assert shared.total == whole.total - routed // 2


def test_a_config_s_expert_ranks_count(make_config: Any) -> None:
    experts = ("model.moe.experts=4", "model.moe.top_k=2", "batch.micro_sequences=1")
    alone, shared = (stage_parameters(make_config(*experts, f"parallel.expert={n}"))[0] for n in (1, 2))
    assert alone - shared == 2 * 2 * 3 * 64 * 160  # two blocks, two of four experts
