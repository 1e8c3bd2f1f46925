"""The router of DeepSeekMoE (arXiv 2412.19437, section 2.1.2, equations 12 to 16).

Affinities are scores per expert. The choice may use more than them: a bias per expert that steers load, and groups of
experts of which only the best may be used. The weights of the chosen experts are their affinities alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modelspec import schema

# Added to the sum of the chosen affinities before dividing by it, as released implementations do.
RENORMALIZE_EPS = 1e-20


class Choice(NamedTuple):
    """Experts of each token, int64 [tokens, k]; their weights [tokens, k]; all affinities [tokens, experts]."""

    experts: Tensor
    weights: Tensor
    affinities: Tensor


class Router(nn.Module):
    """x [tokens, hidden] -> Choice."""

    bias: nn.Parameter | None
    selection_bias: Tensor | None

    def __init__(self, spec: schema.MoE, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec = spec.router
        self.num_experts_per_tok = spec.num_experts_per_tok
        self.dtype = dtype
        self.weight = nn.Parameter(torch.empty(spec.num_experts, hidden_size))
        self.register_parameter("bias", nn.Parameter(torch.empty(spec.num_experts)) if spec.router.bias else None)
        bias = torch.empty(spec.num_experts, dtype=torch.float32) if spec.router.selection.bias else None
        self.register_buffer("selection_bias", bias)

    def forward(self, x: Tensor) -> Choice:
        bias = None if self.bias is None else self.bias.to(self.dtype)
        logits = F.linear(x.to(self.dtype), self.weight.to(self.dtype), bias)
        affinities = logits.softmax(-1) if self.spec.score == "softmax" else logits.sigmoid()
        experts = self.choose(affinities.detach())
        weights = affinities.gather(-1, experts)
        if self.spec.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + RENORMALIZE_EPS)
        return Choice(experts, weights * self.spec.scale, affinities)

    def choose(self, affinities: Tensor) -> Tensor:
        """The chosen experts, [tokens, k]; the choice itself carries no gradient."""
        scores = affinities if self.selection_bias is None else affinities + self.selection_bias
        if self.spec.selection.groups is not None:
            scores = self._mask_groups(scores, self.spec.selection.groups)
        return scores.topk(self.num_experts_per_tok, dim=-1, sorted=False).indices

    @staticmethod
    def _mask_groups(scores: Tensor, groups: schema.ExpertGroups) -> Tensor:
        """Scores with the experts outside the best groups at minus infinity: biased scores can be negative."""
        grouped = scores.unflatten(-1, (groups.num, -1))
        best = grouped.topk(2, dim=-1).values.sum(-1) if groups.score == "top2_sum" else grouped.amax(-1)
        chosen = best.topk(groups.topk, dim=-1, sorted=False).indices
        outside = torch.ones_like(best, dtype=torch.bool).scatter_(-1, chosen, False)
        return grouped.masked_fill(outside.unsqueeze(-1), float("-inf")).flatten(-2)
