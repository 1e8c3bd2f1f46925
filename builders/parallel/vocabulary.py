"""Embedding and head cut by their vocabulary over the tensor axis: the loss without the logits of a whole row anywhere.

A rank embeds the tokens that are in its part of the vocabulary and zeros for the others; the sum is the embedding. Of
the softmax it knows its own columns; the largest logit, the normaliser and the target's logit are found together. As in
kernels/linear_cross_entropy.py rows go in chunks, and gradients are computed while their logits are there.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from modelspec.builders.parallel.mesh import Axis
from modelspec.builders.parallel.tensor import gather, reduce_scatter
from modelspec.kernels.linear import matmul_nt
from modelspec.kernels.linear_cross_entropy import CHUNK_ROWS, IGNORE


def embed(tokens: Tensor, weight: Tensor, axis: Axis) -> Tensor:
    """tokens [batch, sequence], rows of the embedding -> this rank's positions, [batch, sequence / ranks, hidden]."""
    inside, column = _columns(tokens, weight, axis)
    return reduce_scatter(F.embedding(column, weight) * inside.unsqueeze(-1), axis)


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, axis: Axis) -> Tensor:
    """The sum of cross-entropy over targets [batch, sequence], the same on all ranks, in at least FP32.

    x [batch, sequence / ranks, hidden] are this rank's positions, `weight` its rows of the head.
    """
    hidden, flat = gather(x, axis).flatten(0, 1), targets.flatten()
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        total: Tensor = _CrossEntropy.apply(hidden, weight, flat, axis)
        return total
    return _in_chunks(hidden, weight, flat, axis, with_gradients=False)[0]


def _columns(ids: Tensor, weight: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """Whether ids are in this rank's part of the vocabulary, and where; 0 for those that are not."""
    column = ids - axis.rank * weight.shape[0]
    inside = (column >= 0) & (column < weight.shape[0])
    return inside, column.where(inside, 0)


def _in_chunks(
    hidden: Tensor, weight: Tensor, targets: Tensor, axis: Axis, with_gradients: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss and, if wanted, this rank's summand of the gradient of hidden, and the gradient of its rows."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    valid = (targets != IGNORE).unsqueeze(-1)
    inside, columns = (each.unsqueeze(-1) for each in _columns(targets, weight, axis))
    total = torch.zeros((), dtype=wide, device=hidden.device)
    grad_hidden = torch.empty_like(hidden) if with_gradients else None
    grad_weight = torch.zeros_like(weight, dtype=wide) if with_gradients else None
    for start in range(0, hidden.shape[0], CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        scores = matmul_nt(hidden[rows], weight).to(wide)
        largest = scores.amax(-1, keepdim=True)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=axis.group)
        target = (scores.gather(-1, columns[rows]) - largest).where(inside[rows], 0)
        exponentials = scores.sub_(largest).exp_()
        sums = torch.cat((exponentials.sum(-1, keepdim=True), target), dim=-1)
        dist.all_reduce(sums, group=axis.group)
        normaliser, target = sums.split(1, dim=-1)
        total += (normaliser.log() - target).where(valid[rows], 0).sum()
        if grad_hidden is not None and grad_weight is not None:
            grad = exponentials.div_(normaliser).scatter_add_(-1, columns[rows], -inside[rows].to(wide))
            grad_hidden[rows] = matmul_nt(grad.to(hidden.dtype), weight.T).where(valid[rows], 0)
            thin = hidden[rows].where(valid[rows], 0).to(wide)
            grad_weight += grad.T @ thin
    return total, grad_hidden, grad_weight


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, axis: Axis) -> Tensor:
        total, grad_hidden, grad_weight = _in_chunks(hidden, weight, targets, axis, with_gradients=True)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (grad,), (grad_hidden, grad_weight) = grads, ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), (grad_weight * grad).to(ctx.weight_dtype), None, None
