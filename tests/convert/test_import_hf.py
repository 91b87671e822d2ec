"""Models of transformers, imported: the same loss, at any layout, and back again."""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megamup.config import Config, load_config
from megamup.convert.hf import exporting
from megamup.convert.hf.families import FAMILIES, Family
from megamup.convert.hf.importing import import_folder
from megamup.convert.hf.tokenizer import TokenizerFiles
from megamup.errors import MegamupError
from megamup.models.build import build_network
from megamup.parallel.layers import spec_of
from megamup.parallel.mesh import build_mesh
from megamup.train import distributed
from megamup.train.fork import run_ranks
from tests.convert import hf_cases

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIZE: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}
SIZE |= {"vocab_size": 96, "max_position_embeddings": 32, "initializer_range": 0.2}
LLAMA = SIZE | {"num_key_value_heads": 2, "head_dim": 16}
ROPE: dict[str, Any] = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE |= {"original_max_position_embeddings": 16, "rope_theta": 500.0}
WINDOWS = {"use_sliding_window": True, "sliding_window": 8}
GPT2: dict[str, Any] = {
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "vocab_size": 96,
    "initializer_range": 0.2,
}
T5: dict[str, Any] = {"d_model": 48, "d_kv": 16, "d_ff": 80, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
T5 |= {"vocab_size": 96, "initializer_factor": 1.0, "decoder_start_token_id": 0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2),
    "gpt2, untied": ("GPT2", GPT2 | {"tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 64}),
    "llama": ("Llama", LLAMA | {"rope_parameters": ROPE}),
    "llama, biases of attention": ("Llama", LLAMA | {"attention_bias": True, "tie_word_embeddings": True}),
    "mistral": ("Mistral", LLAMA | {"sliding_window": 8}),
    "qwen2": ("Qwen2", SIZE | {"num_key_value_heads": 2}),
    "qwen2, windows": ("Qwen2", SIZE | {"num_key_value_heads": 2, "max_window_layers": 0} | WINDOWS),
    "qwen3": ("Qwen3", LLAMA | WINDOWS | {"layer_types": ["sliding_attention", "full_attention"]}),
    "mixtral": ("Mixtral", LLAMA | {"num_local_experts": 4}),
    "bert": ("Bert", SIZE),
    "t5": ("T5", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "t5, tied": ("T5", T5 | {"feed_forward_proj": "relu"}),
}
CLASSES = {"GPT2": "GPT2LMHeadModel", "Bert": "BertForMaskedLM", "T5": "T5ForConditionalGeneration"}
MUP = ["mup.base.d_model=16", "mup.base.n_heads=2", "mup.base.n_layers=1", "mup.depth=sqrt", "mup.parametrization=mup"]
MUP += [f"mup.alpha.{role}={value}" for role, value in hf_cases.ALPHA.items()]


def random_model(name: str, folder: Path) -> Any:
    """A model whose biases, gains and heads are none of them at a special value, and its folder."""
    kind, settings = MODELS[name]
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(transformers, f"{kind}Config")(**settings, attn_implementation="eager")
        model = getattr(transformers, CLASSES.get(kind, f"{kind}ForCausalLM"))(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            if parameter_name == "lm_head.weight" and kind == "T5" and not settings.get("tie_word_embeddings", True):
                model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model.eval()


def imported(theirs: Path, output: Path, *overrides: str) -> Config:
    few = ["objective.sentinels=30"] if "T5" in (theirs / "config.json").read_text() else []
    import_folder(theirs, output, [*few, *overrides])
    return load_config([output / "config.yaml"], ["data.train=shard", "train.steps=1"])


def loss(logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy of some tokens; a decoder's is that of the next."""
    targets = inputs["decoder_tokens"] if "decoder_tokens" in inputs else inputs["tokens"].roll(-1, 1)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("name", MODELS)
def test_an_imported_model_has_the_same_loss(name: str, tmp_path: Path) -> None:
    theirs = random_model(name, tmp_path / "theirs")
    plain = imported(tmp_path / "theirs", tmp_path / "plain")
    scaled = imported(tmp_path / "theirs", tmp_path / "scaled", *MUP)
    assert (plain.mup.parametrization, scaled.mup.parametrization) == ("sp", "mup")
    inputs = hf_cases.inputs_of(plain)
    expected = hf_cases.their_logits(theirs, inputs)
    for config in (plain, scaled):
        with torch.no_grad():
            logits = build_network(config)(inputs)
        torch.testing.assert_close(loss(logits, inputs), loss(expected, inputs), rtol=1e-5, atol=0)
        assert (logits - expected).abs().max() <= 1e-4
    assert loss(expected, inputs) > 0.5


def logits_of_ranks(config: Config, inputs: dict[str, Tensor]) -> Any:
    distributed.join()
    mesh = build_mesh(config.parallel)
    with torch.no_grad():
        return build_network(config, mesh)(inputs).numpy()


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "mixtral", "bert", "t5"])
def test_tensor_ranks_read_their_shards(name: str, tmp_path: Path) -> None:
    theirs = random_model(name, tmp_path / "theirs")
    config = imported(tmp_path / "theirs", tmp_path / "run", "parallel.tensor=2")
    inputs = hf_cases.inputs_of(config)
    parts = run_ranks(logits_of_ranks, 2, config, inputs)
    logits = torch.cat([torch.from_numpy(part) for part in parts], -1)
    assert (logits - hf_cases.their_logits(theirs, inputs)).abs().max() <= 1e-4


@pytest.mark.parametrize("name", [name for name in MODELS if name != "qwen2, windows"])
def test_export_undoes_import(name: str, tmp_path: Path) -> None:
    theirs = random_model(name, tmp_path / "theirs")
    config = imported(tmp_path / "theirs", tmp_path / "run", *MUP)
    weights = {spec_of(shard).name: shard.detach() for shard in build_network(config).parameters()}
    made = exporting.convert(config, weights)
    exporting.write(tmp_path / "run", made, TokenizerFiles())
    kind = getattr(transformers, made.settings["architectures"][0])
    again = kind.from_pretrained(tmp_path / "run", attn_implementation="eager")
    inputs = hf_cases.inputs_of(config)
    assert (hf_cases.their_logits(again, inputs) - hf_cases.their_logits(theirs, inputs)).abs().max() <= 1e-4
    if name not in ("qwen2", "llama, biases of attention"):  # ours has those of the MLP, too, and theirs both or none
        assert isinstance(again, type(theirs))


@pytest.mark.parametrize("name", hf_cases.MODELS)
def test_import_undoes_export(name: str, tmp_path: Path) -> None:
    _, traits = hf_cases.MODELS[name]
    config = hf_cases.config_of(traits)
    _, weights = hf_cases.build(config)
    (tmp_path / "theirs").mkdir()
    exporting.write(tmp_path / "theirs", exporting.convert(config, weights), TokenizerFiles())
    again = imported(tmp_path / "theirs", tmp_path / "run", f"mup={json.dumps(hf_cases.MUP)}")
    found = {spec_of(shard).name: shard.detach() for shard in build_network(again).parameters()}
    for parameter, weight in weights.items():
        torch.testing.assert_close(found.pop(parameter), weight, rtol=1e-6, atol=1e-7)
    assert not any(weight.any() for weight in found.values())  # what the class has besides


def test_rows_are_added_to_the_vocabulary_and_cut_off_again(tmp_path: Path) -> None:
    theirs = random_model("gpt2", tmp_path / "theirs")
    lines = import_folder(tmp_path / "theirs", tmp_path / "run", ["model.vocab_size=97", "parallel.tensor=4"])
    config = load_config([tmp_path / "run" / "config.yaml"], ["data.train=shard", "train.steps=1", "parallel.tensor=1"])
    assert config.model.vocab_size == 100
    assert any("4 rows of zeros" in line for line in lines)
    weights = {spec_of(shard).name: shard.detach() for shard in build_network(config).parameters()}
    assert not weights["embedding.token"][96:].any()
    state = exporting.state_dict(exporting.convert(config, weights))
    table = state["transformer.wte.weight"]
    assert len(table) == 97  # those that were asked for stay
    torch.testing.assert_close(table[:96], theirs.transformer.wte.weight, rtol=1e-6, atol=0)


def test_files_in_pieces_and_in_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = random_model("llama", tmp_path / "theirs").bfloat16()
    theirs.save_pretrained(tmp_path / "pieces", max_shard_size="20KB")
    assert len(list((tmp_path / "pieces").glob("*.safetensors"))) > 3
    monkeypatch.setattr("megamup.convert.hf.importing.SHARD_BYTES", 40_000)
    config = imported(tmp_path / "pieces", tmp_path / "run")
    stored = list((tmp_path / "run" / "init").glob("*.safetensors"))
    assert len(stored) > 3
    size = sum(parameter.numel() for parameter in theirs.parameters())
    assert sum(path.stat().st_size for path in stored) < 2.3 * size  # as they were, in two bytes each
    inputs = hf_cases.inputs_of(config)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "pieces", dtype=torch.float32)
    with torch.no_grad():
        logits = build_network(config)(inputs)
    assert (logits - hf_cases.their_logits(again, inputs)).abs().max() <= 1e-4


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_key_that_is_left_out_means_the_default_of_the_class(family: Family) -> None:
    whole = transformers.AutoConfig.for_model(family.model_type).to_dict()
    expected = family.section(whole)
    for key in whole:
        with contextlib.suppress(MegamupError):  # a size that has to be there
            assert family.section({other: whole[other] for other in whole if other != key}) == expected, key


def test_ids_that_the_files_tell(tmp_path: Path) -> None:
    random_model("t5", tmp_path / "t5")
    (tmp_path / "t5" / "tokenizer.json").write_text('{"added_tokens": [{"id": 90, "content": "<extra_id_0>"}]}')
    config = imported(tmp_path / "t5", tmp_path / "run")
    assert (config.objective.start_id, config.objective.first_sentinel) == (0, 90)
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").is_file()
    random_model("bert", tmp_path / "bert")
    (tmp_path / "bert" / "vocab.txt").write_text("[PAD]\n[UNK]\n[MASK]\n")
    assert imported(tmp_path / "bert", tmp_path / "masked").objective.mask_id == 2
    (tmp_path / "bert" / "vocab.txt").unlink()
    change(tmp_path / "bert" / "config.json", mask_token_id=3)  # as export writes it
    assert imported(tmp_path / "bert", tmp_path / "again").objective.mask_id == 3


# ----------------------------------------------------------------------------- bad input


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def resaved(folder: Path, **changes: Tensor | None) -> None:
    from safetensors.torch import load_file, save_file

    tensors: dict[str, Any] = load_file(folder / "model.safetensors") | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")


NORM = "transformer.ln_f.weight"


def as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def outside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other.safetensors"}}')


def index_of_another(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "one.safetensors"}}')


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "architecture": (
        lambda f: change(f / "config.json", architectures=["MambaForCausalLM"]),
        "'MambaForCausalLM' is not",
    ),
    "no architecture": (lambda f: change(f / "config.json", architectures=None), "architectures=None"),
    "quantized": (lambda f: resaved(f, **{NORM: torch.ones(48, dtype=torch.int8)}), f"{NORM} is of type I8"),
    "missing": (lambda f: resaved(f, **{NORM: None}), f"lacks {NORM}"),
    "extra": (lambda f: resaved(f, **{"transformer.extra": torch.ones(2)}), "transformer.extra in these files"),
    "shape": (lambda f: resaved(f, **{NORM: torch.ones(7)}), f"{NORM} has shape (7,); config.json makes it (48,)"),
    "untied": (lambda f: resaved(f, **{"lm_head.weight": torch.ones(96, 48)}), "lm_head.weight differs from"),
    "setting": (lambda f: change(f / "config.json", scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse"),
    "activation": (lambda f: change(f / "config.json", activation_function="mish"), "activation_function='mish'"),
    "pickle": (as_pickle, "pytorch_model.bin is a pickle"),
    "nothing": (lambda f: (f / "model.safetensors").unlink(), "no safetensors; expected model.safetensors"),
    "outside": (outside, "'../other.safetensors' is no safetensors file of this folder"),
    "index": (index_of_another, "a is not in one.safetensors"),
    "cut short": (cut_short, "not readable as safetensors"),
    "header": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 100), "not readable as safetensors"),
    "types": (lambda f: change(f / "config.json", activation_function=[]), "activation_function=[]"),
    "size": (lambda f: change(f / "config.json", n_head="4"), "n_head='4'; expected a whole number"),
    "kind of architecture": (lambda f: change(f / "config.json", architectures=1), "architectures=1"),
    "json": (lambda f: (f / "config.json").write_text("{"), "not readable as JSON"),
}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2") / "theirs"
    random_model("gpt2", folder)
    return folder


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_refused_and_nothing_is_written(name: str, gpt2: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    shutil.copytree(gpt2, theirs)
    spoil, message = BAD[name]
    spoil(theirs)
    with pytest.raises(MegamupError) as caught:
        import_folder(theirs, tmp_path / "run")
    assert message in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "other.safetensors") == ["theirs"]


def test_weights_of_another_model_are_refused(gpt2: Path, tmp_path: Path) -> None:
    import_folder(gpt2, tmp_path / "run")
    given = ["data.train=shard", "train.steps=1"]
    for override, message in {
        "model.d_ff=64": "is of shape",
        "model.n_layers=3": "is missing there",
        "train.init=nowhere": "weights.json is not readable",
    }.items():
        with pytest.raises(MegamupError, match=message):
            build_network(load_config([tmp_path / "run" / "config.yaml"], [*given, override]))


def test_an_output_that_is_there_is_left_alone(gpt2: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("kept")
    with pytest.raises(MegamupError, match="is there already"):
        import_folder(gpt2, tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "kept"
