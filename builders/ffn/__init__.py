"""Feed-forward variants: the schema class picks the builder."""

from typing import assert_never

import torch

from modelspec import schema
from modelspec.builders.ffn.moe import MoE
from modelspec.builders.layers import SwiGLU

FFN = SwiGLU | MoE


def build_ffn(spec: schema.FFN, hidden_size: int, router_dtype: torch.dtype) -> FFN:
    """The feed-forward module that a variant of the spec stands for."""
    match spec:
        case schema.Dense():
            return SwiGLU(hidden_size, spec.intermediate_size, spec)
        case schema.MoE():
            return MoE(spec, hidden_size, router_dtype)
        case _:
            assert_never(spec)
