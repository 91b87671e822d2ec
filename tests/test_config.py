"""Configs: layers of files and overrides, the round trip through YAML, and one message for every wrong value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from megamup.config import Config, config_from, dump_config, load_config, merge, micro_batches, parse_override
from megamup.deepspeed_file import OWNED_KEYS, load_deepspeed
from megamup.errors import MegamupError

MODEL = {"arch": "llama", "d_model": 64, "n_layers": 4, "n_heads": 4, "vocab_size": 256, "max_seq_len": 32}
MINIMAL: dict[str, Any] = {"model": MODEL, "data": {"train": "shard"}, "train": {"steps": 10}}


def build(*overrides: str, without: str = "") -> Config:
    values: dict[str, Any] = {key: dict(section) for key, section in MINIMAL.items() if key != without}
    for override in overrides:
        merge(values, parse_override(override))
    return config_from(values)


def message(*overrides: str, without: str = "") -> str:
    with pytest.raises(MegamupError) as caught:
        build(*overrides, without=without)
    return str(caught.value)


def write(path: Path, values: Any) -> Path:
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), encoding="utf-8")
    return path


# --------------------------------------------------------------------------- layers


def test_files_merge_left_to_right_then_overrides(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", MINIMAL | {"optim": {"lr": 0.1, "eps": 1e-6, "weight_decay": 0.3}})
    second = write(tmp_path / "b.yaml", {"optim": {"lr": 0.2, "eps": 1e-7}})
    config = load_config([first, second], ["optim.lr=0.5", "optim.betas=[0.8, 0.9]", "data.seq_len=null"])
    assert (config.optim.lr, config.optim.eps, config.optim.weight_decay) == (0.5, 1e-7, 0.3)
    assert config.optim.betas == (0.8, 0.9)
    assert load_config([second, first], []).optim.lr == 0.1
    assert config.seq_len == 32


def test_an_override_stays_in_its_section_where_the_file_has_an_alias(tmp_path: Path) -> None:
    mup = "mup: {alpha: &same {hidden: 2.0}, eta: *same}\n"
    config = load_config([write(tmp_path / "a.yaml", yaml.safe_dump(MINIMAL) + mup)], ["mup.alpha.hidden=3.0"])
    assert (config.mup.alpha.hidden, config.mup.eta.hidden) == (3.0, 2.0)


def test_exponents_without_a_dot_are_numbers() -> None:
    """YAML 1.1 reads 1e-3 as text."""
    assert build("optim.lr=1e-3").optim.lr == 1e-3


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.arch=gpt", "model.d_ff=100", "mup.base.d_model=32", "mup.zero_init.query=true"),
        ('data.train=[{"prefix": "a", "weight": 2}, {"prefix": "b"}]', "data.valid=c", "train.eval_every=2"),
        ("parallel.tensor=2", "parallel.sequence=true", "parallel.context=2", "data.seq_len=16", "train.recompute=2"),
        ("train.profile=[2, 10]", "train.recompute=selective", "precision=bf16", "kernels.matmul=fp8"),
        ("precision=bf16", "deepspeed=ds_configs/zero1.json", "parallel.pipeline=2", "optim.betas=[0.1, 0.2]"),
    ],
)
def test_dump_then_load_is_the_same_config(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    config = build(*overrides)
    assert load_config([write(tmp_path / "config.yaml", dump_config(config))]) == config


def test_defaults_that_follow_from_other_keys() -> None:
    llama, gpt = build().model, build("model.arch=gpt").model
    assert (llama.d_ff, llama.d_head, llama.n_kv_heads, llama.tie_embeddings, llama.bias) == (176, 16, 4, False, False)
    assert (gpt.d_ff, gpt.d_head, gpt.n_kv_heads, gpt.tie_embeddings, gpt.bias) == (256, 16, 4, True, True)


def test_frozen() -> None:
    config = build()
    with pytest.raises(ValidationError, match="frozen"):
        config.optim.lr = 1.0  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.precision = "bf16"  # type: ignore[misc]


# --------------------------------------------------------------------------- one message for a wrong value


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["parallel.tensor=3"], ["model.n_heads=4", "parallel.tensor=3", "the next that is: 6"]),
        (["parallel.tensor=4", "model.n_kv_heads=2"], ["model.n_kv_heads=2", "parallel.tensor=4"]),
        (["parallel.tensor=4", "model.vocab_size=257"], ["model.vocab_size=257", "parallel.tensor=4", "260"]),
        (["parallel.tensor=4", "model.d_ff=90"], ["model.d_ff=90", "parallel.tensor=4", "92"]),
        (["parallel.sequence=true"], ["parallel", "sequence=true", "tensor=1", "no tensor rank"]),
        (
            ["parallel.sequence=true", "parallel.context=2"],
            ["parallel", "sequence=true", "tensor=1"],  # context ranks don't count
        ),
        (
            ["parallel.tensor=4", "parallel.sequence=true", "data.seq_len=30"],
            ["data.seq_len=30", "4 equal stretches", "tensor=4", "parallel.sequence=true", "the next that can: 32"],
        ),
        (
            ["parallel.context=4", "data.seq_len=30"],
            ["data.seq_len=30", "4 equal stretches", "parallel.context=4", "the next that can: 32"],
        ),
        (
            ["parallel.tensor=2", "parallel.context=2", "parallel.sequence=true", "data.seq_len=10"],
            ["data.seq_len=10", "4 equal stretches", "parallel.context=2 x tensor=2", "the next that can: 12"],
        ),
        (
            ["parallel.tensor=2", "parallel.context=4"],
            ["model.n_heads=4", "parallel.tensor=2 x parallel.context=4", "use fewer context ranks, or more heads"],
        ),
        (
            ["parallel.context=4", "model.n_kv_heads=2"],
            ["model.n_kv_heads=2", "parallel.context=4", "use fewer context ranks, or more heads"],
        ),
        (["train.profile=[3, 2]"], ["train.profile=[3, 2]", "first and last step", "train.steps=10"]),
        (["train.profile=[3, 11]"], ["train.profile=[3, 11]", "train.steps=10"]),
        (["train.profile=[0, 3]"], ["train.profile", "0", "greater than 0"]),
        (["kernels.matmul=fp8"], ["kernels.matmul=fp8", "precision is fp32", "precision=bf16", "kernels.matmul=torch"]),
        (["train.recompute=0"], ["train.recompute: expected none, selective, full or a number", "from 1 on", "0"]),
        (["train.recompute=some"], ["train.recompute: expected none, selective, full", "'some'"]),
        (["train.recompute=true"], ["train.recompute: expected none, selective, full", "True"]),
        (["kernels.attention=magic"], ["kernels.attention='magic'", "flash_attn", "sdpa", "reference"]),
        (["parallel.pipeline=5"], ["model.n_layers=4", "parallel.pipeline=5", "at most one stage a layer"]),
        (["data.seq_len=33"], ["data.seq_len=33", "model.max_seq_len=32"]),
        (["schedule.warmup_steps=11"], ["schedule.warmup_steps=11", "train.steps=10"]),
        (["train.eval_every=5"], ["train.eval_every", "data.valid"]),
        (["train.eval_sequences=5"], ["train.eval_sequences", "data.valid"]),
        (["model.d_head=15"], ["d_head=15", "even"]),
        (["model.d_model=66"], ["d_model=66", "n_heads=4", "d_head"]),
        (["model.n_kv_heads=3"], ["n_heads=4", "n_kv_heads=3"]),
        (["parallel.pipeline=2", "deepspeed=ds_configs/zero2.json"], ["zero2.json", "ZeRO 2", "parallel.pipeline=2"]),
        (["model.tie_embeddings=true", "mup.zero_init.readout=true"], ["mup.zero_init.readout=true", "tied readout"]),
        (["parallel.pipeline=2", "deepspeed=ds_configs/zero3.json"], ["zero3.json", "ZeRO 3", "ds_configs/zero1.json"]),
        (["model.d_modle=64"], ["model.d_modle: unknown key", "did you mean model.d_model?"]),
        (["optm.lr=1"], ["optm: unknown key", "did you mean optim?"]),
        (["train.lr=1"], ["train.lr: unknown key", "did you mean optim.lr?"]),
        (["run.tensor=2"], ["run.tensor: unknown key", "did you mean parallel.tensor?"]),
        (["train.steps=many"], ["train.steps='many'", "integer"]),
        (["train.steps=0"], ["train.steps=0", "greater than 0"]),
        (["optim.betas=[0.9, 1.0]"], ["optim.betas", "1.0", "less than 1"]),
        (["precision=fp16"], ["precision='fp16'", "fp32", "bf16"]),
        (["model.arch=rnn"], ["model.arch='rnn'", "gpt", "llama", "bert", "t5"]),
        (["optim=3"], ["optim=3", "dictionary"]),
        (["model.arch=bert", "model.window=4"], ["window=4", "an encoder sees later ones too", "arch=bert"]),
        (["model.arch=t5", "model.window=4", "model.vocab_size=512"], ["window=4", "arch=t5"]),
        (
            ["model.rope_scaling={kind: llama3, factor: 8, original_max_seq_len: 16, low_freq_factor: 4}"],
            ["high_freq_factor=4 is no more than low_freq_factor=4"],
        ),
        (["model.moe={experts: 2, every: 5}"], ["moe.every=5", "none would have experts"]),
        (["model.relative_buckets=16"], ["relative_buckets has no effect with positions=rotary"]),
        (
            ["model.positions=relative", "model.relative_distance=16"],
            ["relative_distance=16", "relative_buckets=32", "expected a longer one"],
        ),
    ],
)
def test_a_wrong_value_is_one_message(overrides: list[str], parts: list[str]) -> None:
    found = message(*overrides)
    assert "\n" not in found
    for part in parts:
        assert part in found


def test_every_wrong_key_has_its_line() -> None:
    assert len(message("optim.lr=-1", "train.stepz=4", "log.wandb=perhaps").splitlines()) == 3


@pytest.mark.parametrize("section", ["model", "data", "train"])
def test_a_missing_section_is_named(section: str) -> None:
    assert message(without=section) == f"{section}: missing; it has no default"


@pytest.mark.parametrize("override", ["model.d_model=64.0", 'model.d_model="64"', 'model.n_heads="4"'])
def test_a_number_in_another_dress_is_that_number_or_an_error(override: str) -> None:
    try:
        config = build(override)
    except MegamupError as error:
        assert override.split("=")[0] in str(error)  # noqa: PT017
    else:
        assert config == build()


def test_batch_that_ranks_cannot_share() -> None:
    with pytest.raises(MegamupError, match=r"batch.global_sequences=10 .* 4 data-parallel ranks.*: 12"):
        micro_batches(build("batch.global_sequences=10"), 4)
    with pytest.raises(MegamupError, match=r"batch.micro_sequences=3 .* 8 sequences; use one of \[1, 2, 4, 8\]"):
        micro_batches(build("batch.micro_sequences=3"), 4)
    with pytest.raises(MegamupError, match=r"tensor=2 x pipeline=2 = 4 ranks .* 6 ranks were started"):
        micro_batches(build("parallel.tensor=2", "parallel.pipeline=2"), 6)
    with pytest.raises(MegamupError, match=r"tensor=2 x pipeline=1 x context=2 = 4 ranks .* 6 ranks were started"):
        micro_batches(build("parallel.tensor=2", "parallel.context=2"), 6)
    assert micro_batches(build("parallel.pipeline=4"), 8) == (4, 4)
    assert micro_batches(build("parallel.context=2"), 8) == (8, 1)  # 4 data ranks: context ranks share theirs
    assert micro_batches(build("batch.micro_sequences=2"), 4) == (2, 4)


# --------------------------------------------------------------------------- files that aren't configs


@pytest.mark.parametrize(
    ("text", "part"), [("a: [1", "not readable as YAML"), ("- 1\n- 2\n", "found list"), ("x", "str")]
)
def test_a_file_that_is_no_config_is_named(tmp_path: Path, text: str, part: str) -> None:
    path = write(tmp_path / "broken.yaml", text)
    with pytest.raises(MegamupError) as caught:
        load_config([path])
    assert str(path) in str(caught.value)
    assert part in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MegamupError, match=r"absent\.yaml: no such config file"):
        load_config([tmp_path / "absent.yaml"])


@pytest.mark.parametrize("override", ["optim.lr", "=3", "optim..lr=3", ".lr=3"])
def test_an_override_without_key_or_value(override: str) -> None:
    with pytest.raises(MegamupError, match=r"expected a key and a value, such as optim\.lr=0\.003"):
        load_config([], [override])


# --------------------------------------------------------------------------- the DeepSpeed file


@pytest.mark.parametrize("pipeline", [1, 2])
@pytest.mark.parametrize(
    ("text", "part"),
    [
        (None, "no such file"),
        ("{", "not JSON"),
        ("[1]", "found list"),
        ('{"train_batch_size": 8}', "batch.global_sequences"),
        ('{"zero_optimization": {"stage": "two"}}', "stage"),
    ],
)
def test_a_wrong_deepspeed_file_is_one_config_error(tmp_path: Path, text: str | None, part: str, pipeline: int) -> None:
    path = tmp_path / "own.json"
    if text is not None:
        write(path, text)
    found = message(f"deepspeed={path}", f"parallel.pipeline={pipeline}")
    assert str(path) in found
    assert part in found
    assert "\n" not in found


@pytest.mark.parametrize(("key", "owner"), OWNED_KEYS.items())
def test_a_deepspeed_key_that_the_config_owns_names_both(tmp_path: Path, key: str, owner: str) -> None:
    path = write(tmp_path / "own.json", f'{{"zero_optimization": {{"stage": 1}}, "{key}": {{}}}}')
    with pytest.raises(ValueError, match=f"sets {key}, which {owner} of the run config sets"):
        load_deepspeed(str(path))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_shipped_files_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int) -> None:
    monkeypatch.chdir(tmp_path)
    assert build(f"deepspeed=ds_configs/zero{stage}.json").zero_stage == stage


def test_names_of_pydantics_unions_are_not_mistaken_for_keys() -> None:
    """A key that begins like a member of a union is still named whole."""
    assert message("strategy=1") == "strategy: unknown key"
    assert message("optim.strength=1").startswith("optim.strength: unknown key")
    assert message("data.train=[]").startswith("data.train")


def test_a_micro_batch_left_out_always_divides() -> None:
    config = build("batch.global_sequences=5", "batch.micro_sequences=null", "parallel.pipeline=2")
    assert micro_batches(config, 2) == (1, 5)


@pytest.mark.parametrize("text", ['{"zero_optimisation": {"stage": 3}}', '{"prescale_gradients": true}'])
def test_a_deepspeed_key_beyond_zero_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text, encoding="utf-8")
    assert "is no key of ZeRO" in message(f"deepspeed={path}")
