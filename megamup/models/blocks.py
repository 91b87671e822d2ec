"""A transformer block: what is added to the residual stream, and where the norms stand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from megamup.model import Model
from megamup.models.attention import Attention, Sight
from megamup.models.mlp import Mlp
from megamup.models.moe import Experts
from megamup.models.norm import Norm
from megamup.models.recompute import Recompute
from megamup.parallel.layers import Context, scaled
from megamup.parameters import Stack
from megamup.scales import BlockScales, Branch


class Block(nn.Module):
    """(batch, seq, d_model), or a stretch of it, and what else ``reads`` names -> the same as the first.

    Norms stand before each branch (Xiong et al. 2020) or after its sum (Vaswani et al. 2017).
    """

    def __init__(
        self,
        context: Context,
        model: Model,
        stack: Stack,
        layer: int,
        scales: BlockScales,
        recompute: Recompute,
        reads: tuple[str, ...] = ("hidden",),
    ) -> None:
        super().__init__()
        self.name = name = stack.block(layer)
        self.output_is_sharded = context.mesh.sequence
        self.attention_norm = Norm(context, model, f"{name}.attention_norm")
        sight = Sight(model.causal or stack.cross, model.sees(layer))
        self.attention = Attention(context, model, f"{name}.attention", scales, sight)
        if stack.cross:
            self.cross_norm = Norm(context, model, f"{name}.cross_norm")
            self.cross = Attention(context, model, f"{name}.cross", scales, Sight(causal=False))
        self.mlp_norm = None if model.parallel_block else Norm(context, model, f"{name}.mlp_norm")
        self.mlp: Mlp | Experts
        if model.has_experts(layer):
            self.mlp = Experts(context, model, f"{name}.moe", scales)
        else:
            self.mlp = Mlp(context, model, f"{name}.mlp", scales)
        self.norm_first = model.norm_place == "before"
        self.scales, self.recompute, self.reads = scales, recompute, reads
        self.documents = "decoder_documents" if stack.cross else "documents"

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return self.recompute(self.transform, x, *others)

    def transform(self, x: Tensor, *others: Tensor) -> Tensor:
        given = dict(zip(self.reads[1:], others, strict=True))
        documents = given.get(self.documents)
        attend = partial(self.attention, documents=documents, relative=given.get("relative"))
        if self.mlp_norm is None:
            same = self.attention_norm(x)
            return joined(x, attend(same) + self.mlp(same), self.scales.attention)
        x = self.branch(x, self.attention_norm, attend, self.scales.attention)
        if "memory" in given:
            look = partial(
                self.cross, memory=given["memory"], documents=documents, memory_documents=given.get("documents")
            )
            x = self.branch(x, self.cross_norm, look, self.scales.cross)
        return self.branch(x, self.mlp_norm, self.mlp, self.scales.mlp)

    def branch(self, x: Tensor, norm: nn.Module, compute: Callable[[Tensor], Tensor], at: Branch) -> Tensor:
        if self.norm_first:
            return joined(x, compute(norm(x)), at)
        return norm(joined(x, compute(x), at))  # type: ignore[no-any-return]


def joined(x: Tensor, added: Tensor, at: Branch) -> Tensor:
    return scaled(x, at.skip) + scaled(added, at.branch)
