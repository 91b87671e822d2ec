"""Offline wandb runs and TensorBoard events, written by their own packages and by the trainer's copies."""

import math
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megamup.errors import MegamupError
from megamup.scaling.curves import parse_at
from megamup.scaling.readers.wandb_run import read_wandb_run, wandb_file
from megamup.scaling.runs import Reading, load, load_runs, read_curve

STEPS = 120
MODEL = {"arch": "llama", "d_model": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 128, "max_seq_len": 64}
FOREIGN = {"L": "val/loss", "D": "_step*4096", "S": "_step", "N": "net.params", "lr": "net.lr"}


def records() -> Iterator[dict[str, float]]:
    for step in range(1, STEPS + 1):
        record = {"step": step, "tokens": step * 512.0, "flops": step * 1e8, "loss": 3 + math.exp(-step / 30)}
        yield record | ({"valid_loss": record["loss"] + 0.1} if step % 40 == 0 else {})


def finished(run: Any, folder: Path) -> Path:
    """The folder of a run that is wholly written: only the end of wandb's service makes sure of that."""
    import wandb

    run.finish()
    wandb.teardown()
    (found,) = folder.glob("wandb/offline-run-*")
    return Path(found)


@pytest.fixture(scope="module")
def wandb_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An offline run as the trainer's copy of metrics.jsonl makes it; over 32 KiB, so records cross blocks."""
    wandb = pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("wandb")
    config = {"model": MODEL, "train": {"steps": STEPS, "flops_convention": "palm"}, "optim": {"lr": 1e-3}}
    run = wandb.init(project="p", name="w32", dir=folder, mode="offline", config=config, settings={"silent": True})
    for record in records():
        run.log(record, step=int(record["step"]))
    return finished(run, folder)


@pytest.fixture(scope="module")
def foreign_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An offline run of another trainer: its own names, evaluations in steps of their own, steps from 0."""
    wandb = pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("foreign")
    config = {"net": {"params": 5000, "lr": 0.1}}
    run = wandb.init(project="p", name="theirs", dir=folder, mode="offline", config=config, settings={"silent": True})
    for step in range(50):
        run.log({"train/loss": 4 - step / 50})
    run.log({"val/loss": 3.5})
    return finished(run, folder)


def test_an_offline_run_of_ours_needs_no_columns(wandb_run: Path) -> None:
    ladder = load_runs([wandb_run])
    (point,) = ladder.points
    # 2 layers of 4·32² attention and 3·32·96 MLP weights, and 5 norms of 32.
    non_embedding = 2 * (4 * 32**2 + 3 * 32 * 96) + 5 * 32
    assert point.name == "w32"
    assert point.inputs == {
        "N": non_embedding,
        "D": STEPS * 512,
        "C": STEPS * 1e8,
        "S": STEPS,
        "B": 512,
        "lr": 1e-3,
    }
    assert point.loss == pytest.approx(3.1 + math.exp(-STEPS / 30))
    assert ladder.convention["flops"] == "palm"


def test_a_wandb_folder_stands_for_its_runs(wandb_run: Path) -> None:
    # Its link `latest-run` is no second run.
    assert [point.name for point in load_runs([wandb_run.parent]).points] == ["w32"]


def test_the_history_of_an_offline_run_is_its_curve(wandb_run: Path) -> None:
    curve = read_curve(wandb_run)
    np.testing.assert_allclose(curve.loss, [record["loss"] for record in records()])


def test_what_a_killed_run_left_half_written_is_dropped(wandb_run: Path, tmp_path: Path) -> None:
    file = wandb_file(wandb_run)
    assert file is not None
    killed = tmp_path / "run-x.wandb"
    data = file.read_bytes()
    assert len(data) > 32768
    killed.write_bytes(data[: len(data) // 2])
    log = read_wandb_run("x", killed)
    assert 20 < len(log.records) < STEPS
    assert [record["step"] for record in log.records] == list(range(1, len(log.records) + 1))
    with pytest.raises(MegamupError, match=r"w32: stopped at step \d+ of 120"):
        load_runs([killed])


def test_a_damaged_file_is_refused(wandb_run: Path, tmp_path: Path) -> None:
    file = wandb_file(wandb_run)
    assert file is not None
    damaged = tmp_path / "run-x.wandb"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(MegamupError, match=r"run-x\.wandb: is damaged at byte \d+; restore it"):
        read_wandb_run("x", damaged)
    damaged.write_bytes(b"no log at all")
    with pytest.raises(MegamupError, match=r"run-x\.wandb: is no \.wandb file of version 0"):
        read_wandb_run("x", damaged)


def test_a_run_of_another_trainer_is_read_by_the_names_given(foreign_run: Path) -> None:
    (point,) = load([foreign_run], (), Reading(columns=FOREIGN)).points
    assert (point.name, point.loss) == ("theirs", 3.5)
    assert point.inputs == {"N": 5000, "D": 50 * 4096, "S": 50, "B": 4096, "lr": 0.1}


def test_steps_before_the_first_update_are_left_out(foreign_run: Path) -> None:
    reading = Reading(loss="loss", columns=FOREIGN | {"L": "train/loss"}, at=parse_at("curve:40"))
    assert load([foreign_run], (), reading).points[0].inputs["S"] >= 1


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, r"theirs: valid_loss is missing at the final step 50 .* --columns L=NAME"),
        ({"L": "val/loss"}, r"theirs: has no 'tokens' \(tokens seen\); it has .*train/loss.* D=step\*4096 will do"),
        ({"L": "val/los"}, r"L=val/los: run theirs has no column 'val'"),
        (FOREIGN | {"N": "net.param"}, r"no column 'net\.param'; did you mean 'net\.params'"),
    ],
)
def test_names_that_a_run_does_not_have_are_told(foreign_run: Path, columns: dict[str, str], message: str) -> None:
    with pytest.raises(MegamupError, match=message):
        load([foreign_run], (), Reading(columns=columns))


def test_tokens_of_a_step_are_not_taken_for_those_seen(wandb_run: Path) -> None:
    for text in ("64*1000", "1e9/step"):
        with pytest.raises(MegamupError, match=r"w32: tokens go from .* and don't always rise; expected those seen"):
            load([wandb_run], (), Reading(columns={"D": text}))


def test_values_that_are_not_json_are_read_too(tmp_path: Path) -> None:
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    if "number" not in messages.HistoryItem.DESCRIPTOR.fields_by_name:
        pytest.skip("this wandb sends JSON only")
    record = messages.Record()
    record.history.step.num = 7
    record.history.item.add(nested_key=["train", "loss"], number=2.5)
    record.history.item.add(key="tokens", integer=4096)
    payload = record.SerializeToString()
    checksum = zlib.crc32(b"\x01" + payload)
    header = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
    file = tmp_path / "run-x.wandb"
    file.write_bytes(header + struct.pack("<IHB", checksum, len(payload), 1) + payload)
    assert read_wandb_run("x", file).records == [{"step": 7, "_step": 7, "train.loss": 2.5, "tokens": 4096}]


def test_runs_are_not_read_without_the_package(wandb_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb.proto", None)
    with pytest.raises(MegamupError, match=r"takes the wandb package; pip install"):
        load_runs([wandb_run])


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TensorBoard's scalars, as the trainer's copy writes them."""
    pytest.importorskip("tensorboard")
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    folder = tmp_path_factory.mktemp("tensorboard") / "w32"
    writer = EventFileWriter(str(folder))
    for record in records():
        values = [Summary.Value(tag=key, simple_value=value) for key, value in record.items()]
        writer.add_event(Event(wall_time=1.0, step=int(record["step"]), summary=Summary(value=values)))
    writer.close()
    return folder


def test_events_are_a_run(events: Path) -> None:
    ladder = load([events], (), Reading(columns={"N": "250"}, stated={"flops": "palm", "parameters": "total"}))
    (point,) = ladder.points
    assert point.inputs == {"N": 250, "D": STEPS * 512, "C": pytest.approx(STEPS * 1e8), "S": STEPS, "B": 512}
    assert point.loss == pytest.approx(3.1 + math.exp(-STEPS / 30), rel=1e-6)
    assert (ladder.convention["flops"], ladder.convention["parameters"]) == ("palm", "total")
    (file,) = events.iterdir()
    assert read_curve(file).loss[-1] == pytest.approx(3 + math.exp(-STEPS / 30), rel=1e-6)


def test_a_table_gives_what_events_lack(events: Path, tmp_path: Path) -> None:
    facts = tmp_path / "facts.csv"
    facts.write_text("Name,params,lr\nw32,250,0.01\nother,1,1\n")
    reading = Reading(columns={"N": "params", "lr": "lr"}, facts=facts)
    (point,) = load([events], (), reading).points
    assert (point.inputs["N"], point.inputs["lr"]) == (250, 0.01)
