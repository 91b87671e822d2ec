"""Sharded layers and loss against plain torch on the whole tensors, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megamup.config import Config
from megamup.models.decoder import context
from megamup.parallel.collectives import copy_to_axis, leave
from megamup.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    column_parallel,
    spec_of,
)
from megamup.parallel.loss import vocab_parallel_cross_entropy
from megamup.parallel.mesh import SINGLE, build_mesh
from megamup.sections import Parallel
from megamup.train import distributed
from megamup.train.fork import run_ranks

Outcome = dict[str, Tensor]


def gather(x: Tensor, dim: int) -> Tensor:
    pieces = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(pieces, x.contiguous())
    return torch.cat(pieces, dim)


def mlp_like(config: Config) -> Outcome:
    """Column, bias, nonlinearity, row, bias: output, input gradient and gathered weight gradients."""
    distributed.join()
    mesh = build_mesh(config.parallel)
    built_from = context(config, mesh)
    up, down = ColumnParallelLinear(built_from, "blocks.0.mlp.up"), RowParallelLinear(built_from, "blocks.0.mlp.down")
    assert up.bias is not None
    assert down.bias is not None
    torch.manual_seed(0)
    with torch.no_grad():  # biases start at zero: give them values that a wrong sum would show
        down.bias.copy_(torch.randn(config.model.d_model))
    x = torch.randn(2, 5, config.model.d_model, requires_grad=True)
    (inner,) = column_parallel(x, (up,), mesh, built_from.kernels)
    y = down(F.gelu(inner))
    (y * torch.randn(y.shape)).sum().backward()
    assert x.grad is not None
    found = {"y": y.detach(), "x": x.grad}
    for shard in (up.weight, up.bias, down.weight, down.bias):
        assert shard.grad is not None
        dim = spec_of(shard).partition_dim
        found[spec_of(shard).name] = shard.grad if dim is None else gather(shard.grad, dim)
    return found


def test_column_then_row_is_the_whole_linear(make_config: Any) -> None:
    """d_ff = 160 over 1, 2 and 4 ranks: the same output and gradients."""
    overrides = ["model.arch=gpt", "model.n_kv_heads=4", "mup.alpha.hidden=1.5", "mup.alpha.residual_out=0.7"]
    whole = run_ranks(mlp_like, 1, make_config(*overrides))[0]
    for tensor in (2, 4):
        for rank in run_ranks(mlp_like, tensor, make_config(*overrides, f"parallel.tensor={tensor}")):
            for name, value in whole.items():
                torch.testing.assert_close(rank[name], value, rtol=1e-5, atol=1e-6, msg=name)


def embed(config: Config) -> Outcome:
    distributed.join()
    mesh = build_mesh(config.parallel)
    layer = VocabParallelEmbedding(context(config, mesh), "embedding.token")
    tokens = torch.tensor([[0, 1, 127, 128, 255, 128], [64, 63, 191, 192, 0, 0]])
    y = layer(tokens)
    (y * torch.arange(y.numel()).reshape(y.shape)).sum().backward()
    assert layer.weight.grad is not None
    return {"y": y.detach(), "gradient": gather(layer.weight.grad, 0), "weight": gather(layer.weight.detach(), 0)}


def test_vocab_parallel_embedding_is_a_lookup(make_config: Any) -> None:
    for tensor in (1, 2, 4):
        for rank in run_ranks(
            embed, tensor, make_config(f"parallel.tensor={tensor}", "model.n_kv_heads=4", "mup.alpha.embedding=2")
        ):
            tokens = torch.tensor([[0, 1, 127, 128, 255, 128], [64, 63, 191, 192, 0, 0]])
            weight = rank["weight"].requires_grad_()
            expected = 2 * F.embedding(tokens, weight)
            torch.testing.assert_close(rank["y"], expected.detach(), rtol=0, atol=0)
            (expected * torch.arange(expected.numel()).reshape(expected.shape)).sum().backward()
            torch.testing.assert_close(rank["gradient"], weight.grad)


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


def pairs() -> tuple[Tensor, Tensor]:
    distributed.join()
    axis = build_mesh(Parallel(tensor=dist.get_world_size())).tensor
    x = torch.full((3,), float(axis.rank + 1), requires_grad=True)
    copy_to_axis(x, axis).sum().backward()
    z = x.detach().clone().requires_grad_()
    y = leave(z, axis, False)
    (y * torch.arange(3)).sum().backward()
    assert x.grad is not None
    assert z.grad is not None
    assert y.tolist() == [3.0, 3.0, 3.0]
    return x.grad, z.grad


def test_collectives_are_each_others_adjoint() -> None:
    """copy: identity forward, sum backward. reduce: sum forward, identity backward."""
    for copied, reduced in run_ranks(pairs, 2):
        assert copied.tolist() == [2.0, 2.0, 2.0]
        assert reduced.tolist() == [0.0, 1.0, 2.0]
