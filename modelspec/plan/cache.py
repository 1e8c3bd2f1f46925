"""What generating a token leaves in memory, exactly.

Attention keeps something of every token that it may read again: a head's keys and values, or for latent attention the
one latent and the rotated key that all heads share, and an indexer's key. That grows with the text. A window and a
recurrence keep the same however long the text is: they have a state.
"""

from dataclasses import dataclass
from typing import assert_never

from modelspec.plan.runs import runs
from modelspec.plan.storage import ITEM_BYTES
from modelspec.schema import GQA, MLA, Attention, GatedDeltaNet, ModelSpec


@dataclass(frozen=True, slots=True)
class Cache:
    """Bytes of one sequence: `per_token` for each of its tokens, `per_sequence` beside them once and for all."""

    per_token: int
    per_sequence: int


def cache(spec: ModelSpec) -> Cache:
    """The cache of the main model, in `precision.compute`; the memory of a recurrence is kept in FP32 at least."""
    model = spec.model
    each = [(run.repeat, layer_cache(spec, model.attention[run.attention])) for run in runs(model)]
    return Cache(
        sum(layers * layer.per_token for layers, layer in each),
        sum(layers * layer.per_sequence for layers, layer in each),
    )


def layer_cache(spec: ModelSpec, variant: Attention) -> Cache:
    """The cache of one layer with this attention."""
    item = ITEM_BYTES[spec.precision.compute]
    match variant:
        case MLA():
            index = variant.indexer.head_dim if variant.indexer else 0
            return Cache((variant.kv_lora_rank + variant.qk_rope_head_dim + index) * item, 0)
        case GQA():
            token = 2 * variant.num_kv_heads * variant.head_dim * item
            window = variant.sliding_window
            bounded = window is not None and window < spec.model.max_position
            return Cache(0, window * token) if window is not None and bounded else Cache(token, 0)
        case GatedDeltaNet():
            memory = variant.num_v_heads * variant.qk_head_dim * variant.v_head_dim
            channels = 2 * variant.num_qk_heads * variant.qk_head_dim + variant.num_v_heads * variant.v_head_dim
            before = (variant.conv_kernel - 1) * channels
            return Cache(0, memory * max(item, ITEM_BYTES["float32"]) + before * item)
        case other:
            assert_never(other)
