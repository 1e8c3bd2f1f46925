"""The lightning indexer of DeepSeek Sparse Attention (DeepSeek-V3.2): which keys a query may see.

    score[t, s] = sum over heads j of w[t, j] relu(q[t, j] . k[s])       a query sees the topk keys of highest score

Queries come from attention's query latent, keys and the weights w from the layer's input; keys have one head. The
choice carries no gradient, so a language-model loss trains nothing here: the indexer is learnt by a loss of its own,
which follows attention's own probabilities and is not part of this model.
"""

from math import sqrt

import torch
from torch import Tensor, nn

from modelspec import schema
from modelspec.builders.attention.sequence import WHOLE, Sequence
from modelspec.builders.layers import Linear
from modelspec.builders.rope import Rotary


class LightningIndexer(nn.Module):
    """x [batch, sequence, hidden] and the query latent [batch, sequence, rank] -> chosen keys, or None for all."""

    def __init__(self, spec: schema.Lightning, hidden_size: int, q_lora_rank: int) -> None:
        super().__init__()
        self.spec = spec
        self.q_proj = Linear(q_lora_rank, spec.num_heads * spec.head_dim)
        self.k_proj = Linear(hidden_size, spec.head_dim)
        self.k_norm = nn.LayerNorm(spec.head_dim, eps=spec.norm_eps)
        self.weights_proj = Linear(hidden_size, spec.num_heads)

    @torch.no_grad()
    def forward(self, x: Tensor, latent: Tensor, rotary: Rotary | None, sequence: Sequence = WHOLE) -> Tensor | None:
        """Bool [batch, 1, queries, keys]; None where no query has more keys than it may see."""
        length = sequence.length(x.shape[1])
        if length <= self.spec.topk:
            return None
        seen = torch.zeros(*x.shape[:2], length, dtype=torch.bool, device=x.device)
        return seen.scatter_(-1, self.choose(x, latent, rotary, sequence), True).unsqueeze(1)

    def choose(self, x: Tensor, latent: Tensor, rotary: Rotary | None, sequence: Sequence) -> Tensor:
        """The keys of highest score, int64 [batch, queries, topk]."""
        (k,) = sequence.gather(self._rotated(self._normed_keys(x).unsqueeze(1), rotary), dim=2)
        q = self._rotated(self.q_proj(latent).unflatten(-1, (self.spec.num_heads, -1)).transpose(1, 2), rotary)
        wide = torch.promote_types(x.dtype, torch.float32)
        affinities = (q.to(wide) @ k.to(wide).mT / sqrt(self.spec.head_dim)).relu()
        weights = self.weights_proj(x).to(wide) / sqrt(self.spec.num_heads)
        scores = torch.einsum("bth,bhts->bts", weights, affinities)
        future = sequence.future(x.shape[1], scores.shape[-1], x.device)
        return scores.masked_fill(future, float("-inf")).topk(self.spec.topk, dim=-1, sorted=False).indices

    def _normed_keys(self, x: Tensor) -> Tensor:
        keys = self.k_proj(x)
        weight, bias = self.k_norm.weight.to(keys.dtype), self.k_norm.bias.to(keys.dtype)
        return nn.functional.layer_norm(keys, (self.spec.head_dim,), weight, bias, self.spec.norm_eps)

    def _rotated(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        """x [batch, heads, sequence, head_dim], its first elements turned in the indexer's own layout."""
        if rotary is None:
            return x
        own = Rotary(rotary.cos, rotary.sin, self.spec.rope_layout)
        position, rest = x.split([self.spec.rope_head_dim, self.spec.head_dim - self.spec.rope_head_dim], dim=-1)
        return torch.cat((own.rotate(position), rest), dim=-1)
