"""Every kernel on CUDA against its reference in float64; run by ./dev gpu. What isn't installed is skipped by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megamup.kernels import attention, cross_entropy, mlp, norm, rotary
from megamup.kernels.attention import Mask, Scores
from megamup.kernels.choice import choose, import_error
from megamup.model import GATED, RopeScaling
from tests.conftest import MakeConfig
from tests.kernels.comparison import (
    ACROSS,
    HEADS,
    KEYS,
    MASKS,
    SEQ,
    Function,
    apart,
    distance,
    draw,
    heads,
    on,
    results,
)

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


BOTH = MASKS | ACROSS
PLAIN = Scores(1 / 64)
"""At 1/d_head, which no kernel has by default; heads of 64, which every one takes."""


def attended(backend: Function, scores: Scores, mask: Mask) -> Function:
    """``backend`` of query, key, value and, where it is given, the bias: the whole one, of all keys."""
    seen = on(mask, "cuda")

    def call(q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> Tensor:
        added = bias[0][..., : k.shape[2]] if bias else None
        return backend(q, k, v, replace(scores, bias=added), seen)  # type: ignore[no-any-return]

    return call


@pytest.mark.parametrize("mask", BOTH)
@pytest.mark.parametrize(("n_heads", "n_kv_heads"), HEADS)
@pytest.mark.parametrize(("backend", "dtype"), ATTENTION)
def test_attention(backend: Function, dtype: torch.dtype, n_heads: int, n_kv_heads: int, mask: str) -> None:
    torch.compiler.reset()
    inputs = heads(n_heads, n_kv_heads, d_head=64, keys=KEYS if mask in ACROSS else None)
    check(attended(backend, PLAIN, BOTH[mask]), attended(attention.reference, PLAIN, BOTH[mask]), inputs, dtype)


@pytest.mark.parametrize("mask", BOTH)
@pytest.mark.parametrize("backend", [attention.flex, pytest.param(attention.flash_attn, marks=FLASH)])
def test_soft_cap(backend: Function, mask: str) -> None:
    torch.compiler.reset()
    scores = Scores(0.2, soft_cap=1.5)
    inputs = heads(6, 2, d_head=64, keys=KEYS if mask in ACROSS else None)
    mine, exact = (attended(call, scores, BOTH[mask]) for call in (backend, attention.reference))
    check(mine, exact, inputs, torch.bfloat16)


@pytest.mark.parametrize("mask", BOTH)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("backend", [attention.sdpa, attention.cudnn_sdpa, attention.flex])
def test_bias_and_its_gradient(backend: Function, batch: int, mask: str) -> None:
    """cuDNN's kernel would leave it out."""
    torch.compiler.reset()
    inputs = [*heads(6, 2, d_head=64, keys=KEYS if mask in ACROSS else None), draw(batch, 6, SEQ, SEQ, seed=4)]
    mine, exact = (attended(call, PLAIN, BOTH[mask]) for call in (backend, attention.reference))
    check(mine, exact, inputs, torch.bfloat16)


def test_flex_has_the_cap_and_the_bias() -> None:
    torch.compiler.reset()
    inputs = [*heads(6, 2, d_head=64), draw(1, 6, SEQ, SEQ, seed=4)]
    mine, exact = (attended(call, Scores(0.2, 1.5), MASKS["both"]) for call in (attention.flex, attention.reference))
    check(mine, exact, inputs, torch.float32)


@pytest.mark.parametrize(("backend", "dtype"), ATTENTION)
def test_long_attention(backend: Function, dtype: torch.dtype) -> None:
    """Many blocks, the last one part full, of the width of a large model's heads."""
    torch.compiler.reset()
    mine, exact = (attended(call, Scores(0.02), Mask(window=300)) for call in (backend, attention.reference))
    check(mine, exact, heads(8, 2, seq=1000, d_head=128), dtype)


@pytest.mark.parametrize("biased", [False, True])
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
def test_compiled_attention(backend: Function, mask: str, biased: bool) -> None:
    """One graph with what stands before it, by Inductor; the mask is made inside, as a block does."""
    torch.compiler.reset()
    seen = on(MASKS[mask], "cuda")
    if backend is attention.flash_attn and (biased or seen.documents is not None):
        pytest.skip("no bias; and with documents it isn't chosen for compiled blocks")

    def region(q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> Tensor:
        q, k = rotary.torch_rotate(q, k, rotary.Rotation(500.0))
        scores = Scores(1 / 64, bias=bias[0] if bias else None)
        return backend(q, k, v, scores, Mask(seen.window, seen.documents, seen.causal))  # type: ignore[no-any-return]

    drawn = [*heads(6, 2, d_head=64), draw(1, 6, SEQ, SEQ, seed=4)]
    inputs = [x.to("cuda", torch.bfloat16) for x in drawn[: 3 + biased]]
    compiled = torch.compile(region, fullgraph=True, dynamic=False)
    assert apart(results(compiled, inputs), results(region, inputs)) < TOLERANCE[torch.bfloat16]


def test_flex_keeps_no_scores_where_blocks_run_uncompiled() -> None:
    """As they do in a monitored step."""
    torch.compiler.reset()
    query, key, value = (x.to("cuda", torch.bfloat16).requires_grad_() for x in heads(8, 8, seq=4096, d_head=64))
    scores = 2 * 8 * 4096**2 * 4
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.compiler.set_stance("force_eager"):
        attention.flex(query, key, value, Scores(0.1, soft_cap=2.0), Mask(window=512)).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 0.3 * scores


@pytest.mark.parametrize("mask", ["documents", "both ways, documents"])
def test_documents_are_apart_on_cuda(mask: str) -> None:
    seen = on(MASKS[mask], "cuda")
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
        before, after = backend(query, key, value, Scores(0.1), seen), backend(*other, Scores(0.1), seen)
        assert torch.equal(before[0, :, 6:], after[0, :, 6:])
        assert not torch.equal(before[0, :, :6], after[0, :, :6])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("n_heads", "n_kv_heads"), HEADS)
def test_sdpa_is_never_the_plain_one(n_heads: int, n_kv_heads: int, mask: str) -> None:
    """torch would take it without a word, with all scores in memory; cuDNN's is taken on Hopper and later."""
    seen = on(MASKS[mask], "cuda")
    query, key, value = (x.to("cuda", torch.bfloat16) for x in heads(n_heads, n_kv_heads, d_head=64))
    visible = seen.visible(query.shape[2], query.shape[2], query.device) if seen.dense else None
    if visible is not None:
        key, value = attention.per_query_head(key, query), attention.per_query_head(value, query)
    grouped = key.shape[1] != query.shape[1]

    def taken() -> int:
        arguments = (query, key, value, visible, 0.0, visible is None and seen.causal)
        return torch._fused_sdp_choice(*arguments, scale=0.1, enable_gqa=grouped)

    assert taken() not in (SDPBackend.MATH.value, SDPBackend.ERROR.value)
    if visible is None and torch.cuda.get_device_capability() >= (9, 0):
        with sdpa_kernel(attention.CUDNN_FIRST, set_priority=True):
            assert taken() == SDPBackend.CUDNN_ATTENTION.value


@pytest.mark.parametrize("dtype", TYPES)
def test_sdpa_with_a_bias_is_the_efficient_one(dtype: torch.dtype) -> None:
    query, key, value = (x.to("cuda", dtype) for x in heads(4, 4, d_head=64))
    bias = draw(1, 4, SEQ, SEQ).to("cuda", dtype).requires_grad_()
    with sdpa_kernel(attention.WITH_A_BIAS):
        taken = torch._fused_sdp_choice(query, key, value, bias, 0.0, False, scale=0.1)
    assert taken == SDPBackend.EFFICIENT_ATTENTION.value


WIDTHS = [(7, 48), (300, 4096)]
"""Rows and columns: few and odd, and as a large model has them."""


@pytest.mark.parametrize(("rows", "width"), WIDTHS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("backend", [norm.torch_rms_norm, pytest.param(norm.liger_rms_norm, marks=LIGER)])
def test_rms_norm(backend: Function, dtype: torch.dtype, rows: int, width: int) -> None:
    mine, exact = (lambda x, w, call=call: call(x, w, 0.1) for call in (backend, norm.reference_rms_norm))
    check(mine, exact, [draw(2, rows, width), draw(width, seed=2)], dtype)


@pytest.mark.parametrize("seq", [7, 3000])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("backend", [norm.torch_rms_norm, pytest.param(norm.liger_rms_norm, marks=LIGER)])
def test_rms_norm_of_heads(backend: Function, dtype: torch.dtype, seq: int) -> None:
    """Rows of d_head, which don't lie one after another; from 32,768 of them on Liger takes sixteen at a time."""
    mine, exact = (lambda x, w, call=call: call(x, w, 0.1) for call in (backend, norm.reference_rms_norm))
    query, *_ = heads(8, 8, seq=seq, d_head=64)
    check(mine, exact, [query, draw(64, seed=2)], dtype)


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
    ("name", "backend"),
    [
        *mlp.TORCH.items(),
        *(pytest.param(name, backend, marks=LIGER) for name, backend in mlp.LIGER.items()),
    ],
)
def test_mlp(name: str, backend: Function, dtype: torch.dtype, rows: int, width: int) -> None:
    inputs = [3 * draw(2, rows, width), draw(2, rows, width, seed=2)]
    check(backend, mlp.REFERENCE[name], inputs[: 2 if name in GATED else 1], dtype)


YARN = RopeScaling(kind="yarn", factor=4.0, original_max_seq_len=64)


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), HEADS)
@pytest.mark.parametrize("seq", [33, 5000])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("scaling", [None, YARN], ids=["plain", "yarn"])
@pytest.mark.parametrize("backend", [rotary.torch_rotate, pytest.param(rotary.liger_rotate, marks=LIGER)])
def test_rotary(
    backend: Function, scaling: RopeScaling | None, dtype: torch.dtype, seq: int, n_heads: int, n_kv_heads: int
) -> None:
    """A position's angle itself has an error of position x 6e-8 in fp32."""
    rotation = rotary.Rotation(500.0, scaling)
    mine, exact = (lambda q, k, call=call: call(q, k, rotation) for call in (backend, rotary.reference_rotate))
    found = distance(mine, exact, heads(n_heads, n_kv_heads, seq=seq, d_head=64)[:2], dtype, "cuda")
    assert found < TOLERANCE[dtype] + seq * 2e-7


@LIGER
def test_compiled_liger() -> None:
    """Its kernels within a region, where ``auto`` prefers torch's: asked for by name they have to work."""
    torch.compiler.reset()

    def region(x: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        x = norm.liger_layer_norm(norm.liger_rms_norm(x + up, weight, 1e-5), weight, None, 1e-5)
        by_head = x.unflatten(-1, (4, -1)).transpose(1, 2)
        query, key = rotary.liger_rotate(by_head, by_head * 2, rotary.Rotation(500.0))
        gate = mlp.liger_swiglu((query + key).transpose(1, 2).flatten(2), up * 1)
        return mlp.liger_geglu_tanh(gate, up + 1)

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

    def exact(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return (F.cross_entropy(0.7 * hidden @ weight.t() + bias, targets, reduction="none") * weights).sum()

    def mine(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return cross_entropy.liger(hidden, weight, targets, weights.float(), 0.7, bias).to(hidden.dtype)

    check(mine, exact, [draw(tokens, width), draw(vocab, width, seed=2), draw(vocab, seed=3)], dtype)


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
