"""Attention variants: the schema class picks the builder."""

import torch
from torch import Tensor

from modelspec import schema
from modelspec.builders.attention.mla import MLA
from modelspec.builders.rope import Rotary, rotary_tables

Attention = MLA


def build_attention(spec: schema.Attention, hidden_size: int) -> Attention:
    """The attention module that a variant of the spec stands for."""
    match spec:
        case schema.MLA():
            return MLA(spec, hidden_size)


def rotary_of(spec: schema.Attention, positions: Tensor, dtype: torch.dtype) -> Rotary | None:
    """The rotary tables that a variant's forward takes, for positions [sequence]; None where it has no rope."""
    match spec:
        case schema.MLA(rope="none"):
            return None
        case schema.MLA(rope=rope, qk_rope_head_dim=dim):
            assert rope != "none"
            return rotary_tables(rope, dim, positions, dtype)
