"""Products in 8-bit floats: against float64, against torchao, and under the rules of a GPU's product."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megamup.errors import MegamupError
from megamup.kernels import choice, matmul
from megamup.kernels.choice import Machine, available, choose
from megamup.kernels.matmul import Scaled, fp8_linear, gradient, in_8_bits, product, torch_linear, value
from megamup.models.recompute import selective
from tests.conftest import MakeConfig
from tests.kernels.comparison import draw, results

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ROUNDING = {E4M3: 2.0**-4, E5M2: 2.0**-3}
"""Largest relative error of an element: half of the last of 3 or 2 bits after the leading one."""
SMALLEST_STEP = {E4M3: 2.0**-9, E5M2: 2.0**-16}
CPU, H100 = Machine("cpu", None), Machine("cuda", (9, 0))
FP8 = ("precision=bf16", "kernels.matmul=fp8")


def bf16(*shape: int, seed: int = 1) -> Tensor:
    return draw(*shape, seed=seed).bfloat16()


def exact(scaled: Scaled) -> Tensor:
    return scaled.bits.double() * scaled.unit.double()


def inputs(device: str = "cpu") -> list[Tensor]:
    """Activations (batch, seq, d_in) and a weight (d_out, d_in), of very different sizes."""
    return [(1e3 * bf16(2, 24, 64)).to(device), (1e-3 * bf16(96, 64, seed=2)).to(device)]


# ------------------------------------------------------------------- the scaling


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("size", [1e-12, 1.0, 3e7])
def test_elements_are_rounded_to_their_neighbours(dtype: torch.dtype, size: float) -> None:
    x = size * bf16(64, 48)
    scaled = in_8_bits(x, dtype)
    allowed = (ROUNDING[dtype] * x.abs().double()).clamp(min=0.5 * SMALLEST_STEP[dtype] * scaled.unit.double())
    assert ((exact(scaled) - x.double()).abs() <= allowed).all()
    top = torch.finfo(dtype).max
    assert top / 2 < x.abs().max() / scaled.unit <= top, "half of the range is unused, or it overflows"
    assert math.frexp(scaled.unit.item())[0] == 0.5, "no power of two"


@pytest.mark.parametrize("scale", [value, gradient])
def test_a_shard_is_rounded_as_the_whole_is(scale: Callable[[Tensor], Scaled]) -> None:
    """Each part has its own scale; elements that e4m3 has all digits for don't know it."""
    x = torch.where(bf16(64, 48).abs() < 0.01, 0.01, bf16(64, 48))
    x[:32] *= 0.1
    parts = [scale(part) for part in x.chunk(2)]
    assert parts[0].unit != parts[1].unit
    assert torch.equal(torch.cat([exact(part) for part in parts]), exact(scale(x)))


@pytest.mark.parametrize("fill", [0.0, 2.0**-100])
def test_next_to_nothing_gives_next_to_nothing(fill: float) -> None:
    x, weight = torch.full((16, 32), fill, dtype=torch.bfloat16), bf16(48, 32)
    for found, expected in zip(results(fp8_linear, [x, weight]), results(torch_linear, [x, weight]), strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found, expected, rtol=0, atol=0.2 * expected.abs().max().item() + 1e-20)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    """A cast to e4m3 would make 448 of an infinity, and the loss would never show it."""
    x, weight = bf16(16, 32), bf16(48, 32)
    x[3, 5] = bad
    y, of_x, of_weight = results(fp8_linear, [x, weight])
    assert y.isnan().all()
    assert of_weight.isnan().all()
    assert of_x.isfinite().all()


# ------------------------------------------------------------------- the products


def error(found: Tensor, expected: Tensor) -> float:
    """Root mean square, relative."""
    return ((found.double() - expected).square().mean() / expected.square().mean()).sqrt().item()


def compare_with_float64(backend: matmul.Linear, device: str) -> None:
    """Errors of roundings are independent: those of a product's two operands add up in squares.

    An element whose mantissa is anything in [1, 2) alike is off by 2^-4/√3 · √½ = 2.6% (e4m3) or 5.1% (e5m2).
    """
    on_device = inputs(device)
    expected = results(torch_linear, [x.double() for x in on_device])
    y, of_x, of_weight = (error(*pair) for pair in zip(results(backend, on_device), expected, strict=True))
    assert 0.030 < y < 0.043, "3.6%: two operands in e4m3"
    for found in (of_x, of_weight):
        assert 0.049 < found < 0.066, "5.7%: one in e5m2"


def test_products_are_those_of_float64_but_for_8_bits() -> None:
    compare_with_float64(fp8_linear, "cpu")


def test_every_element_is_within_the_bound_of_its_roundings() -> None:
    """|found - exact| <= (1 + ε)(1 + ε') - 1 times the sum of absolute products, and what bf16 rounds."""
    x, weight = inputs()
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    of_output = bf16(2, 24, 96, seed=3)
    y = fp8_linear(leaves[0], leaves[1])
    of_x, of_weight = torch.autograd.grad(y, leaves, of_output)
    rows, grads = x.flatten(0, 1).double(), of_output.flatten(0, 1).double()
    for found, a, b, first in (
        (y.flatten(0, 1), rows, weight.double().t(), E4M3),
        (of_x.flatten(0, 1), grads, weight.double(), E5M2),
        (of_weight, grads.t(), rows, E5M2),
    ):
        allowed = (1 + ROUNDING[first]) * (1 + ROUNDING[E4M3]) - 1 + 0.005
        assert ((found.double() - a @ b).abs() <= allowed * (a.abs() @ b.abs())).all()


def test_powers_of_two_pass_through() -> None:
    """μP's multipliers, a loss's scale, the size that width gives a tensor: none of them changes a digit."""
    x, weight = inputs()
    of_output = bf16(2, 24, 96, seed=3)

    def run(a: float, b: float, c: float) -> list[Tensor]:
        leaves = [(a * x).requires_grad_(), (b * weight).requires_grad_()]
        y = fp8_linear(leaves[0], leaves[1])
        of_x, of_weight = torch.autograd.grad(y, leaves, c * of_output)
        return [y.detach() / (a * b), of_x / (b * c), of_weight / (a * c)]

    for found, expected in zip(run(2.0**-12, 2.0**9, 2.0**-30), run(1, 1, 1), strict=True):
        assert torch.equal(found, expected)


def test_equals_torchao() -> None:
    """Their recipe, on their module, to the bit."""
    float8 = pytest.importorskip("torchao.float8", reason="torchao is not installed")
    x, weight = inputs()
    of_output = draw(2, 24, 96, seed=10).to(x)  # as `results` draws it
    config = replace(float8.Float8LinearConfig.from_recipe_name("tensorwise"), round_scales_to_power_of_2=True)
    module: Any = torch.nn.Sequential(torch.nn.Linear(64, 96, bias=False, dtype=torch.bfloat16))
    module[0].weight.data.copy_(weight)
    module = float8.convert_to_float8_training(module, config=config)
    assert type(module[0]) is not torch.nn.Linear
    y = module(x.requires_grad_())
    expected = [y, *torch.autograd.grad(y, (x, module[0].weight), of_output)]
    for found, theirs in zip(results(fp8_linear, [x, weight]), expected, strict=True):
        assert torch.equal(found, theirs)


# ------------------------------------------------------------------- what a GPU and the rest of training ask of it


class OnCuda(TorchDispatchMode):
    """Shows every product to torch's own check of what CUDA takes, by tensors without contents; counts them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._scaled_mm.default:
            self.products += 1
            assert E5M2 not in (args[0].dtype, args[1].dtype) or args[0].dtype != args[1].dtype, "CUDA has no such"
            with FakeTensorMode():
                a, b, *scales = (
                    torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") for x in args[:4]
                )
                func(a, b, *scales, **{key: kwargs[key] for key in ("out_dtype", "use_fast_accum") if key in kwargs})
        return func(*args, **kwargs)


def laid_out(layout: str) -> list[Tensor]:
    x, weight = inputs()
    if layout == "gathered":  # as a sequence-parallel gather leaves it: positions outermost in memory
        return [x.transpose(0, 1).contiguous().transpose(0, 1), weight]
    return [x, weight.t().contiguous().t()] if layout == "transposed weight" else [x, weight]


@pytest.mark.parametrize("layout", ["plain", "gathered", "transposed weight"])
def test_operands_lie_as_cuda_wants_them(layout: str) -> None:
    with OnCuda() as seen:
        found = results(fp8_linear, laid_out(layout))
    assert seen.products == 3
    assert all(torch.equal(*pair) for pair in zip(found, results(fp8_linear, inputs()), strict=True))


def test_cudas_check_refuses_what_it_should() -> None:
    """Else the test above would show nothing."""
    one = torch.ones(())
    a, b = value(bf16(32, 48)).bits, value(bf16(48, 64)).bits
    for rows, columns, wrong in ((a, b, "col_major"), (a[:, :40], b[:40].t().contiguous().t(), "divisible by 16")):
        with OnCuda(), pytest.raises(RuntimeError, match=wrong):
            torch._scaled_mm(rows, columns, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def test_an_expanded_gradient_is_taken() -> None:
    """What the sum of a layer's outputs hands back has no memory of its own."""
    leaves = [x.requires_grad_() for x in inputs()]
    with OnCuda():
        fp8_linear(leaves[0], leaves[1]).sum().backward()
    assert leaves[1].grad is not None
    expected = leaves[0].detach().double().flatten(0, 1).sum(0).expand(96, 64)
    assert error(leaves[1].grad, expected) < 0.05


def test_the_weight_is_not_held_between_forward_and_backward() -> None:
    """ZeRO 3 drops what it gathered, and gathers again into the same parameter: backward must look there."""
    x, weight = inputs()
    x.requires_grad_()
    parameter = torch.nn.Parameter(weight)
    y = fp8_linear(x, parameter)
    parameter.data = 2 * weight
    of_output = bf16(2, 24, 96, seed=3)
    (found,) = torch.autograd.grad(y, (x,), of_output)
    (expected,) = torch.autograd.grad(fp8_linear(x, weight), (x,), of_output)
    assert torch.equal(found, 2 * expected)


def test_selective_recomputation_keeps_the_product() -> None:
    x, weight = inputs()
    with OnCuda() as seen:
        found = results(lambda x, weight: selective(lambda x: fp8_linear(x, weight).relu(), x), [x, weight])
    assert seen.products == 3, "the forward product was computed again"
    expected = results(lambda x, weight: fp8_linear(x, weight).relu(), [x, weight])
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_one_graph_that_computes_the_same() -> None:
    """`fullgraph`: nothing in it is left to Python. Inductor's code for it: the test on CUDA."""
    compiled = torch.compile(fp8_linear, backend="aot_eager", fullgraph=True, dynamic=False)
    for found, expected in zip(results(compiled, inputs()), results(fp8_linear, inputs()), strict=True):
        assert torch.equal(found, expected)


# ------------------------------------------------------------------- the choice


def test_a_cpu_emulates_and_says_so(make_config: MakeConfig) -> None:
    kernels = choose(make_config(*FP8), "cpu")
    assert kernels.linear is fp8_linear
    assert kernels.names["matmul"] == "fp8 (emulated)"
    assert choose(make_config(), "cpu").linear is torch_linear


def test_an_h100_does_not_emulate(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice.Machine, "of", lambda device_type: H100)
    assert choose(make_config(*FP8), "cuda").names["matmul"] == "fp8"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.d_ff=168", "model.d_ff / parallel.tensor is 84"),
        ("model.d_head=8", "model.n_kv_heads · model.d_head / parallel.tensor is 8"),
        ("model.d_model=72", "model.d_model is 72"),
        ("data.seq_len=20", r"batch.micro_sequences .* is 40"),
    ],
)
def test_sides_that_are_no_multiples_of_16_are_named(make_config: MakeConfig, override: str, key: str) -> None:
    assert available("matmul", "fp8", make_config(*FP8, "parallel.tensor=2"), H100) is None
    with pytest.raises(MegamupError, match=f"kernels.matmul=fp8 can't run here: .*{key}. What can: torch$"):
        choose(make_config(*FP8, "parallel.tensor=2", override), "cpu")


def test_older_gpus_are_refused(make_config: MakeConfig) -> None:
    lacks = [available("matmul", "fp8", make_config(*FP8), Machine("cuda", of)) for of in ((8, 0), (8, 9), (10, 0))]
    assert [reason is None for reason in lacks] == [False, True, True]
    assert "8.9" in str(lacks[0])


def test_needs_bf16(make_config: MakeConfig) -> None:
    with pytest.raises(MegamupError, match=r"kernels\.matmul=fp8 gives bf16, but precision is fp32: set precision"):
        make_config("kernels.matmul=fp8")


# ------------------------------------------------------------------- on CUDA


@pytest.fixture
def cuda() -> str:
    """The device; asked for here, since a process that has started CUDA can't fork ranks."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < matmul.FIRST_CAPABILITY:
        pytest.skip("needs an Ada or Hopper GPU or later")
    return "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_products_on_cuda_are_those_of_float64_but_for_8_bits(cuda: str, compiled: bool) -> None:
    backend = torch.compile(fp8_linear, fullgraph=True, dynamic=False) if compiled else fp8_linear
    compare_with_float64(backend, cuda)


@pytest.mark.gpu
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("inner", [64, 4096])
def test_cuda_multiplies_the_same_8_bits(cuda: str, inner: int, fast: bool) -> None:
    """Against float64 products of the 8-bit operands: what is left is bf16's rounding and that of the sum."""
    a, b = value(bf16(128, inner).to(cuda)), value(bf16(256, inner, seed=2).to(cuda))
    expected = exact(a) @ exact(b).t()
    assert error(product(a, b.t(), fast=fast), expected) < (0.02 if fast else 0.003)
    assert torch.equal(a.bits.float().cpu(), value(bf16(128, inner)).bits.float())


@pytest.mark.gpu
def test_compiled_on_cuda_is_faster_than_bf16(cuda: str) -> None:
    """Forward and backward of a layer of an 8B model, scaling included; the products alone are twice as fast."""
    x, weight = (torch.randn(shape, device=cuda).bfloat16().requires_grad_() for shape in ((8192, 4096), (14336, 4096)))
    of_output = torch.randn(8192, 14336, device=cuda).bfloat16()

    def milliseconds(linear: matmul.Linear) -> float:
        compiled = torch.compile(linear, fullgraph=True, dynamic=False)
        took = []
        for _ in range(8):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            torch.autograd.grad(compiled(x, weight), (x, weight), of_output)
            end.record()
            torch.cuda.synchronize()
            took.append(start.elapsed_time(end))
        return float(min(took))

    assert milliseconds(fp8_linear) < milliseconds(F.linear)
