"""What a run writes, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megamup.config import Config, dump_config, load_config
from megamup.data.consumed import documents_of_step
from megamup.data.corpus import Corpus
from megamup.data.loader import TensorBatch
from megamup.data.objectives import NOT_COUNTED, Causal
from megamup.data.writer import write_corpus
from megamup.errors import MegamupError, OneRankError
from megamup.flops import flops_per_token
from megamup.parallel.mesh import SINGLE
from megamup.train.engine import weigh
from megamup.train.fork import run_ranks
from megamup.train.loop import DivergedError, start, train, train_step


def test_run_folder_holds_what_the_tools_read(make_config: Any, read_metrics: Any) -> None:
    config = make_config("train.steps=10", "train.log_every=4", "train.eval_every=5")
    last = run_ranks(train, 1, config)[0]
    folder = config.run.folder
    assert load_config([folder / "config.yaml"]) == config
    records = read_metrics(config)
    assert [record["step"] for record in records] == [1, 4, 5, 8, 10]
    assert [record["step"] for record in records if "valid_loss" in record] == [5, 10]
    needed = {"step", "tokens", "flops", "loss", "lr", "grad_norm", "tokens_per_s", "mfu_percent", "memory_peak_gib"}
    assert all(needed <= record.keys() for record in records)
    assert records[-1] == last
    assert last["tokens"] == 10 * 8 * 64
    assert last["flops"] == last["tokens"] * flops_per_token(config.model, 64, "palm")
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["flops_convention"] == "palm"
    assert environment["peak_basis"].startswith("measured: fp32 matrix product")
    per_token = flops_per_token(config.model, 64, "palm")
    expected = 100 * last["tokens_per_s"] * per_token / environment["peak_flops"]
    assert math.isclose(last["mfu_percent"], expected, rel_tol=1e-9)


def test_schedule_reaches_the_groups_with_their_scales(make_config: Any) -> None:
    """The rate in the metrics is the peak's; every group's is that times its scale from the table."""
    config = make_config("train.steps=3", "mup.base.d_ff=64")
    groups = run_ranks(rates_after_training, 1, config)[0]
    scales = sorted({scale for scale, _, _ in groups})
    assert scales == [0.4, 0.5, 1.0]  # d_ff 160 over 64; d_model 64 over 32; embedding, readout, gains
    for scale, rate, at in groups:
        assert math.isclose(rate, at * scale, rel_tol=1e-12)


def rates_after_training(config: Any) -> list[tuple[float, float, float]]:
    training = start(config, 1, None)
    record = [train_step(training, step) for step in range(3)][-1]
    groups = training.engine.deepspeed.optimizer.param_groups
    return [(group["lr_scale"], group["lr"], record["lr"]) for group in groups]


def test_divergence_is_one_error_that_names_the_rate(make_config: Any) -> None:
    config = make_config("optim.lr=1e30", "optim.grad_clip=0", "schedule.warmup_steps=0")
    with pytest.raises(DivergedError, match=r"diverged at step \d+.*lower optim\.lr=1e\+30"):
        run_ranks(train, 1, config)


def test_missing_shard_is_found_before_any_process_group(make_config: Any, tmp_path: Path) -> None:
    with pytest.raises(MegamupError, match="nowhere"):
        train(make_config(f"data.train={tmp_path / 'nowhere'}"))
    assert not dist.is_initialized()


def test_missing_initial_weights_are_found_before_any_process_group(make_config: Any, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    with pytest.raises(MegamupError, match=r"nowhere: weights\.json is not readable"):
        train(make_config(f"train.init={tmp_path / 'nowhere'}"))
    assert not dist.is_initialized()


def test_token_beyond_the_vocabulary_names_shard_and_place(make_config: Any, tmp_path: Path) -> None:
    """A foreign shard without a manifest is checked as it is read, on the rank that reads it."""
    ids = np.full(20_000, 7, dtype=np.uint16)
    ids[15_000] = 300
    write_corpus(str(tmp_path / "bad"), [ids], 400, eod_id=0)
    (tmp_path / "bad.json").unlink()
    config = make_config(f"data.train={tmp_path / 'bad'}", "train.steps=40")
    with pytest.raises(OneRankError, match=r"bad.*15000.*300.*256|bad.*300"):
        run_ranks(train, 2, config)


def test_blend_of_shards_trains(make_config: Any, shards: Path, read_metrics: Any) -> None:
    sources = f"[{{prefix: '{shards / 'train'}', weight: 3}}, {{prefix: '{shards / 'valid'}', weight: 1}}]"
    config = make_config(f"data.train={sources}", "train.steps=10")
    run_ranks(train, 2, config)
    assert load_config([config.run.folder / "config.yaml"]) == config
    assert dump_config(config)
    assert read_metrics(config)[-1]["loss"] < read_metrics(config)[0]["loss"]


def test_epochs_are_told_and_recorded(
    make_config: Any, shards: Path, read_metrics: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    sources = (
        f"[{{prefix: '{shards / 'train'}', weight: 3}}, {{prefix: '{shards / 'valid'}', weight: 1, fraction: 0.5}}]"
    )
    config = make_config(f"data.train={sources}", "train.steps=32")  # 624 and 11 samples; 192 and 64 are read
    run_ranks(train, 1, config)
    record = read_metrics(config)[-1]
    assert (record["epochs_train"], record["epochs_valid"]) == (192 / 624, 64 / 11)
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("data.")]
    assert [line.split(":")[0] for line in lines] == ["data.train train", "data.train valid", "data.valid valid"]
    assert "75% of the batches, 0.308 epochs in this run" in lines[0]
    assert "(fraction 0.5), 25% of the batches, 5.82 epochs in this run; warning: past 4 epochs" in lines[1]
    assert "warning: trained on" in lines[2]


def test_one_source_has_plain_epochs(make_config: Any, read_metrics: Any) -> None:
    config = make_config("train.steps=3")
    run_ranks(train, 1, config)
    assert [record["epochs"] for record in read_metrics(config)] == [8 / 624, 16 / 624, 24 / 624]


def test_documents_of_a_step_are_those_that_were_trained_on(make_config: Any, shards: Path) -> None:
    """What the record of a run tells, against the batch that its second rank trained on at step 7."""
    config = make_config("train.steps=8", "data.fraction=0.5", "data.prefetch=1")
    (_, seen) = run_ranks(batch_of_step, 2, config, 7)
    corpus = Corpus(str(shards / "train"))
    samples = documents_of_step(config.run.folder, 7)
    assert [corpus.tokens(sample.start, sample.stop).tolist() for sample in samples[4:]] == seen
    assert {part.document for sample in samples for part in sample.parts} == {0, 1}


def batch_of_step(config: Any, step: int) -> list[list[int]]:
    run = start(config, 2, None)
    seen: list[list[int]] = []
    train_batch = run.engine.train_batch

    def watched(batch: Any, lr: float) -> Any:
        for micro in batch:
            seen.extend(torch.cat([micro.inputs["tokens"], micro.targets[:, -1:]], dim=1).tolist())
        return train_batch(batch, lr)

    run.engine.train_batch = watched  # type: ignore[method-assign]
    for number in range(step):
        seen.clear()
        train_step(run, number)
    return seen


@pytest.mark.parametrize("padded", [False, True])
def test_weights_are_shares_of_the_global_batchs_targets(padded: bool) -> None:
    """One number where all targets count; else the mask times it, so that padding has no say."""
    window = torch.arange(22).reshape(2, 11)
    mask, columns = torch.arange(10) < torch.tensor([[10], [3]]), Causal(10).columns
    cut = window.clone()
    cut[:, 1:][~mask] = NOT_COUNTED
    batches = [
        TensorBatch(window, columns, 20),
        TensorBatch(cut, columns, 13) if padded else TensorBatch(window, columns, 20),
    ]
    micro, targets = weigh(batches, SINGLE, torch.device("cpu"))
    assert int(targets) == (33 if padded else 40)
    losses = torch.rand(2, 2, 10)
    mean = sum((loss * batch.weights).sum() for loss, batch in zip(losses, micro, strict=True)) / 2
    counted = [losses[0].flatten(), losses[1][mask] if padded else losses[1].flatten()]
    assert float(mean) == pytest.approx(float(torch.cat(counted).mean()))
    assert all(batch.weights.dtype == torch.float32 for batch in micro)
    assert torch.equal(micro[0].inputs["tokens"], window[:, :-1])
    assert torch.equal(micro[0].targets, window[:, 1:])
    assert min(int(batch.inputs["tokens"].min()) for batch in micro) == 0, "what no target counts after is an id"


def test_wandb_offline_and_tensorboard_are_copies(make_config: Any, monkeypatch: Any, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("HOME", str(tmp_path))  # no key to be found
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    config = make_config("train.steps=2", "log.wandb=true", "log.tensorboard=true")
    run_ranks(train, 1, config)
    assert list(config.run.folder.glob("wandb/offline-run-*"))
    assert list(config.run.folder.glob("tensorboard/events.*"))


def test_broken_wandb_never_stops_training(make_config: Any, monkeypatch: Any, read_metrics: Any) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # `import wandb` fails
    config = make_config("train.steps=2", "log.wandb=true")
    run_ranks(train, 1, config)
    assert len(read_metrics(config)) == 2


def test_wandb_that_fails_later_is_dropped(make_config: Any, read_metrics: Any, monkeypatch: Any) -> None:
    class Run:
        def log(self, record: Any, step: int) -> None:
            raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: Run()))
    config = make_config("train.steps=3", "log.wandb=true")
    run_ranks(train, 1, config)
    assert len(read_metrics(config)) == 3


def test_full_disk_under_the_metrics_is_one_error(make_config: Any) -> None:
    with pytest.raises(OneRankError, match=r"metrics\.jsonl: cannot be written .*free space"):
        run_ranks(train_with_small_files, 1, make_config("train.steps=50", "data.valid=null"))


def train_with_small_files(config: Any) -> None:
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, resource.RLIM_INFINITY))
    train(config)


def test_clipped_gradients_have_the_norm_asked_for() -> None:
    from megamup.train.optim import ClipByGlobalNorm

    shards = [torch.nn.Parameter(torch.zeros(5)), torch.nn.Parameter(torch.zeros(3))]
    for shard, value in zip(shards, (3.0, 4.0), strict=True):
        shard.model_parallel = True  # type: ignore[attr-defined]
        shard.grad = torch.full_like(shard, value)
    expected = math.sqrt(5 * 9 + 3 * 16)
    optimizer = torch.optim.SGD(shards, lr=1.0)
    loose, tight = ClipByGlobalNorm(SINGLE, 100.0), ClipByGlobalNorm(SINGLE, 0.5)
    loose(optimizer)
    assert loose.norm == pytest.approx(expected)
    tight(optimizer)
    assert tight.norm == pytest.approx(expected), "a norm below the limit changes nothing, and is reported unclipped"
    clipped = torch.cat([shard.grad for shard in shards if shard.grad is not None])
    assert float(clipped.norm()) == pytest.approx(0.5, rel=1e-5)


def train_as_this_rank(configs: list[Config]) -> dict[str, float]:
    return train(configs[int(os.environ["RANK"])])


def test_machines_that_hold_other_data_are_told_apart(make_config: Any, tmp_path: Path) -> None:
    """A corpus that is old on one machine: refused by every rank, where training would go on with a wrong loss."""
    moved_data = f"data.train={tmp_path}/copy/train"
    config, moved = make_config(), make_config(moved_data)
    (tmp_path / "copy").mkdir()
    for path in Path(str(config.data.train)).parent.glob("train.*"):
        shutil.copy(path, tmp_path / "copy")
    assert run_ranks(train_as_this_rank, 2, [config, moved])[0]["step"] == 20  # the same, elsewhere
    write_corpus(f"{tmp_path}/copy/train", [[1, 2, 3] * 1000], 256, 0)
    with pytest.raises(MegamupError, match=r"ranks read different data .*copy the same corpora to every machine"):
        run_ranks(train_as_this_rank, 2, [make_config("run.name=b"), make_config(moved_data, "run.name=b")])


def test_a_kernel_that_cannot_run_is_found_before_the_ranks_meet(make_config: Any) -> None:
    with pytest.raises(MegamupError, match=r"kernels\.attention=flash_attn can.t run here"):
        train(make_config("kernels.attention=flash_attn"))
    assert not dist.is_initialized()
