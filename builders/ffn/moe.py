"""Mixture of experts: few of many small networks per token, and a shared one for all (arXiv 2401.06066, 2412.19437).

Tokens are sorted by expert, so that every expert sees one contiguous run of rows, and all experts are three grouped
products. No token is dropped.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modelspec import schema
from modelspec.builders.ffn.router import Router
from modelspec.builders.layers import SwiGLU
from modelspec.kernels.grouped_mm import grouped_mm


class Routing(NamedTuple):
    """What a layer's router did: tokens per expert, int64 [experts], and its balance loss before any factor, scalar."""

    counts: Tensor
    balance: Tensor


class Experts(nn.Module):
    """The routed experts, stacked: gate rows then up rows in `gate_up_proj`."""

    def __init__(self, num: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num, hidden_size, intermediate_size))

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x [rows, hidden], sorted by expert, counts [experts] rows of each -> [rows, hidden]."""
        ends = counts.cumsum(0).to(torch.int32)
        gate, up = grouped_mm(x, self.gate_up_proj.to(x.dtype), ends).chunk(2, dim=-1)
        return grouped_mm(F.silu(gate) * up, self.down_proj.to(x.dtype), ends)


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
        counts = choice.experts.flatten().bincount(minlength=self.num_experts)
        out = self._route(tokens, choice.experts, choice.weights.to(x.dtype), counts)
        if self.shared_experts is not None:
            out = out + self.shared_experts(tokens)
        balance = sequence_balance_loss(choice.affinities.unflatten(0, x.shape[:-1]), choice.experts.shape[-1])
        return out.view_as(x), Routing(counts, balance)

    def _route(self, x: Tensor, experts: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        """Each token's weighted sum over its experts: x [tokens, hidden], experts and weights [tokens, k]."""
        order = experts.flatten().argsort(stable=True)
        rows = self.experts(x[order // experts.shape[-1]], counts)
        rows = rows[order.argsort()].unflatten(0, experts.shape)
        return torch.einsum("tkh,tk->th", rows, weights)


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
