"""Mixture of experts: few of many small networks per token, and a shared one for all (arXiv 2401.06066, 2412.19437).

Every expert sees the rows of the tokens that chose it, and a token's output is the weighted sum over its experts, plus
the shared network's. No token is dropped.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from modelspec import schema
from modelspec.builders.ffn.router import Choice, Router
from modelspec.builders.layers import Linear, SwiGLU, gating
from modelspec.kernels.experts import Experts as ExpertWeights
from modelspec.kernels.experts import swiglu_experts, tokens_per_expert
from modelspec.kernels.swiglu import Gated, swiglu


class Routing(NamedTuple):
    """What a layer's router did: tokens per expert, int64 [experts]; affinities [tokens, experts] of so many sequences,
    one after the other; experts per token.
    """

    counts: Tensor
    affinities: Tensor
    sequences: int
    k: int

    def by_sequence(self) -> Tensor:
        """Affinities [sequences, positions, experts]."""
        return self.affinities.unflatten(0, (self.sequences, -1))


class Experts(nn.Module):
    """The routed experts, stacked: gate rows then up rows in `gate_up_proj`."""

    gate_up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None

    def __init__(self, spec: schema.MoE, hidden_size: int) -> None:
        super().__init__()
        num, width = spec.num_experts, spec.intermediate_size
        self.gating = gating(spec.activation)
        self.gated: Gated = swiglu.reference
        self.gate_up_proj = nn.Parameter(torch.empty(num, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num, hidden_size, width))
        self.register_parameter("gate_up_bias", _bias(num, 2 * width) if "gate" in spec.bias else None)
        self.register_parameter("down_bias", _bias(num, hidden_size) if "down" in spec.bias else None)

    def forward(self, x: Tensor, choice: Choice) -> Tensor:
        """Each token's weighted sum over its experts: x [tokens, hidden] -> [tokens, hidden]."""
        weights = ExpertWeights(self.gate_up_proj, self.down_proj, self.gate_up_bias, self.down_bias)
        return swiglu_experts(x, choice.experts, choice.weights, weights, self.gating, self.gated)


def _bias(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))


# Brings tokens [tokens, hidden] to the experts of their choice and the weighted sums back.
Dispatch = Callable[[Experts, Tensor, Choice], Tensor]


def local(experts: Experts, x: Tensor, choice: Choice) -> Tensor:
    """All experts are here."""
    out: Tensor = experts(x, choice)
    return out


class MoE(nn.Module):
    """x [batch, sequence, hidden] -> the same shape, and what the router did."""

    def __init__(self, spec: schema.MoE, hidden_size: int, router_dtype: torch.dtype) -> None:
        super().__init__()
        self.spec = spec
        self.router = Router(spec, hidden_size, router_dtype)
        self.experts = Experts(spec, hidden_size)
        self.dispatch: Dispatch = local
        self.shared_experts = SwiGLU(hidden_size, spec.shared_width, spec) if spec.shared_experts else None
        gated = spec.shared_experts is not None and spec.shared_experts.gate
        self.shared_gate = Linear(hidden_size, 1) if gated else None

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        tokens = x.flatten(0, -2)
        choice = self.router(tokens)
        out = self.dispatch(self.experts, tokens, choice)
        if self.shared_experts is not None:
            shared = self.shared_experts(tokens)
            out = out + (shared if self.shared_gate is None else self.shared_gate(tokens).sigmoid() * shared)
        counts = tokens_per_expert(choice.experts, self.spec.num_experts)
        return out.view_as(x), Routing(counts, choice.affinities, x.shape[0], choice.experts.shape[-1])


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
