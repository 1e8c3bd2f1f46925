"""The routed experts of a mixture: each token's weighted sum over the SwiGLU networks of its experts.

The reference sorts (token, expert) pairs by expert and runs grouped products over all experts, under plain autograd.
The fast form on CPU is one autograd function: it keeps its input and the first product's output and nothing else, and
scales the narrow activations by the routing weights instead of the wide outputs. It loops over the experts, as torch's
grouped product does on CPU, with oneDNN's products. These are compiled for each number of rows, which takes longer than
to run them, so every expert's rows are padded to whole granules: few numbers of rows ever occur.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from modelspec.kernels.grouped_mm import grouped_mm
from modelspec.kernels.linear import matmul_nt, matmul_tn
from modelspec.kernels.op import Op, on_cpu
from modelspec.kernels.swiglu import SWIGLU, Gated, Gating

# Rows of padding that an expert may have at most, plus one. At 256 rows an expert, 32 cost 6 % more rows.
GRANULE = 32


def tokens_per_expert(choice: Tensor, num: int) -> Tensor:
    """How often each of `num` experts was chosen, int64 [num]; unlike bincount it also runs on meta and compiles."""
    chosen = choice.flatten()
    return chosen.new_zeros(num).scatter_add_(0, chosen, torch.ones_like(chosen))


class Experts(NamedTuple):
    """The weights of all experts: gate_up [experts, 2 * width, hidden], gate rows before up rows; down [experts,
    hidden, width]; and, where they have some, their biases [experts, 2 * width] and [experts, hidden].
    """

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None


def _reference(
    x: Tensor,
    choice: Tensor,
    weights: Tensor,
    experts: Experts,
    gating: Gating,
    gated: Gated,
) -> Tensor:
    expert, order = choice.flatten().sort(stable=True)
    ends = tokens_per_expert(choice, experts.gate_up.shape[0]).cumsum(0).to(torch.int32)
    hidden = grouped_mm(x[order // choice.shape[-1]], experts.gate_up.to(x.dtype), ends)
    if experts.gate_up_bias is not None:
        hidden = hidden + experts.gate_up_bias.to(x.dtype)[expert]
    gate, up = hidden.chunk(2, dim=-1)
    rows = grouped_mm(gated(gate, up, gating), experts.down.to(x.dtype), ends)
    if experts.down_bias is not None:
        rows = rows + experts.down_bias.to(x.dtype)[expert]
    # Pairs back in their order, so that a token's rows stand side by side: no atomics, the same sum every time.
    rows = rows[order.argsort()].unflatten(0, choice.shape)
    return torch.einsum("tkh,tk->th", rows, weights.to(x.dtype))


class _Layout(NamedTuple):
    """Where (token, expert) pairs stand once they are sorted by expert, each expert's rows padded to whole granules."""

    # Rows of each expert, padding included.
    sizes: list[int]
    # Of each pair, its row, int64 [tokens, k].
    row: Tensor
    # Of each row, its token, int64 [rows]; token 0 for padding, whose weight is 0.
    token: Tensor


def _layout(choice: Tensor, num: int) -> _Layout:
    counts = tokens_per_expert(choice, num)
    sizes = (counts + GRANULE - 1).div(GRANULE, rounding_mode="floor") * GRANULE
    flat = choice.flatten()
    order = flat.argsort(stable=True)
    # Padding before an expert's rows is all that moves a pair away from its rank.
    padding = (sizes - counts).cumsum(0) - (sizes - counts)
    row = torch.empty_like(order)
    row[order] = torch.arange(len(order)) + padding[flat[order]]
    split = sizes.tolist()
    token = order.new_zeros(sum(split))
    token[row] = torch.arange(len(order)).div(choice.shape[-1], rounding_mode="floor")
    return _Layout(split, row.view_as(choice), token)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, choice: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        sizes, row, token = _layout(choice, gate_up.shape[0])
        row_weights = weights.new_zeros(len(token), 1)
        row_weights[row.flatten(), 0] = weights.flatten()
        hidden = _grouped_nt(x.index_select(0, token), sizes, gate_up)
        gate, up = hidden.chunk(2, dim=-1)
        activated = F.silu(gate).mul_(up).mul_(row_weights)
        ctx.save_for_backward(x, gate_up, down, hidden, row, token, row_weights)
        ctx.sizes = sizes
        return _sum_per_token(_grouped_nt(activated, sizes, down), row)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor, Tensor, Tensor]:
        x, gate_up, down, hidden, row, token, row_weights = ctx.saved_tensors
        sizes = ctx.sizes
        grad_rows, rows = grads[0].index_select(0, token), x.index_select(0, token)
        grad_activated = _grouped_nt(grad_rows, sizes, down.mT)
        grad_hidden = torch.empty_like(hidden)
        gate, up = hidden.chunk(2, dim=-1)
        grad_gate, grad_up = grad_hidden.chunk(2, dim=-1)
        silu = F.silu(gate)
        activated = silu * up
        grad_weights = torch.linalg.vecdot(grad_activated, activated)[row]
        activated.mul_(row_weights)
        grad_activated.mul_(row_weights)
        torch.mul(grad_activated, silu, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_activated.mul_(up), gate, grad_input=grad_gate)
        grad_down = _grouped_tn(grad_rows, activated, sizes)
        grad_gate_up = _grouped_tn(grad_hidden, rows, sizes)
        grad_x = _sum_per_token(_grouped_nt(grad_hidden, sizes, gate_up.mT), row)
        return grad_x, None, grad_weights, grad_gate_up, grad_down


def _grouped_nt(rows: Tensor, counts: list[int], weights: Tensor) -> Tensor:
    """Each group's rows times the transpose of its weight: [rows, in], [groups, out, in] -> [rows, out]."""
    return torch.cat([matmul_nt(each, weight) for each, weight in zip(rows.split(counts), weights, strict=True)])


def _grouped_tn(grad: Tensor, rows: Tensor, counts: list[int]) -> Tensor:
    """Each group's gradient of its weight, zeros for an empty one: [rows, out], [rows, in] -> [groups, out, in]."""
    return torch.stack([matmul_tn(g, each) for g, each in zip(grad.split(counts), rows.split(counts), strict=True)])


def _sum_per_token(rows: Tensor, row: Tensor) -> Tensor:
    """out[t] = sum over j < k of rows[row[t, j]]."""
    return F.embedding_bag(row, rows, mode="sum")


def _fast(
    x: Tensor,
    choice: Tensor,
    weights: Tensor,
    experts: Experts,
    gating: Gating,
    gated: Gated,
) -> Tensor:
    return _Experts.apply(x, choice, weights, experts.gate_up, experts.down)


def _applies(
    x: Tensor,
    choice: Tensor,
    weights: Tensor,
    experts: Experts,
    gating: Gating,
    gated: Gated,
) -> bool:
    plain = experts.gate_up_bias is None and experts.down_bias is None and gating == SWIGLU
    return plain and on_cpu(x, weights, experts.gate_up, experts.down)


# swiglu_experts(x [tokens, hidden], choice [tokens, k] int64, weights [tokens, k], experts, gating, gated)
#     -> [tokens, hidden] in x's dtype; `gated` is what the reference calls, the fast form has it inside
swiglu_experts: Op[[Tensor, Tensor, Tensor, Experts, Gating, Gated], Tensor] = Op(
    reference=_reference, fast=_fast, applies=_applies
)
