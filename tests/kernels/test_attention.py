"""Every attention backend against the plain one in float64, and masks against what they are for."""

from __future__ import annotations

import sys
from functools import partial
from types import ModuleType

import pytest
import torch
from torch import Tensor

from megamup.errors import MegamupError
from megamup.kernels import attention
from megamup.kernels.attention import CAUSAL, Attention, Mask, cudnn_sdpa, flash_attn, flex, reference, sdpa
from tests.kernels.comparison import (
    D_HEAD,
    DOCUMENTS,
    HEADS,
    MASKS,
    SEQ,
    Function,
    apart,
    distance,
    draw,
    heads,
    results,
)

SCALES = [1 / 4, 1 / 16, 0.9]
"""1/√d_head, μP's 1/d_head, and one that is neither."""
CPU_BACKENDS = {"sdpa": sdpa, "flash_attn": flash_attn, "flex": flex}


@pytest.fixture(autouse=True)
def emulated_flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn's two functions as its documentation has them, position by position, with the checks of its C++."""
    module = ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool, window_size: tuple[int, int] = (-1, -1)
) -> Tensor:
    """(batch, seq, heads, d_head): "query at position i attends to keys between i - window_size[0] and i +
    window_size[1] inclusive", -1 for no bound, and none after i when causal."""
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    left, right = window_size
    groups, rows = q.shape[2] // k.shape[2], []
    for i in range(q.shape[1]):
        first = 0 if left < 0 else max(0, i - left)
        last = i if causal else q.shape[1] - 1 if right < 0 else i + right
        seen = [x[:, first : last + 1].repeat_interleave(groups, dim=2) for x in (k, v)]
        weights = torch.einsum("bhd,bjhd->bhj", q[:, i], seen[0]).mul(softmax_scale).softmax(-1)
        rows.append(torch.einsum("bhj,bjhd->bhd", weights, seen[1]))
    return torch.stack(rows, dim=1)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, softmax_scale: float, causal: bool, window_size: tuple[int, int],
) -> Tensor:  # fmt: skip
    """(tokens, heads, d_head), sequence i from cu_seqlens[i] to cu_seqlens[i + 1]."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert [int(cu_seqlens_q[0]), int(cu_seqlens_q[-1])] == [0, len(q)]
    lengths = cu_seqlens_q.diff()
    assert lengths.min() >= 0
    assert max_seqlen_q == max_seqlen_k >= lengths.max()
    parts = [x.split(lengths.tolist()) for x in (q, k, v)]
    attend = partial(flash_attn_func, softmax_scale=softmax_scale, causal=causal, window_size=window_size)
    return torch.cat([attend(*(x[None] for x in one))[0] for one in zip(*parts, strict=True) if len(one[0])])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("n_heads", "n_kv_heads"), HEADS)
@pytest.mark.parametrize("backend", [sdpa, cudnn_sdpa, flash_attn])
def test_backends_are_the_reference(backend: Attention, n_heads: int, n_kv_heads: int, mask: str) -> None:
    inputs = heads(n_heads, n_kv_heads)
    for scale in SCALES:
        found = distance(
            lambda q, k, v, scale=scale: backend(q, k, v, scale, MASKS[mask]),
            lambda q, k, v, scale=scale: reference(q, k, v, scale, MASKS[mask]),
            inputs,
        )
        assert found < 1e-13


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("backend", [reference, sdpa])
def test_lower_precision(backend: Attention, dtype: torch.dtype, tolerance: float) -> None:
    for mask in MASKS.values():
        mine = lambda q, k, v, mask=mask: backend(q, k, v, 0.2, mask)  # noqa: E731
        exact = lambda q, k, v, mask=mask: reference(q, k, v, 0.2, mask)  # noqa: E731
        assert distance(mine, exact, heads(6, 2), dtype) < tolerance


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("n_heads", "n_kv_heads"), HEADS)
def test_flex_is_the_reference_forward(n_heads: int, n_kv_heads: int, mask: str) -> None:
    """All of it that a CPU has."""
    query, key, value = (x.float() for x in heads(n_heads, n_kv_heads))
    for scale in SCALES:
        expected = reference(query.double(), key.double(), value.double(), scale, MASKS[mask])
        assert apart([flex(query, key, value, scale, MASKS[mask])], [expected]) < 2e-6


def test_reference_by_hand() -> None:
    """Two positions, one head: the first sees itself alone, the second weighs both by softmax."""
    query, key = torch.tensor([[[[1.0], [2.0]]]]), torch.tensor([[[[3.0], [4.0]]]])
    value = torch.tensor([[[[10.0], [20.0]]]])
    second = 1 / (1 + torch.exp(torch.tensor(0.5 * 2.0 * (3.0 - 4.0))))
    expected = torch.tensor([10.0, 10.0 + 10.0 * second.item()])
    torch.testing.assert_close(reference(query, key, value, 0.5).flatten(), expected)
    alone = torch.tensor([10.0, 20.0])
    torch.testing.assert_close(reference(query, key, value, 0.5, Mask(window=1)).flatten(), alone)
    torch.testing.assert_close(
        reference(query, key, value, 0.5, Mask(documents=torch.tensor([[0, 1]]))).flatten(), alone
    )


@pytest.mark.parametrize("backend", [reference, sdpa])
def test_query_heads_share_the_key_head_of_their_group(backend: Attention) -> None:
    """Heads 0, 1, 2 read key-value head 0, and 3, 4, 5 head 1: head by head, the same as without groups."""
    query, key, value = heads(6, 2)
    whole = backend(query, key, value, 0.3, CAUSAL)
    for head in range(6):
        own = slice(head // 3, head // 3 + 1)
        alone = reference(query[:, head : head + 1], key[:, own], value[:, own], 0.3)
        torch.testing.assert_close(whole[:, head : head + 1], alone)


def test_the_visible_positions_are_those_of_the_definition() -> None:
    visible = MASKS["both"].visible(SEQ, torch.device("cpu"))
    for sequence in range(2):
        for at in range(SEQ):
            same = [DOCUMENTS[sequence, j] == DOCUMENTS[sequence, at] for j in range(SEQ)]
            expected = [at - 7 < j <= at and bool(same[j]) for j in range(SEQ)]
            assert visible[sequence, 0, at].tolist() == expected


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_no_document_hears_of_another(backend: str) -> None:
    """The first sequence's documents are 0-4, 5 and 6-32: other inputs at 0-5 leave 6-32 as they are, bit for bit."""
    call = CPU_BACKENDS[backend]
    query, key, value = (x.float() for x in heads(6, 2))
    changed = [x.clone() for x in (query, key, value)]
    for x in changed:
        x[0, :, :6] = draw(*x[0, :, :6].shape, seed=9)
    other = (changed[0], changed[1], changed[2])
    before, after = (call(*x, 0.3, MASKS["documents"]) for x in ((query, key, value), other))
    assert torch.equal(before[0, :, 6:], after[0, :, 6:])
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0, :, :6], after[0, :, :6])
    assert not torch.equal(call(*other, 0.3, CAUSAL)[0, :, 6:], call(query, key, value, 0.3, CAUSAL)[0, :, 6:])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_nothing_before_the_window_is_heard(backend: str) -> None:
    call, (query, key, value) = CPU_BACKENDS[backend], [x.float() for x in heads(6, 2)]
    other_key, other_value = key.clone(), value.clone()
    other_key[:, :, 10], other_value[:, :, 10] = 7.0, -7.0
    before, after = (call(query, *x, 0.3, MASKS["window"]) for x in ((key, value), (other_key, other_value)))
    changed = (before != after).any(dim=(0, 1, 3))  # (seq,)
    assert changed.nonzero().flatten().tolist() == list(range(10, 17))


@pytest.mark.parametrize(
    "fault",
    [
        lambda q, k, v: sdpa(q, k, v, D_HEAD**-0.5, MASKS["both"]),
        lambda q, k, v: sdpa(q, k, v, 0.3, Mask(6, DOCUMENTS)),
        lambda q, k, v: sdpa(q, k, v, 0.3, Mask(8, DOCUMENTS)),
        lambda q, k, v: sdpa(q, k, v, 0.3, MASKS["window"]),
        lambda q, k, v: sdpa(q, k.flip(1), v.flip(1), 0.3, MASKS["both"]),
    ],
    ids=["1/sqrt(d) left in", "window one short", "window one long", "documents ignored", "groups swapped"],
)
def test_a_fault_is_seen(fault: attention.Attention) -> None:
    exact = lambda q, k, v: reference(q, k, v, 0.3, MASKS["both"])  # noqa: E731
    assert distance(fault, exact, heads(6, 2)) > 1e-2


def test_boundaries_are_flash_attns() -> None:
    """Starts of the documents of both sequences laid end to end, none across two, and padded to a power of two."""
    mask = MASKS["documents"]
    assert mask.boundaries.tolist() == [0, 5, 6, 33, 66]
    assert mask.boundaries is mask.boundaries
    five = Mask(documents=torch.tensor([[0, 1, 2], [2, 3, 3]]))  # the second sequence's 2 is not the first's
    assert five.boundaries.tolist() == [0, 1, 2, 3, 4, 6, 6, 6, 6]


def test_a_window_of_nothing_is_refused() -> None:
    with pytest.raises(MegamupError, match="window=0"):
        Mask(window=0)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", [reference, sdpa, cudnn_sdpa])
def test_compiled_without_a_break(backend: Attention, mask: str) -> None:
    """One graph, forward and backward, of the same results; compiled without Inductor, which is not ours to test."""
    torch.compiler.reset()
    call = lambda q, k, v: backend(q, k, v, 0.3, MASKS[mask])  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, dynamic=False, backend="aot_eager")
    inputs = heads(6, 2)
    assert apart(results(compiled, inputs), results(call, inputs)) < 1e-14


@pytest.mark.parametrize("mask", MASKS)
def test_flex_within_a_compiled_region(mask: str) -> None:
    """Blocks of documents are found before it, once for all layers."""
    torch.compiler.reset()
    assert MASKS[mask].documents is None or MASKS[mask].document_blocks is not None
    call = lambda q, k, v: flex(q, k, v, 0.3, MASKS[mask])  # noqa: E731
    compiled: Function = torch.compile(call, fullgraph=True, dynamic=False, backend="eager")
    query, key, value = (x.float() for x in heads(6, 2))
    assert apart([compiled(query, key, value)], [flex(query, key, value, 0.3, MASKS[mask])]) < 1e-6


def test_preferring_cudnn_leaves_torchs_own_order() -> None:
    before = torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)
    cudnn_sdpa(*heads(4, 4), 0.3)
    assert torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True) == before
