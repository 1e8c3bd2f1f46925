"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434; DeepSeek-V3, arXiv 2412.19437, equations 1 to 11).

Keys and values come from one latent vector per token. Per head, queries and keys have a part without position, and a
rotated part that is computed straight from the input and, for keys, shared by all heads:

    c_kv = norm(W_dkv h)      k_nope, v = W_ukv c_kv      k_rope = rotate(W_kr h)
    c_q  = norm(W_dq h)       q_nope, q_rope = W_uq c_q   q_rope = rotate(q_rope)
    o    = softmax([q_nope; q_rope] [k_nope; k_rope]^T * scale) v

`kv_a_proj` is W_dkv and W_kr in one matrix, `kv_b_proj` holds k_nope and v head by head. This is the form for training
and prefill; decoding folds W_ukv into its neighbours so that only c_kv and k_rope need a cache. With an indexer the
softmax runs over the keys that it chooses from c_q and h.
"""

from math import sqrt

import torch
from torch import Tensor, nn

from modelspec import schema
from modelspec.builders.attention.indexer import LightningIndexer
from modelspec.builders.attention.sequence import WHOLE, Sequence
from modelspec.builders.layers import Linear, RMSNorm
from modelspec.builders.rope import Rotary, softmax_factor
from modelspec.kernels.attention import Sight


class MLA(nn.Module):
    """Causal attention over x [batch, sequence, hidden] -> [batch, sequence, hidden]."""

    def __init__(self, spec: schema.MLA, hidden_size: int) -> None:
        super().__init__()
        self.spec = spec
        self.sequence: Sequence = WHOLE
        qk_head_dim = spec.qk_nope_head_dim + spec.qk_rope_head_dim
        self.scale = softmax_factor(spec.rope) / sqrt(qk_head_dim)
        if spec.q_lora_rank is None:
            self.q_proj = Linear(hidden_size, spec.num_heads * qk_head_dim)
        else:
            self.q_a_proj = Linear(hidden_size, spec.q_lora_rank)
            self.q_a_norm = RMSNorm(spec.q_lora_rank, spec.latent_norm_eps)
            self.q_b_proj = Linear(spec.q_lora_rank, spec.num_heads * qk_head_dim)
        self.kv_a_proj = Linear(hidden_size, spec.kv_lora_rank + spec.qk_rope_head_dim)
        self.kv_a_norm = RMSNorm(spec.kv_lora_rank, spec.latent_norm_eps)
        self.kv_b_proj = Linear(spec.kv_lora_rank, spec.num_heads * (spec.qk_nope_head_dim + spec.v_head_dim))
        self.o_proj = Linear(spec.num_heads * spec.v_head_dim, hidden_size)
        self.indexer: LightningIndexer | None = None
        if spec.indexer is not None:
            assert spec.q_lora_rank is not None, "the indexer reads the query latent: see checks"
            self.indexer = LightningIndexer(spec.indexer, hidden_size, spec.q_lora_rank)

    def forward(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        spec = self.spec
        chosen = None
        if spec.q_lora_rank is None:
            c_q = self.q_proj(x)
        else:
            c_q = self.q_a_norm(self.q_a_proj(x))
            if self.indexer is not None:
                chosen = self.indexer(x, c_q, rotary, self.sequence)
        c_kv, k_rope = self.kv_a_proj(x).split([spec.kv_lora_rank, spec.qk_rope_head_dim], dim=-1)
        k_rope = self.positioned(k_rope, rotary)
        q, (k, v) = self.queries(c_q, rotary), self.keys_values(self.kv_a_norm(c_kv), k_rope)
        o = self.sequence.attend(q, k, v, self.scale, Sight(chosen=chosen))
        return self.o_proj(o.transpose(1, 2).flatten(-2))

    @staticmethod
    def positioned(k_rope: Tensor, rotary: Rotary | None) -> Tensor:
        """The keys' part with position, [batch, sequence, qk_rope_head_dim]."""
        return k_rope if rotary is None else rotary.rotate(k_rope)

    def queries(self, c_q: Tensor, rotary: Rotary | None) -> Tensor:
        """[batch, heads, sequence, dim] out of latents, or what is not compressed, [batch, sequence, whatever]."""
        spec = self.spec
        q = c_q if spec.q_lora_rank is None else self.q_b_proj(c_q)
        q_nope, q_rope = self._heads(q).split([spec.qk_nope_head_dim, spec.qk_rope_head_dim], dim=-1)
        return torch.cat((q_nope, q_rope if rotary is None else rotary.rotate(q_rope)), dim=-1)

    def keys_values(self, c_kv: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """[batch, heads, sequence, dim] each, of the whole sequence, out of latents and rotated parts of keys that are
        here, [batch, sequence, dim].
        """
        spec = self.spec
        c_kv, k_rope = self.sequence.gather(c_kv, k_rope, dim=1)
        k_nope, v = self._heads(self.kv_b_proj(c_kv)).split([spec.qk_nope_head_dim, spec.v_head_dim], dim=-1)
        return torch.cat((k_nope, k_rope.unsqueeze(1).expand(-1, spec.num_heads, -1, -1)), dim=-1), v

    def _heads(self, x: Tensor) -> Tensor:
        """[batch, sequence, heads x dim] -> [batch, heads, sequence, dim]."""
        return x.unflatten(-1, (self.spec.num_heads, -1)).transpose(1, 2)
