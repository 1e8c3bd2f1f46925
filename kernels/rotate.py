"""Rotary embedding's rotation of pairs of elements (arXiv 2104.09864).

A pair (a, b) at a position with angle t becomes (a cos t - b sin t, b cos t + a sin t): a complex product, and its
gradient is the product with the conjugate. Neighbouring elements are read as complex numbers where they lie.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from modelspec.kernels.op import Op, on_cpu

Layout = Literal["interleaved", "half_split"]


def _reference(x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
    if layout == "interleaved":
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class _RotateInterleaved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, torch.complex(cos, sin))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        grad = grads[0] if _in_pairs(grads[0]) else grads[0].clone(memory_format=torch.contiguous_format)
        return _turn(grad, torch.complex(cos, -sin)), None, None


def _in_pairs(x: Tensor) -> bool:
    """Whether neighbouring elements can be read as complex numbers: pairs must lie at even offsets."""
    return x.stride(-1) == 1 and x.storage_offset() % 2 == 0 and all(step % 2 == 0 for step in x.stride()[:-1])


def _turn(x: Tensor, by: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * by).flatten(-2)


def _fast(x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
    return _RotateInterleaved.apply(x, cos, sin)


def _applies(x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> bool:
    return layout == "interleaved" and on_cpu(x, cos, sin) and _in_pairs(x)


# rotate(x [..., sequence, dim], cos and sin [sequence, dim / 2], layout) -> x's shape
rotate: Op[[Tensor, Tensor, Tensor, Layout], Tensor] = Op(reference=_reference, fast=_fast, applies=_applies)
