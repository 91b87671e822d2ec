"""Fused attention against the plain one, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megamup.kernels.attention import reference, sdpa

Backend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
SHAPES = [(4, 4), (6, 2), (4, 1)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def inputs(heads: int, kv_heads: int, dtype: torch.dtype, device: str, d_head: int = 16) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    shapes = [(2, heads, 33, d_head), (2, kv_heads, 33, d_head), (2, kv_heads, 33, d_head)]
    return [torch.randn(shape, generator=draw).to(device, dtype).requires_grad_() for shape in shapes]


def compare(heads: int, kv_heads: int, scale: float, dtype: torch.dtype, device: str) -> None:
    query, key, value = inputs(heads, kv_heads, dtype, device)
    weight = torch.randn(query.shape, generator=torch.Generator().manual_seed(2)).to(device)
    results = []
    for backend in (reference, sdpa):
        y = backend(query, key, value, scale)
        assert (y.shape, y.dtype) == (query.shape, dtype)
        results.append((y, *torch.autograd.grad((y.float() * weight).sum(), (query, key, value))))
    for expected, found in zip(*results, strict=True):
        size = expected.float().abs().max()
        torch.testing.assert_close(found.float() / size, expected.float() / size, atol=TOLERANCE[dtype], rtol=0.0)


@pytest.mark.parametrize(("heads", "kv_heads"), SHAPES)
@pytest.mark.parametrize("scale", [1 / 4, 1 / 16, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sdpa_is_the_reference(heads: int, kv_heads: int, scale: float, dtype: torch.dtype) -> None:
    compare(heads, kv_heads, scale, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads"), SHAPES)
@pytest.mark.parametrize("scale", [1 / 4, 1 / 16, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sdpa_is_the_reference_on_cuda(heads: int, kv_heads: int, scale: float, dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    compare(heads, kv_heads, scale, dtype, "cuda")


def test_reference_by_hand() -> None:
    """Two positions, one head: the first sees itself alone, the second weighs both by softmax."""
    query, key = torch.tensor([[[[1.0], [2.0]]]]), torch.tensor([[[[3.0], [4.0]]]])
    value = torch.tensor([[[[10.0], [20.0]]]])
    second = 1 / (1 + torch.exp(torch.tensor(0.5 * 2.0 * (3.0 - 4.0))))
    expected = torch.tensor([10.0, 10.0 + 10.0 * second.item()])
    torch.testing.assert_close(reference(query, key, value, 0.5).flatten(), expected)


@pytest.mark.parametrize("backend", [reference, sdpa])
def test_query_heads_share_the_key_head_of_their_group(backend: Backend) -> None:
    """Heads 0, 1, 2 read key-value head 0, and 3, 4, 5 head 1: head by head, the same as without groups."""
    query, key, value = (x.detach() for x in inputs(6, 2, torch.float32, "cpu"))
    whole = backend(query, key, value, 0.3)
    for head in range(6):
        own = slice(head // 3, head // 3 + 1)
        alone = reference(query[:, head : head + 1], key[:, own], value[:, own], 0.3)
        torch.testing.assert_close(whole[:, head : head + 1], alone)
