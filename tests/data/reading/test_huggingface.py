"""Data sets of the `datasets` package, written by it."""

import json
from pathlib import Path
from typing import Any

import pytest

from megamup.data.reading import units
from megamup.data.reading.documents import ReadOptions
from megamup.data.reading.huggingface import HubData
from megamup.data.reading.sources import find
from megamup.data.reading.units import plan_units
from megamup.errors import MegamupError

datasets = pytest.importorskip("datasets")

TEXTS = [f"document {number}" for number in range(100)]


def texts(*inputs: object, options: ReadOptions | None = None) -> list[str]:
    found = find([str(given) for given in inputs])
    return [
        text
        for unit in plan_units(found)
        for _, batches in unit.pieces(options or ReadOptions(), lambda _: True)
        for batch in batches
        for text in batch.texts
    ]


@pytest.fixture
def data() -> Any:
    datasets.disable_progress_bars()
    return datasets.Dataset.from_dict({"text": TEXTS, "n": list(range(100))})


def test_saved_data_set(tmp_path: Path, data: Any) -> None:
    data.save_to_disk(tmp_path / "saved", num_shards=12)
    found = find([str(tmp_path)])  # below the folder that is named, too
    assert [source.format for source in found.sources] == ["arrow stream"] * 12
    assert texts(tmp_path / "saved") == TEXTS


def test_data_set_with_splits(tmp_path: Path, data: Any) -> None:
    datasets.DatasetDict(train=data).save_to_disk(tmp_path / "one")
    assert texts(tmp_path / "one") == TEXTS
    datasets.DatasetDict(train=data, test=data.select(range(3))).save_to_disk(tmp_path / "two")
    with pytest.raises(
        MegamupError, match=r"two: a data set of several splits; name what to read: .*/two/train .*/two/test"
    ):
        find([str(tmp_path / "two")])
    assert texts(tmp_path / "two" / "test") == TEXTS[:3]


def test_a_selection_that_the_files_do_not_have(tmp_path: Path, data: Any) -> None:
    data.save_to_disk(tmp_path / "saved")
    state = tmp_path / "saved" / "state.json"
    values = json.loads(state.read_text())
    state.write_text(json.dumps({**values, "_indices_files": [{"filename": "indices.arrow"}]}))
    with pytest.raises(MegamupError, match=r"selected or shuffled .*flatten_indices\(\)"):
        find([str(tmp_path / "saved")])
    state.write_text(json.dumps({**values, "_data_files": [{"filename": "gone.arrow"}]}))
    with pytest.raises(MegamupError, match=r"gone\.arrow: no such file, but .*state\.json names it"):
        find([str(tmp_path / "saved")])
    state.write_text("{}")
    with pytest.raises(MegamupError, match=r"state\.json: not a file of datasets\.save_to_disk"):
        find([str(tmp_path / "saved")])


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that load_dataset knows how to read, of three files."""
    monkeypatch.setattr(units, "_hub_data", HubData)
    folder = tmp_path / "named"
    folder.mkdir()
    for shard in range(3):
        rows = [json.dumps({"text": text, "url": None}) for text in TEXTS[shard::3]]
        (folder / f"train-{shard}.jsonl").write_text("\n".join(rows))
    return folder


def test_by_name(named: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [text for shard in range(3) for text in TEXTS[shard::3]]
    assert texts(f"hf:{named}") == texts(f"hf:{named}::train") == expected
    found = find([f"hf:{named}:default"])
    assert found.inputs == [{"path": f"hf:{named}:default", "files": 3, "bytes": 0}]
    assert len({source.name for source in found.sources}) == 3
    monkeypatch.setattr(units, "UNIT_BYTES", 100)
    unit = plan_units(found)[1]
    assert unit.is_stream
    whole = [[text for batch in some for text in batch.texts] for _, some in unit.pieces(ReadOptions(), lambda _: True)]
    assert len(whole) > 3
    assert [text for piece in whole for text in piece] == TEXTS[1::3]
    some = [
        [text for batch in some for text in batch.texts]
        for _, some in unit.pieces(ReadOptions(), lambda piece: piece == 2)
    ]
    assert some == [piece if number == 2 else [] for number, piece in enumerate(whole)]


def test_state_follows_the_files(named: Path) -> None:
    before = find([f"hf:{named}"]).sources[0].state
    assert find([f"hf:{named}"]).sources[0].state == before
    (named / "train-1.jsonl").write_text('{"text": "other", "url": null}\n')
    assert find([f"hf:{named}"]).sources[0].state != before


def test_errors_by_name(named: Path) -> None:
    with pytest.raises(MegamupError, match=r"hf:.*:tran': datasets says: Bad split: tran"):
        find([f"hf:{named}::tran"])
    with pytest.raises(MegamupError, match=r"expected hf:NAME\[:CONFIG\[:SPLIT\]\]"):
        find(["hf:a:b:c:d"])
    with pytest.raises(MegamupError, match=r"datasets says: Couldn't find any data file"):
        find([f"hf:{named}/nowhere"])
    with pytest.raises(MegamupError, match=r"shard 0:row 0: no key 'body'; its keys: 'text', 'url'"):
        texts(f"hf:{named}", options=ReadOptions(("body",)))
    with pytest.raises(MegamupError, match=r"shard 0:row 0: 'url' holds NoneType"):
        texts(f"hf:{named}", options=ReadOptions(("url",)))
