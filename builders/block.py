"""One layer: x += attention(norm(x)), then x += ffn(norm(x))."""

import torch
from torch import Tensor, nn

from modelspec import schema
from modelspec.builders.attention import build_attention
from modelspec.builders.ffn import build_ffn
from modelspec.builders.ffn.moe import MoE, Routing
from modelspec.builders.layers import build_norm
from modelspec.builders.rope import Rotary


class Block(nn.Module):
    """x [batch, sequence, hidden] -> the same shape, and what the router did where there is one."""

    def __init__(self, model: schema.Model, layer: schema.LayerRun, router_dtype: torch.dtype) -> None:
        super().__init__()
        norm = layer.norm or model.norm
        self.attention_norm = build_norm(norm, model.hidden_size)
        self.attention = build_attention(model.attention[layer.attention], model.hidden_size, norm)
        self.ffn_norm = build_norm(norm, model.hidden_size)
        self.ffn = build_ffn(model.ffn[layer.ffn], model.hidden_size, router_dtype)

    def forward(self, x: Tensor, rotary: Rotary | None) -> tuple[Tensor, Routing | None]:
        x = x + self.attention(self.attention_norm(x), rotary)
        h = self.ffn_norm(x)
        if isinstance(self.ffn, MoE):
            y, routing = self.ffn(h)
            return x + y, routing
        return x + self.ffn(h), None
