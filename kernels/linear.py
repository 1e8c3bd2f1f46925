"""y = x W^T.

torch's own linear calls MKL for FP32 on CPU. oneDNN's product was measured 15 to 20 % faster for the shapes of a small
transformer on an AVX-512 machine (215 against 175 GFLOP/s forward, 218 against 180 for the input's gradient, which it
computes without copying the transposed weight); for the weight's gradient MKL stays ahead.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from modelspec.kernels.op import Op, on_cpu

_HAS_ONEDNN = torch.backends.mkldnn.is_available()


def matmul_nt(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] times the transpose of weight [out, in], which may be a view; without autograd."""
    # The compiler has its own choice of products, and no lowering of this one for weights that train.
    if _HAS_ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling():
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return matmul_nt(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_x = matmul_nt(grad, weight.T) if ctx.needs_input_grad[0] else None
        grad_weight = grad.flatten(0, -2).T.mm(x.flatten(0, -2)) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


def _fast(x: Tensor, weight: Tensor) -> Tensor:
    return _Linear.apply(x, weight)


# linear(x [..., in], weight [out, in]) -> [..., out]
linear: Op[[Tensor, Tensor], Tensor] = Op(reference=F.linear, fast=_fast, applies=on_cpu)
