"""What μP promises, watched in the run itself: how far each role moves, and how large the logits and the stream are.

Under μP none of these figures grows with width (Yang et al. 2022, Tensor Programs V, appendix D.1), so a proxy's are
what a large run is to show; growing attention and output logits announce an instability before the loss does
(Wortsman et al. 2023). A monitored step's record holds, over all ranks:

    update_ratio_ROLE       RMS of the step's change over RMS before it, of all weights of a role; left out where the
                            weights were all zero
    attention_logit_max     largest |scale · q·k| that the causal mask leaves, over layers and heads
    output_logit_max        largest |logit|
    activation_rms_NAME     residual stream: embedding, blocks.0, ..., final_norm
    moe_balance, moe_z      what routers add to the gradients, before its factors: means over their layers
    moe_max_share           largest share of a micro batch's choices that fell on one expert, over layers and ranks
    pair_loss               nats of BERT's classifier of two texts

All but the first are of the training forward itself, of each data rank's first micro batch. Other steps pay nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.hooks import RemovableHandle

from megamup.config import Config
from megamup.model import Model
from megamup.models.attention import CoreAttention
from megamup.models.moe import Router
from megamup.models.pairs import PairHead
from megamup.parallel.layers import counted, shared_out, spec_of
from megamup.parallel.loss import CrossEntropy
from megamup.parallel.mesh import Mesh
from megamup.parameters import Role, parameters, stacks
from megamup.train.compile import eager
from megamup.train.engine import Engine

ATTENTION, OUTPUT = MAXIMA = ("attention_logit_max", "output_logit_max")
BALANCE, Z, MAX_SHARE = "moe_balance", "moe_z", "moe_max_share"
PAIR = "pair_loss"
AT_A_TIME = 2**24
"""Elements of a temporary: 64 MiB in fp32, however long the sequence or large the shard."""


class Monitor:
    """Measures single steps of an engine: ``with monitor.watching(True): ...train_batch...``, then `values`."""

    def __init__(self, config: Config, mesh: Mesh, engine: Engine, device: torch.device) -> None:
        self.mesh, self.engine, self.device = mesh, engine, device
        self.roles = list(dict.fromkeys(parameter.role for parameter in parameters(config.model).values()))
        self.stream = stream(config.model)
        self.sums = [f"{what}_{role}" for role in self.roles for what in ("before", "change")]
        self.sums += self.stream.values()
        self.maxima: tuple[str, ...] = MAXIMA
        self.routers = sum(parameter.role == "router" for parameter in parameters(config.model).values())
        if self.routers:
            self.sums += (BALANCE, Z)
            self.maxima = (*MAXIMA, MAX_SHARE)
        self.sums += [PAIR] if config.model.pair_head else []
        self.seen: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def watching(self, due: bool) -> Iterator[None]:
        """Measure the training step inside, where ``due``; blocks run uncompiled then, as what is in them is seen."""
        self.seen.clear()
        handles = [*self.watch_forward(), *self.watch_update()] if due else []
        try:
            with eager(due):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def values(self) -> dict[str, float]:
        """The step's figures, the same on every rank. Collective."""
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        mine = torch.stack([self.seen.get(name, zero).to(zero) for name in (*self.sums, *self.maxima)])
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        ranks = torch.stack(everyone)  # (world, figures)
        sums = dict(zip(self.sums, ranks.sum(0).tolist(), strict=False))
        ratios = {
            f"update_ratio_{role}": sqrt(sums[f"change_{role}"] / sums[f"before_{role}"])
            for role in self.roles
            if sums[f"before_{role}"] > 0
        }
        maxima = dict(zip(self.maxima, ranks[:, len(self.sums) :].amax(0).tolist(), strict=True))
        shares = self.mesh.replicas.size * (self.mesh.tensor.size if self.mesh.sequence else 1)
        rms = {f"activation_rms_{name}": sqrt(sums[name] / shares) for name in self.stream.values()}
        routed = {name: sums[name] / (self.routers * self.mesh.data.size) for name in (BALANCE, Z) if self.routers}
        paired = {PAIR: sums[PAIR] / self.mesh.data.size} if PAIR in sums else {}
        return ratios | maxima | rms | routed | paired

    def add(self, name: str, value: Tensor) -> None:
        self.seen[name] = self.seen[name] + value if name in self.seen else value

    # ------------------------------------------------------------------- forward

    def watch_forward(self) -> Iterator[RemovableHandle]:
        own_stream = self.mesh.sequence or self.mesh.tensor.rank == 0  # else alike on all tensor ranks
        for module in self.engine.deepspeed.module.modules():
            if isinstance(module, CoreAttention):
                yield first_forward(module, self.see_attention)
            elif isinstance(module, CrossEntropy):
                yield first_forward(module, self.see_logits)
            elif isinstance(module, Router) and self.mesh.tensor.rank == 0:  # alike on all tensor ranks
                yield first_forward(module, self.see_router)
            elif isinstance(module, PairHead) and self.mesh.tensor.rank == 0 and self.mesh.stretch == 0:
                yield first_forward(module, self.see_pairs)
            elif getattr(module, "name", None) in self.stream and own_stream and not again(module):
                yield first_forward(module, self.see_stream)

    def see_attention(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(module, CoreAttention)
        largest = largest_attention_logit(inputs[0], inputs[1], module.scale, module.causal)
        self.seen[ATTENTION] = torch.maximum(self.seen.get(ATTENTION, largest), largest)

    def see_stream(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self.add(self.stream[str(module.name)], squares(output) / output.numel())

    def see_logits(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self.seen[OUTPUT] = torch.stack([logits.abs().amax() for logits in inputs[0].pieces(AT_A_TIME)]).amax()

    def see_router(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(module, Router)
        _, chosen, probabilities = module.choose(output)
        losses = module.losses(output, chosen, probabilities)
        self.add(BALANCE, losses.balance)
        self.add(Z, losses.z)
        largest = chosen.flatten().bincount().amax() / chosen.numel()
        self.seen[MAX_SHARE] = torch.maximum(self.seen.get(MAX_SHARE, largest), largest)

    def see_pairs(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(module, PairHead)
        self.add(PAIR, module.last_loss)

    # ------------------------------------------------------------------- update

    def watch_update(self) -> Iterator[RemovableHandle]:
        """Copy what the optimizer is about to change, and compare: group by group under ZeRO 1-3, as DeepSpeed steps.

        The copy lives while the optimizer steps, when the activations are gone; before the step it would add to them.
        """
        found: dict[int, list[Master]] = {}
        for master in masters(self.engine, self.mesh):
            found.setdefault(id(master.flat), []).append(master)
        before: dict[int, Tensor] = {}

        def copy(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            flats = [flat for group in optimizer.param_groups for flat in group["params"] if id(flat) in found]
            before.update({id(flat): flat.detach().flatten().clone() for flat in flats})

        def compare(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            for key, old in before.items():
                for master in found[key]:
                    part = old.narrow(0, master.start, master.size)
                    self.add(f"before_{master.role}", squares(part))
                    part -= master.flat.detach().flatten().narrow(0, master.start, master.size)
                    self.add(f"change_{master.role}", squares(part))
            before.clear()

        optimizer = self.engine.deepspeed.basic_optimizer
        yield optimizer.register_step_pre_hook(copy)
        yield optimizer.register_step_post_hook(compare)


def stream(model: Model) -> dict[str, str]:
    """{module that puts out the residual stream: its name in the metrics}."""
    last = "type" if model.token_types else "position" if model.positions == "learned" else "token"
    found = {f"embedding.{last}": "embedding"}  # each table adds to the one before
    for stack in stacks(model):
        found |= {name: name for name in map(stack.block, range(stack.layers))}
        if model.norm_place == "before":
            found[f"{stack.prefix}final_norm"] = f"{stack.prefix}final_norm"
    return found


def again(module: nn.Module) -> bool:
    """A copy, on a later stage, of a module that stages share: of t5's embedding, which its decoder reads too."""
    return any(getattr(shard, "ds_pipe_replicated", False) for shard in module.parameters(recurse=False))


Seen = Callable[[nn.Module, tuple[Any, ...], Tensor], None]


def first_forward(module: nn.Module, see: Seen) -> RemovableHandle:
    """Call ``see`` after the module's next forward alone, which is the first micro batch's."""

    def hook(called: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        handle.remove()
        # Without modes, as that of selective recomputation would keep what is computed here as the block's own.
        with torch.no_grad(), _disable_current_modes():
            see(called, inputs, output.detach())

    handle = module.register_forward_hook(hook)
    return handle


def largest_attention_logit(query: Tensor, key: Tensor, scale: float, causal: bool = True) -> Tensor:
    """Largest |scale · q·k| of a key that its query may see, from a few rows of logits at a time.

    Args:
        query: (batch, heads, seq, d_head)
        key: (batch, kv_heads, seq, d_head)
    """
    batch, heads, seq, _ = query.shape
    grouped = query.float().unflatten(1, (key.shape[1], -1))  # (batch, kv_heads, heads / kv_heads, seq, d_head)
    keys = key.float().unsqueeze(2).transpose(-2, -1)  # (batch, kv_heads, 1, d_head, seq)
    rows = max(1, AT_A_TIME // (batch * heads * seq))
    found = []
    for start in range(0, seq, rows):
        seen = keys[..., : start + rows] if causal else keys
        logits = grouped[..., start : start + rows, :] @ seen
        if causal:
            logits.tril_(start)  # zero in the future: no more than any |logit|
        found.append(logits.abs_().amax())
    return abs(scale) * torch.stack(found).amax()


def squares(x: Tensor) -> Tensor:
    """Sum of squares: fp32 over pieces, fp64 over all, as one copy in fp64 would be twice ``x``."""
    pieces = [piece.float().square().sum() for piece in x.flatten().split(AT_A_TIME)]
    return torch.stack(pieces).sum(dtype=torch.float64)


@dataclass(frozen=True)
class Master:
    """Where the optimizer of this rank keeps weights of one parameter in fp32."""

    role: Role
    flat: Tensor
    """What the optimizer steps: the parameter itself (ZeRO 0), or parts of many in one vector."""
    start: int
    size: int


def masters(engine: Engine, mesh: Mesh) -> Iterator[Master]:
    """The weights that this rank is to count: over all ranks, each logical element once.

    In bf16 a step may round away in the parameters, not in the fp32 vectors that ZeRO 1-3 step: of these, each data
    rank has its own part. At ZeRO 0 data ranks are alike, but for the experts that they share out.
    """
    groups = engine.deepspeed.basic_optimizer.param_groups
    for shard in engine.deepspeed.module.parameters():
        if not counted(shard):
            continue
        role = spec_of(shard).role
        if hasattr(shard, "_z3_optimizer"):
            zero = shard._z3_optimizer
            group, start, size = zero.grad_position[zero.get_param_id(shard)]
            size = min(size, max(0, shard.ds_numel - mesh.replicas.rank * size))  # the last ranks' parts are padded
            yield Master(role, zero.fp32_partitioned_groups_flat[group], start, size)
        elif hasattr(shard, "_hp_mapping"):  # ZeRO 1-2; None: another rank's
            if (part := shard._hp_mapping) is not None:
                at = part.hp_fragment_address
                yield Master(role, groups[part.param_group_index]["params"][0], at.start, at.numel)
        elif (mesh.holders if shared_out(shard) else mesh.replicas).rank == 0:
            yield Master(role, shard, 0, shard.numel())
