"""Gated DeltaNet (arXiv 2412.06464): attention whose cost per token does not grow with the text.

A head keeps a memory of fixed size, from keys to values. Each token lets it decay by alpha, corrects what stands under
its key by beta, and reads it with its query; `kernels/gated_delta.py` has the rule.

    q, k, v, z = W_qkvz h       b, a = W_ba h            q, k, v = silu(conv(q, k, v))
    beta  = sigmoid(b)          alpha = exp(-exp(A_log) softplus(a + dt_bias))
    o     = delta_rule(q / |q| / sqrt(qk_head_dim), k / |k|, v, alpha, beta)
    u     = W_o (norm(o) * silu(z))

The convolution is depthwise and causal: a channel mixes a token with the few before it. Projections keep together what
belongs to one head of keys: its q and k, and v, z, b and a of all heads of values that it serves.
"""

from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modelspec import schema
from modelspec.builders.layers import Linear, RMSNorm
from modelspec.builders.rope import Rotary
from modelspec.kernels.gated_delta import gated_delta_chunks


class GatedDeltaNet(nn.Module):
    """x [batch, sequence, hidden] -> [batch, sequence, hidden], each token from itself and those before it."""

    def __init__(self, spec: schema.GatedDeltaNet, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.spec = spec
        self.queries, self.values = spec.num_qk_heads * spec.qk_head_dim, spec.num_v_heads * spec.v_head_dim
        self.qkvz_proj = Linear(hidden_size, 2 * self.queries + 2 * self.values)
        self.ba_proj = Linear(hidden_size, 2 * spec.num_v_heads)
        self.conv = CausalConv(2 * self.queries + self.values, spec.conv_kernel)
        self.dt_bias = nn.Parameter(torch.empty(spec.num_v_heads))
        self.A_log = nn.Parameter(torch.empty(spec.num_v_heads))
        self.norm = RMSNorm(spec.v_head_dim, eps)
        self.out_proj = Linear(self.values, hidden_size)

    def forward(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        spec, served = self.spec, self.spec.num_v_heads // self.spec.num_qk_heads
        widths = [spec.qk_head_dim, spec.qk_head_dim, served * spec.v_head_dim, served * spec.v_head_dim]
        by_key_head = self.qkvz_proj(x).unflatten(-1, (spec.num_qk_heads, -1))
        q, k, v, z = (part.flatten(-2) for part in by_key_head.split(widths, dim=-1))
        mixed = F.silu(self.conv(torch.cat((q, k, v), dim=-1)))
        q, k, v = mixed.split([self.queries, self.queries, self.values], dim=-1)
        q, k = (_unit(self._heads(part, spec.qk_head_dim)).repeat_interleave(served, dim=1) for part in (q, k))
        log_alpha, beta = self._gates(x)
        o = gated_delta_chunks(q / sqrt(spec.qk_head_dim), k, self._heads(v, spec.v_head_dim), log_alpha, beta)
        gate = F.silu(z.unflatten(-1, (-1, spec.v_head_dim)))
        return self.out_proj((self.norm(o.transpose(1, 2)) * gate).flatten(-2))

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The logarithm of alpha, and beta: [batch, heads of values, sequence] each, in at least FP32."""
        wide = torch.promote_types(x.dtype, torch.float32)
        by_key_head = self.ba_proj(x).unflatten(-1, (self.spec.num_qk_heads, 2, -1)).to(wide)
        b, a = (part.flatten(-2) for part in by_key_head.unbind(-2))
        log_alpha = -self.A_log.to(wide).exp() * F.softplus(a + self.dt_bias.to(wide))
        return log_alpha.mT, b.sigmoid().mT

    @staticmethod
    def _heads(x: Tensor, dim: int) -> Tensor:
        """[batch, sequence, heads x dim] -> [batch, heads, sequence, dim]."""
        return x.unflatten(-1, (-1, dim)).transpose(1, 2)


class CausalConv(nn.Module):
    """y[t] = sum over i of weight[i] x[t - kernel + 1 + i], each channel by itself: x [batch, sequence, channels]."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel))

    def forward(self, x: Tensor) -> Tensor:
        channels, _, kernel = self.weight.shape
        before = F.pad(x.mT, (kernel - 1, 0))
        return F.conv1d(before, self.weight.to(x.dtype), groups=channels).mT


def _unit(x: Tensor) -> Tensor:
    """x scaled to length 1 along its last dim, in at least FP32; what is shorter than a thousandth stays shorter."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)
