"""The small parts that every block is made of.

Parameters stay in the dtype in which the optimizer keeps them; a product runs in the dtype of its input. So one model
trains in FP32, or computes in BF16 over FP32 master weights, without a word about it in the layers above.
"""

import torch
from torch import Tensor, nn

from modelspec import schema
from modelspec.kernels.linear import linear
from modelspec.kernels.rms_norm import rms_norm
from modelspec.kernels.swiglu import Gated, Gating, swiglu


class Linear(nn.Module):
    """y = x W^T, plus b where it has one: x [..., in] -> [..., out]."""

    bias: nn.Parameter | None

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.register_parameter("bias", nn.Parameter(torch.empty(outputs)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.weight.to(x.dtype))
        return y if self.bias is None else y + self.bias.to(y.dtype)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dim (arXiv 1910.07467), the mean in at least FP32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.to(x.dtype), self.eps)


class ZeroCenteredRMSNorm(RMSNorm):
    """The same with 1 + weight, so that decay and a weight of 0 pull towards the norm alone."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, (1.0 + self.weight).to(x.dtype), self.eps)


def build_norm(spec: schema.Norm, dim: int) -> RMSNorm:
    """The norm that a spec names, over vectors of `dim` elements."""
    return ZeroCenteredRMSNorm(dim, spec.eps) if spec.zero_centered else RMSNorm(dim, spec.eps)


def gating(spec: schema.Activation) -> Gating:
    """The constants of the activation that a spec names."""
    return Gating(spec.alpha, spec.limit, spec.up_offset)


class SwiGLU(nn.Module):
    """down(gated(gate(x), up(x))) (arXiv 2002.05202): x [..., hidden] -> [..., hidden]."""

    def __init__(self, hidden_size: int, intermediate_size: int, spec: schema.Dense | schema.MoE) -> None:
        super().__init__()
        self.gating = gating(spec.activation)
        self.gated: Gated = swiglu
        self.gate_proj = Linear(hidden_size, intermediate_size, "gate" in spec.bias)
        self.up_proj = Linear(hidden_size, intermediate_size, "up" in spec.bias)
        self.down_proj = Linear(intermediate_size, hidden_size, "down" in spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gated(self.gate_proj(x), self.up_proj(x), self.gating))
