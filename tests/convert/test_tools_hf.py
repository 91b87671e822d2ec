"""The two programs, end to end: import, train at some layout, export."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from megamup.config import Config, load_config
from megamup.convert.hf.checkpoint import CheckpointWeights
from megamup.parallel.layers import spec_of
from megamup.train import checkpoint
from megamup.train.fork import run_ranks
from megamup.train.loop import start, train

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

ROOT = Path(__file__).parents[2]
VOCAB, SEQ = 264, 64
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SIZE |= {"vocab_size": VOCAB, "max_position_embeddings": SEQ}
T5_SIZE: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": VOCAB}
T5_SIZE |= {"decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu"}
MODELS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "gpt2": (
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=SEQ, vocab_size=VOCAB)
        ),
        [],
    ),
    "llama": (lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZE)), []),
    "bert": (lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SIZE)), []),
    "t5": (
        lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5_SIZE)),
        ["objective.sentinels=8", "data.seq_len=64"],
    ),
}


def program(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def initial(config: Config) -> dict[str, Any]:
    """This rank's weights as training starts, by global name."""
    training = start(config, config.parallel.replica_ranks, None)
    shards = [shard for shard in training.engine.deepspeed.module.parameters() if hasattr(shard, "spec")]
    return {spec_of(shard).name: shard.detach().float().numpy() for shard in shards}


@pytest.mark.parametrize("name", MODELS)
def test_import_train_export(
    name: str, shards: Path, tmp_path: Path, read_metrics: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    build, overrides = MODELS[name]
    torch.manual_seed(1)
    build().save_pretrained(tmp_path / "theirs")
    run = tmp_path / "run"
    given = [*overrides, "parallel.tensor=2", "parallel.pipeline=2"]
    assert program("import_hf").main([str(tmp_path / "theirs"), "--output", str(run), *given]) == 0
    assert "next: launch/pretrain.py" in capsys.readouterr().out
    data = [f"data.train={shards / 'train'}", "train.steps=6", "train.log_every=1", "train.save_every=6"]
    rest = ["batch.global_sequences=8", "optim.lr=0.003", "train.monitor_every=0"]
    config = load_config([run / "config.yaml"], [*data, *rest])
    assert config.run.folder == run
    alone = load_config(
        [run / "config.yaml"],
        [*data, *rest, "parallel.tensor=1", "parallel.pipeline=1", f"run.dir={tmp_path}", "run.name=alone"],
    )
    run_ranks(train, 1, alone)
    run_ranks(train, 4, config)
    expected, found = ([record["loss"] for record in read_metrics(each)] for each in (alone, config))
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[-1] < found[0] - 0.01
    assert program("export_hf").main([str(run), "--output", str(tmp_path / "export"), "--dtype", "bfloat16"]) == 0
    settings = json.loads((tmp_path / "export" / "config.json").read_text())
    theirs = getattr(transformers, settings["architectures"][0]).from_pretrained(tmp_path / "export")
    assert theirs.dtype == torch.bfloat16
    trained = CheckpointWeights(config, checkpoint.named(str(run))[2])["embedding.token"]
    assert trained.shape == (VOCAB, 32)
    (before,) = (weights["embedding.token"] for weights in run_ranks(initial, 1, alone))
    assert 0 < abs(trained.numpy() - before).max() < 0.05


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program("import_hf").main([str(tmp_path), "--output", str(tmp_path / "run")]) == 2
    assert "config.json: not readable" in capsys.readouterr().err
    assert program("export_hf").main([str(tmp_path / "run@5"), "--output", str(tmp_path / "out")]) == 2
    assert "error: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
