"""Checkpoints of every layout hold the weights that were trained, and are exported."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megamup.config import Config
from megamup.convert.hf.checkpoint import CheckpointWeights, load
from megamup.convert.hf.exporting import export_run
from megamup.errors import MegamupError
from megamup.models.build import build_network
from megamup.parallel.layers import spec_of
from megamup.train import checkpoint
from megamup.train.fork import run_ranks
from megamup.train.loop import train
from tests.convert import hf_cases

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

MODELS = {
    "gpt": ["model.arch=gpt"],
    "llama": ["model.arch=llama", "model.bias=true"],
    "bert": ["model.arch=bert", "model.vocab_size=264"],
    "t5": ["model.arch=t5", "model.vocab_size=272", "objective.sentinels=8"],
    "t5, tied": ["model.arch=t5", "model.vocab_size=272", "objective.sentinels=8", "model.tie_embeddings=true"],
    "experts": ["model.arch=llama", "model.moe={experts: 4, d_expert: 96}"],
}
ALPHA = [f"mup.alpha.{role}={value}" for role, value in hf_cases.ALPHA.items()]
SHORT = ["train.steps=2", "train.save_every=1", "train.monitor_every=0", "data.valid=null", "schedule.warmup_steps=0"]
# (tensor, pipeline, data, ZeRO stage, precision); fp32 masters stand in the optimizer's files
LAYOUTS = [
    (1, 1, 1, 0, "fp32"),
    (2, 1, 1, 0, "bf16"),
    (1, 1, 2, 1, "bf16"),
    (2, 1, 2, 2, "bf16"),
    (2, 1, 2, 3, "bf16"),
    (1, 2, 2, 1, "bf16"),
    (2, 2, 1, 0, "fp32"),
    (2, 2, 1, 1, "fp32"),
]


ALONE: dict[str, dict[str, torch.Tensor]] = {}
"""Weights that one rank trained, by precision."""


def layout(tensor: int, pipeline: int, zero: int, precision: str = "fp32") -> list[str]:
    named = [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}", f"precision={precision}"]
    return [*named, f"deepspeed=ds_configs/zero{zero}.json"]


def held(config: Config) -> dict[str, torch.Tensor]:
    _, _, path = checkpoint.named(str(config.run.folder))
    return dict(CheckpointWeights(config, path))


@pytest.mark.parametrize(("tensor", "pipeline", "data", "zero", "precision"), LAYOUTS)
def test_weights_of_any_layout_are_those_of_one_rank(
    make_config: Any, tensor: int, pipeline: int, data: int, zero: int, precision: str
) -> None:
    # Tied: the embedding is on two stages. Without biases: those of keys have no gradient but rounding's.
    model = ["model.tie_embeddings=true"]
    config = make_config(*SHORT, *ALPHA, "model.n_kv_heads=4", *model, *layout(tensor, pipeline, zero, precision))
    run_ranks(train, tensor * pipeline * data, config)
    if precision not in ALONE:
        alone = make_config(*SHORT, *ALPHA, "model.n_kv_heads=4", *model, "run.name=alone", f"precision={precision}")
        run_ranks(train, 1, alone)
        ALONE[precision] = held(alone)
    expected, found = ALONE[precision], held(config)
    initial = {spec_of(shard).name: shard.detach() for shard in build_network(config).parameters()}
    assert found.keys() == expected.keys() == initial.keys()
    for name, weight in found.items():
        moved = (expected[name] - initial[name]).abs().max()
        assert moved > 0
        assert weight.dtype == torch.float32
        # Two steps of Adam go one rate each, in bf16 some of them the other way.
        assert (weight - expected[name]).abs().mean() <= (1e-3 if precision == "fp32" else 0.2) * moved, name


@pytest.mark.parametrize("place", [layout(1, 2, 0), layout(2, 1, 0), layout(1, 1, 1)])
def test_experts_that_ranks_share_out(make_config: Any, place: list[str]) -> None:
    few = [*SHORT, *ALPHA, *MODELS["experts"]]
    alone, config = make_config(*few, "run.name=alone"), make_config(*few, *place, "parallel.expert=2")
    run_ranks(train, 1, alone)
    run_ranks(train, 4, config)
    expected = held(alone)
    for name, weight in held(config).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "zero"), [*((name, 0) for name in MODELS), ("t5, tied", 1)])
def test_logits_of_an_export_from_tensor_and_pipeline_ranks(
    make_config: Any, tmp_path: Path, name: str, zero: int
) -> None:
    overrides = [*SHORT, *ALPHA, "model.n_kv_heads=4", *MODELS[name], *layout(2, 2, zero)]
    config = make_config(*overrides)
    run_ranks(train, 4, config)
    lines = export_run(str(config.run.folder), tmp_path / "export")
    assert "after 2 steps" in lines[0]
    kind = getattr(transformers, json.loads((tmp_path / "export" / "config.json").read_text())["architectures"][0])
    theirs, found = kind.from_pretrained(tmp_path / "export", output_loading_info=True, attn_implementation="eager")
    assert not any(found.values()), found
    single = make_config(*overrides, "parallel.tensor=1", "parallel.pipeline=1")
    ours, weights = build_network(single), held(config)
    with torch.no_grad():
        for shard in ours.parameters():
            shard.copy_(weights[spec_of(shard).name])
        inputs = hf_cases.inputs_of(config)
        assert (ours(inputs) - hf_cases.their_logits(theirs, inputs)).abs().max() <= 1e-4


def test_a_step_by_its_number(make_config: Any, tmp_path: Path) -> None:
    config = make_config(*SHORT, *MODELS["llama"])
    run_ranks(train, 1, config)
    folder = str(config.run.folder)
    first, last = (export_run(f"{folder}{at}", tmp_path / f"export{at}") for at in ("@1", "@2"))
    assert ("after 1 steps" in first[0], "after 2 steps" in last[0]) == (True, True)
    read = [(tmp_path / f"export{at}" / "model.safetensors").read_bytes() for at in ("@1", "@2")]
    assert len(read[0]) == len(read[1])
    assert read[0] != read[1]
    for run, message in {f"{folder}@3": "there are 1, 2", str(tmp_path / "no"): "no config.yaml there"}.items():
        with pytest.raises(MegamupError, match=message):
            export_run(run, tmp_path / "nothing")
    shutil.rmtree(config.run.folder / "checkpoints" / "step-00000002" / "state")
    with pytest.raises(MegamupError, match="found no file"):
        export_run(folder, tmp_path / "nothing")
    assert not list(tmp_path.glob("*nothing*"))


class Code:
    """A pickle of it runs code where it is read."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def test_no_code_of_a_checkpoint_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"module": Code()}, "mp_rank_00_model_states.pt")
    with pytest.raises(MegamupError, match=r"mp_rank_00_model_states.pt: holds posix.mkdir; expected"):
        load(Path("mp_rank_00_model_states.pt"))
    assert not Path("ran").exists()


def test_tokenizer_files_of_the_corpus(make_config: Any, tmp_path: Path) -> None:
    config = make_config(*SHORT, *MODELS["gpt"], "model.n_kv_heads=4")
    run_ranks(train, 1, config)
    lines = export_run(str(config.run.folder), tmp_path / "export")
    assert any("no tokenizer files were written" in line for line in lines)  # the corpus tells none
    settings = json.loads((tmp_path / "export" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == 0
