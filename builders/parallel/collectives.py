"""What ranks of an axis exchange, with gradients: each collective's backward pass is the one that undoes it.

Gathering hands every rank the parts of all, so gradients for a part come from all ranks and are summed; scattering a
sum hands every rank a part of it, so the gradient of each summand is all parts. Rows sent to other ranks come back.
Tensors are ordinary ones throughout, so that kernels take their fast forms.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from modelspec.builders.parallel.mesh import Axis

# Since torch 2.13 the first name of each pair; 2.11 has the second alone.
_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(whole: Tensor, share: Tensor, axis: Axis) -> None:
    """Fills the flat tensor `whole` with the shares of all ranks, one after the other."""
    _gather(whole, share, group=axis.group)


def reduce_scatter(share: Tensor, whole: Tensor, axis: Axis) -> None:
    """Fills the flat tensor `share` with this rank's part of the sum of all `whole`."""
    _scatter(share, whole, group=axis.group)


def gathered(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """The parts of all ranks, one after the other along `dim`; gradients are summed and scattered."""
    found: Tensor = _Gathered.apply(x, dim, axis)
    return found


def scattered_sum(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """This rank's part along `dim` of the sum of all ranks' x; gradients are gathered."""
    found: Tensor = _ScatteredSum.apply(x, dim, axis)
    return found


class Way(NamedTuple):
    """How many rows go to each rank of an axis, and how many come from each."""

    sent: list[int]
    came: list[int]

    @property
    def back(self) -> "Way":
        """The way of what became of the rows."""
        return Way(self.came, self.sent)


def moved(rows: Tensor, way: Way, axis: Axis) -> Tensor:
    """Rows, in the order of ranks, to these; what comes is in the order of ranks too. Gradients go the way back."""
    found: Tensor = _Moved.apply(rows, way, axis)
    return found


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axis: Axis) -> Tensor:
        ctx.dim, ctx.axis = dim, axis
        return _gather_along(x, dim, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _scatter_along(grads[0], ctx.dim, ctx.axis), None, None


class _ScatteredSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axis: Axis) -> Tensor:
        ctx.dim, ctx.axis = dim, axis
        return _scatter_along(x, dim, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _gather_along(grads[0], ctx.dim, ctx.axis), None, None


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, way: Way, axis: Axis) -> Tensor:
        ctx.way, ctx.axis = way, axis
        return _move(rows, way, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _move(grads[0], ctx.way.back, ctx.axis), None, None


def _gather_along(x: Tensor, dim: int, axis: Axis) -> Tensor:
    x = x.movedim(dim, 0).contiguous()
    whole = x.new_empty(axis.size * x.shape[0], *x.shape[1:])
    all_gather(whole, x, axis)
    return whole.movedim(0, dim)


def _scatter_along(x: Tensor, dim: int, axis: Axis) -> Tensor:
    x = x.movedim(dim, 0).contiguous()
    share = x.new_empty(x.shape[0] // axis.size, *x.shape[1:])
    reduce_scatter(share, x, axis)
    return share.movedim(0, dim)


def _move(rows: Tensor, way: Way, axis: Axis) -> Tensor:
    if axis.group is None:
        return rows
    come = rows.new_empty(sum(way.came), *rows.shape[1:])
    dist.all_to_all_single(come, rows.contiguous(), way.came, way.sent, group=axis.group)
    return come
