"""Every kernel on CUDA against its reference in float64; run by ./dev gpu. What isn't installed is skipped by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megamup.kernels import attention, cross_entropy, mlp, norm, rotary
from megamup.kernels.choice import choose, import_error
from tests.conftest import MakeConfig
from tests.kernels.comparison import HEADS, MASKS, Function, apart, distance, draw, heads, on, results

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""Of the largest element: some roundings of the type (6e-8 and 4e-3), and of sums over a sequence."""
TYPES = [torch.float32, torch.bfloat16]
LIGER = pytest.mark.skipif(
    torch.cuda.is_available() and import_error("liger_kernel.ops.rms_norm") is not None, reason="no liger-kernel"
)
FLASH = pytest.mark.skipif(torch.cuda.is_available() and import_error("flash_attn") is not None, reason="no flash-attn")


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def check(backend: Function, reference: Function, inputs: Sequence[Tensor], dtype: torch.dtype) -> None:
    assert distance(backend, reference, inputs, dtype, "cuda") < TOLERANCE[dtype]


ATTENTION = [
    pytest.param(attention.reference, torch.float32, id="reference-fp32"),
    pytest.param(attention.sdpa, torch.float32, id="sdpa-fp32"),
    pytest.param(attention.sdpa, torch.bfloat16, id="sdpa-bf16"),
    pytest.param(attention.cudnn_sdpa, torch.bfloat16, id="cudnn_sdpa-bf16"),
    pytest.param(attention.flex, torch.float32, id="flex-fp32"),
    pytest.param(attention.flex, torch.bfloat16, id="flex-bf16"),
    pytest.param(attention.flash_attn, torch.bfloat16, id="flash_attn-bf16", marks=FLASH),
]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("n_heads", "n_kv_heads"), HEADS)
@pytest.mark.parametrize(("backend", "dtype"), ATTENTION)
def test_attention(backend: Function, dtype: torch.dtype, n_heads: int, n_kv_heads: int, mask: str) -> None:
    """At 1/d_head, which no kernel has by default, and d_head 64, which every one takes."""
    torch.compiler.reset()
    seen = on(MASKS[mask], "cuda")
    check(
        lambda q, k, v: backend(q, k, v, 1 / 64, seen),
        lambda q, k, v: attention.reference(q, k, v, 1 / 64, seen),
        heads(n_heads, n_kv_heads, d_head=64),
        dtype,
    )


@pytest.mark.parametrize(("backend", "dtype"), ATTENTION)
def test_long_attention(backend: Function, dtype: torch.dtype) -> None:
    """Many blocks, the last one part full, of the width of a large model's heads."""
    torch.compiler.reset()
    check(
        lambda q, k, v: backend(q, k, v, 0.02, attention.Mask(window=300)),
        lambda q, k, v: attention.reference(q, k, v, 0.02, attention.Mask(window=300)),
        heads(8, 2, seq=1000, d_head=128),
        dtype,
    )


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "backend",
    [
        attention.sdpa,
        attention.cudnn_sdpa,
        attention.flex,
        pytest.param(attention.flash_attn, marks=FLASH),
    ],
)
def test_compiled_attention(backend: Function, mask: str) -> None:
    """One graph with what stands before it, by Inductor."""
    torch.compiler.reset()
    seen = on(MASKS[mask], "cuda")
    if seen.documents is not None and backend in (attention.flash_attn, attention.flex):
        assert seen.boundaries is not None  # what waits for the device is computed before the region
        assert seen.document_blocks is not None

    def region(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = rotary.torch_rotate(q, k, 500.0)
        return backend(q, k, v, 1 / 64, seen)  # type: ignore[no-any-return]

    inputs = [x.to("cuda", torch.bfloat16) for x in heads(6, 2, d_head=64)]
    compiled = torch.compile(region, fullgraph=True, dynamic=False)
    assert apart(results(compiled, inputs), results(region, inputs)) < TOLERANCE[torch.bfloat16]


def test_documents_are_apart_on_cuda() -> None:
    seen = on(MASKS["documents"], "cuda")
    query, key, value = (x.to("cuda", torch.bfloat16) for x in heads(6, 2, d_head=64))
    other = [x.clone() for x in (query, key, value)]
    for x in other:
        x[0, :, :6] = 3.0
    backends: list[Function] = [
        attention.sdpa,
        attention.flex,
        *([] if import_error("flash_attn") else [attention.flash_attn]),
    ]
    for backend in backends:
        before, after = backend(query, key, value, 0.1, seen), backend(*other, 0.1, seen)
        assert torch.equal(before[0, :, 6:], after[0, :, 6:])
        assert not torch.equal(before[0, :, :6], after[0, :, :6])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("n_heads", "n_kv_heads"), HEADS)
def test_sdpa_is_never_the_plain_one(n_heads: int, n_kv_heads: int, mask: str) -> None:
    """torch would take it without a word, with all scores in memory; cuDNN's is taken on Hopper and later."""
    seen = on(MASKS[mask], "cuda")
    query, key, value = (x.to("cuda", torch.bfloat16) for x in heads(n_heads, n_kv_heads, d_head=64))
    visible = None if seen.plain else seen.visible(query.shape[2], query.device)
    if visible is not None:
        key, value = attention.per_query_head(key, query), attention.per_query_head(value, query)
    grouped = key.shape[1] != query.shape[1]

    def taken() -> int:
        arguments = (query, key, value, visible, 0.0, visible is None)
        return torch._fused_sdp_choice(*arguments, scale=0.1, enable_gqa=grouped)

    assert taken() not in (SDPBackend.MATH.value, SDPBackend.ERROR.value)
    if visible is None and torch.cuda.get_device_capability() >= (9, 0):
        with sdpa_kernel(attention.CUDNN_FIRST, set_priority=True):
            assert taken() == SDPBackend.CUDNN_ATTENTION.value


WIDTHS = [(7, 48), (300, 4096)]
"""Rows and columns: few and odd, and as a large model has them."""


@pytest.mark.parametrize(("rows", "width"), WIDTHS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("backend", [norm.torch_rms_norm, pytest.param(norm.liger_rms_norm, marks=LIGER)])
def test_rms_norm(backend: Function, dtype: torch.dtype, rows: int, width: int) -> None:
    mine, exact = (lambda x, w, call=call: call(x, w, 0.1) for call in (backend, norm.reference_rms_norm))
    check(mine, exact, [draw(2, rows, width), draw(width, seed=2)], dtype)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("rows", "width"), WIDTHS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("backend", [norm.torch_layer_norm, pytest.param(norm.liger_layer_norm, marks=LIGER)])
def test_layer_norm(backend: Function, dtype: torch.dtype, rows: int, width: int, biased: bool) -> None:
    mine, exact = (lambda x, w, b=None, call=call: call(x, w, b, 0.1) for call in (backend, norm.reference_layer_norm))
    inputs = [draw(2, rows, width) + 3, draw(width, seed=2), draw(width, seed=3)]
    check(mine, exact, inputs[: 2 + biased], dtype)


@pytest.mark.parametrize(("rows", "width"), WIDTHS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("backend", "reference"),
    [
        (mlp.torch_swiglu, mlp.reference_swiglu),
        pytest.param(mlp.liger_swiglu, mlp.reference_swiglu, marks=LIGER),
        (mlp.torch_geglu, mlp.reference_geglu),
        (lambda gate, up: mlp.torch_gelu(gate) * up, mlp.reference_geglu),
    ],
)
def test_mlp(backend: Function, reference: Function, dtype: torch.dtype, rows: int, width: int) -> None:
    check(backend, reference, [3 * draw(2, rows, width), draw(2, rows, width, seed=2)], dtype)


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), HEADS)
@pytest.mark.parametrize("offset", [0, 5000])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("backend", [rotary.torch_rotate, pytest.param(rotary.liger_rotate, marks=LIGER)])
def test_rotary(backend: Function, dtype: torch.dtype, offset: int, n_heads: int, n_kv_heads: int) -> None:
    """A position's angle itself has an error of position x 6e-8 in fp32."""
    mine, exact = (lambda q, k, call=call: call(q, k, 500.0, offset) for call in (backend, rotary.reference_rotate))
    found = distance(mine, exact, heads(n_heads, n_kv_heads, d_head=64)[:2], dtype, "cuda")
    assert found < TOLERANCE[dtype] + offset * 2e-7


@LIGER
def test_compiled_liger() -> None:
    """Its kernels within a region, where ``auto`` prefers torch's: asked for by name they have to work."""
    torch.compiler.reset()

    def region(x: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        x = norm.liger_layer_norm(norm.liger_rms_norm(x + up, weight, 1e-5), weight, None, 1e-5)
        by_head = x.unflatten(-1, (4, -1)).transpose(1, 2)
        query, key = rotary.liger_rotate(by_head, by_head * 2, 500.0)
        return mlp.liger_swiglu((query + key).transpose(1, 2).flatten(2), up * 1)

    inputs = [x.to("cuda", torch.bfloat16) for x in (draw(2, 33, 256), draw(2, 33, 256, seed=2), draw(256, seed=3))]
    compiled = torch.compile(region, fullgraph=True, dynamic=False)
    assert apart(results(compiled, inputs), results(region, inputs)) < TOLERANCE[torch.bfloat16]


@LIGER
@pytest.mark.parametrize("weighting", ["number", "mask", "any"])
@pytest.mark.parametrize("dtype", TYPES)
def test_liger_cross_entropy(dtype: torch.dtype, weighting: str) -> None:
    tokens, width, vocab = 600, 64, 1000
    uniform = torch.rand(tokens, generator=torch.Generator().manual_seed(3), dtype=torch.float64).cuda()
    weights = {"number": uniform[0], "mask": (uniform > 0.4) * 0.7, "any": uniform}[weighting]
    targets = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(4)).cuda()

    def exact(hidden: Tensor, weight: Tensor) -> Tensor:
        return (F.cross_entropy(0.5 * hidden @ weight.t(), targets, reduction="none") * weights).sum()

    def mine(hidden: Tensor, weight: Tensor) -> Tensor:
        return cross_entropy.liger(hidden, weight, targets, weights.float(), 0.5).to(hidden.dtype)

    check(mine, exact, [draw(tokens, width), draw(vocab, width, seed=2)], dtype)


@LIGER
def test_liger_cross_entropy_keeps_no_logits() -> None:
    """Peak memory beyond the inputs and their gradients stays far below the logits' 2 GiB."""
    tokens, width, vocab = 8192, 512, 131_072
    hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, vocab, (tokens,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    cross_entropy.liger(hidden, weight, targets, torch.tensor(1 / tokens, device="cuda"), 1.0).backward()
    logits = tokens * vocab * 2
    assert torch.cuda.max_memory_allocated() - before < 0.4 * logits


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_auto_takes_what_is_installed(make_config: MakeConfig, precision: str) -> None:
    names = choose(make_config(f"precision={precision}"), "cuda").names
    ampere = (8, 0) <= torch.cuda.get_device_capability() < (9, 0)
    flash = ampere and precision == "bf16" and import_error("flash_attn") is None
    assert names["attention"] == ("flash_attn" if flash else "sdpa")
    assert (names["norm"] == "liger") == (import_error("liger_kernel.ops.rms_norm") is None)
    compiled = choose(make_config(f"precision={precision}", "kernels.compile=true"), "cuda").names
    assert (compiled["norm"], compiled["mlp"], compiled["rotary"]) == ("torch", "torch", "torch")
