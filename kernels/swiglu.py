"""The gated activation of a feed-forward network: silu(gate) * up (arXiv 2002.05202), and its relatives.

    gate * sigmoid(alpha * gate) * (up + up_offset)      with a limit: gate cut above it, up on both sides

The fast form is that of silu alone: it keeps gate and up and computes silu(gate) again in the backward pass.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from modelspec.kernels.op import Op, on_cpu


class Gating(NamedTuple):
    """Constants of the activation; the defaults are SwiGLU's."""

    alpha: float = 1.0
    limit: float | None = None
    up_offset: float = 0.0


SWIGLU = Gating()
# The activation of gate and up [..., n].
Gated = Callable[[Tensor, Tensor, Gating], Tensor]


def _reference(gate: Tensor, up: Tensor, gating: Gating = SWIGLU) -> Tensor:
    if gating.limit is not None:
        gate, up = gate.clamp(max=gating.limit), up.clamp(-gating.limit, gating.limit)
    gated = F.silu(gate) if gating.alpha == 1.0 else gate * torch.sigmoid(gating.alpha * gate)
    return gated * (up + gating.up_offset if gating.up_offset else up)


def swiglu_gradients(grad: Tensor, gate: Tensor, up: Tensor, gating: Gating = SWIGLU) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up [..., n] given that of the output, computed in at least FP32, without autograd."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    g, u, grad = gate.to(wide), up.to(wide), grad.to(wide)
    if gating.limit is not None:
        g, u = g.clamp(max=gating.limit), u.clamp(-gating.limit, gating.limit)
    sigmoid = torch.sigmoid(gating.alpha * g)
    grad_gate = grad * (u + gating.up_offset) * sigmoid * (1 + gating.alpha * g * (1 - sigmoid))
    grad_up = grad * g * sigmoid
    if gating.limit is not None:
        grad_gate = grad_gate.masked_fill(gate > gating.limit, 0.0)
        grad_up = grad_up.masked_fill(up.abs() > gating.limit, 0.0)
    return grad_gate.to(gate.dtype), grad_up.to(up.dtype)


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


def _fast(gate: Tensor, up: Tensor, gating: Gating = SWIGLU) -> Tensor:
    return _SwiGLU.apply(gate, up)


def _applies(gate: Tensor, up: Tensor, gating: Gating = SWIGLU) -> bool:
    return gating == SWIGLU and on_cpu(gate, up)


# swiglu(gate [..., n], up [..., n], gating) -> [..., n]
swiglu: Op[[Tensor, Tensor, Gating], Tensor] = Op(reference=_reference, fast=_fast, applies=_applies)
