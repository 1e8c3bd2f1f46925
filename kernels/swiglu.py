"""silu(gate) * up (arXiv 2002.05202).

The fast form keeps gate and up alone and computes silu(gate) again in the backward pass.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from modelspec.kernels.op import Op, on_cpu


def _reference(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = grads[0] * up
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_gate, F.silu(gate).mul_(grads[0])


def _fast(gate: Tensor, up: Tensor) -> Tensor:
    return _SwiGLU.apply(gate, up)


# swiglu(gate [..., n], up [..., n]) -> [..., n]
swiglu: Op[[Tensor, Tensor], Tensor] = Op(reference=_reference, fast=_fast, applies=on_cpu)
