"""Grouped-query attention (arXiv 2305.13245), from multi-head (one head of keys per query head) to multi-query (one).

    q = rotate(norm(W_q h))      k = rotate(norm(W_k h))      v = W_v h
    o = softmax(q k^T / sqrt(head_dim)) v                     u = W_o (o * sigmoid(g))

Norms over q and k, the gate g, biases, a sliding window and sinks are there where the spec has them. Position may turn
only the first elements of a head.
"""

from math import sqrt

import torch
from torch import Tensor, nn

from modelspec import schema
from modelspec.builders.attention.sequence import WHOLE, Sequence
from modelspec.builders.layers import Linear, build_norm
from modelspec.builders.rope import Rotary, softmax_factor
from modelspec.kernels.attention import Sight


class GQA(nn.Module):
    """Causal attention over x [batch, sequence, hidden] -> [batch, sequence, hidden]."""

    sinks: nn.Parameter | None

    def __init__(self, spec: schema.GQA, hidden_size: int, norm: schema.Norm) -> None:
        super().__init__()
        self.spec = spec
        self.sequence: Sequence = WHOLE
        self.scale = softmax_factor(spec.rope) / sqrt(spec.head_dim)
        queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.q_proj = Linear(hidden_size, queries * (2 if spec.output_gate else 1), "q" in spec.bias)
        self.k_proj = Linear(hidden_size, keys, "k" in spec.bias)
        self.v_proj = Linear(hidden_size, keys, "v" in spec.bias)
        self.o_proj = Linear(queries, hidden_size, "o" in spec.bias)
        if spec.qk_norm is not None:
            per_head = spec.qk_norm == "per_head"
            self.q_norm = build_norm(norm, spec.head_dim if per_head else queries)
            self.k_norm = build_norm(norm, spec.head_dim if per_head else keys)
        self.register_parameter("sinks", nn.Parameter(torch.empty(spec.num_heads)) if spec.sinks else None)

    def forward(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        q, k, v, gate = self.q_proj(x), self.k_proj(x), self.v_proj(x), None
        if self.spec.output_gate:
            q, gate = (part.flatten(-2) for part in q.unflatten(-1, (self.spec.num_heads, -1)).chunk(2, dim=-1))
        if self.spec.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.unflatten(-1, (-1, self.spec.head_dim)) for part in (q, k, v))
        if self.spec.qk_norm == "per_head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if rotary is not None:
            q, k = self._rotated(q, rotary), self._rotated(k, rotary)
        k, v = self.sequence.gather(k, v, dim=2)
        sight = Sight(window=self.spec.sliding_window, sinks=self.sinks)
        o = self.sequence.attend(q, k, v, self.scale, sight).transpose(1, 2).flatten(-2)
        return self.o_proj(o if gate is None else o * gate.sigmoid())

    def _rotated(self, x: Tensor, rotary: Rotary) -> Tensor:
        """x [batch, heads, sequence, head_dim], its first elements turned by their positions."""
        position, rest = x.split([self.spec.rotated, self.spec.head_dim - self.spec.rotated], dim=-1)
        return torch.cat((rotary.rotate(position), rest), dim=-1)
