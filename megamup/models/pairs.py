"""BERT's second task: does a text follow another (Devlin et al. 2018), or were they swapped (Lan et al. 2019)?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megamup.parallel.auxiliary import inject
from megamup.parallel.layers import Context, on_stretch, scaled


class PairHead(nn.Module):
    """Tanh of the first token's hidden state, classified: adds its loss to what is optimized, and changes nothing.

    (batch, seq, d_model), or a stretch of it, and labels (batch, 1) of 0 and 1, or -1 for none -> the first. Where the
    sequence is cut, the rank with its beginning computes the loss.
    """

    name = "pair"

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.mesh, self.output_is_sharded = context.mesh, True
        self.pooler, self.pooler_bias = context.parameter("pooler.weight"), context.optional("pooler.bias")
        self.pair, self.pair_bias = context.parameter("pair.weight"), context.optional("pair.bias")
        self.multipliers = [context.table[f"{part}.weight"].multiplier for part in ("pooler", "pair")]
        # DeepSpeed divides by the micro batches, and means over data x context ranks, of which one computes anything.
        self.loss_weight = context.mesh.context.size / context.micro_batches
        self.last_loss = torch.zeros(())
        """Of the last batch, for what watches it: mean over its pairs, nats; of meaning on the first stretch alone."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        known = labels[:, 0] >= 0  # past the end of held-out text there is no label
        loss = (F.cross_entropy(self.logits(x), labels[:, 0].clamp(min=0), reduction="none") * known).mean()
        self.last_loss = loss.detach()
        return inject(x, loss * float(self.mesh.stretch == 0), self.loss_weight)

    def logits(self, x: Tensor) -> Tensor:
        """(batch, 2), fp32: of the sequence where ``x`` begins with its beginning."""
        pooled = torch.tanh(self.linear(x[:, 0], self.pooler, self.pooler_bias, self.multipliers[0]))
        return self.linear(pooled, self.pair, self.pair_bias, self.multipliers[1]).float()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, multiplier: float) -> Tensor:
        y = scaled(F.linear(x, on_stretch(weight, self.mesh).to(x.dtype)), multiplier)
        return y if bias is None else y + on_stretch(bias, self.mesh).to(x.dtype)
