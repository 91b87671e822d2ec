"""Rotary positions against transformers' and against what they are for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megamup.kernels.rotary import reference_rotate, rotate, torch_rotate
from tests.kernels.comparison import apart, distance, heads, results


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


@pytest.mark.parametrize("offset", [0, 5])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_pairs_are_turned_as_complex_numbers_are(dtype: torch.dtype, tolerance: float, offset: int) -> None:
    query, key, _ = heads(6, 2)
    for backend in (torch_rotate, reference_rotate):
        mine, exact = (lambda q, k, call=call: call(q, k, 500.0, offset) for call in (backend, reference_rotate))
        assert distance(mine, exact, (query, key), dtype) < tolerance


def test_a_stretch_is_the_part_of_the_whole_that_begins_at_its_offset() -> None:
    query, key, _ = heads(6, 2)
    whole = torch_rotate(query, key, 500.0)
    stretch = torch_rotate(query[:, :, 11:22], key[:, :, 11:22], 500.0, offset=11)
    for x, part in zip(whole, stretch, strict=True):
        torch.testing.assert_close(x[:, :, 11:22], part, rtol=0.0, atol=0.0)
    wrong = torch_rotate(query[:, :, 11:22], key[:, :, 11:22], 500.0)
    assert apart(wrong, stretch) > 0.1


def test_compiled_takes_the_table_as_it_is() -> None:
    """No cosine in the graph, whose results are the same."""
    torch.compiler.reset()
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    call = lambda q, k: torch_rotate(q, k, 500.0)  # noqa: E731
    inputs = heads(6, 2)[:2]
    compiled = torch.compile(call, fullgraph=True, dynamic=False, backend=keep)
    assert apart(results(compiled, inputs), results(call, inputs)) == 0.0
    (graph,) = graphs
    assert ".cos(" not in graph.code
    assert "torch.cat(" in graph.code
