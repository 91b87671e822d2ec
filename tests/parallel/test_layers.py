"""Sharded layers and loss against plain torch on the whole tensors, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megamup.config import Config
from megamup.models.build import context
from megamup.models.embeddings import PositionEmbedding
from megamup.models.norm import Norm
from megamup.parallel.collectives import SEQ, all_reduce
from megamup.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    column_parallel,
    spec_of,
)
from megamup.parallel.loss import vocab_parallel_cross_entropy
from megamup.parallel.mesh import SINGLE, Axis, Mesh, build_mesh
from megamup.sections import Parallel
from megamup.train import distributed
from megamup.train.fork import run_ranks

Outcome = dict[str, Tensor]


def gather(x: Tensor, dim: int, axis: Axis | None = None) -> Tensor:
    """The parts of the world's ranks, or of an axis's."""
    group, size = (dist.group.WORLD, dist.get_world_size()) if axis is None else (axis.group, axis.size)
    if size == 1:
        return x
    pieces = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(size)]
    dist.all_gather(pieces, x.contiguous(), group=group)
    return torch.cat(pieces, dim)


def stretch(x: Tensor, mesh: Mesh) -> Tensor:
    """What of (batch, seq, ...) this rank holds between the tensor-parallel regions."""
    return x.chunk(mesh.stretches, SEQ)[mesh.stretch]


def joined(x: Tensor, mesh: Mesh) -> Tensor:
    """The whole of it again."""
    return gather(gather(x, SEQ, mesh.tensor) if mesh.sequence else x, SEQ, mesh.context)


def mlp_like(config: Config) -> Outcome:
    """Norm, column, bias, nonlinearity, row, bias: output, input gradient and gathered weight gradients."""
    distributed.join()
    mesh = build_mesh(config.parallel)
    built_from = context(config, mesh)
    norm = Norm(built_from, config.model, "blocks.0.mlp_norm")
    up, down = ColumnParallelLinear(built_from, "blocks.0.mlp.up"), RowParallelLinear(built_from, "blocks.0.mlp.down")
    shards = [norm.weight, norm.bias, up.weight, up.bias, down.weight, down.bias]
    torch.manual_seed(0)
    with torch.no_grad():  # biases start at zero: give them values that a wrong sum would show
        assert down.bias is not None
        down.bias.copy_(torch.randn(config.model.d_model))
    x = stretch(torch.randn(2, 8, config.model.d_model), mesh).requires_grad_()
    (inner,) = column_parallel(norm(x), (up,), mesh, built_from.kernels)
    y = down(F.gelu(inner))
    (y * stretch(torch.randn(2, 8, config.model.d_model), mesh)).sum().backward()
    assert x.grad is not None
    found = {"y": joined(y.detach(), mesh), "x": joined(x.grad, mesh)}
    for shard in shards:
        assert shard is not None
        assert shard.grad is not None
        dim = spec_of(shard).partition_dim
        found[spec_of(shard).name] = shard.grad if dim is None else gather(shard.grad, dim)
    return found


@pytest.mark.parametrize("sequence", [False, True])
def test_column_then_row_is_the_whole_linear(make_config: Any, sequence: bool) -> None:
    """d_ff = 160 over 1, 2 and 4 ranks: the same output and gradients, those of replicas and of stretches too."""
    overrides = ["model.arch=gpt", "model.n_kv_heads=4", "mup.alpha.hidden=1.5", "mup.alpha.residual_out=0.7"]
    whole = run_ranks(mlp_like, 1, make_config(*overrides))[0]
    for tensor in (2, 4):
        parallel = (f"parallel.tensor={tensor}", f"parallel.sequence={sequence}")
        for rank in run_ranks(mlp_like, tensor, make_config(*overrides, *parallel)):
            for name, value in whole.items():
                torch.testing.assert_close(rank[name], value, rtol=1e-5, atol=1e-5, msg=name)


TOKENS = torch.tensor([[0, 1, 127, 128, 255, 128, 3, 3], [64, 63, 191, 192, 0, 0, 255, 254]])


def embed(config: Config) -> Outcome:
    """Tokens and positions, and the gradients of both tables, whole."""
    distributed.join()
    mesh = build_mesh(config.parallel)
    built_from = context(config, mesh)
    token, position = VocabParallelEmbedding(built_from, "embedding.token"), PositionEmbedding(built_from)
    y = position(token(TOKENS.chunk(mesh.context.size, SEQ)[mesh.context.rank]))
    weights = torch.arange(TOKENS.numel() * y.shape[-1]).view(*TOKENS.shape, -1)
    (y * stretch(weights, mesh)).sum().backward()
    assert token.weight.grad is not None
    assert position.weight.grad is not None
    # Context ranks' gradients, each of its stretch, are added where data ranks' are.
    of_tokens, of_positions = (all_reduce(grad, mesh.context) for grad in (token.weight.grad, position.weight.grad))
    return {
        "y": joined(y.detach(), mesh),
        "gradient": gather(of_tokens, 0, mesh.tensor),
        "weight": gather(token.weight.detach(), 0, mesh.tensor),
        "position gradient": of_positions,
        "position": position.weight.detach(),
    }


@pytest.mark.parametrize(
    "parallel",
    [
        {"tensor": 1},
        {"tensor": 2},
        {"tensor": 4},
        {"tensor": 2, "sequence": True},
        {"tensor": 4, "sequence": True},
        {"context": 2},
        {"tensor": 2, "context": 2},
        {"tensor": 2, "context": 2, "sequence": True},
    ],
    ids=str,
)
def test_embeddings_are_lookups(make_config: Any, parallel: dict[str, int]) -> None:
    overrides = ["model.arch=gpt", "model.n_kv_heads=4", "mup.alpha.embedding=2"]
    overrides += [f"parallel.{key}={value}" for key, value in parallel.items()]
    world = parallel.get("tensor", 1) * parallel.get("context", 1)
    for rank in run_ranks(embed, world, make_config(*overrides)):
        token, position = rank["weight"].requires_grad_(), rank["position"].requires_grad_()
        expected = 2 * F.embedding(TOKENS, token) + 2 * position[: TOKENS.shape[1]]
        torch.testing.assert_close(rank["y"], expected.detach(), rtol=1e-6, atol=1e-6)
        (expected * torch.arange(expected.numel()).reshape(expected.shape)).sum().backward()
        torch.testing.assert_close(rank["gradient"], token.grad)
        torch.testing.assert_close(rank["position gradient"], position.grad)


def loss_shards(logits: Tensor, targets: Tensor, weights: Tensor) -> Outcome:
    distributed.join()
    axis = build_mesh(Parallel(tensor=dist.get_world_size())).tensor
    mine = logits.chunk(axis.size, dim=-1)[axis.rank].clone().requires_grad_()
    losses = vocab_parallel_cross_entropy(mine, targets, axis)
    (losses * weights).sum().backward()
    assert mine.grad is not None
    return {"loss": losses.detach(), "gradient": gather(mine.grad, -1)}


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_vocab_parallel_cross_entropy_is_torchs(offset: float) -> None:
    """Also with logits so large that exponentials without the shift would overflow."""
    torch.manual_seed(1)
    logits = (3 * torch.randn(2, 7, 64) + offset).requires_grad_()
    targets, weights = torch.randint(64, (2, 7)), torch.rand(2, 7)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 7)
    (expected * weights).sum().backward()
    for ranks in (1, 2, 4):
        for rank in run_ranks(loss_shards, ranks, logits.detach(), targets, weights):
            torch.testing.assert_close(rank["loss"], expected.detach(), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(rank["gradient"], logits.grad, rtol=1e-4, atol=1e-6)


def test_cross_entropy_of_bf16_logits_is_taken_in_fp32() -> None:
    torch.manual_seed(2)
    logits = torch.randn(1, 3, 50_000).bfloat16().requires_grad_()
    targets = torch.tensor([[1, 2, 3]])
    loss = vocab_parallel_cross_entropy(logits, targets, SINGLE.tensor)
    expected = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view(1, 3)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    loss.sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16
