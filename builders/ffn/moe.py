"""Mixture of experts: few of many small networks per token, and a shared one for all (arXiv 2401.06066, 2412.19437).

Every expert sees the rows of the tokens that chose it, and a token's output is the weighted sum over its experts, plus
the shared network's. No token is dropped.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from modelspec import schema
from modelspec.builders.ffn.router import Choice, Router
from modelspec.builders.layers import SwiGLU
from modelspec.kernels.experts import swiglu_experts, tokens_per_expert


class Routing(NamedTuple):
    """What a layer's router did: tokens per expert, int64 [experts]; affinities [batch, sequence, experts]; k."""

    counts: Tensor
    affinities: Tensor
    k: int


class Experts(nn.Module):
    """The routed experts, stacked: gate rows then up rows in `gate_up_proj`."""

    def __init__(self, num: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num, hidden_size, intermediate_size))

    def forward(self, x: Tensor, choice: Choice) -> Tensor:
        """Each token's weighted sum over its experts: x [tokens, hidden] -> [tokens, hidden]."""
        return swiglu_experts(x, choice.experts, choice.weights, self.gate_up_proj, self.down_proj)


class MoE(nn.Module):
    """x [batch, sequence, hidden] -> the same shape, and what the router did."""

    def __init__(self, spec: schema.MoE, hidden_size: int, router_dtype: torch.dtype) -> None:
        super().__init__()
        self.num_experts = spec.num_experts
        self.router = Router(spec, hidden_size, router_dtype)
        self.experts = Experts(spec.num_experts, hidden_size, spec.intermediate_size)
        self.shared_experts = SwiGLU(hidden_size, spec.shared_width) if spec.shared_width else None

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        tokens = x.flatten(0, -2)
        choice = self.router(tokens)
        out = self.experts(tokens, choice)
        if self.shared_experts is not None:
            out = out + self.shared_experts(tokens)
        counts = tokens_per_expert(choice.experts, self.num_experts)
        return out.view_as(x), Routing(counts, choice.affinities.unflatten(0, x.shape[:-1]), choice.experts.shape[-1])


def sequence_balance_loss(affinities: Tensor, k: int) -> Tensor:
    """Balance of load within each sequence, averaged over sequences (arXiv 2412.19437, equations 17 to 20).

    affinities [batch, sequence, experts] without bias. Per sequence: sum over experts of f x P, where f is the share
    of tokens whose plain top-k holds the expert, times experts / k, and P the expert's mean share of the affinities.
    """
    experts = affinities.shape[-1]
    top = affinities.detach().topk(k, dim=-1, sorted=False).indices
    chosen = torch.zeros_like(affinities).scatter_(-1, top, 1.0)
    f = chosen.mean(dim=-2) * (experts / k)
    p = (affinities / affinities.sum(-1, keepdim=True)).mean(dim=-2)
    return (f * p).sum(-1).mean()
