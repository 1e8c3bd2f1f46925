"""Attention: how a token reads from the tokens before it. One class per kind, the union at the foot."""

from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Field

from modelspec.schema.base import (
    UNIQUE,
    AsSet,
    AsTuple,
    Count,
    Position,
    Positive,
    Strict,
    Tensors,
    TensorSpec,
    Width,
    linear,
    under,
)
from modelspec.schema.norm import Norm
from modelspec.schema.rope import RopeOrNone


class Lightning(Strict):
    """The lightning indexer of DeepSeek Sparse Attention (DeepSeek-V3.2): it picks the keys that a query may see.

    Small heads score every key; attention then runs over the best of them alone.
    """

    type: Literal["lightning"] = Field(description="an indexer of its own")
    num_heads: Count = Field(description="heads of the indexer's queries; its keys have one", examples=[64])
    head_dim: Width = Field(description="per head, the indexer's queries and keys; elements", examples=[128])
    rope_head_dim: Width = Field(description="the first so many of them carry position; elements", examples=[64])
    rope_layout: Literal["interleaved", "half_split"] = Field(
        description="which elements form a pair: (0, 1), (2, 3), ... or (0, n/2), (1, n/2 + 1), ..."
    )
    norm_eps: Positive = Field(description="eps of the LayerNorm over keys; no unit", examples=[1.0e-6])
    topk: Position = Field(description="keys that one query sees; tokens", examples=[2048])

    def tensors(self, hidden_size: int, q_lora_rank: int) -> Tensors:
        """Queries from the query latent, keys and the heads' weights from the layer's input."""
        return (
            under("q_proj", linear(self.num_heads * self.head_dim, q_lora_rank))
            | under("k_proj", linear(self.head_dim, hidden_size))
            | {
                "k_norm.weight": TensorSpec((self.head_dim,), initial="ones"),
                "k_norm.bias": TensorSpec((self.head_dim,), initial="zeros"),
            }
            | under("weights_proj", linear(self.num_heads, hidden_size))
        )


Indexer = Lightning


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
    indexer: Indexer | None = Field(
        default=None, description="sparse attention: what picks the keys of a query; left out: it sees all before it"
    )

    @property
    def tells_order(self) -> bool:
        """Whether it knows the order of tokens otherwise than by the causal mask."""
        return self.rope != "none"

    @property
    def rotated(self) -> int:
        """Elements of a head that carry position."""
        return self.qk_rope_head_dim

    def tensors(self, hidden_size: int, norm: Norm) -> Tensors:
        """Projections without bias, the norms over the latents, the indexer."""
        qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        queries = self.num_heads * qk_head_dim
        if self.q_lora_rank is None:
            table = under("q_proj", linear(queries, hidden_size))
        else:
            table = (
                under("q_a_proj", linear(self.q_lora_rank, hidden_size))
                | {"q_a_norm.weight": TensorSpec((self.q_lora_rank,), initial="ones")}
                | under("q_b_proj", linear(queries, self.q_lora_rank))
            )
        table |= (
            under("kv_a_proj", linear(self.kv_lora_rank + self.qk_rope_head_dim, hidden_size))
            | {"kv_a_norm.weight": TensorSpec((self.kv_lora_rank,), initial="ones")}
            | under("kv_b_proj", linear(self.num_heads * (self.qk_nope_head_dim + self.v_head_dim), self.kv_lora_rank))
            | under("o_proj", linear(hidden_size, self.num_heads * self.v_head_dim))
        )
        if self.indexer is not None and self.q_lora_rank is not None:
            table |= under("indexer", self.indexer.tensors(hidden_size, self.q_lora_rank))
        return table


class GQA(Strict):
    """Grouped-query attention (arXiv 2305.13245): several query heads share a head of keys and values.

    With as many of the latter as of the former it is multi-head attention, with one multi-query attention.
    """

    type: Literal["gqa"] = Field(description="grouped-query attention")
    num_heads: Count = Field(description="query heads", examples=[64])
    num_kv_heads: Count = Field(description="heads of keys and values; divides num_heads", examples=[8])
    head_dim: Width = Field(description="queries, keys and values per head; elements", examples=[128])
    rope_head_dim: Width | None = Field(
        default=None, description="the first so many elements of a head carry position; elements. Left out: all"
    )
    bias: Annotated[tuple[Literal["q", "k", "v", "o"], ...], AsTuple, AsSet] = Field(
        default=(), description="projections with a bias", json_schema_extra=UNIQUE
    )
    qk_norm: Literal["per_head", "full"] | None = Field(
        default=None,
        description="model.norm over queries and keys before rope, over each head or all at once; left out: none",
    )
    sliding_window: Position | None = Field(
        default=None, description="a token sees itself and those before it, so many in all; tokens. Left out: all"
    )
    sinks: bool = Field(
        default=False, description="one learned logit per head that takes its share of each softmax and gives nothing"
    )
    output_gate: bool = Field(
        default=False, description="attention's output times the sigmoid of a gate that the query projection also gives"
    )
    rope: RopeOrNone = Field(description="rotary embedding of queries and keys, or the word none")

    @property
    def tells_order(self) -> bool:
        """Whether it knows the order of tokens otherwise than by the causal mask."""
        return self.rope != "none"

    @property
    def rotated(self) -> int:
        """Elements of a head that carry position."""
        return self.rope_head_dim or self.head_dim

    def tensors(self, hidden_size: int, norm: Norm) -> Tensors:
        """Projections, norms over queries and keys, sinks. With a gate, a head's query rows come before its gate's."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        table = (
            under("q_proj", linear(queries * (2 if self.output_gate else 1), hidden_size, "q" in self.bias))
            | under("k_proj", linear(keys, hidden_size, "k" in self.bias))
            | under("v_proj", linear(keys, hidden_size, "v" in self.bias))
            | under("o_proj", linear(hidden_size, queries, "o" in self.bias))
        )
        if self.qk_norm is not None:
            per_head = self.qk_norm == "per_head"
            table |= under("q_norm", norm.tensors(self.head_dim if per_head else queries))
            table |= under("k_norm", norm.tensors(self.head_dim if per_head else keys))
        if self.sinks:
            table["sinks"] = TensorSpec((self.num_heads,), initial="zeros")
        return table


class GatedDeltaNet(Strict):
    """Gated DeltaNet (arXiv 2412.06464): a recurrence over a memory of fixed size, whatever the length of the text.

    Heads of queries and keys may be fewer than of values, and then serve several each. A short causal convolution
    mixes neighbouring tokens first.
    """

    rope: ClassVar[Literal["none"]] = "none"
    rotated: ClassVar[int] = 0
    tells_order: ClassVar[bool] = True

    type: Literal["gated_deltanet"] = Field(description="linear attention by the gated delta rule")
    num_qk_heads: Count = Field(description="heads of queries and keys", examples=[16])
    num_v_heads: Count = Field(description="heads of values; a multiple of num_qk_heads", examples=[32])
    qk_head_dim: Width = Field(description="queries and keys per head; elements", examples=[128])
    v_head_dim: Width = Field(description="values per head; elements", examples=[128])
    conv_kernel: Count = Field(description="reach of the convolution, the token itself included; tokens", examples=[4])

    def tensors(self, hidden_size: int, norm: Norm) -> Tensors:
        """Projections without bias, the convolution, decay. Rows of a projection go by heads of keys: of each head
        q, k, its values v and their gates z; and b before a. The norm over a head of values multiplies by its weight
        even where the model's norms are zero-centred.
        """
        queries, values = self.num_qk_heads * self.qk_head_dim, self.num_v_heads * self.v_head_dim
        return (
            under("qkvz_proj", linear(2 * queries + 2 * values, hidden_size))
            | under("ba_proj", linear(2 * self.num_v_heads, hidden_size))
            | {
                "conv.weight": TensorSpec((2 * queries + values, 1, self.conv_kernel)),
                "dt_bias": TensorSpec((self.num_v_heads,), initial="ones"),
                "A_log": TensorSpec((self.num_v_heads,), initial="log_of_uniform"),
                "norm.weight": TensorSpec((self.v_head_dim,), initial="ones"),
            }
            | under("out_proj", linear(hidden_size, values))
        )


# One more type is a class above and a name here.
Attention = Annotated[MLA | GQA | GatedDeltaNet, Discriminator("type")]
