"""The routed experts of a mixture: each token's weighted sum over the SwiGLU networks of its experts.

The reference sorts (token, expert) pairs by expert and runs grouped products over all experts, under plain autograd.
The fast form on CPU is one autograd function: it keeps its input and the first product's output and nothing else,
scales the narrow activations by the routing weights instead of the wide outputs, and writes every product where it
belongs. Its plain loop over experts was measured as fast as torch's grouped product, which is such a loop on CPU.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from modelspec.kernels.grouped_mm import grouped_mm
from modelspec.kernels.op import Op, on_cpu


def tokens_per_expert(experts: Tensor, num: int) -> Tensor:
    """How often each of `num` experts was chosen, int64 [num]; unlike bincount it also runs on meta and compiles."""
    chosen = experts.flatten()
    return chosen.new_zeros(num).scatter_add_(0, chosen, torch.ones_like(chosen))


def _reference(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    order = experts.flatten().argsort(stable=True)
    ends = tokens_per_expert(experts, gate_up.shape[0]).cumsum(0).to(torch.int32)
    gate, up = grouped_mm(x[order // experts.shape[-1]], gate_up.to(x.dtype), ends).chunk(2, dim=-1)
    rows = grouped_mm(F.silu(gate) * up, down.to(x.dtype), ends)
    # Pairs back in their order, so that a token's rows stand side by side: no atomics, the same sum every time.
    rows = rows[order.argsort()].unflatten(0, experts.shape)
    return torch.einsum("tkh,tk->th", rows, weights.to(x.dtype))


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        k, width = experts.shape[-1], down.shape[-1]
        flat = experts.flatten()
        order = flat.argsort(stable=True)
        position = torch.empty_like(order)
        position[order] = torch.arange(len(order))
        token = order.div(k, rounding_mode="floor")
        row_weights = weights.flatten()[order].unsqueeze(-1)
        counts = tokens_per_expert(experts, gate_up.shape[0]).tolist()
        rows = x.index_select(0, token)
        hidden = x.new_empty(len(order), 2 * width)
        for each, weight, out in zip(rows.split(counts), gate_up.mT, hidden.split(counts), strict=True):
            torch.mm(each, weight, out=out)
        gate, up = hidden.chunk(2, dim=-1)
        activated = F.silu(gate).mul_(up).mul_(row_weights)
        for each, weight, out in zip(activated.split(counts), down.mT, rows.split(counts), strict=True):
            torch.mm(each, weight, out=out)
        ctx.save_for_backward(x, gate_up, down, hidden, order, position, token, row_weights)
        ctx.counts, ctx.k = counts, k
        return _sum_per_token(rows, position, k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor, Tensor, Tensor]:
        x, gate_up, down, hidden, order, position, token, row_weights = ctx.saved_tensors
        counts = ctx.counts
        grad_rows, rows = grads[0].index_select(0, token), x.index_select(0, token)
        grad_gate_up, grad_down, grad_hidden = map(torch.empty_like, (gate_up, down, hidden))
        grad_activated = hidden.new_empty(len(token), down.shape[-1])
        for each, weight, out in zip(grad_rows.split(counts), down, grad_activated.split(counts), strict=True):
            torch.mm(each, weight, out=out)
        gate, up = hidden.chunk(2, dim=-1)
        grad_gate, grad_up = grad_hidden.chunk(2, dim=-1)
        silu = F.silu(gate)
        activated = silu * up
        grad_weights = torch.empty_like(row_weights)
        grad_weights[order] = torch.linalg.vecdot(grad_activated, activated).unsqueeze(-1)
        activated.mul_(row_weights)
        grad_activated.mul_(row_weights)
        torch.mul(grad_activated, silu, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_activated.mul_(up), gate, grad_input=grad_gate)
        # An expert without rows multiplies nothing and writes zeros.
        for each, right, out in zip(grad_rows.split(counts), activated.split(counts), grad_down, strict=True):
            torch.mm(each.T, right, out=out)
        for each, right, out in zip(grad_hidden.split(counts), rows.split(counts), grad_gate_up, strict=True):
            torch.mm(each.T, right, out=out)
        for each, weight, out in zip(grad_hidden.split(counts), gate_up, grad_rows.split(counts), strict=True):
            torch.mm(each, weight, out=out)
        grad_x = _sum_per_token(grad_rows, position, ctx.k)
        return grad_x, None, grad_weights.view(-1, ctx.k), grad_gate_up, grad_down


def _sum_per_token(rows: Tensor, position: Tensor, k: int) -> Tensor:
    """out[t] = sum over j < k of rows[position[t * k + j]]."""
    return F.embedding_bag(position.view(-1, k), rows, mode="sum")


def _fast(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return _Experts.apply(x, experts, weights, gate_up, down)


# swiglu_experts(x [tokens, hidden], experts [tokens, k] int64, weights [tokens, k],
#                gate_up [experts, 2 * width, hidden], down [experts, hidden, width]) -> [tokens, hidden] in x's dtype
swiglu_experts: Op[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] = Op(
    reference=_reference, fast=_fast, applies=on_cpu
)
