"""Which backend serves a run: the fastest that can, or the one asked for, or an error that says why it can't."""

from __future__ import annotations

import sys

import pytest
import torch

from megamup import kernel_rules
from megamup.config import Config
from megamup.errors import MegamupError
from megamup.kernels import attention, choice, mlp, norm, rotary
from megamup.kernels.choice import Machine, available, choose, chosen, kernels_of
from tests.conftest import MakeConfig
from tests.kernels.comparison import apart, draw, heads, results

CPU, VOLTA, AMPERE, HOPPER = (
    Machine("cpu", None),
    Machine("cuda", (7, 0)),
    Machine("cuda", (8, 0)),
    Machine("cuda", (9, 0)),
)
OPERATIONS = ("attention", "norm", "mlp", "rotary", "cross_entropy")
GPT = ("model.arch=gpt", "model.n_kv_heads=4")
CAP = ("model.attention_soft_cap=50",)
RELATIVE = ("model.positions=relative",)
DOCUMENTS_COMPILED = ("precision=bf16", "data.documents=true", "kernels.compile=true")


@pytest.fixture
def everything_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "import_error", lambda module: None)


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("flash_attn", "liger_kernel"):
        monkeypatch.setitem(sys.modules, module, None)
        for loaded in [name for name in sys.modules if name.startswith(f"{module}.")]:
            monkeypatch.setitem(sys.modules, loaded, None)


def names(config: Config, machine: Machine) -> tuple[str, ...]:
    return tuple(chosen(op, config, machine) for op in OPERATIONS)


@pytest.mark.usefixtures("everything_installed")
@pytest.mark.parametrize(
    ("machine", "overrides", "expected"),
    [
        (CPU, (), ("sdpa", "torch", "torch", "torch", "fused")),
        (AMPERE, ("precision=bf16",), ("flash_attn", "liger", "liger", "liger", "liger")),
        (HOPPER, ("precision=bf16",), ("sdpa", "liger", "liger", "liger", "liger")),
        (AMPERE, (), ("sdpa", "liger", "liger", "liger", "liger")),
        (VOLTA, ("precision=bf16",), ("sdpa", "torch", "torch", "torch", "fused")),
        (AMPERE, ("precision=bf16", "kernels.compile=true"), ("flash_attn", "torch", "torch", "torch", "liger")),
        (AMPERE, ("precision=bf16", "model.d_head=264"), ("sdpa", "liger", "liger", "liger", "liger")),
        (AMPERE, ("precision=bf16", "parallel.tensor=2"), ("flash_attn", "liger", "liger", "liger", "fused")),
        (AMPERE, ("precision=bf16", *GPT), ("flash_attn", "liger", "torch", "liger", "liger")),
        (HOPPER, ("precision=bf16", "model.activation=geglu_tanh"), ("sdpa", "liger", "liger", "liger", "liger")),
        (HOPPER, ("model.activation=relu2", "model.logit_soft_cap=30"), ("sdpa", "liger", "torch", "liger", "fused")),
        (HOPPER, ("objective.z_loss=1e-4",), ("sdpa", "liger", "liger", "liger", "fused")),
        (CPU, ("model.window=8",), ("sdpa", "torch", "torch", "torch", "fused")),
        (CPU, CAP, ("reference", "torch", "torch", "torch", "fused")),
        (VOLTA, CAP, ("reference", "torch", "torch", "torch", "fused")),
        (HOPPER, CAP, ("flex", "liger", "liger", "liger", "liger")),
        (HOPPER, ("precision=bf16", *CAP), ("flash_attn", "liger", "liger", "liger", "liger")),
        (HOPPER, ("precision=bf16", "model.window=8"), ("flash_attn", "liger", "liger", "liger", "liger")),
        (HOPPER, ("precision=bf16", "data.documents=true"), ("flash_attn", "liger", "liger", "liger", "liger")),
        (HOPPER, DOCUMENTS_COMPILED, ("flex", "torch", "torch", "torch", "liger")),
        (AMPERE, ("precision=bf16", *RELATIVE), ("sdpa", "liger", "liger", "liger", "liger")),
        (AMPERE, ("precision=bf16", *RELATIVE, *CAP), ("flex", "liger", "liger", "liger", "liger")),
        (CPU, (*RELATIVE, *CAP), ("reference", "torch", "torch", "torch", "fused")),
    ],
)
def test_auto(make_config: MakeConfig, machine: Machine, overrides: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert names(make_config(*overrides), machine) == expected


@pytest.mark.usefixtures("nothing_installed")
def test_auto_takes_what_is_installed(make_config: MakeConfig) -> None:
    assert names(make_config("precision=bf16"), AMPERE) == ("sdpa", "torch", "torch", "torch", "fused")


@pytest.mark.usefixtures("everything_installed")
@pytest.mark.parametrize(
    ("machine", "overrides", "message"),
    [
        (CPU, ["kernels.attention=flash_attn"], "kernels.attention=flash_attn .* needs CUDA.*: auto, sdpa, reference"),
        (VOLTA, ["kernels.attention=flash_attn"], "Ampere.*7, 0"),
        (AMPERE, ["kernels.attention=flash_attn"], "precision is fp32, set precision=bf16"),
        (AMPERE, ["kernels.attention=flash_attn", "precision=bf16", "model.d_head=264"], "d_head up to 256.* 264"),
        (CPU, ["kernels.attention=flex"], "no backward pass on a CPU"),
        (AMPERE, ["kernels.attention=flex", "model.d_head=8"], "d_head of 16 or more, which is 8"),
        (CPU, ["kernels.norm=liger"], "kernels.norm=liger can't run here: it needs CUDA.*: auto, torch, reference"),
        (VOLTA, ["kernels.norm=liger"], "Ampere.*7, 0"),
        (AMPERE, ["kernels.mlp=liger", *GPT], "has swiglu and geglu_tanh, and model.activation is gelu"),
        (AMPERE, ["kernels.attention=sdpa", *CAP], "no soft cap, and .*attention_soft_cap is 50.*: auto, flex"),
        (AMPERE, ["kernels.attention=flash_attn", "precision=bf16", *RELATIVE], "positions is relative"),
        (AMPERE, ["kernels.attention=flash_attn", *DOCUMENTS_COMPILED], "how many documents a batch has"),
        (AMPERE, ["kernels.cross_entropy=liger", "model.logit_soft_cap=30"], "model.logit_soft_cap is 30"),
        (AMPERE, ["kernels.cross_entropy=liger", "objective.z_loss=0.001"], "objective.z_loss is 0.001"),
        (AMPERE, ["kernels.mlp=liger", "model.d_ff=65600"], "65600"),
        (AMPERE, ["kernels.cross_entropy=liger", "parallel.tensor=2"], "parallel.tensor=2.*: auto, fused, reference"),
    ],
)
def test_what_cannot_run_is_refused(
    make_config: MakeConfig, machine: Machine, overrides: list[str], message: str
) -> None:
    with pytest.raises(MegamupError, match=message):
        names(make_config(*overrides), machine)


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize(
    ("key", "module"), [("kernels.attention=flash_attn", "flash_attn"), ("kernels.rotary=liger", "liger_kernel")]
)
def test_what_is_not_installed_says_how_to(make_config: MakeConfig, key: str, module: str) -> None:
    with pytest.raises(MegamupError, match=rf"{module}.* is not installed: pip install 'megamup\[cuda\]'"):
        names(make_config(key, "precision=bf16"), AMPERE)


def test_what_is_installed_but_broken_is_told_apart(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As flash-attn is when it was built for another torch."""

    def broken(module: str) -> None:
        raise ImportError(f"{module}: undefined symbol: _ZN3c105ErrorE\nmore")

    monkeypatch.setattr("importlib.import_module", broken)
    reason = available("attention", "flash_attn", make_config("precision=bf16"), AMPERE)
    assert reason == "flash_attn is installed but can't be imported: flash_attn: undefined symbol: _ZN3c105ErrorE"


@pytest.mark.parametrize(
    ("op", "backend"), [("attention", "reference"), ("norm", "reference"), ("mlp", "reference"), ("rotary", "torch")]
)
def test_what_is_asked_for_is_taken(make_config: MakeConfig, op: str, backend: str) -> None:
    assert choose(make_config(f"kernels.{op}={backend}"), "cpu").names[op] == backend


def test_names_are_the_functions(make_config: MakeConfig) -> None:
    ours = choose(make_config(), "cpu")
    assert (ours.attention, ours.rms_norm) == (attention.sdpa, norm.torch_rms_norm)
    assert ours.activation is mlp.TORCH["swiglu"]
    assert ours.overlaps
    plain = choose(make_config(*(f"kernels.{op}=reference" for op in OPERATIONS)), "cpu")
    assert (plain.attention, plain.layer_norm) == (attention.reference, norm.reference_layer_norm)
    assert (plain.activation, plain.rotate) == (mlp.REFERENCE["swiglu"], rotary.reference_rotate)
    assert choose(make_config("model.activation=relu2"), "cpu").activation is mlp.TORCH["relu2"]
    fast = {**ours.names, "attention": "sdpa", "norm": "liger", "mlp": "liger", "rotary": "liger"}
    on_hopper = kernels_of(fast, HOPPER, "swiglu")
    assert on_hopper.attention is attention.cudnn_sdpa
    assert (on_hopper.rms_norm, on_hopper.activation) == (norm.liger_rms_norm, mlp.liger_swiglu)
    assert kernels_of(fast, AMPERE, "geglu_tanh").attention is attention.sdpa
    assert kernels_of(fast, AMPERE, "geglu_tanh").activation is mlp.liger_geglu_tanh


def test_the_default_compiles_as_one_graph(make_config: MakeConfig) -> None:
    torch.compiler.reset()
    kernels = choose(make_config(), "cpu")

    def region(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        query, key = kernels.rotate(query, key, rotary.Rotation(500.0))
        query, scores = kernels.rms_norm(query, weight, 1e-5), attention.Scores(0.1)
        mixed = kernels.attention(query, key, value, scores, attention.CAUSAL)
        return kernels.activation(kernels.layer_norm(mixed, weight, weight, 1e-5), mixed)

    inputs = [*heads(6, 2), draw(16, seed=7)]
    compiled = torch.compile(region, fullgraph=True, dynamic=False, backend="aot_eager")
    assert apart(results(compiled, inputs), results(region, inputs)) < 1e-13


# ----------------------------------------------------------------------------- by the config alone


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["kernels.cross_entropy=liger", "parallel.tensor=2"], "parallel.tensor=2 cuts it. What can: fused, reference"),
        (["kernels.attention=flash_attn"], "precision is fp32"),
        (["kernels.mlp=liger", "model.d_ff=65600"], "65600"),
        (["kernels.matmul=fp8", "precision=bf16", "model.d_ff=168", "parallel.tensor=2"], "parallel.tensor is 84"),
        (
            ["kernels.matmul=fp8", "precision=bf16", "model.arch=t5", "model.vocab_size=512"],
            "objective.decoder_len · batch.micro_sequences (1 where it is not set) / parallel.context is 28",
        ),
    ],
)
def test_what_no_machine_can_is_told_from_the_config(
    make_config: MakeConfig, overrides: list[str], message: str
) -> None:
    reason = kernel_rules.refused(make_config(*overrides))
    assert reason is not None
    assert reason.startswith(overrides[0])
    assert message in reason


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("kernels.attention=flash_attn", "precision=bf16"),
        ("kernels.cross_entropy=liger", "kernels.mlp=liger", "kernels.norm=liger", "kernels.rotary=liger"),
        ("kernels.cross_entropy=fused", "model.logit_soft_cap=30", "parallel.tensor=2"),
    ],
)
def test_what_some_machine_can_is_not_refused(make_config: MakeConfig, overrides: tuple[str, ...]) -> None:
    assert kernel_rules.refused(make_config(*overrides)) is None
