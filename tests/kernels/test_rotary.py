"""Rotary positions against transformers' and against what they are for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megamup.kernels.rotary import rotate


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("theta", [10_000.0, 500.0])
def test_equals_transformers(theta: float) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama", reason="transformers is not installed")
    query, key = draw(2, 4, 20, 16), draw(2, 2, 20, 16)
    settings = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }
    embedding = llama.LlamaRotaryEmbedding(llama.LlamaConfig(**settings))
    cosine, sine = embedding(query, torch.arange(20)[None])
    theirs = llama.apply_rotary_pos_emb(query, key, cosine, sine)
    torch.testing.assert_close((rotate(query, theta), rotate(key, theta)), theirs)


def test_norms_of_pairs_are_kept_and_position_0_stays() -> None:
    x = draw(2, 3, 50, 8)
    y = rotate(x, 10_000.0)
    first, second = y.chunk(2, dim=-1)
    torch.testing.assert_close(first.square() + second.square(), x[..., :4].square() + x[..., 4:].square())
    torch.testing.assert_close(y[:, :, 0], x[:, :, 0])
    assert (y[:, :, 1:] - x[:, :, 1:]).abs().mean() > 0.1


def test_products_depend_on_the_distance_alone() -> None:
    """The same query and key at every position: the matrix of products is constant along its diagonals."""
    query, key = draw(1, 1, 1, 16).expand(1, 1, 30, 16), draw(1, 1, 2, 16)[:, :, 1:].expand(1, 1, 30, 16)
    products = (rotate(query, 100.0) @ rotate(key, 100.0).transpose(-2, -1))[0, 0]  # (seq, seq)
    torch.testing.assert_close(products[1:, 1:], products[:-1, :-1], atol=1e-4, rtol=1e-4)
    assert products[0].std() > 0.1
    assert (products - products.t()).abs().max() > 0.1  # left is not right


def test_bf16_keeps_its_type() -> None:
    x = draw(1, 2, 40, 8)
    y = rotate(x.bfloat16(), 10_000.0)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), rotate(x, 10_000.0), atol=0.05, rtol=0.05)
