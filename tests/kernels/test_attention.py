"""Every attention backend against the plain one in float64, and masks against what they are for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from megamup.errors import MegamupError
from megamup.kernels import attention
from megamup.kernels.attention import (
    CAUSAL,
    Attention,
    Mask,
    Scores,
    boundaries,
    cudnn_sdpa,
    flash_attn,
    flex,
    reference,
    sdpa,
)
from tests.kernels.comparison import (
    ACROSS,
    D_HEAD,
    DOCUMENTS,
    HEADS,
    KEY_DOCUMENTS,
    KEYS,
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
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool, window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """(batch, seq, heads, d_head): "query at position i attends to keys between i - window_size[0] and i +
    window_size[1] inclusive", -1 for no bound, and none after i when causal; a softcap of 0 is none."""
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert not causal or q.shape[1] == k.shape[1], "its causal mask is aligned to the end"
    left, right = window_size
    groups, rows = q.shape[2] // k.shape[2], []
    for i in range(q.shape[1]):
        first = 0 if left < 0 else max(0, i - left)
        last = i if causal else k.shape[1] - 1 if right < 0 else i + right
        seen = [x[:, first : last + 1].repeat_interleave(groups, dim=2) for x in (k, v)]
        scores = torch.einsum("bhd,bjhd->bhj", q[:, i], seen[0]).mul(softmax_scale)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        rows.append(torch.einsum("bhj,bjhd->bhd", scores.softmax(-1), seen[1]))
    return torch.stack(rows, dim=1)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, softmax_scale: float, causal: bool, window_size: tuple[int, int], softcap: float,
) -> Tensor:  # fmt: skip
    """(tokens, heads, d_head), sequence i from cu_seqlens[i] to cu_seqlens[i + 1]."""
    parts = []
    for x, starts, longest in ((q, cu_seqlens_q, max_seqlen_q), (k, cu_seqlens_k, max_seqlen_k)):
        lengths = starts.diff()
        assert starts.dtype == torch.int32
        assert [int(starts[0]), int(starts[-1])] == [0, len(x)]
        assert 0 <= lengths.min() <= lengths.max() <= longest
        parts.append(x.split(lengths.tolist()))
    of_values = v.split(cu_seqlens_k.diff().tolist())
    attend = partial(flash_attn_func, softmax_scale=softmax_scale, causal=causal, window_size=window_size)
    together = zip(*parts, of_values, strict=True)
    return torch.cat([attend(*(x[None] for x in one), softcap=softcap)[0] for one in together if len(one[0])])


def compare(backend: Attention, scores: Scores, mask: Mask, inputs: tuple[Tensor, ...]) -> float:
    """How far results and gradients lie from the reference's, all in float64."""
    return distance(
        lambda q, k, v: backend(q, k, v, scores, mask), lambda q, k, v: reference(q, k, v, scores, mask), inputs
    )


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("n_heads", "n_kv_heads"), HEADS)
@pytest.mark.parametrize("backend", [sdpa, cudnn_sdpa, flash_attn])
def test_backends_are_the_reference(backend: Attention, n_heads: int, n_kv_heads: int, mask: str) -> None:
    for scale in SCALES:
        assert compare(backend, Scores(scale), MASKS[mask], heads(n_heads, n_kv_heads)) < 1e-13


@pytest.mark.parametrize("mask", ACROSS)
@pytest.mark.parametrize("backend", [sdpa, cudnn_sdpa, flash_attn])
def test_keys_of_another_stack(backend: Attention, mask: str) -> None:
    assert compare(backend, Scores(0.3), ACROSS[mask], heads(6, 2, keys=KEYS)) < 1e-13


@pytest.mark.parametrize("mask", [*MASKS, *ACROSS])
def test_flash_attn_has_the_cap(mask: str) -> None:
    inputs = heads(6, 2, keys=KEYS if mask in ACROSS else None)
    assert compare(flash_attn, Scores(0.9, soft_cap=1.5), (MASKS | ACROSS)[mask], inputs) < 1e-13


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("mask", [*MASKS, *ACROSS])
@pytest.mark.parametrize("backend", [sdpa, cudnn_sdpa])
def test_a_bias_and_its_gradient(backend: Attention, mask: str, shared: bool) -> None:
    """One for all sequences, as relative positions are, or one for each; none is needed where it is not learned."""
    keys = KEYS if mask in ACROSS else SEQ
    bias = draw(1 if shared else 2, 6, SEQ, keys, seed=4)
    seen = (MASKS | ACROSS)[mask]

    def mine(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        return backend(q, k, v, Scores(0.3, bias=b), seen)

    def exact(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        return reference(q, k, v, Scores(0.3, bias=b), seen)

    inputs = (*heads(6, 2, keys=keys), bias)
    assert distance(mine, exact, inputs) < 1e-13
    assert apart([mine(*inputs)], [exact(*inputs)]) < 1e-13


def test_cudnn_is_not_asked_for_a_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would leave the bias without a gradient; torch's table of derivatives has none."""
    asked: list[list[SDPBackend]] = []
    plain = F.scaled_dot_product_attention

    def noted(*args: Tensor, **options: object) -> Tensor:
        asked.append(_cur_sdpa_kernel_backends())
        return plain(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    for bias in (None, draw(1, 4, SEQ, SEQ)):
        cudnn_sdpa(*heads(4, 4), Scores(0.3, bias=bias))
    assert [SDPBackend.CUDNN_ATTENTION in backends for backends in asked] == [True, False]
    assert SDPBackend.EFFICIENT_ATTENTION in asked[1]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("backend", [reference, sdpa])
def test_lower_precision(backend: Attention, dtype: torch.dtype, tolerance: float) -> None:
    for mask in MASKS.values():
        mine, exact = (
            lambda q, k, v, b, call=call, mask=mask: call(q, k, v, Scores(0.2, bias=b), mask)
            for call in (backend, reference)
        )
        assert distance(mine, exact, [*heads(6, 2), draw(1, 6, SEQ, SEQ, seed=4)], dtype) < tolerance


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("mask", [*MASKS, *ACROSS])
@pytest.mark.parametrize(("n_heads", "n_kv_heads"), HEADS)
def test_flex_is_the_reference_forward(n_heads: int, n_kv_heads: int, mask: str) -> None:
    """All of it that a CPU has."""
    keys = KEYS if mask in ACROSS else SEQ
    query, key, value = (x.float() for x in heads(n_heads, n_kv_heads, keys=keys))
    seen, each = (MASKS | ACROSS)[mask], draw(2, n_heads, SEQ, keys, seed=4).float()
    for scores in (Scores(1 / 16), Scores(0.9, 1.5, each)):
        expected = reference(query.double(), key.double(), value.double(), scores, seen)
        assert apart([flex(query, key, value, scores, seen)], [expected]) < 2e-6


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("batch", [None, 1, 2])
def test_flex_has_the_cap_and_the_bias(cap: float | None, batch: int | None) -> None:
    query, key, value = (x.float() for x in heads(6, 2))
    scores = Scores(0.9, cap, None if batch is None else draw(batch, 6, SEQ, SEQ, seed=4).float())
    expected = reference(query.double(), key.double(), value.double(), scores, MASKS["both"])
    assert apart([flex(query, key, value, scores, MASKS["both"])], [expected]) < 2e-6


def test_reference_by_hand() -> None:
    """Two positions, one head: the first sees itself alone, the second weighs both by softmax."""
    query, key = torch.tensor([[[[1.0], [2.0]]]]), torch.tensor([[[[3.0], [4.0]]]])
    value = torch.tensor([[[[10.0], [20.0]]]])

    def second(first: float, other: float) -> Tensor:
        """What the second position gets for logits of the first and of its own."""
        return torch.tensor(10.0 + 10.0 / (1 + torch.exp(torch.tensor(first - other)).item()))

    half = Scores(0.5)
    torch.testing.assert_close(
        reference(query, key, value, half)[0, 0, :, 0], torch.stack((value[0, 0, 0, 0], second(3, 4)))
    )
    alone = torch.tensor([10.0, 20.0])
    torch.testing.assert_close(reference(query, key, value, half, Mask(window=1)).flatten(), alone)
    apart_ = Mask(documents=torch.tensor([[0, 1]]))
    torch.testing.assert_close(reference(query, key, value, half, apart_).flatten(), alone)
    capped = [2 * torch.tanh(torch.tensor(x / 2)).item() for x in (3.0, 4.0)]
    found = reference(query, key, value, Scores(0.5, soft_cap=2.0))
    torch.testing.assert_close(found[0, 0, 1, 0], second(*capped))
    bias = torch.tensor([[[[0.0, 0.0], [7.0, -1.0]]]])
    found = reference(query, key, value, Scores(0.5, 2.0, bias))
    torch.testing.assert_close(found[0, 0, 1, 0], second(capped[0] + 7.0, capped[1] - 1.0))
    both = reference(query, key, value, half, Mask(causal=False))
    torch.testing.assert_close(both[0, 0, 0, 0], second(1.5, 2.0))


@pytest.mark.parametrize("backend", [reference, sdpa])
def test_query_heads_share_the_key_head_of_their_group(backend: Attention) -> None:
    """Heads 0, 1, 2 read key-value head 0, and 3, 4, 5 head 1: head by head, the same as without groups."""
    query, key, value = heads(6, 2)
    whole = backend(query, key, value, Scores(0.3), CAUSAL)
    for head in range(6):
        own = slice(head // 3, head // 3 + 1)
        alone = reference(query[:, head : head + 1], key[:, own], value[:, own], Scores(0.3))
        torch.testing.assert_close(whole[:, head : head + 1], alone)


def test_the_visible_positions_are_those_of_the_definition() -> None:
    visible = MASKS["both"].visible(SEQ, SEQ, torch.device("cpu"))
    across = ACROSS["across, documents"].visible(SEQ, KEYS, torch.device("cpu"))
    for sequence in range(2):
        for at in range(SEQ):
            own = DOCUMENTS[sequence, at]
            same = [bool(DOCUMENTS[sequence, j] == own) for j in range(SEQ)]
            assert visible[sequence, 0, at].tolist() == [at - 7 < j <= at and same[j] for j in range(SEQ)]
            assert across[sequence, 0, at].tolist() == [bool(other == own) for other in KEY_DOCUMENTS[sequence]]
    assert MASKS["both ways"].visible(3, 5, torch.device("cpu")).all()


@pytest.mark.parametrize("mask", ["documents", "both ways, documents"])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_no_document_hears_of_another(backend: str, mask: str) -> None:
    """The first sequence's documents are 0-4, 5 and 6-32: other inputs at 0-5 leave 6-32 as they are, bit for bit."""
    call, scores = CPU_BACKENDS[backend], Scores(0.3)
    query, key, value = (x.float() for x in heads(6, 2))
    changed = [x.clone() for x in (query, key, value)]
    for x in changed:
        x[0, :, :6] = draw(*x[0, :, :6].shape, seed=9)
    other = (changed[0], changed[1], changed[2])
    before, after = (call(*x, scores, MASKS[mask]) for x in ((query, key, value), other))
    assert torch.equal(before[0, :, 6:], after[0, :, 6:])
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0, :, :6], after[0, :, :6])
    assert not torch.equal(call(*other, scores, CAUSAL)[0, :, 6:], call(query, key, value, scores, CAUSAL)[0, :, 6:])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_nothing_before_the_window_is_heard(backend: str) -> None:
    call, (query, key, value) = CPU_BACKENDS[backend], [x.float() for x in heads(6, 2)]
    other_key, other_value = key.clone(), value.clone()
    other_key[:, :, 10], other_value[:, :, 10] = 7.0, -7.0
    before, after = (call(query, *x, Scores(0.3), MASKS["window"]) for x in ((key, value), (other_key, other_value)))
    changed = (before != after).any(dim=(0, 1, 3))  # (seq,)
    assert changed.nonzero().flatten().tolist() == list(range(10, 17))


BIAS = draw(1, 6, SEQ, SEQ, seed=4)


@pytest.mark.parametrize(
    "fault",
    [
        lambda q, k, v: sdpa(q, k, v, Scores(D_HEAD**-0.5, bias=BIAS), MASKS["both"]),
        lambda q, k, v: sdpa(q, k, v, Scores(0.3, bias=BIAS), Mask(6, DOCUMENTS)),
        lambda q, k, v: sdpa(q, k, v, Scores(0.3, bias=BIAS), Mask(8, DOCUMENTS)),
        lambda q, k, v: sdpa(q, k, v, Scores(0.3, bias=BIAS), MASKS["window"]),
        lambda q, k, v: sdpa(q, k.flip(1), v.flip(1), Scores(0.3, bias=BIAS), MASKS["both"]),
        lambda q, k, v: sdpa(q, k, v, Scores(0.3), MASKS["both"]),
        lambda q, k, v: sdpa(q, k, v, Scores(0.3, bias=0.3 * BIAS), MASKS["both"]),
        lambda q, k, v: reference(q, k, v, Scores(0.3, 2.0, BIAS), MASKS["both"]),
    ],
    ids=[
        "1/sqrt(d) left in",
        "window one short",
        "window one long",
        "documents ignored",
        "groups swapped",
        "no bias",
        "bias scaled",
        "a cap that isn't asked for",
    ],
)
def test_a_fault_is_seen(fault: Function) -> None:
    exact = lambda q, k, v: reference(q, k, v, Scores(0.3, bias=BIAS), MASKS["both"])  # noqa: E731
    assert distance(fault, exact, heads(6, 2)) > 1e-2


def test_boundaries_are_flash_attns() -> None:
    """Starts of the documents of both sequences laid end to end, none across two, and padded to a power of two."""
    for starts in boundaries(DOCUMENTS, DOCUMENTS):
        assert starts.tolist() == [0, 5, 6, 33, 66]
    assert boundaries(DOCUMENTS, DOCUMENTS)[0] is boundaries(DOCUMENTS, DOCUMENTS)[0], "computed again for each layer"
    five = torch.tensor([[0, 1, 2], [2, 3, 3]])  # the second sequence's 2 is not the first's
    assert boundaries(five, five)[0].tolist() == [0, 1, 2, 3, 4, 6, 6, 6, 6]


def test_boundaries_of_documents_that_one_side_has() -> None:
    """The keys' document 7 has no query, and stands empty among these."""
    of_queries, of_keys = boundaries(torch.tensor([[4, 4, 9]]), torch.tensor([[4, 7, 7, 9, 9]]))
    assert of_queries.tolist() == [0, 2, 2, 3, 3]
    assert of_keys.tolist() == [0, 1, 3, 5, 5]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mask(window=0), "window=0"),
        (lambda: Mask(window=4, causal=False), "window=4 counts the latest positions"),
        (lambda: Mask(key_documents=DOCUMENTS, causal=False), "documents of the queries"),
        (lambda: Mask(documents=DOCUMENTS, key_documents=DOCUMENTS), "causal=False"),
        (lambda: sdpa(*heads(4, 4, keys=KEYS), Scores(0.3)), "33 queries and 20 keys"),
        (lambda: sdpa(*heads(4, 4), Scores(0.3, soft_cap=2.0)), "no soft cap"),
        (lambda: flash_attn(*heads(6, 2), Scores(0.3, bias=BIAS)), "no bias"),
    ],
)
def test_what_no_one_computes_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(MegamupError, match=message):
        make()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", [reference, sdpa, cudnn_sdpa])
def test_compiled_without_a_break(backend: Attention, mask: str) -> None:
    """One graph, forward and backward, of the same results; compiled without Inductor, which is not ours to test."""
    torch.compiler.reset()
    given = MASKS[mask]

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        seen = Mask(given.window, given.documents, given.causal)  # made where it is needed, as a block does
        plain = backend(q, k, v, Scores(0.3), seen)
        return plain + backend(q, k, v, Scores(0.3, bias=bias), seen)

    compiled = torch.compile(call, fullgraph=True, dynamic=False, backend="aot_eager")
    inputs = [*heads(6, 2), BIAS]
    assert apart(results(compiled, inputs), results(call, inputs)) < 1e-14


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("mask", MASKS)
def test_flex_within_a_compiled_region(mask: str) -> None:
    torch.compiler.reset()
    given, bias = MASKS[mask], BIAS.float()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex(q, k, v, Scores(0.3, 1.5, bias), Mask(given.window, given.documents, given.causal))

    compiled: Function = torch.compile(call, fullgraph=True, dynamic=False, backend="eager")
    query, key, value = (x.float() for x in heads(6, 2))
    assert apart([compiled(query, key, value)], [call(query, key, value)]) < 1e-6


def test_preferring_cudnn_leaves_torchs_own_order() -> None:
    before = _cur_sdpa_kernel_backends(with_priority=True)
    for bias in (None, draw(1, 4, SEQ, SEQ)):
        cudnn_sdpa(*heads(4, 4), Scores(0.3, bias=bias))
    assert _cur_sdpa_kernel_backends(with_priority=True) == before


def test_blocks_are_found_once_for_all_layers() -> None:
    query, key, value = (x.float() for x in heads(4, 4))
    attention.kept_blocks.cache_clear()
    for _ in range(3):
        flex(query, key, value, Scores(0.3), Mask(documents=DOCUMENTS))
    assert attention.kept_blocks.cache_info().misses == 1
