"""One list of layers under two DeepSpeed engines: ZeRO 0-3 without a pipeline, PipelineModule (ZeRO 0-1) with one.

The loop sees one `Engine`: a step on this rank's share of a global batch, and an evaluation.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, cast

import deepspeed
import torch
from deepspeed.pipe import LayerSpec as PipeLayerSpec
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor

from megamup.config import Config, micro_batches
from megamup.data.loader import TensorBatch
from megamup.deepspeed_file import load_deepspeed, offloads_optimizer
from megamup.models.blocks import Block
from megamup.models.build import context, cross_entropy, model_layers
from megamup.models.network import Carried, LayerSpec, Network, Wired, WiredBlock, Wires, inputs, wires
from megamup.parallel.collectives import all_reduce
from megamup.parallel.layers import shared_out
from megamup.parallel.loss import CrossEntropy
from megamup.parallel.mesh import Axis, Mesh, Mpu
from megamup.train import experts
from megamup.train.compile import compile_blocks
from megamup.train.optim import TORCH, ClipByGlobalNorm, adamw, adamw_backend, parameter_groups, write_lr
from megamup.train.overlap import OverlappedReduction


@dataclass(frozen=True)
class MicroBatch:
    """What one rank sees at a time; weights make the loss the mean over the *global* batch's target tokens."""

    inputs: dict[str, Tensor]
    """What the model's first layers read, by name: ``tokens`` (batch, seq), int64, ..."""
    targets: Tensor
    """(batch, seq), int64; 0 where none counts"""
    weights: Tensor
    """fp32, mask / targets of the global batch x (micro batches x data ranks), see `weigh`: (batch, seq), or one number
    where all targets count."""


@dataclass(frozen=True)
class StepResult:
    loss: float
    """Mean over the target tokens of the global batch, nats."""
    grad_norm: float
    """Global 2-norm before clipping."""


class Engine(Protocol):
    """A model in training, whatever the layout. Every method is collective."""

    deepspeed: Any
    """The DeepSpeed engine underneath; checkpoints go through it."""
    backends: dict[str, str]
    """Operation -> what computes it, for environment.json."""
    mesh: Mesh

    def train_batch(self, batch: Sequence[MicroBatch], lr: float) -> StepResult: ...

    def evaluate(self, batch: Sequence[MicroBatch]) -> float: ...


def weigh(batches: Sequence[TensorBatch], mesh: Mesh, device: torch.device) -> tuple[list[MicroBatch], Tensor]:
    """Turn a rank's share of a global batch into weighted micro batches on its device, of which a context rank keeps
    its stretch.

    The weights make averaging over micro batches and replicas (which is what DeepSpeed does to gradients) give the
    sum of losses / number of targets of the global batch. Collective over the data axis. Copies out of
    pinned memory run beside whatever else the device does; a mask, where there is padding, isn't pinned.

    Returns:
        The micro batches, and the number of targets of the global batch (int64, one number).
    """
    targets = all_reduce(torch.tensor(sum(batch.n_targets for batch in batches), device=device), mesh.data)
    factor = len(batches) * mesh.replicas.size / targets.clamp(min=1)
    return [micro_batch(batch, factor, mesh.context, device) for batch in batches], targets


WHOLE = ("documents", "decoder_documents", "pair")
"""Inputs that every context rank needs of the whole sequence."""


def micro_batch(batch: TensorBatch, factor: Tensor, context: Axis, device: torch.device) -> MicroBatch:
    def stretch(x: Tensor) -> Tensor:
        return x.chunk(context.size, 1)[context.rank].contiguous() if context.size > 1 else x

    moved = replace(batch, window=batch.window.to(device, non_blocking=True))
    inputs = {name: x if name in WHOLE else stretch(x) for name, x in moved.inputs.items()}
    targets, weights = stretch(moved.targets), factor
    if not batch.complete:  # a target below 0 doesn't count
        weights, targets = (targets >= 0) * factor, targets.clamp(min=0)
    return MicroBatch(inputs, targets, weights)


def build_engine(config: Config, mesh: Mesh, world_size: int) -> Engine:
    """Build this rank's part of the model and hand it to DeepSpeed. Collective."""
    built_from = context(config, mesh, accelerator().type)
    names = built_from.kernels.names
    loss = cross_entropy(built_from, config)
    specs = model_layers(built_from, config, loss)
    engine: Engine
    if config.parallel.pipeline == 1:
        engine = DataParallelEngine(config, mesh, Network(specs, loss), world_size)
    else:
        engine = PipelinedEngine(config, mesh, specs, loss, world_size)
    optimizer = adamw_backend(config, accelerator().type)
    engine.backends = {**names, "optimizer": optimizer, "compile": "blocks" if config.kernels.compile else "off"}
    return engine


class DataParallelEngine:
    """DeepSpeedEngine, ZeRO 0-3."""

    backends: dict[str, str]

    def __init__(self, config: Config, mesh: Mesh, module: Network, world_size: int) -> None:
        self.mesh = mesh
        if config.zero_stage == 3:  # a block's weights are fetched and dropped together
            set_z3_leaf_modules(module, [Block])
        self.deepspeed, self.clip = initialize(config, mesh, module, world_size, mpu=Mpu(mesh))
        self.reductions: list[OverlappedReduction] = []
        if config.zero_stage == 0:
            self.deepspeed.enable_backward_allreduce = False  # its own, after the backward pass
            self.reductions = reductions(self.deepspeed, mesh)

    def loss(self, micro: MicroBatch) -> Tensor:
        return cast(Tensor, self.deepspeed(micro.inputs, (micro.targets, micro.weights)))

    def mean(self, losses: list[Tensor]) -> float:
        """Average over this rank's micro batches and the replicas."""
        return float(all_reduce(torch.stack(losses).mean(), self.mesh.replicas)) / self.mesh.replicas.size

    def train_batch(self, batch: Sequence[MicroBatch], lr: float) -> StepResult:
        self.deepspeed.train()
        write_lr(self.deepspeed.optimizer.param_groups, lr)
        losses = []
        for number, micro in enumerate(batch, 1):
            loss = self.loss(micro)
            with contextlib.ExitStack() as reducing:
                for reduction in self.reductions:
                    reducing.enter_context(reduction.during(number == len(batch)))
                self.deepspeed.backward(loss)
            self.deepspeed.step()
            losses.append(loss.detach())
        return StepResult(self.mean(losses), grad_norm(self.deepspeed, self.clip))

    def evaluate(self, batch: Sequence[MicroBatch]) -> float:
        self.deepspeed.eval()
        with torch.no_grad():
            return self.mean([self.loss(micro) for micro in batch])


class PipelinedEngine:
    """PipelineEngine over the same list of layers, ZeRO 0-1."""

    backends: dict[str, str]

    def __init__(self, config: Config, mesh: Mesh, specs: list[LayerSpec], loss: CrossEntropy, world_size: int) -> None:
        topology = PipeModelDataParallelTopology(
            num_pp=mesh.pipeline.size, num_mp=mesh.tensor.size, num_dp=mesh.replicas.size
        )
        with quiet():
            module = PipelineModule(
                layers=[pipe_spec(spec, at) for spec, at in zip(specs, wires(specs), strict=True)],
                topology=topology,
                loss_fn=loss,
                partition_method="type:^(Wired)?Block$",  # as many blocks a stage as possible alike
            )
        save_wired(module)
        self.deepspeed, self.clip = initialize(config, mesh, module, world_size, mpu=None)
        if mesh.expert.size > 1 and config.zero_stage == 0:  # DeepSpeed's knows no experts but its own
            own = reductions(self.deepspeed, mesh)
            self.deepspeed.allreduce_gradients = lambda bucket_size: reduce_now(own)
        self.mesh, self.inputs = mesh, inputs(specs)

    def train_batch(self, batch: Sequence[MicroBatch], lr: float) -> StepResult:
        write_lr(self.deepspeed.optimizer.param_groups, lr)
        loss = self.deepspeed.train_batch(data_iter=pipe_batches(batch, self.inputs))
        return StepResult(float(loss), grad_norm(self.deepspeed, self.clip))

    def evaluate(self, batch: Sequence[MicroBatch]) -> float:
        self.deepspeed.reset_activation_shape()  # an evaluation may use another batch size than training
        loss = self.deepspeed.eval_batch(data_iter=pipe_batches(batch, self.inputs), num_micro_batches=len(batch))
        self.deepspeed.reset_activation_shape()
        return float(loss)


def reductions(engine: Any, mesh: Mesh) -> list[OverlappedReduction]:
    """Means over the replicas: of experts too, whose gradients have come from all ranks that share them out."""
    dtype, shards = engine.communication_data_type, list(engine.module.parameters())
    everywhere = [shard for shard in shards if not shared_out(shard)]
    found = [OverlappedReduction(everywhere, mesh.replicas, dtype)]
    if mesh.expert.size > 1:
        own = [shard for shard in shards if shared_out(shard)]
        found.append(OverlappedReduction(own, mesh.holders, dtype, share=1 / mesh.replicas.size))
    return found


def reduce_now(found: Sequence[OverlappedReduction]) -> None:
    for reduction in found:
        with reduction.during(last=True):
            pass


def pipe_spec(spec: LayerSpec, at: Wires) -> PipeLayerSpec:
    if spec.shared is not None:
        forward = spec.borrow if at.plain else partial(run_shared, spec, at)
        return TiedLayerSpec(spec.shared, spec.module, *spec.arguments, forward_fn=forward)
    if at.plain:
        return PipeLayerSpec(spec.module, *spec.arguments)
    return PipeLayerSpec(WiredBlock if spec.module is Block else Wired, spec, at)


def run_shared(spec: LayerSpec, at: Wires, module: torch.nn.Module, carried: Carried) -> Any:
    return at.run(module if spec.borrow is None else partial(spec.borrow, module), carried)


def save_wired(module: PipelineModule) -> None:
    """Let DeepSpeed save and load shared modules that are called with wires: it passes over what isn't a module."""
    for call in module.forward_funcs:
        if isinstance(call, partial) and call.func is run_shared and call.args[0].borrow is None:
            shared = call.args[-1]
            call.state_dict, call.load_state_dict = shared.state_dict, shared.load_state_dict  # type: ignore[attr-defined]


PipeBatch = tuple[Carried, tuple[Tensor, Tensor]]


def pipe_batches(batch: Sequence[MicroBatch], names: tuple[str, ...]) -> Iterator[PipeBatch]:
    """What DeepSpeed's stages take: inputs in the order of ``names``, and labels."""

    def carried(micro: MicroBatch) -> Carried:
        found = tuple(micro.inputs[name] for name in names)
        return found[0] if len(found) == 1 else found

    return iter([(carried(micro), (micro.targets, micro.weights)) for micro in batch])


def accelerator() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def initialize(
    config: Config, mesh: Mesh, module: torch.nn.Module, world_size: int, mpu: Mpu | None
) -> tuple[Any, ClipByGlobalNorm | None]:
    """``deepspeed.initialize`` with everything that the run config owns injected."""
    if config.kernels.compile:
        compile_blocks(module, config)
    groups = parameter_groups(module.to(accelerator()), config)  # they hold the parameters on the device
    optimizer = adamw(groups, adamw_backend(config, accelerator().type))
    clip = None
    if config.zero_stage == 0:  # DeepSpeed reports no norm here
        clip = ClipByGlobalNorm(mesh, config.optim.grad_clip)
        optimizer.register_step_pre_hook(clip)
    keys = deepspeed_keys(config, world_size)
    with quiet(), experts.announced(module, mesh, partitioned=config.zero_stage > 0):
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=keys, mpu=mpu, dist_init_required=False
        )
    engine.has_moe_layers = False  # its optimizer knows of experts; checkpoints are to be as without
    return engine, clip


def deepspeed_keys(config: Config, world_size: int) -> dict[str, Any]:
    """The DeepSpeed config: the user's ZeRO keys and what the run config says of the rest."""
    micro, accumulation = micro_batches(config, world_size)
    keys = load_deepspeed(config.deepspeed) | {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.grad_clip if config.zero_stage > 0 else 0.0,
        "steps_per_print": None,
        "pipeline": dict.fromkeys(("pipe_partitioned", "grad_partitioned"), replicas_travel(config)),
    }
    if offloads_optimizer(keys) and adamw_backend(config, accelerator().type) == TORCH:
        keys["zero_force_ds_cpu_optimizer"] = False  # else DeepSpeed refuses any optimizer but its own
    if config.parallel.pipeline > 1 and config.zero_stage > 0:
        keys["zero_optimization"] |= {"overlap_comm": False}  # DeepSpeed has none there, and warns on every rank
    if config.precision == "bf16" and config.zero_stage > 0:
        # At ZeRO 0 the parameters stay fp32 and the layers cast them: DeepSpeed has no bf16 there that accumulates
        # gradients in fp32.
        # With a pipeline, bf16 gradients are to be added to their fp32 sums as they come: DeepSpeed would clear them
        # when it sees the gradient of the model's output, which is none of ours (`Unread`).
        keys |= {
            "bf16": {"enabled": True, "immediate_grad_update": config.parallel.pipeline > 1},
            "data_types": {"grad_accum_dtype": "fp32"},
        }
    return keys


def replicas_travel(config: Config) -> bool:
    """Whether a tensor rank may send its part alone between stages, and the receiving ones join the parts: where
    DeepSpeed is right to take what travels for replicas, and one tensor of it has a gradient."""
    model = config.model
    return not config.parallel.sequence and model.arch != "t5" and model.positions != "relative"


def grad_norm(engine: Any, clip: ClipByGlobalNorm | None) -> float:
    return clip.norm if clip is not None else float(engine.get_global_grad_norm())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """DeepSpeed prints layouts and memory with ``print``; ours are in environment.json and metrics.jsonl."""
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
        yield
