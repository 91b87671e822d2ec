"""A run killed with SIGKILL and started again gives, bit for bit, the losses of the run never killed."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megamup.config import Config
from megamup.data.writer import write_corpus
from megamup.errors import MegamupError
from megamup.train import checkpoint
from megamup.train.fork import RankError, Ranks, run_ranks
from megamup.train.loop import train

LAYOUTS = [
    ("parallel.tensor=1", "deepspeed=ds_configs/zero0.json", 1),
    ("parallel.tensor=2", "deepspeed=ds_configs/zero0.json", 2),
    ("parallel.pipeline=2", "deepspeed=ds_configs/zero1.json", 2),
    ("parallel.tensor=1", "deepspeed=ds_configs/zero1.json", 2),
    ("parallel.tensor=1", "deepspeed=ds_configs/zero2.json", 2),
    ("parallel.tensor=1", "deepspeed=ds_configs/zero3.json", 2),
]
TIMED = ("tokens_per_s", "mfu_percent", "memory_peak_gib", "time_unix_s", "evaluation_s", "saving_s")


def computed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without what depends on the clock."""
    return [{key: value for key, value in record.items() if key not in TIMED} for record in records]


def kill_after(config: Config, world_size: int, step: int) -> None:
    """Start the run and SIGKILL every rank once ``step`` stands in its metrics."""
    metrics = config.run.folder / "metrics.jsonl"
    with Ranks(train, world_size, config) as ranks:
        while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
            assert not ranks.poll(0.002), "the run ended before it could be killed"
        for process in ranks.processes:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
        for process in ranks.processes:
            process.join()


@pytest.mark.parametrize(("layout", "deepspeed", "ranks"), LAYOUTS)
def test_killed_run_goes_on_bit_for_bit(
    make_config: Callable[..., Config], read_metrics: Any, layout: str, deepspeed: str, ranks: int
) -> None:
    overrides = (layout, deepspeed, "train.save_every=6", "train.eval_every=5", "train.steps=30")
    unbroken = make_config(*overrides, "run.name=unbroken")
    run_ranks(train, ranks, unbroken)
    killed = make_config(*overrides, "run.name=killed")
    kill_after(killed, ranks, step=14)
    resumed_from = checkpoint.newest(killed.run.folder / "checkpoints")
    assert resumed_from is not None
    assert 12 <= resumed_from[0] < 30
    run_ranks(train, ranks, killed)
    assert computed(read_metrics(killed)) == computed(read_metrics(unbroken))


def test_a_pipeline_resumes_the_embedding_that_its_two_stacks_share(make_config: Any, read_metrics: Any) -> None:
    model = ("model.arch=t5", "model.vocab_size=272", "model.n_kv_heads=4", "objective.sentinels=8")
    config = make_config(*model, "parallel.pipeline=2", "train.steps=6", "train.save_every=3")
    run_ranks(train, 2, config)
    expected = computed(read_metrics(config))
    shutil.rmtree(config.run.folder / "checkpoints" / "step-00000006")
    run_ranks(train, 2, config)
    assert computed(read_metrics(config)) == expected


def test_kill_while_saving_leaves_no_checkpoint_that_looks_whole(make_config: Any, read_metrics: Any) -> None:
    """A partial folder, as a kill leaves it, is neither resumed from nor in the way."""
    config = make_config("train.steps=8", "train.save_every=4")
    run_ranks(train, 1, config)
    expected = computed(read_metrics(config))
    checkpoints = config.run.folder / "checkpoints"
    shutil.copytree(checkpoints / "step-00000004", checkpoints / ".step-00000008.partial")
    shutil.rmtree(checkpoints / "step-00000008")
    run_ranks(train, 1, config)
    assert computed(read_metrics(config)) == expected
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000004", "step-00000008"]


def test_finished_run_is_left_alone(make_config: Any, read_metrics: Any) -> None:
    config = make_config("train.steps=4", "train.save_every=4")
    run_ranks(train, 1, config)
    metrics = config.run.folder / "metrics.jsonl"
    before = metrics.stat()
    result = run_ranks(train, 1, config)[0]
    assert result == read_metrics(config)[-1]
    after = metrics.stat()
    assert (after.st_ino, after.st_mtime_ns, after.st_size) == (before.st_ino, before.st_mtime_ns, before.st_size)


def test_half_written_metrics_line_is_dropped_on_resumption(make_config: Any, read_metrics: Any) -> None:
    config = make_config("train.steps=4", "train.save_every=2")
    run_ranks(train, 1, config)
    expected = computed(read_metrics(config))
    shutil.rmtree(config.run.folder / "checkpoints" / "step-00000004")
    with open(config.run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 3.1')
    run_ranks(train, 1, config)
    assert computed(read_metrics(config)) == expected


def test_another_config_is_refused_key_by_key(make_config: Any) -> None:
    run_ranks(train, 1, make_config("train.steps=2"))
    with pytest.raises(MegamupError, match=r"another config; set run\.name.*\n.*optim\.lr: 0\.01 there, 0\.02 now"):
        train(make_config("train.steps=2", "optim.lr=0.02"))


def test_another_layout_is_refused(make_config: Any) -> None:
    """Before a process group exists: this process has none."""
    config = make_config("train.steps=4", "train.save_every=2")
    run_ranks(train, 1, config)
    shutil.rmtree(config.run.folder / "checkpoints" / "step-00000004")
    os.environ["WORLD_SIZE"] = "2"
    try:
        with pytest.raises(MegamupError, match="written with world_size=1, this run has world_size=2"):
            train(config)
    finally:
        del os.environ["WORLD_SIZE"]


@pytest.mark.parametrize("damage", ["cut", "missing", "no manifest"])
def test_damaged_checkpoint_is_named(make_config: Any, damage: str) -> None:
    config = make_config("train.steps=4", "train.save_every=2")
    run_ranks(train, 1, config)
    shutil.rmtree(config.run.folder / "checkpoints" / "step-00000004")
    folder = config.run.folder / "checkpoints" / "step-00000002"
    victim = max(folder.rglob("*.pt"), key=lambda path: path.stat().st_size)
    if damage == "cut":
        os.truncate(victim, 1000)
        expected = rf"{victim.name}: expected \d+ bytes, found 1000; remove this checkpoint's folder"
    elif damage == "missing":
        victim.unlink()
        expected = rf"{victim.name}: expected \d+ bytes, found no file"
    else:
        (folder / "manifest.json").unlink()
        expected = r"no readable manifest\.json"
    with pytest.raises(MegamupError, match=expected):
        train(config)


def test_full_disk_while_saving_keeps_the_last_checkpoint(make_config: Any, read_metrics: Any) -> None:
    """A file-size limit stands in for the full disk: the write fails in the middle of a checkpoint."""
    config = make_config("train.steps=8", "train.save_every=4")
    with pytest.raises(MegamupError, match=r"step-00000008: the checkpoint could not be written.*resumes from step 4"):
        run_ranks(train_with_small_disk, 1, config)
    checkpoints = config.run.folder / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000004"]
    run_ranks(train, 1, config)
    assert read_metrics(config)[-1]["step"] == 8


def train_with_small_disk(config: Config) -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then the write itself fails, as on a full disk
    save = checkpoint.save

    def limited(engine: Any, folder: Path, step: int, config: Config) -> Path:
        if step == 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        return save(engine, folder, step, config)

    checkpoint.save = limited
    train(config)


def test_time_between_steps_leaves_out_evaluation(make_config: Any, read_metrics: Any, monkeypatch: Any) -> None:
    """An evaluation that takes long doesn't lower the reported throughput."""
    from megamup.train import evaluate

    function = evaluate.evaluate_set

    def slow(*arguments: Any) -> evaluate.SetLoss:
        time.sleep(1.0)
        return function(*arguments)

    monkeypatch.setattr(evaluate, "evaluate_set", slow)
    config = make_config("train.steps=6", "train.eval_every=1")
    run_ranks(train, 1, config)
    tokens = config.batch_tokens
    assert all(record["tokens_per_s"] > tokens / 0.9 for record in read_metrics(config)[1:])


def test_kill_right_after_saving_loses_no_record(make_config: Any, read_metrics: Any) -> None:
    """The record of a step is written before its checkpoint: with the checkpoint there, the record is."""
    config = make_config("train.steps=4", "train.save_every=2", "train.log_every=100")
    with pytest.raises(RankError):
        run_ranks(train_until_saved, 1, config)
    assert checkpoint.newest(config.run.folder / "checkpoints") is not None
    assert [record["step"] for record in read_metrics(config)] == [1, 2]
    run_ranks(train, 1, config)
    assert [record["step"] for record in read_metrics(config)] == [1, 2, 4]


def train_until_saved(config: Config) -> None:
    save = checkpoint.save

    def last_act(engine: Any, folder: Path, step: int, config: Config) -> Path:
        save(engine, folder, step, config)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")

    checkpoint.save = last_act
    train(config)


def test_checkpoints_of_an_unknown_config_are_refused(make_config: Any) -> None:
    config = make_config("train.steps=2", "train.save_every=2")
    run_ranks(train, 1, config)
    (config.run.folder / "config.yaml").unlink()
    with pytest.raises(MegamupError, match=r"holds checkpoints but no config\.yaml"):
        train(make_config("train.steps=2", "optim.lr=0.5"))


@pytest.fixture
def own_data(tmp_path: Path) -> Path:
    """Prefix of a corpus that a test may change."""
    write_corpus(str(tmp_path / "data" / "train"), [list(range(1, 256)) * 40], 256, eod_id=0)
    return tmp_path / "data" / "train"


def stop_half_way(config: Config) -> None:
    run_ranks(train, 1, config)
    shutil.rmtree(config.run.folder / "checkpoints" / "step-00000004")


def test_another_corpus_at_the_same_place_is_refused(make_config: Any, own_data: Path) -> None:
    """Before a process group exists: this process has none."""
    config = make_config("train.steps=4", "train.save_every=2", f"data.train={own_data}")
    stop_half_way(config)
    write_corpus(str(own_data), [list(range(255, 0, -1)) * 40], 256, eod_id=0)
    changed = rf"data\.train '{own_data}': content_hash '\w{{64}}' there, '\w{{64}}' now"
    with pytest.raises(MegamupError, match=rf"a run on other data; restore it; set run.*\n  {changed}"):
        train(config)


def test_moved_data_is_the_same_data(make_config: Any, own_data: Path, read_metrics: Any) -> None:
    options = ("train.steps=4", "train.save_every=2", "data.valid=null")
    config = make_config(*options, f"data.train={own_data}")
    stop_half_way(config)
    expected = computed(read_metrics(config))
    moved = own_data.parent.rename(own_data.parents[1] / "moved") / "train"
    run_ranks(train, 1, make_config(*options, f"data.train={moved}", "data.prefetch=5"))
    assert computed(read_metrics(config)) == expected
    assert f'"prefix": "{moved}"' in (config.run.folder / "data.json").read_text()


@pytest.mark.parametrize(
    ("override", "expected"),
    [("data.fraction=0.5", r"fraction 1\.0 there, 0\.5 now"), ("data.valid=null", r"data\.valid: 'valid' is gone")],
)
def test_other_use_of_the_data_is_refused(make_config: Any, override: str, expected: str) -> None:
    run_ranks(train, 1, make_config("train.steps=2"))
    with pytest.raises(MegamupError, match=expected):
        train(make_config("train.steps=2", override))


def test_checkpoints_without_a_record_of_their_data_are_refused(make_config: Any) -> None:
    """As megamup wrote them when its order of samples was another one."""
    config = make_config("train.steps=4", "train.save_every=2")
    stop_half_way(config)
    (config.run.folder / "data.json").unlink()
    with pytest.raises(MegamupError, match=r"holds checkpoints but no data\.json"):
        train(config)
