"""What the comparisons of kernels with their references share: the same inputs, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megamup.kernels.attention import Mask

Function = Callable[..., Any]

HEADS = [(4, 4), (6, 2), (4, 1)]
"""Query heads and key-value heads."""
SEQ, D_HEAD = 33, 16

DOCUMENTS = torch.tensor([[0] * 5 + [1] + [2] * 27, [0] * 33])
KEY_DOCUMENTS = torch.tensor([[0] * 11 + [1] * 2 + [2] * 7, [0] * 19 + [1]])
"""Of 20 keys of another stack."""
MASKS = {
    "causal": Mask(),
    "window": Mask(window=7),
    "documents": Mask(documents=DOCUMENTS),
    "both": Mask(window=7, documents=DOCUMENTS),
    "both ways": Mask(causal=False),
    "both ways, documents": Mask(documents=DOCUMENTS, causal=False),
}
ACROSS = {
    "across": Mask(causal=False),
    "across, documents": Mask(documents=DOCUMENTS, causal=False, key_documents=KEY_DOCUMENTS),
}
"""From 33 queries to 20 keys."""
KEYS = KEY_DOCUMENTS.shape[1]


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heads(
    n_heads: int, n_kv_heads: int, seq: int = SEQ, d_head: int = D_HEAD, keys: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of two sequences, laid out as a model's projections leave them."""

    def one(count: int, seed: int, length: int) -> Tensor:
        return draw(2, length, count, d_head, seed=seed).transpose(1, 2)

    return one(n_heads, 1, seq), one(n_kv_heads, 2, keys or seq), one(n_kv_heads, 3, keys or seq)


def on(mask: Mask, device: str) -> Mask:
    moved = [None if x is None else x.to(device) for x in (mask.documents, mask.key_documents)]
    return Mask(mask.window, moved[0], mask.causal, moved[1])


def results(function: Function, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs of ``function``, then the gradients of a fixed random combination of them by every input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    outputs = list(y) if isinstance(y, tuple) else [y]
    weights = [draw(*output.shape, seed=10 + at).to(output) for at, output in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, leaves, weights)
    return [x.detach() for x in (*outputs, *gradients)]


def apart(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference of any tensor's elements, relative to the tensor's largest."""
    assert [x.shape for x in found] == [x.shape for x in expected]
    pairs = [(x.double().cpu(), y.double().cpu()) for x, y in zip(found, expected, strict=True)]
    return max(((x - y).abs().max() / y.abs().max()).item() for x, y in pairs)


def distance(
    backend: Function,
    reference: Function,
    inputs: Sequence[Tensor],
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> float:
    """How far ``backend`` in ``dtype`` lies from ``reference`` in float64 on the same, rounded, inputs."""
    rounded = [x.to(device, dtype) for x in inputs]
    found = results(backend, rounded)
    assert all(x.dtype == dtype for x in found)
    return apart(found, results(reference, [x.double() for x in rounded]))
