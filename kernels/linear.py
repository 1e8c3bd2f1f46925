"""y = x W^T.

torch's own products call MKL for FP32 on CPU, which on processors of other makers than Intel's computes with vectors of
half the width. oneDNN's were measured twice as fast on one AVX-512 machine (440 against 220 GFLOP/s, for the output and
both gradients), and 20 % faster on another. `matmul_nt` and `matmul_tn` choose; what has no such form is torch's.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from modelspec.kernels.op import Op, on_cpu

_HAS_ONEDNN = torch.backends.mkldnn.is_available()
# From so many rows on, oneDNN's gradient of a weight repays the copies that it asks for (16 % faster at 2,048 rows of
# 1,024 and 256); below, transposing one operand is cheaper (131 against 170 microseconds at 256 rows of 256 and 256).
_MANY_ROWS = 1024


def _onednn(x: Tensor) -> bool:
    # The compiler has its own choice of products, and no lowering of these for weights that train.
    return _HAS_ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()


def matmul_nt(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] times the transpose of weight [out, in], which may be a view; without autograd."""
    if _onednn(x):
        # Of a weight whose rows lie apart, oneDNN has a form that is 1,000 times slower than a copy.
        if not (weight.is_contiguous() or weight.T.is_contiguous()):
            weight = weight.contiguous()
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


def matmul_tn(grad: Tensor, x: Tensor) -> Tensor:
    """The transpose of grad [rows, out] times x [rows, in], a weight's gradient [out, in]; without autograd."""
    if not _onednn(x) or x.shape[0] == 0:
        return grad.T.mm(x)
    if x.shape[0] < _MANY_ROWS:
        return matmul_nt(grad.T.contiguous(), x.T)
    weight = x.new_empty(grad.shape[1], x.shape[1])  # Read for its shape alone.
    return torch.ops.aten.mkldnn_linear_backward_weights(grad.to_mkldnn(), x.to_mkldnn(), weight, False)[0]


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
        grad_weight = matmul_tn(grad.flatten(0, -2), x.flatten(0, -2)) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


def _fast(x: Tensor, weight: Tensor) -> Tensor:
    return _Linear.apply(x, weight)


# linear(x [..., in], weight [out, in]) -> [..., out]
linear: Op[[Tensor, Tensor], Tensor] = Op(reference=F.linear, fast=_fast, applies=on_cpu)
