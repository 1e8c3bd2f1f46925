"""Grouped matrix product: rows sorted by group, one weight per group.

    y[rows of group g] = x[rows of group g] @ weight[g]^T

torch has this as `torch.nn.functional.grouped_mm`, with gaps that this op closes: in FP32 it works in eager mode only
(the meta and fake implementations take BF16 alone), and it refuses views whose rows are not whole 16 bytes apart. What
it does not take at all, such as float64 or rows that are not a multiple of 16 bytes, runs as a plain loop over groups,
which is also the reference in tests.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _torch_takes(weight: Tensor) -> bool:
    rows = (size * weight.element_size() for size in weight.shape[1:])
    return weight.dtype in (torch.float32, torch.bfloat16, torch.float16) and all(size % 16 == 0 for size in rows)


def grouped_mm_reference(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The definition, group by group. x [rows, in], weight [groups, out, in], ends [groups] -> [rows, out]."""
    return torch.cat([x[a:b] @ w.T for (a, b), w in zip(_runs(ends), weight, strict=True)])


def _runs(ends: Tensor) -> list[tuple[int, int]]:
    return list(pairwise([0, *ends.tolist()]))


@torch.library.custom_op("modelspec::grouped_mm", mutates_args=())
def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows times their group's weight.

    x [rows, in], sorted by group; weight [groups, out, in]; ends [groups] int32, the row after each group's last: the
    final one must equal rows. Returns [rows, out]. Differentiable in x and weight.
    """
    if _torch_takes(weight):
        return F.grouped_mm(x.contiguous(), weight.contiguous().transpose(-2, -1), offs=ends)
    return grouped_mm_reference(x, weight, ends)


@grouped_mm.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("modelspec::grouped_mm_backward", mutates_args=())
def grouped_mm_backward(grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `grouped_mm` with respect to x and weight, given that of its output."""
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    if _torch_takes(weight):
        return F.grouped_mm(grad, weight, offs=ends), F.grouped_mm(grad.T, x, offs=ends)
    runs = _runs(ends)
    grad_x = torch.cat([grad[a:b] @ w for (a, b), w in zip(runs, weight, strict=True)])
    return grad_x, torch.stack([grad[a:b].T @ x[a:b] for a, b in runs])


@grouped_mm_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    grad_x, grad_weight = grouped_mm_backward(grad, *ctx.saved_tensors)
    return grad_x, grad_weight, None


grouped_mm.register_autograd(_backward, setup_context=_setup)
