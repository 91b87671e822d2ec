"""Exported models against transformers' own classes, μP on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megamup.config import Config
from megamup.convert.hf.exporting import convert, state_dict, write
from megamup.convert.hf.fold import factors
from megamup.convert.hf.tokenizer import TokenizerFiles
from megamup.errors import MegamupError
from megamup.models.network import Network
from tests.convert import hf_cases

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def written(config: Config, weights: dict[str, torch.Tensor], folder: Path) -> Any:
    """The model that transformers reads from an export, all of whose tensors were there."""
    folder.mkdir()
    made = convert(config, weights)
    write(folder, made, TokenizerFiles())
    kind = getattr(transformers, made.settings["architectures"][0])
    model, found = kind.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not any(found.values()), found
    return model


@pytest.mark.parametrize("name", hf_cases.MODELS)
def test_logits_equal_those_of_the_class(name: str, tmp_path: Path) -> None:
    class_name, traits = hf_cases.MODELS[name]
    config = hf_cases.config_of(traits)
    ours, weights = hf_cases.build(config)
    theirs = written(config, weights, tmp_path / "export")
    assert type(theirs).__name__ == class_name
    inputs = hf_cases.inputs_of(config)
    expected = hf_cases.their_logits(theirs, inputs)
    with torch.no_grad():
        found = ours(inputs)
    assert expected.std() > 0.3  # not all alike
    assert (found - expected).abs().max() <= 1e-4
    # Every factor of the forward pass has to be there: without one the logits are others.
    plain = {name: weight / factors(config, made_for(config))[name] for name, weight in weights.items()}
    unfolded = state_dict(convert(config, plain))
    theirs.load_state_dict(unfolded, strict=False)
    assert (hf_cases.their_logits(theirs, inputs) - expected).abs().max() > 0.05


def made_for(config: Config) -> Any:
    made = convert(config, {})
    return made.family.own_scales(config.model, made.settings)


def test_pair_head(tmp_path: Path) -> None:
    config = hf_cases.config_of(hf_cases.PAIRS)
    ours, weights = hf_cases.build(config)
    theirs, inputs = written(config, weights, tmp_path / "export"), hf_cases.inputs_of(config)
    hidden = hidden_before_pairs(ours, inputs)
    head = next(layer for layer in ours.layers if getattr(layer, "name", "") == "pair")
    with torch.no_grad():
        expected = theirs.eval()(**hf_cases.their_arguments(inputs)).seq_relationship_logits
        assert (head.logits(hidden) - expected).abs().max() <= 1e-4  # type: ignore[operator]


def hidden_before_pairs(net: Network, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    seen = []
    head = next(layer for layer in net.layers if getattr(layer, "name", "") == "pair")
    handle = head.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        net(inputs)
    handle.remove()
    return seen[0]  # type: ignore[no-any-return]


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "umup": (hf_cases.LLAMA, {"mup": {"parametrization": "umup"}}, "can't be folded"),
    "parallel": (hf_cases.LLAMA | {"parallel_block": True}, {}, "has no model.parallel_block=true"),
    "soft cap": (hf_cases.LLAMA | {"logit_soft_cap": 30.0}, {}, "has no model.logit_soft_cap=30.0"),
    "squared relu": (hf_cases.LLAMA | {"activation": "relu2"}, {}, "has no model.activation=relu2"),
    "window": ({"arch": "gpt", "window": 8}, {}, "GPT2LMHeadModel has no model.window=8"),
    "groups": ({"arch": "gpt", "n_kv_heads": 2}, {}, "n_kv_heads=2 of n_heads=4"),
    "post-norm": ({"arch": "gpt", "norm_place": "after"}, {}, "has no model.norm_place=after"),
    "pre-norm": ({"arch": "bert", "norm_place": "before"}, {}, "has no model.norm_place=before"),
    "biases": (hf_cases.LLAMA | {"qk_norm": True, "bias": True}, {}, "Qwen3ForCausalLM has no model.bias=true"),
    "shared expert": (hf_cases.LLAMA | {"moe": {"experts": 4, "shared": 1}}, {}, "moe.shared=1"),
    "t5 with biases": (hf_cases.T5 | {"bias": True}, {}, "has no model.bias=true"),
    "zero": ({"arch": "gpt"}, {"mup": {"alpha": {"embedding": 0.0}}}, "multiplier of 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_class_computes_is_refused_by_name(name: str) -> None:
    traits, sections, message = REFUSED[name]
    with pytest.raises(MegamupError) as caught:
        convert(hf_cases.config_of(traits, **sections), {})
    assert message in str(caught.value)


def test_shards_and_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = hf_cases.config_of(hf_cases.LLAMA)
    _, weights = hf_cases.build(config)
    monkeypatch.setattr("megamup.convert.hf.exporting.SHARD_BYTES", 30_000)
    theirs = written(config, weights, tmp_path / "export")
    index = json.loads((tmp_path / "export" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 3
    assert max((tmp_path / "export" / file).stat().st_size for file in files) < 32_000
    assert torch.equal(theirs.lm_head.weight, state_dict(convert(config, weights))["lm_head.weight"])


def test_bfloat16(tmp_path: Path) -> None:
    config = hf_cases.config_of({"arch": "gpt"})
    _, weights = hf_cases.build(config)
    exact, rounded = (state_dict(convert(config, weights, kind)) for kind in ("float32", "bfloat16"))
    for name, tensor in rounded.items():
        assert torch.equal(tensor, exact[name].bfloat16())
