"""The expert axis: tokens go to the ranks that hold their experts, and what these make of them comes back.

Experts are divided between ranks in their order. A rank sorts its pairs of token and expert by expert, which is by rank
too, and sends each rank its rows in one all-to-all; how many rows come for which expert is told first. There every row
is a token with one expert. Rows come back the way they went, and the weighted sum over a token's experts is taken at
home, so that weights of routing never travel. No token is dropped; an expert, or a rank, may get none.

Rows of uneven number are read on the host, so an exchange waits for the device once.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from modelspec.builders.ffn.moe import Experts
from modelspec.builders.ffn.router import Choice
from modelspec.builders.parallel.collectives import Way, moved
from modelspec.builders.parallel.mesh import Axis
from modelspec.kernels.experts import tokens_per_expert


class Exchange:
    """A row for every pair, straight to the rank of its expert."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    def __call__(self, experts: Experts, x: Tensor, choice: Choice) -> Tensor:
        """x [tokens, hidden] of this rank and their choice among all experts -> their weighted sums."""
        here, ranks, k = experts.gate_up_proj.shape[0], self.axis.size, choice.experts.shape[-1]
        counts = tokens_per_expert(choice.experts, here * ranks).view(ranks, here)
        coming = torch.empty_like(counts)
        dist.all_to_all_single(coming, counts, group=self.axis.group)
        way = Way(counts.sum(-1).tolist(), coming.sum(-1).tolist())

        order = choice.experts.flatten().argsort(stable=True)
        rows = moved(x[order.div(k, rounding_mode="floor")], way, self.axis)
        expert = torch.arange(here, device=x.device).repeat(ranks).repeat_interleave(coming.flatten())
        done = experts(rows, alone(expert, choice.weights.dtype))
        pairs = moved(done, way.back, self.axis)[order.argsort()].unflatten(0, (-1, k))
        return torch.einsum("tkh,tk->th", pairs, choice.weights.to(x.dtype))


def alone(expert: Tensor, dtype: torch.dtype) -> Choice:
    """Rows with one expert each, whose weight is taken elsewhere."""
    ones = torch.ones(len(expert), 1, dtype=dtype, device=expert.device)
    return Choice(expert.unsqueeze(-1), ones, ones)
