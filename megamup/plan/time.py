"""Seconds of a training step on a cluster, by what they go to, before anything runs.

A rank's micro batch is added up operation by operation (work.py) at the devices' rates (rates.py); here these become a
step: pipeline stages and their bubble, gradient accumulation, the data axis's traffic, the optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from megamup.cluster import Cluster
from megamup.flops import Lengths, flops_per_token, pairs
from megamup.model import Model
from megamup.plan.layout import Layout
from megamup.plan.rates import Rates, known, rates_of
from megamup.plan.state import stage_layers
from megamup.plan.work import Passes, Seconds, Work

OPTIMIZER_BYTES = 32
"""A number of the fp32 weights costs at a step: fused AdamW reads weight, gradient and two moments and writes three of
them; the gradient's norm reads it once more."""
SECONDS_A_DAY = 86_400


@dataclass(frozen=True)
class StepTime:
    """A step of all ranks."""

    terms: dict[str, float]
    """Seconds by what they go to; their sum is the step's."""
    tokens: int
    """Of the global batch."""
    devices: int
    mfu: float
    """Percent of the peak, model FLOPs by PaLM's convention (megamup/flops.py)."""
    hfu: float
    """The same of the FLOPs that are computed: recomputation counts, and with fused attention what the causal mask
    hides doesn't."""

    @property
    def seconds(self) -> float:
        return sum(self.terms.values())

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def bound(self) -> str:
        """What most of the step goes to."""
        return max(self.terms, key=lambda name: self.terms[name])

    def as_json(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "terms": self.terms,
            "bound": self.bound,
            "tokens_per_s": self.tokens_per_s,
            "mfu_percent": self.mfu,
            "hfu_percent": self.hfu,
        }


def step_time(
    model: Model, seq_len: Lengths, layout: Layout, cluster: Cluster, stage_parameters: tuple[int, ...]
) -> StepTime:
    """Predict a step's time.

    Args:
        seq_len: of an encoder-decoder that of either stack.
        stage_parameters: parameters that one tensor rank of each pipeline stage holds (state.py).

    Raises:
        MegamupError: a figure of the cluster that the time rests on is missing.
    """
    rates = rates_of(cluster, layout)
    step = Step(Work(model, seq_len, layout, rates), stage_parameters)
    sequences = layout.data * layout.micro_batches * layout.micro_sequences
    tokens = sequences * (sum(seq_len) if isinstance(seq_len, tuple) else seq_len)
    peak = cluster.peak if layout.precision == "bf16" else known(cluster, "fp32_peak")
    terms = {name: value for name, value in step.terms().items() if value > 0}
    possible = sum(terms.values()) * layout.ranks * peak / 100
    return StepTime(
        terms=terms,
        tokens=tokens,
        devices=layout.ranks,
        mfu=tokens * palm_flops(model, seq_len) / possible,
        hfu=tokens * computed_flops(model, seq_len, layout) / possible,
    )


@lru_cache(maxsize=64)
def palm_flops(model: Model, seq_len: Lengths) -> float:
    """Per token; kept, as a search over layouts asks for the same thousands of times."""
    return flops_per_token(model, seq_len, "palm")


def computed_flops(model: Model, seq_len: Lengths, layout: Layout) -> float:
    """FLOPs per token that the devices do, those of a recomputed forward pass included."""
    within, across = seq_len if isinstance(seq_len, tuple) else (seq_len, 0)
    tokens = within + across
    readout = 2.0 * model.vocab_size * model.d_model * (across or within) / tokens
    each = 4.0 * model.n_heads * model.d_head / tokens
    scores = each * pairs(model, within, across)
    blocks = palm_flops(model, seq_len) / 3 - readout - scores
    again = layout.recomputed
    if layout.fused_attention:
        seen = scores - each * masked_pairs(model, within, across)
        return (3 + again) * blocks + (3.5 + again) * seen + 3 * readout
    return (3 + again) * (blocks + scores) + 3 * readout


def masked_pairs(model: Model, within: int, across: int) -> float:
    """Pairs of query and key that fused attention leaves out: half of a causal stack's own, where no bias is added."""
    if model.causal:
        return model.n_layers * within**2 / 2
    if model.n_decoder_layers is None or model.positions == "relative":
        return 0.0
    return model.n_decoder_layers * across**2 / 2


class Contents(NamedTuple):
    """What is on a pipeline stage."""

    blocks: int
    """Of the first stack."""
    cross_blocks: int
    """Of a decoder that attends to it."""
    starts: tuple[bool, ...]
    """Embeddings: of which, the decoder's?"""
    memory: bool
    """The encoder's last norm."""
    head: bool


@lru_cache(maxsize=256)
def stage_contents(model: Model, pipeline: int) -> tuple[Contents, ...]:
    found = []
    for of_stage in stage_layers(model, pipeline):
        crosses = [layer.stack.cross for layer in of_stage if layer.kind == "block"]
        starts = tuple(layer.stack.cross for layer in of_stage if layer.kind == "start")
        kinds = {layer.kind for layer in of_stage}
        found.append(Contents(crosses.count(False), crosses.count(True), starts, "memory" in kinds, "head" in kinds))
    return tuple(found)


@dataclass(frozen=True)
class Step:
    """A step, stage by stage."""

    work: Work
    """Of the first stack."""
    stage_parameters: tuple[int, ...]

    @property
    def layout(self) -> Layout:
        return self.work.layout

    @property
    def rates(self) -> Rates:
        return self.work.rates

    @cached_property
    def decoder(self) -> Work:
        """Of a second stack."""
        return replace(self.work, cross=True)

    @cached_property
    def last(self) -> Work:
        return self.work if self.work.model.n_decoder_layers is None else self.decoder

    @cached_property
    def contents(self) -> tuple[Contents, ...]:
        return stage_contents(self.work.model, len(self.stage_parameters))

    @cached_property
    def stages(self) -> list[Passes]:
        """One micro batch of each pipeline stage."""
        kinds = list(zip(self.stage_parameters, self.contents, strict=True))
        found = {kind: self.stage(*kind) for kind in set(kinds)}
        return [found[kind] for kind in kinds]

    def stage(self, held: int, here: Contents) -> Passes:
        found = self.accumulation(held)
        if here.blocks:
            found = found.plus(self.block, here.blocks)
        if here.cross_blocks:
            found = found.plus(self.cross_block, here.cross_blocks)
        for cross in here.starts:
            found = found.plus((self.decoder if cross else self.work).embedding())
        if here.memory:
            found = found.plus(self.work.norm())
        return found.plus(self.last.readout()) if here.head else found

    @cached_property
    def block(self) -> Passes:
        return self.work.block()

    @cached_property
    def cross_block(self) -> Passes:
        return self.decoder.block()

    def accumulation(self, held: int) -> Passes:
        """Adding a micro batch's gradients to the sum in fp32; casting fp32 weights, and their gradients back."""
        element = self.layout.element
        summed = held * (element + 8) if self.layout.micro_batches > 1 else 0
        cast = held * (4 + element) if self.layout.casts_weights else 0
        return Passes(
            Seconds(memory=self.rates.stream(cast, ops=0)), Seconds(memory=self.rates.stream(cast + summed, ops=0))
        )

    def sending(self) -> float:
        """Seconds that a stage spends on passing one micro batch's activations on and its gradients back.

        Each tensor rank sends its part, and the receiving node puts it together (Narayanan et al. 2021, section 4.1;
        DeepSpeed's ``pipe_partitioned``).
        """
        layout = self.layout
        if layout.pipeline == 1 or layout.overlap_pipeline:
            return 0.0
        # Into a decoder's stage goes the encoder's output too.
        tokens = max(
            self.decoder.tokens + self.work.tokens if here.cross_blocks else self.work.tokens
            for here in self.contents[1:]
        )
        whole = tokens * self.work.model.d_model * layout.element
        message = self.rates.send(whole / layout.tensor, layout.tensor * layout.context * layout.data)
        joining = 0.0 if layout.sequence else self.rates.gather(whole, layout.tensor, 1)
        return 2 * layout.virtual_stages * (message + joining)

    def terms(self) -> dict[str, float]:
        """Seconds by what they go to.

        1F1B: the slowest stage works on every micro batch, and waits for one through all others (Narayanan et al.
        2021, section 2.2; with ``virtual_stages`` the wait is as many times shorter).
        """
        layout, sending = self.layout, self.sending()
        each = [stage.forward.plus(stage.backward) for stage in self.stages]
        slowest = max(each, key=lambda stage: stage.total)
        waiting = sum(stage.total + sending for stage in each) - slowest.total - sending
        held = max(self.stage_parameters)
        count = layout.micro_batches
        return {
            "matrix products": count * slowest.products,
            "attention": count * slowest.attention,
            "memory traffic": count * slowest.memory + self.optimizer(held),
            "tensor network": count * slowest.tensor,
            "context network": count * slowest.context,
            "pipeline sends": count * sending,
            "pipeline bubble": waiting / layout.virtual_stages,
            "data network": self.data_network(held),
        }

    def optimizer(self, held: int) -> float:
        layout = self.layout
        own = held / layout.replicas if layout.zero >= 1 else held
        return self.rates.stream(own * (OPTIMIZER_BYTES + (2 if layout.element == 2 else 0)), ops=4)

    def data_network(self, held: int) -> float:
        """Seconds that the data axis's traffic shows (Rajbhandari et al. 2020, section 7).

        ZeRO 0: an all-reduce of the gradients. 1: that too (DeepSpeed 0.19.8 has no reduce-scatter there) and an
        all-gather of the weights. 2: the all-reduce for every micro batch. 3: a reduce-scatter for each, and the
        weights gathered for every forward and backward pass, block by block.
        """
        layout = self.layout
        if layout.replicas == 1:
            return 0.0
        forward = max(stage.forward.total for stage in self.stages)
        backward = max(stage.backward.total for stage in self.stages)
        gradients = self.over_replicas(held * layout.gradient_bytes)
        reduced = gradients if layout.scatters_gradients else 2 * gradients
        weights = self.over_replicas(held * layout.element)
        if layout.zero == 3:  # each block's by themselves
            weights += (self.most_blocks - 1) * self.rates.latency(layout.replicas, layout.tensor)
        if layout.zero == 0:
            return self.shown(2 * gradients, backward)
        if layout.zero == 1:
            return self.shown(reduced, backward) + weights
        if layout.zero == 2:
            return layout.micro_batches * self.shown(reduced, backward) + weights
        return layout.micro_batches * (self.shown(weights, forward) + self.shown(weights + gradients, backward))

    @property
    def most_blocks(self) -> int:
        """Of a stage."""
        return max(here.blocks + here.cross_blocks for here in self.contents)

    def over_replicas(self, size: float) -> float:
        return self.rates.gather(size, self.layout.replicas, self.layout.tensor)

    def shown(self, traffic: float, computing: float) -> float:
        """What is left of traffic behind a pass; the first or last block's has nothing to hide behind."""
        if not self.layout.overlap_data:
            return traffic
        blocks = sum(here.blocks + here.cross_blocks for here in self.contents)
        return max(traffic - computing, traffic / blocks)
