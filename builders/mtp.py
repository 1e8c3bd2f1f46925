"""Multi-token prediction (arXiv 2412.19437, section 2.2, equations 21 to 25).

Module k takes the representation of a position and the embedding of the token k places on, and predicts the token
after that. Modules work in sequence, each on the one before, and share the main model's embedding and head. The
representation that a module takes is the one that the head took: the main model's after its final norm, then each
module's after its own. The embedding comes first in the concatenation, as in the released weights; the report writes it
second.
"""

import torch
from torch import Tensor, nn

from modelspec import schema
from modelspec.builders.block import Block
from modelspec.builders.ffn.moe import Routing
from modelspec.builders.layers import Linear, build_norm
from modelspec.builders.rope import Rotary


class MTPModule(nn.Module):
    """hidden and embeddings, both [batch, sequence, hidden] -> the representation for the head and the next module."""

    def __init__(self, model: schema.Model, router_dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding_norm = build_norm(model.norm, model.hidden_size)
        self.hidden_norm = build_norm(model.norm, model.hidden_size)
        self.proj = Linear(2 * model.hidden_size, model.hidden_size)
        self.block = Block(model, model.mtp_layer(), router_dtype)
        self.norm = build_norm(model.norm, model.hidden_size)

    def forward(self, hidden: Tensor, embeddings: Tensor, rotary: Rotary | None) -> tuple[Tensor, Routing | None]:
        x, routing = self.block(self.entry(hidden, embeddings), rotary)
        return self.norm(x), routing

    def entry(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        """What the block takes, [batch, sequence, hidden]."""
        return self.proj(self.joined(hidden, embeddings))

    def joined(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        """Both normed, side by side, [batch, sequence, 2 x hidden]."""
        return torch.cat((self.embedding_norm(embeddings), self.hidden_norm(hidden)), dim=-1)
