"""tools/convert_config_to_mup.py: Cerebras-GPT 2.7B worked out by hand, both layouts, what is refused, what is said."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from megamup.cli import load_program
from megamup.config import Config, dump_config, load_config, merge, parse_override
from megamup.convert.config import Proxy, convert
from megamup.errors import MegamupError
from megamup.flops import flops_per_token
from megamup.mup import attention_scale, ratios, readout_multiplier, table
from megamup.plan import base_model
from megamup.sections import Alpha, Base, Sigma

ROOT = Path(__file__).resolve().parents[2]

PARAMS = """
train_input: {data_dir: ./pile/train, max_sequence_length: 2048, batch_size: 512, num_workers: 8}
eval_input: {data_dir: [./pile/a, ./pile/b], batch_size: 256}
model:
  hidden_size: 2560
  num_hidden_layers: 32
  num_heads: 32
  filter_size: 10240
  vocab_size: 50257
  max_position_embeddings: 2048
  position_embedding_type: learned
  nonlinearity: gelu
  share_embedding_weights: True
  use_projection_bias_in_attention: True
  use_ffn_bias_in_attention: True
  use_ffn_bias: True
  use_bias_in_output: False
  attention_type: scaled_dot_product
  dropout_rate: 0.0
  layer_norm_epsilon: 1.0e-5
  initializer_range: 0.02
  mixed_precision: True
optimizer:
  optimizer_type: AdamW
  beta1: 0.9
  beta2: 0.95
  eps: 1e-9
  weight_decay_rate: 0.1
  max_gradient_norm: 1.0
  learning_rate:
    - {scheduler: Linear, initial_learning_rate: 0.0, end_learning_rate: 1.6e-4, steps: 375}
    - {scheduler: Linear, initial_learning_rate: 1.6e-4, end_learning_rate: 1.6e-5, total_iters: 9625}
runconfig: {max_steps: 10000, eval_steps: 10, eval_frequency: 1000, checkpoint_steps: 2000, seed: 7, num_csx: 1}
"""


def tool(*arguments: str | Path) -> int:
    program = load_program(ROOT / "tools" / "convert_config_to_mup.py")
    code: int = program.main([str(argument) for argument in arguments])
    return code


def params(*overrides: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(PARAMS)
    for override in overrides:
        merge(values, parse_override(override))
    return values


def trainer(values: dict[str, Any]) -> dict[str, Any]:
    """The same run in the layout with ``trainer``."""
    optimizer, run = values["optimizer"], values["runconfig"]
    mixed = values["model"].pop("mixed_precision")
    stages = [{f"{stage.pop('scheduler')}LR": stage} for stage in optimizer["learning_rate"]]
    for stage in stages:
        inner = next(iter(stage.values()))
        inner["total_iters"] = inner.pop("steps", inner.get("total_iters"))
    adamw = {"betas": [0.9, 0.95], "eps": optimizer["eps"], "weight_decay": optimizer["weight_decay_rate"]}
    init = {
        "model": values["model"],
        "optimizer": {"AdamW": adamw},
        "schedulers": [{"SequentialLR": {"schedulers": stages}}],
        "precision": {"enabled": mixed, "max_gradient_norm": optimizer["max_gradient_norm"]},
        "loop": {key: run[key] for key in ("max_steps", "eval_steps", "eval_frequency")},
        "checkpoint": {"steps": run["checkpoint_steps"]},
        "seed": run["seed"],
    }
    return {
        "trainer": {
            "init": init,
            "fit": {"train_dataloader": values["train_input"], "val_dataloader": values["eval_input"]},
        }
    }


def converted(values: dict[str, Any], folder: Path, proxy: Proxy | None = None) -> Config:
    """The config that a run would load from the converter's text."""
    path = folder / "converted.yaml"
    path.write_text(convert(values, proxy or Proxy()), encoding="utf-8")
    return load_config([path])


def test_cerebras_gpt_2p7b(tmp_path: Path) -> None:
    """Width ratio 10; 80-wide heads don't fit a proxy of 256, so it keeps 32 heads, of 8."""
    config = converted(params(), tmp_path)
    rows, residual = table(config), 0.08 / math.sqrt(10) / math.sqrt(64)
    assert rows["blocks.0.attention.query.weight"].init_std == pytest.approx(0.08 / math.sqrt(10), rel=1e-12)
    assert rows["blocks.31.mlp.up.weight"].init_std == pytest.approx(0.08 / math.sqrt(10), rel=1e-12)
    assert rows["blocks.0.attention.output.weight"].init_std == pytest.approx(residual, rel=1e-12)
    assert rows["blocks.31.mlp.down.weight"].init_std == pytest.approx(residual, rel=1e-12)
    for name, scales in rows.items():
        hidden = name.startswith("blocks.") and ".weight" in name and "norm" not in name
        assert config.optim.lr * scales.lr_scale == pytest.approx(6e-4 if hidden else 6e-3, rel=1e-12), name
    for name in ("embedding.token", "embedding.position"):
        assert (rows[name].init_std, rows[name].multiplier) == (0.08, 10.0)
    assert readout_multiplier(config) == pytest.approx(0.1, rel=1e-12)
    assert attention_scale(config) == pytest.approx(1 / 80, rel=1e-12)
    assert (config.mup.base.n_heads, config.mup.base.d_head, config.mup.base.d_ff) == (32, 8, 1024)


def test_what_is_not_the_parametrization_is_the_inputs(tmp_path: Path) -> None:
    config = converted(params(), tmp_path)
    model = config.model
    assert (model.arch, model.d_model, model.n_layers, model.n_heads, model.d_ff) == ("gpt", 2560, 32, 32, 10240)
    assert (model.vocab_size, model.max_seq_len, model.tie_embeddings, model.bias) == (50257, 2048, True, True)
    assert (config.optim.betas, config.optim.eps, config.optim.weight_decay) == ((0.9, 0.95), 1e-9, 0.1)
    schedule, train = config.schedule, config.train
    assert (schedule.kind, schedule.warmup_steps, schedule.min_ratio) == ("linear", 375, 0.1)
    assert (train.steps, train.save_every, train.eval_every, train.eval_sequences) == (10000, 2000, 1000, 2560)
    assert (config.batch.global_sequences, config.seq_len, config.run.seed) == (512, 2048, 7)
    assert (config.precision, config.optim.grad_clip, config.data.train) == ("bf16", 1.0, "./pile/train")
    assert [source.prefix for source in config.data.valid or () if not isinstance(source, str)] == [
        "./pile/a",
        "./pile/b",
    ]


def test_both_layouts_of_the_model_zoo_are_one_config(tmp_path: Path) -> None:
    assert converted(trainer(params()), tmp_path) == converted(params(), tmp_path)


def test_a_llama_keeps_its_heads_and_their_groups(tmp_path: Path) -> None:
    values = params(
        *("model.position_embedding_type=rotary", "model.norm_type=rmsnorm", "model.nonlinearity=swiglu"),
        *("model.hidden_size=4096", "model.filter_size=11008", "model.rotary_dim=128", "model.rope_theta=5e5"),
        *("model.attention_module=multiquery_attention", "model.extra_attention_params.num_kv_groups=8"),
        *("model.use_projection_bias_in_attention=false", "model.use_ffn_bias_in_attention=false"),
        *("model.use_ffn_bias=false", "model.share_embedding_weights=false"),
    )
    with pytest.raises(MegamupError, match=r"n_kv_heads=8\) nor their size .*times 32/4096 is a whole \(and, .*even\)"):
        convert(values, Proxy(d_model=32))  # heads of 1: rotary positions turn pairs
    config = converted(values, tmp_path, Proxy(d_model=512))
    model, base = config.model, config.mup.base
    assert (model.arch, model.n_kv_heads, model.rope_theta) == ("llama", 8, 5e5)
    assert (model.bias, model.tie_embeddings) == (False, False)
    assert base == Base(d_model=512, d_ff=1376, n_heads=4, n_kv_heads=1)
    assert base_model(config).d_head == 128
    assert ratios(config).group == 1.0
    assert attention_scale(config) == pytest.approx(1 / 128, rel=1e-12)


def test_a_smaller_target_is_converted_too(tmp_path: Path) -> None:
    config = converted(params("model.hidden_size=128", "model.filter_size=512", "model.num_heads=2"), tmp_path)
    assert table(config)["blocks.0.mlp.up.weight"].lr_scale == 2.0
    assert (config.mup.base.n_heads, readout_multiplier(config)) == (4, 2.0)


def test_our_own_config_changes_only_in_mup_and_rate(make_config: Any, tmp_path: Path) -> None:
    given = make_config("mup.parametrization=sp", "mup.depth=sqrt", "mup.alpha.hidden=2", "optim.eps=1e-9")
    found = converted(yaml.safe_load(dump_config(given)), tmp_path, Proxy(32, 0.01, 0.05, 4.0))
    assert found.mup.base == Base(d_model=32, d_ff=80, n_heads=2, n_kv_heads=1)
    assert found.mup.sigma == Sigma(embedding=0.05, hidden=0.05, residual_out=0.05, readout=0.05)
    assert found.mup.alpha == Alpha(embedding=4.0, attention=0.25, hidden=2.0)
    assert (found.mup.parametrization, found.mup.depth, found.optim.lr) == ("mup", "sqrt", 0.01)
    changed = {"mup": given.mup, "optim": found.optim.model_copy(update={"lr": given.optim.lr})}
    assert found.model_copy(update=changed) == given


def test_a_converted_config_trains(make_config: Any, read_metrics: Any, tmp_path: Path) -> None:
    from megamup.train.fork import run_ranks
    from megamup.train.loop import train

    given = yaml.safe_load(dump_config(make_config("mup.parametrization=sp", "train.steps=2", "precision=fp32")))
    config = converted(given, tmp_path, Proxy(d_model=32))
    run_ranks(train, 1, config)
    records = read_metrics(config)
    assert [record["step"] for record in records] == [1, 2]
    assert records[-1]["flops"] == 2 * config.batch_tokens * flops_per_token(config.model, config.seq_len, "palm")
    # Logits of a random model are near zero beside ln(vocabulary), or the multipliers are wrong.
    assert records[0]["loss"] == pytest.approx(math.log(config.model.vocab_size), rel=0.2)
    # Warm-up: lr(0) = lr/3, with nothing of the width in it; the groups' own scales carry that.
    assert records[0]["lr"] == pytest.approx(6e-3 / 3, rel=1e-9)


def test_every_decided_line_says_where_it_is_from() -> None:
    lines = convert(params("runconfig.num_csx=2"), Proxy(lr=0.005)).splitlines()
    body = [line for line in lines if not line.startswith("#")]
    assert [line for line in body if "  # " not in line and not line.endswith(":")] == []
    assert "  lr: 0.005  # -lr_base: the proxy's; hidden matrices get 256/2560 of it" in body
    assert "    d_model: 256  # Cerebras' default of -d_base" in body
    assert "  eps: 1.0e-09  # optimizer.eps" in body
    assert sum("tools/preprocess_data.py" in line for line in body) == 2
    end = " ".join(line.removeprefix("#").strip() for line in lines[len(body) :])
    assert end == "not carried over: train_input.num_workers, model.initializer_range, runconfig.num_csx"


def test_sections_of_our_own_config_say_so_once(make_config: Any) -> None:
    lines = convert(yaml.safe_load(dump_config(make_config("mup.parametrization=sp"))), Proxy(d_model=32)).splitlines()
    assert "model:  # from the input" in lines
    assert "  d_model: 64" in lines
    assert "precision: fp32  # from the input" in lines
    assert lines[-1] == "# not carried over: mup.base.d_model, mup.base.n_heads"


def test_a_decay_that_ends_early_is_said() -> None:
    text = convert(params("runconfig.max_steps=12000"), Proxy())
    assert "the input's decay ends at step 10000, here at the last one, 12000" in text
    assert "decay ends" not in convert(params(), Proxy())


def test_cosine_after_a_linear_warm_up(tmp_path: Path) -> None:
    values = params()
    values["optimizer"]["learning_rate"][1]["scheduler"] = "CosineDecay"
    assert converted(values, tmp_path).schedule.kind == "cosine"
    assert converted(trainer(values), tmp_path).schedule.kind == "cosine"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.position_embedding_type=alibi",), "model.position_embedding_type=alibi, .*expected learned"),
        (("model.nonlinearity=swiglu",), "model.nonlinearity=swiglu: expected learned, layernorm and gelu"),
        (("model.dropout_rate=0.1",), r"model.dropout_rate=0.1: expected 0;"),
        (("model.attention_module=moe",), "model.attention_module='moe': expected 'aiayn_attention' or"),
        (("model.moe_params.num_experts=8",), "model.moe_params.num_experts=8: our models have no place for it"),
        (("model.use_ffn_bias=false",), "use_ffn_bias: expected all true, or all false together with norm_type=bias"),
        (("model.hidden_size=2500.0",), "model.hidden_size=2500.0: expected a whole number"),
        (("model.scale_qk_dot_by_d=true",), "model.scale_qk_dot_by_d=True: the config is in μP already"),
        (("optimizer.adjust_learning_rate.decoder_kernel=0.1",), "decoder_kernel=0.1: the config is in μP already"),
        (("optimizer.optimizer_type=SGD",), "optimizer.optimizer_type='SGD': expected AdamW"),
        (("optimizer.eps=small",), "optimizer.eps='small': expected a number"),
        (("optimizer.learning_rate=0.001",), r"optimizer.learning_rate: 0.001; supported: two schedulers in sequence"),
        (
            ("optimizer.learning_rate=[{scheduler: Linear}, {scheduler: Linear}]",),
            r"learning_rate\[0\].*supported: two",
        ),
        (("model.filter_size=10241",), r"-d_base 256: model.d_ff=10241 · 256/2560 is no whole number"),
        (
            ("model.hidden_size=2562", "model.num_heads=3", "model.filter_size=1281"),
            r"neither the number of heads \(model.n_heads=3, .*times 256/2562 is a whole number",
        ),
    ],
)
def test_what_ours_cannot_be_is_refused_by_its_key(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(MegamupError, match=message):
        convert(params(*overrides), Proxy())


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        (0, {"scheduler": "Constant"}, "Constant, then Linear; supported"),
        (1, {"scheduler": "Exponential"}, "Linear, then Exponential; supported"),
        (0, {"initial_learning_rate": 1}, "Linear, then Linear; supported"),
        (0, {"initial_learning_rate": -1, "end_learning_rate": 0}, "Linear, then Linear; supported"),
        (1, {"initial_learning_rate": 1e-4}, "warm-up ends at 0.00016, the decay goes from 0.0001 to 1.6e-05"),
        (1, {"end_learning_rate": 1}, "the decay goes from 0.00016 to 1; supported"),
        (1, {"total_iters": 0.5}, r"learning_rate\[1\].total_iters=0.5: expected a whole number of steps"),
        (1, {"total_iters": math.nan}, r"learning_rate\[1\].total_iters=nan: expected a whole number of steps"),
    ],
)
def test_schedules_that_ours_has_no_word_for(stage: int, changes: dict[str, Any], message: str) -> None:
    values = params()
    values["optimizer"]["learning_rate"][stage] |= changes
    with pytest.raises(MegamupError, match=message):
        convert(values, Proxy())


def test_all_missing_keys_are_one_message_in_the_files_own_words() -> None:
    values = params()
    del values["model"]["hidden_size"], values["optimizer"]["beta1"], values["runconfig"]["max_steps"]
    with pytest.raises(MegamupError, match=r"missing: model.hidden_size, optimizer.betas, runconfig.max_steps$"):
        convert(values, Proxy())
    newer = trainer(params())
    del newer["trainer"]["init"]["model"]["hidden_size"], newer["trainer"]["init"]["loop"]["max_steps"]
    with pytest.raises(MegamupError, match=r"missing: trainer.init.model.hidden_size, trainer.init.loop.max_steps$"):
        convert(newer, Proxy())


def test_a_config_in_mup_is_refused(make_config: Any) -> None:
    given = yaml.safe_load(dump_config(make_config()))
    with pytest.raises(MegamupError, match=r"parametrization=mup with mup.base=.*in μP already"):
        convert(given, Proxy(d_model=32))
    text = convert(given | {"mup": {}}, Proxy(d_model=32))
    with pytest.raises(MegamupError, match="in μP already"):
        convert(yaml.safe_load(text), Proxy(d_model=32))


def test_program_writes_beside_the_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "params_gpt3_2p7b.yaml"
    path.write_text(PARAMS, encoding="utf-8")
    assert tool("-i", path) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'params_gpt3_2p7b_mup.yaml'}\n"
    default = load_config([tmp_path / "params_gpt3_2p7b_mup.yaml"])
    assert default.optim.lr == 6e-3
    assert (
        tool("-i", path, "-o", tmp_path / "new" / "o.yaml", "-d_base", "320", "-lr_base", "1e-2", "--m_embed", "5") == 0
    )
    other = load_config([tmp_path / "new" / "o.yaml"])
    assert (other.mup.base.d_model, other.mup.base.n_heads, other.optim.lr) == (320, 4, 0.01)
    assert (other.mup.alpha.embedding, other.mup.sigma.hidden) == (5.0, 0.08)
    assert tool("--input_yaml", path, "--output_yaml", tmp_path / "long.yaml", "--base_init_std", "0.1") == 0
    assert load_config([tmp_path / "long.yaml"]).mup.sigma.readout == 0.1


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (None, [], "no such config file"),
        ("a: [", [], "not readable as YAML"),
        ("pages: 3", [], "neither a config of megamup (sections model, data, train) nor a params file"),
        ("model: {arch: gpt}", [], "model.d_model: missing; it has no default"),
        (PARAMS, ["-d_base", "0"], "-d_base 0: expected a positive number"),
        (PARAMS, ["-lr_base", "nan"], "-lr_base nan: expected a positive number"),
        (PARAMS, ["-d_base", "300"], "times 300/2560 is a whole number; give the width of the proxy"),
    ],
)
def test_bad_input_is_exit_code_2_and_no_file(
    text: str | None, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "input.yaml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    assert tool("-i", path, *arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert message in told
    assert [found.name for found in tmp_path.iterdir()] == ([] if text is None else ["input.yaml"])


def test_the_input_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "input.yaml"
    path.write_text(PARAMS, encoding="utf-8")
    (tmp_path / "link.yaml").symlink_to(path)
    for output in (path, tmp_path / "link.yaml"):
        assert tool("-i", path, "-o", output) == 2
        assert "is the input; give another name" in capsys.readouterr().err
    assert path.read_text(encoding="utf-8") == PARAMS
