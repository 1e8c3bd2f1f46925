"""Attention: how a token reads from the tokens before it. One class per kind, the union at the foot."""

from typing import Literal

from pydantic import Field

from modelspec.schema.base import Count, Positive, Strict, Tensors, TensorSpec, Width, linear, under
from modelspec.schema.rope import RopeOrNone


class MLA(Strict):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    Keys and values of all heads are rebuilt from one small latent vector per token, which is all that a cache must
    hold, beside one rotated key part that the heads share. Queries may be compressed likewise.
    """

    type: Literal["mla"] = Field(description="multi-head latent attention")
    num_heads: Count = Field(description="query heads", examples=[128])
    q_lora_rank: Width | None = Field(
        default=None, description="width of the query latent; elements. Left out: queries are not compressed"
    )
    kv_lora_rank: Width = Field(description="width of the latent shared by keys and values; elements", examples=[512])
    qk_nope_head_dim: Width = Field(description="per head, the part of queries and keys without position; elements")
    qk_rope_head_dim: Width = Field(
        description="per head, the part of queries and keys that carries position; elements"
    )
    v_head_dim: Width = Field(description="values per head; elements")
    latent_norm_eps: Positive = Field(description="eps of the norms over the two latents; no unit", examples=[1.0e-6])
    rope: RopeOrNone = Field(description="rotary embedding of the position part, or the word none")

    def tensors(self, hidden_size: int) -> Tensors:
        """Projections without bias and the norms over the latents."""
        qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        queries = self.num_heads * qk_head_dim
        if self.q_lora_rank is None:
            table = under("q_proj", linear(queries, hidden_size))
        else:
            table = (
                under("q_a_proj", linear(self.q_lora_rank, hidden_size))
                | {"q_a_norm.weight": TensorSpec((self.q_lora_rank,))}
                | under("q_b_proj", linear(queries, self.q_lora_rank))
            )
        return (
            table
            | under("kv_a_proj", linear(self.kv_lora_rank + self.qk_rope_head_dim, hidden_size))
            | {"kv_a_norm.weight": TensorSpec((self.kv_lora_rank,))}
            | under("kv_b_proj", linear(self.num_heads * (self.qk_nope_head_dim + self.v_head_dim), self.kv_lora_rank))
            | under("o_proj", linear(hidden_size, self.num_heads * self.v_head_dim))
        )


# The tagged union of attention kinds: `MLA | GQA | ...`, told apart by `type`.
Attention = MLA
