"""Attention variants: the schema class picks the builder."""

from typing import assert_never

import torch
from torch import Tensor

from modelspec import schema
from modelspec.builders.attention.gated_deltanet import GatedDeltaNet
from modelspec.builders.attention.gqa import GQA
from modelspec.builders.attention.mla import MLA
from modelspec.builders.rope import Rotary, rotary_tables

Attention = MLA | GQA | GatedDeltaNet


def build_attention(spec: schema.Attention, hidden_size: int, norm: schema.Norm) -> Attention:
    """The attention module that a variant of the spec stands for; `norm` is the kind of its layer."""
    match spec:
        case schema.MLA():
            return MLA(spec, hidden_size)
        case schema.GQA():
            return GQA(spec, hidden_size, norm)
        case schema.GatedDeltaNet():
            return GatedDeltaNet(spec, hidden_size, norm.eps)
        case _:
            assert_never(spec)


def rotary_of(spec: schema.Attention, positions: Tensor, dtype: torch.dtype) -> Rotary | None:
    """The rotary tables that a variant's forward takes, for positions [sequence]; None where it has no rope."""
    if spec.rope == "none":
        return None
    return rotary_tables(spec.rope, spec.rotated, positions, dtype)
