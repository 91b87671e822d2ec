"""tools/plan.py: totals, bytes and stages against formulas, as JSON and as text."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megamup.cli import load_program
from megamup.config import config_from, dump_config, load_config
from megamup.flops import flops_per_token
from megamup.plan import stage_parameters, table_lines
from megamup.scaling.analysis import Result, analyse
from megamup.scaling.fit_file import save_result
from megamup.scaling.laws.loss import power
from megamup.scaling.runs import Ladder, Point

ROOT = Path(__file__).resolve().parents[2]
# Of a block: query and output 64·64, key and value 32·64, gate, up and down 64·160, two norms. 512 tokens a step.
BLOCK_CUT, BLOCK_WHOLE, TABLE = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 160, 2 * 64, 256 * 64
TOTAL = 4 * (BLOCK_CUT + BLOCK_WHOLE) + 64 + 2 * TABLE


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    model = {"arch": "llama", "d_model": 64, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "d_ff": 160}
    values: dict[str, Any] = {
        "model": {**model, "vocab_size": 256, "max_seq_len": 64},
        "mup": {"base": {"d_model": 32, "n_heads": 2}},
        "data": {"train": "shard"},
        "batch": {"global_sequences": 8},
        "train": {"steps": 20},
    }
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config_from(values)), encoding="utf-8")
    return path


def tool() -> ModuleType:
    return load_program(ROOT / "tools" / "plan.py")


def planned(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    assert tool().main([*map(str, arguments), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_totals(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, config_file)
    assert found["parameters"] == {"total": TOTAL, "non_embedding": TOTAL - 2 * TABLE}
    base = 4 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 80 + 2 * 32) + 32
    assert found["base_parameters"] == {"total": base + 2 * 256 * 32, "non_embedding": base}
    assert (found["batch_tokens"], found["tokens"]) == (512, 10_240)
    assert found["flops_per_token"]["6N"] == 6 * (TOTAL - 2 * TABLE)
    assert found["flops_per_token"]["palm"] == 6 * (TOTAL - TABLE) + 12 * 4 * 64 * 64
    assert found["flops_convention"] == "palm"
    assert found["flops"] == found["flops_per_token"]["palm"] * 10_240
    assert found["ratios"] == {"d_model": 2.0, "d_heads": 2.0, "d_ff": 2.0, "depth": 1.0, "batch": 1.0, "tokens": 1.0}
    assert found["readout_multiplier"] == 0.5
    assert found["attention_scale"] == 0.25
    assert found["table"]["blocks.3.mlp.down.weight"]["lr_scale"] == 0.5
    assert len(found["table"]) == 4 * 9 + 3
    assert found["ranks"] == {"world": 1, "tensor": 1, "pipeline": 1, "context": 1, "data": 1}


TO_T5 = ["model.arch=t5", "model.positions=relative", "model.vocab_size=512", "objective.kind=span_corruption"]


def test_two_stacks(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A step's tokens are those of both; each stack has rows of its own in the table, its blocks' once."""
    found = planned(capsys, config_file, *TO_T5)
    config = load_config([config_file], TO_T5)
    assert found["batch_tokens"] == 8 * (64 + config.decoder_len)
    assert found["flops_per_token"]["palm"] == flops_per_token(config.model, (64, config.decoder_len), "palm")
    names = [line.split()[0] for line in table_lines(config)]
    assert {"encoder.blocks.0-3.mlp.gate.weight", "decoder.blocks.0-3.cross.key.weight"} <= set(names)
    assert {"encoder.relative.weight", "decoder.relative.weight"} <= set(names)
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.moe.experts=4", "model.moe=4 experts"),
        ("data.documents=true", "data.documents=true"),
        ("model.attention_soft_cap=50", "model.attention_soft_cap=50"),
        ("model.window=16", "model.window=16"),
    ],
)
def test_what_is_not_planned_has_no_figure(
    config_file: Path, capsys: pytest.CaptureFixture[str], override: str, key: str
) -> None:
    found = planned(capsys, config_file, override, "--cluster", NODE)
    assert (found["memory_bytes_per_rank"], found["step"], found["run"]) == (None, None, None)
    assert found["state_bytes_per_rank"]["weights"] > 0
    assert [reason.partition(":")[0].removesuffix(".0") for reason in found["unplanned"]] == [key]
    assert tool().main([str(config_file), override, "--cluster", NODE]) == 0
    said = capsys.readouterr().out
    assert f"not planned       activations and step time: {key}" in said
    assert not any(word in said for word in ("memory per rank", "tokens/s", "MFU", "days of training"))
    assert tool().main([str(config_file), override, "--cluster", NODE, "--search"]) == 2
    assert f"--search: activations and step time aren't planned: {key}" in capsys.readouterr().err


def test_what_is_planned_has_no_reason(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(capsys, config_file)["unplanned"] == []
    assert planned(capsys, config_file, *TO_T5, "--cluster", NODE)["step"]["mfu_percent"] > 0
    reference = planned(capsys, config_file, "train.recompute=selective", "kernels.attention=reference")
    assert [reason.partition("=")[0] for reason in reference["unplanned"]] == ["kernels.attention"]


def test_experts_that_a_token_meets_are_said(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["model.moe.experts=4", "model.moe.every=2"]
    found = planned(capsys, config_file, *overrides)
    assert found["parameters"]["total"] - found["parameters"]["active"] == 2 * 2 * 3 * 64 * 160
    assert found["state_bytes_per_rank"]["weights"] == 4 * found["parameters"]["total"]
    assert tool().main([str(config_file), *overrides]) == 0
    said = capsys.readouterr().out
    assert f"{found['parameters']['active']:,} active)" in said
    assert "blocks.1-3 of 2.moe.experts.up" in said
    assert "blocks.0-2 of 2.mlp.up.weight" in said


def test_the_base_s_experts_are_as_narrow_as_its_mlp(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["mup.base.d_model=32", "mup.base.n_heads=2", "mup.base.d_ff=80"]
    given = planned(capsys, config_file, "model.moe={experts: 4, d_expert: 160}", *base)
    alike = planned(capsys, config_file, "model.moe={experts: 4}", *base)
    assert given["base_parameters"] == alike["base_parameters"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bytes_of_zero_stages(
    config_file: Path, capsys: pytest.CaptureFixture[str], stage: int, precision: str
) -> None:
    """4 replicas: ZeRO 1 cuts the optimizer, which has masters then (in fp32 too), 2 the gradients, 3 the weights, but
    keeps those whole that are smaller than DeepSpeed's param_persistence_threshold: here all of them."""
    overrides = [f"deepspeed=ds_configs/zero{stage}.json", f"precision={precision}"]
    element = 2 if precision == "bf16" and stage > 0 else 4
    assert planned(capsys, config_file, *overrides, "--ranks", "4")["state_bytes_per_rank"] == {
        "weights": element * TOTAL + (element * TOTAL // 4 if stage == 3 else 0),
        "gradients": 4 * TOTAL // (4 if stage >= 2 else 1),
        "optimizer": 12 * TOTAL // 4 if stage >= 1 else 8 * TOTAL,
    }


def test_bytes_are_of_the_largest_tensor_and_pipeline_shard(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tensor 2 halves what is cut; of two stages the last holds a final norm more than the first."""
    found = planned(capsys, config_file, "parallel.tensor=2", "parallel.pipeline=2", "--ranks", "8")
    assert found["ranks"] == {"world": 8, "tensor": 2, "pipeline": 2, "context": 1, "data": 2}
    held = 2 * (BLOCK_CUT // 2 + BLOCK_WHOLE) + TABLE // 2 + 64
    assert found["state_bytes_per_rank"] == {"weights": 4 * held, "gradients": 4 * held, "optimizer": 8 * held}


@pytest.mark.parametrize("pipeline", [1, 2, 3, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_stages_sum_to_the_model_and_the_tied_copy(config_file: Path, pipeline: int, tied: bool) -> None:
    config = load_config([config_file], [f"parallel.pipeline={pipeline}", f"model.tie_embeddings={tied}"])
    held = stage_parameters(config)
    assert len(held) == pipeline
    assert sum(held) == (TOTAL - TABLE if tied else TOTAL) + (TABLE if tied and pipeline > 1 else 0)
    blocks = [size // (BLOCK_CUT + BLOCK_WHOLE) for size in held]
    assert max(blocks) - min(blocks) <= 1
    assert sum(blocks) == 4


def test_text_has_a_row_for_each_kind_of_parameter(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool().main([str(config_file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"parameters        {TOTAL:,} ")
    names = [line.split()[0] for line in lines[lines.index("") + 2 : -1]]
    assert len(names) == 9 + 3
    assert names[0] == "embedding.token"
    assert "blocks.0-3.mlp.down.weight" in names
    down = next(line.split() for line in lines if line.startswith("blocks.0-3.mlp.down.weight"))
    # 64 x 160, residual out, 0.02/√2/√8, multiplier 1, lr 3e-3/2, eps, weight decay
    assert down[1:] == ["64", "x", "160", "residual_out", "0.005", "1", "0.0015", "1e-08", "0.1"]
    assert lines[-1] == "betas 0.9, 0.95"


def test_one_layer_is_one_block_in_the_table() -> None:
    model = {"arch": "gpt", "d_model": 8, "n_layers": 1, "n_heads": 2, "vocab_size": 16, "max_seq_len": 4}
    config = config_from({"model": model, "data": {"train": "shard"}, "train": {"steps": 1}})
    rows = [line.split()[0] for line in table_lines(config)]
    assert sum("mlp.up.weight" in row for row in rows) == 1


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["optim.lr=-1"], "optim.lr=-1"),
        (["parallel.tensor=2", "--ranks", "3"], "3 ranks were started"),
        (["batch.global_sequences=3", "--ranks", "2"], "batch.global_sequences=3"),
        (["deepspeed=absent.json"], "deepspeed=absent.json: no such file"),
        (["mup.base.batch_tokens=16"], "optim.betas"),
        (["--fit", "absent.json"], "--fit: absent.json is no file"),
    ],
)
def test_an_error_is_a_line_and_exit_2(
    config_file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], part: str
) -> None:
    assert tool().main([str(config_file), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert part in captured.err
    assert captured.out == ""


def fitted() -> Result:
    """L = 2 + 10·N^-0.2 through eight sizes below the config's, with 0.1% of noise."""
    sizes = [(TOTAL - 2 * TABLE) / 2**k for k in range(8, 0, -1)]
    noise = [1, -1, -1, 1, 1, 1, -1, -1]
    points = [
        Point(f"n{n:.0f}", {"N": n}, (2 + 10 * n**-0.2) * (1 + 0.001 * e)) for n, e in zip(sizes, noise, strict=True)
    ]
    convention = {"parameters": "non_embedding", "flops": "6N", "loss": "valid_loss at the final step"}
    return analyse(Ladder(tuple(points), convention), [power("N")])


def test_a_fit_tells_the_final_loss(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "fit.json"
    save_result(fitted(), path)
    plain, found = planned(capsys, config_file), planned(capsys, config_file, "--fit", path)
    predicted = found.pop("predicted")
    assert found == plain
    truth = 2 + 10 * (TOTAL - 2 * TABLE) ** -0.2
    assert predicted["at"] == {"N": TOTAL - 2 * TABLE}
    assert predicted["loss"] == pytest.approx(truth, rel=0.005)
    assert predicted["low"] < truth < predicted["high"]
    assert predicted["over_largest_run"] == pytest.approx(2)
    assert tool().main([str(config_file), "--fit", str(path)]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith(f"predicted final valid_loss {predicted['loss']:.4g} (")
    assert said.endswith("2 times the largest fitted run")


def test_overrides_follow_the_files(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(capsys, config_file, "--ranks", "1", "train.steps=40")["tokens"] == 20_480
    assert planned(capsys, config_file, "train.steps=40")["tokens"] == 20_480


NODE = "configs/clusters/h100.yaml,nodes=1,price=2"


def test_without_a_cluster_there_is_no_time(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, config_file)
    assert {"step", "run", "device_memory_bytes"}.isdisjoint(found)
    assert tool().main([str(config_file)]) == 0
    said = capsys.readouterr().out
    assert not any(word in said for word in ("tokens/s", "MFU", "days", "bound by"))


def test_with_a_cluster(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """20 steps on 8 devices, at 2 a device-hour."""
    found = planned(capsys, config_file, "--cluster", NODE)
    step, run = found["step"], found["run"]
    assert found["ranks"]["world"] == 8
    assert sum(step["terms"].values()) == pytest.approx(step["seconds"])
    assert step["bound"] in step["terms"]
    assert step["tokens_per_s"] == pytest.approx(512 / step["seconds"])
    assert run["device_hours"] == pytest.approx(8 * 20 * step["seconds"] / 3600)
    assert run["days"] == pytest.approx(20 * step["seconds"] / 86_400)
    assert run["cost"] == pytest.approx(2 * run["device_hours"])
    assert tool().main([str(config_file), "--cluster", NODE]) == 0
    said = capsys.readouterr().out
    assert f"bound by        {step['bound']}" in said
    assert "fits in         90% of a device's 80 GB" in said
    assert tool().main([str(config_file), "--cluster", f"{NODE},memory=1e6"]) == 0
    assert "does not fit in 90% of a device's 0.001 GB" in capsys.readouterr().out


def test_ranks_and_devices_tell_each_other(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = "configs/clusters/h100.yaml"
    assert planned(capsys, config_file, "--cluster", file, "--ranks", "4")["ranks"]["world"] == 4
    assert planned(capsys, config_file, "parallel.tensor=2", "--cluster", file)["ranks"]["world"] == 2
    for arguments, part in (
        (["--cluster", NODE, "--ranks", "4"], "the cluster has 8 devices"),
        (["--cluster", f"{NODE},mfu=40"], "has no effect on a plan, which predicts it"),
    ):
        assert tool().main([str(config_file), *arguments]) == 2
        assert part in capsys.readouterr().err
