"""``--search``: what it finds is valid, fits, and is the fastest by trying everything."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from megamup import kernel_rules
from megamup.cli import load_program
from megamup.cluster import parse_cluster
from megamup.config import Config, config_from, dump_config, load_config, micro_batches
from megamup.errors import MegamupError
from megamup.plan import search, search_lines, stage_parameters
from megamup.plan.layout import layout_of
from megamup.plan.memory import memory
from megamup.plan.search import HEADROOM
from megamup.plan.time import step_time

ROOT = Path(__file__).resolve().parents[2]
NODES = "configs/clusters/h100.yaml,nodes=2"


def config(**model: Any) -> Config:
    shape = {"arch": "llama", "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "d_ff": 14_336}
    return config_from(
        {
            "model": {**shape, "vocab_size": 128_256, "max_seq_len": 8192, **model},
            "data": {"train": "shard"},
            "train": {"steps": 10},
            "batch": {"global_sequences": 128},
            "precision": "bf16",
        }
    )


def test_candidates_are_valid_fit_and_take_the_time_they_say(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config()))
    cluster = parse_cluster(NODES)
    found = search(config(), cluster)
    assert len(found.candidates) == 10
    assert [one.step.seconds for one in found.candidates] == sorted(one.step.seconds for one in found.candidates)
    for one in found.candidates:
        pasted = load_config([file], one.overrides)
        micro_batches(pasted, 16)
        assert memory(pasted, 16).total == one.peak_bytes <= HEADROOM * 80e9
        step = step_time(pasted.model, 8192, layout_of(pasted, 16), cluster, tuple(stage_parameters(pasted)))
        assert step.seconds == one.step.seconds


def test_nothing_that_fits_is_faster() -> None:
    """Against memory asked for every layout of a small space: two devices."""
    cluster = parse_cluster("configs/clusters/h100.yaml,devices=2,memory=40e9")
    few = config(n_layers=4).model_copy(update={"batch": config().batch.model_copy(update={"global_sequences": 8})})
    best = search(few, cluster).candidates[0]
    everything = search(few, parse_cluster("configs/clusters/h100.yaml,devices=2,memory=1e15"), limit=10**6)
    fitting = [one for one in everything.candidates if one.peak_bytes <= HEADROOM * 40e9]
    assert 0 < len(fitting) < len(everything.candidates)
    assert best == min(fitting, key=lambda one: one.step.seconds)


@pytest.mark.parametrize("kernels", [{"cross_entropy": "liger"}, {"matmul": "fp8"}, {"attention": "flash_attn"}])
def test_no_layout_that_its_kernels_cannot_compute(kernels: dict[str, str]) -> None:
    """Liger's loss has no tensor axis; fp8 wants multiples of 16 of d_ff / tensor, and of the rows of a micro batch."""
    values = config(n_layers=4, d_ff=14_352, max_seq_len=520).model_dump(mode="json")
    small = {"kernels": values["kernels"] | kernels, "batch": {"global_sequences": 16}}
    cluster = parse_cluster("configs/clusters/h100.yaml,devices=4")
    plain = search(config_from(values | {"batch": {"global_sequences": 16}}), cluster, limit=10**6)
    found = search(config_from(values | small), cluster, limit=10**6)
    kept = [load_overrides(config_from(values | small), one.overrides) for one in found.candidates]
    assert all(kernel_rules.refused(one) is None for one in kept)
    refused = any(one.parallel.tensor > 1 for one in kept)
    assert refused == ("attention" in kernels)
    assert (len(found.candidates) < len(plain.candidates)) == ("attention" not in kernels)
    if "matmul" in kernels:
        assert {one.batch.micro_sequences for one in kept} >= {2}
        assert all((one.batch.micro_sequences or 1) % 2 == 0 or one.parallel.context == 1 for one in kept)


def test_a_larger_model_needs_more_than_data_parallelism() -> None:
    """405B parameters on 512 devices: no single device holds a replica's state."""
    large = config(d_model=16_384, n_layers=126, n_heads=128, d_ff=53_248)
    cluster = parse_cluster("configs/clusters/h100.yaml,nodes=64")
    best = load_overrides(large, search(large, cluster, limit=1).candidates[0].overrides)
    assert best.parallel.tensor * best.parallel.pipeline > 1 or best.zero_stage == 3


def load_overrides(base: Config, overrides: tuple[str, ...]) -> Config:
    values = base.model_dump(mode="json")
    for override in overrides:
        key, _, text = override.partition("=")
        section, _, last = key.rpartition(".")
        target = values[section] if section else values
        target[last] = json.loads(text) if text[0].isdigit() or text in ("true", "false") else text
    return config_from(values)


def test_thousands_of_layouts_in_seconds() -> None:
    start = time.process_time()
    found = search(config(), parse_cluster("configs/clusters/h100.yaml,nodes=16"))
    assert found.tried > 1_000
    assert time.process_time() - start < 20


def test_too_large_for_everything_is_said() -> None:
    cluster = parse_cluster(f"{NODES},memory=1e9")
    lines = list(search_lines(search(config(), cluster), cluster))
    assert len(lines) == 1
    assert "none of" in lines[0]


def test_no_valid_layout_is_an_error() -> None:
    odd = config().model_copy(update={"batch": config().batch.model_copy(update={"global_sequences": 1})})
    with pytest.raises(MegamupError, match="no layout of 37 devices is valid"):
        search(odd, parse_cluster("configs/clusters/h100.yaml,devices=37"))


def test_the_tool_searches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, tool = tmp_path / "config.yaml", load_program(ROOT / "tools" / "plan.py")
    file.write_text(dump_config(config()))
    assert tool.main([str(file), "--cluster", NODES, "--search", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["candidates"][0]["tokens_per_s"] >= found["candidates"][-1]["tokens_per_s"]
    assert tool.main([str(file), "--cluster", NODES, "--search"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(found["candidates"])
    assert tool.main([str(file), "--search"]) == 2
    assert "add --cluster" in capsys.readouterr().err
