"""The small parts that every block is made of.

Parameters stay in the dtype in which the optimizer keeps them; a product runs in the dtype of its input. So one model
trains in FP32, or computes in BF16 over FP32 master weights, without a word about it in the layers above.
"""

import torch
from torch import Tensor, nn

from modelspec import schema
from modelspec.kernels.linear import linear
from modelspec.kernels.rms_norm import rms_norm
from modelspec.kernels.swiglu import swiglu


class Linear(nn.Module):
    """y = x W^T without bias: x [..., in] -> [..., out]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dim (arXiv 1910.07467); the mean is at least FP32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.to(x.dtype), self.eps)


def build_norm(spec: schema.Norm, dim: int) -> RMSNorm:
    """The norm that a spec names, over vectors of `dim` elements."""
    return RMSNorm(dim, spec.eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202): x [..., hidden] -> [..., hidden]."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
