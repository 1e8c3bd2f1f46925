"""y = x / sqrt(mean(x^2) + eps) * weight over the last dim (arXiv 1910.07467).

Plain autograd keeps several tensors of x's size and passes over memory a dozen times. The fast form keeps x and one
number per row. With r = 1 / sqrt(mean(x^2) + eps) and n elements in a row:

    grad_x = r * (g * w) - x * r^3 / n * sum(g * w * x)        grad_w = sum over rows of g * x * r
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from modelspec.kernels.op import Op, on_cpu


def _reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return torch.mul(x, r).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, r = ctx.saved_tensors
        size = x.shape[-1]
        gx = grads[0] * x
        rows, scales = gx.reshape(-1, size), r.reshape(-1)
        grad_weight = rows.T.mv(scales)
        pull = rows.mv(weight).mul_(scales).mul_(scales).mul_(scales).div_(-size).view_as(r)
        return torch.mul(grads[0], weight, out=gx).mul_(r).addcmul_(x, pull), grad_weight, None


def _fast(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _RMSNorm.apply(x, weight, eps)


# rms_norm(x [..., dim], weight [dim], eps) -> [..., dim]; the mean is at least FP32
rms_norm: Op[[Tensor, Tensor, float], Tensor] = Op(reference=_reference, fast=_fast, applies=on_cpu)
