"""Rotary positions against transformers' and against what they are for."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from megamup.errors import MegamupError
from megamup.kernels.rotary import Rotation, frequencies, reference_rotate, rotate, temper, torch_rotate
from megamup.model import RopeScaling
from tests.kernels.comparison import apart, distance, heads, results

PLAIN = Rotation(500.0)
SCALINGS = {
    "linear": {},
    "ntk": {},
    "yarn": {},
    "yarn, narrow": {"kind": "yarn", "beta_fast": 4.0, "beta_slow": 3.0},
    "llama3": {},
    "llama3, wide": {"kind": "llama3", "low_freq_factor": 0.5, "high_freq_factor": 30.0},
}


def scaled(name: str, theta: float = 10_000.0, **more: Any) -> Rotation:
    kind = name.split(",")[0]
    values = {"kind": kind, "factor": 4.0, "original_max_seq_len": 64} | SCALINGS[name] | more
    return Rotation(theta, RopeScaling.model_validate(values))


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def embedding(theta: float, d_head: int, longest: int, **parameters: Any) -> Any:
    """transformers' module of cosines and sines, made for sequences of ``longest``."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama", reason="transformers is not installed")
    settings = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "head_dim": d_head,
        "max_position_embeddings": longest,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta, **parameters},
    }
    return llama.LlamaRotaryEmbedding(llama.LlamaConfig(**settings))


@pytest.mark.parametrize("theta", [10_000.0, 500.0])
def test_equals_transformers(theta: float) -> None:
    theirs = embedding(theta, 16, 64)
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    query, key = draw(2, 4, 20, 16), draw(2, 2, 20, 16)
    turned = llama.apply_rotary_pos_emb(query, key, *theirs(query, torch.arange(20)[None]))
    rotation = Rotation(theta)
    torch.testing.assert_close((rotate(query, rotation), rotate(key, rotation)), turned)


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("d_head", [16, 64, 128])
@pytest.mark.parametrize("name", SCALINGS)
def test_scalings_equal_transformers(name: str, d_head: int, theta: float) -> None:
    """``ntk`` is their dynamic one where it has grown to the whole factor."""
    rotation = scaled(name, theta)
    scaling = rotation.scaling
    assert scaling is not None
    keys = {"low_freq_factor", "high_freq_factor"} if scaling.kind == "llama3" else {"beta_fast", "beta_slow"}
    more = {key: getattr(scaling, key) for key in keys if scaling.kind in ("yarn", "llama3")}
    if scaling.kind in ("yarn", "llama3"):
        more["original_max_position_embeddings"] = 64
    kind = "dynamic" if scaling.kind == "ntk" else scaling.kind
    longest = 64 if kind == "dynamic" else 256
    theirs = embedding(theta, d_head, longest, rope_type=kind, factor=4.0, **more)
    seq = 64 * 7 // 4  # (factor · seq / 64) - (factor - 1) is the factor
    cosine, sine = theirs(draw(1, 1, seq, d_head), torch.arange(seq)[None])
    ours = frequencies(rotation, d_head, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(ours, theirs.inv_freq, rtol=2e-6, atol=0.0)
    assert temper(rotation) == pytest.approx(theirs.attention_scaling, abs=1e-12)
    x = draw(1, 2, seq, d_head)
    half = torch.cat((-x[..., d_head // 2 :], x[..., : d_head // 2]), dim=-1)
    torch.testing.assert_close(rotate(x, rotation), x * cosine + half * sine, rtol=0.0, atol=2e-4)
    assert apart([ours], [frequencies(Rotation(theta), d_head, torch.device("cpu"), torch.float32)]) < 1
    assert not torch.equal(ours, frequencies(Rotation(theta), d_head, torch.device("cpu"), torch.float32))


def test_yarns_temperature() -> None:
    """Attention logits grow by its square: by 30% at factor 4."""
    query, key = draw(1, 1, 1, 64), draw(1, 1, 1, 64) + 1
    rotation = scaled("yarn")
    grown = (rotate(query, rotation) * rotate(key, rotation)).sum() / (query * key).sum()
    assert grown.item() == pytest.approx((0.1 * 1.3862943611198906 + 1) ** 2, rel=1e-5)
    assert temper(scaled("linear")) == temper(PLAIN) == 1.0


def test_ntk_of_one_pair_is_refused() -> None:
    with pytest.raises(MegamupError, match=r"ntk needs model\.d_head of 4 or more"):
        rotate(draw(1, 1, 3, 2), scaled("ntk"))


def test_norms_of_pairs_are_kept_and_position_0_stays() -> None:
    x = draw(2, 3, 50, 8)
    y = rotate(x, Rotation(10_000.0))
    first, second = y.chunk(2, dim=-1)
    torch.testing.assert_close(first.square() + second.square(), x[..., :4].square() + x[..., 4:].square())
    torch.testing.assert_close(y[:, :, 0], x[:, :, 0])
    assert (y[:, :, 1:] - x[:, :, 1:]).abs().mean() > 0.1


@pytest.mark.parametrize("rotation", [Rotation(100.0), scaled("yarn", 100.0)], ids=["plain", "yarn"])
def test_products_depend_on_the_distance_alone(rotation: Rotation) -> None:
    """The same query and key at every position: the matrix of products is constant along its diagonals."""
    query, key = draw(1, 1, 1, 16).expand(1, 1, 30, 16), draw(1, 1, 2, 16)[:, :, 1:].expand(1, 1, 30, 16)
    products = (rotate(query, rotation) @ rotate(key, rotation).transpose(-2, -1))[0, 0]  # (seq, seq)
    torch.testing.assert_close(products[1:, 1:], products[:-1, :-1], atol=1e-4, rtol=1e-4)
    assert products[0].std() > 0.1
    assert (products - products.t()).abs().max() > 0.1  # left is not right


def test_bf16_keeps_its_type() -> None:
    x, rotation = draw(1, 2, 40, 8), Rotation(10_000.0)
    y = rotate(x.bfloat16(), rotation)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), rotate(x, rotation), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("rotation", [PLAIN, scaled("yarn"), scaled("llama3")], ids=["plain", "yarn", "llama3"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_pairs_are_turned_as_complex_numbers_are(dtype: torch.dtype, tolerance: float, rotation: Rotation) -> None:
    query, key, _ = heads(6, 2)
    for backend in (torch_rotate, reference_rotate):
        mine, exact = (lambda q, k, call=call: call(q, k, rotation) for call in (backend, reference_rotate))
        assert distance(mine, exact, (query, key), dtype) < tolerance


def test_compiled_takes_the_table_as_it_is() -> None:
    """No cosine in the graph, whose results are the same; one graph for all layers, each with a rotation of its own."""
    torch.compiler.reset()
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    scaling = scaled("yarn").scaling
    inputs = heads(6, 2)[:2]
    compiled = torch.compile(torch_rotate, fullgraph=True, dynamic=False, backend=keep)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            rotation = Rotation(500.0, scaling)
            found = results(lambda q, k, own=rotation: compiled(q, k, own), inputs)
            expected = results(lambda q, k, own=rotation: torch_rotate(q, k, own), inputs)
            assert apart(found, expected) == 0.0
    (graph,) = graphs
    assert ".cos(" not in graph.code
    assert "torch.cat(" in graph.code


def test_compiled_another_rotation_has_another_table() -> None:
    torch.compiler.reset()
    compiled = torch.compile(torch_rotate, fullgraph=True, dynamic=False, backend="eager")
    query, key, _ = heads(6, 2)
    for rotation in (PLAIN, Rotation(400.0), scaled("linear"), scaled("linear", factor=8.0), scaled("yarn"), PLAIN):
        assert apart(list(compiled(query, key, rotation)), list(torch_rotate(query, key, rotation))) == 0.0
