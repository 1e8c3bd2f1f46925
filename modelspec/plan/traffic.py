"""What ranks send to each other, in bytes: every collective of one layer and microbatch, and those of a step.

All figures are of one rank and one direction, so that bytes over a link's bandwidth are seconds. Ranks that are next to
each other share a node as far as it goes: tensor first, then context, then data; experts take the same ranks.

Tokens go to their experts in one of two ways. The naive exchange sends a copy for each expert. The deduplicated one
sends a copy to each node that has one of them and hands it on inside the node; a router that limits a token to few
groups of experts bounds the copies (DeepSeek-V3, arXiv 2412.19437, section 3.2.2).
"""

from dataclasses import dataclass
from typing import Literal, assert_never

from modelspec.layout import mesh
from modelspec.plan.runs import runs
from modelspec.plan.storage import ITEM_BYTES
from modelspec.schema import GQA, MLA, GatedDeltaNet, LayerRun, ModelSpec, MoE

Axis = Literal["expert", "tensor", "context", "pipeline", "data"]
Link = Literal["node", "network"]


@dataclass(frozen=True, slots=True)
class Transfer:
    """Bytes that one rank sends in one collective, over the slower link that it crosses."""

    axis: Axis
    name: str
    link: Link
    bytes: float


def span(size: int, stride: int, domain: int) -> Link:
    """The link that `size` ranks at a distance of `stride` need, where `domain` ranks share a node."""
    return "node" if size * stride <= domain else "network"


def layer_traffic(spec: ModelSpec, run: LayerRun, tokens: float, domain: int) -> tuple[Transfer, ...]:
    """The forward pass of one layer over a microbatch of `tokens` tokens of a tensor group; backward it repeats.

    `domain` is how many devices share a node's fast link.
    """
    return (*_expert(spec, run, tokens, domain), *_tensor(spec, tokens, domain), *_context(spec, run, tokens, domain))


def _expert(spec: ModelSpec, run: LayerRun, tokens: float, domain: int) -> tuple[Transfer, ...]:
    ffn, ranks = spec.model.ffn[run.ffn], spec.parallelism.expert
    if not isinstance(ffn, MoE) or ranks == 1:
        return ()
    own = tokens / spec.parallelism.tensor
    sent, back = token_bytes(spec)
    inside = min(ranks, domain)
    nodes = -(-ranks // domain)
    copies = ffn.num_experts_per_tok * (inside - 1) / inside
    if nodes == 1:
        return (
            Transfer("expert", "dispatch", "node", own * copies * sent),
            Transfer("expert", "combine", "node", own * copies * back),
        )
    far = nodes_of_token(ffn, nodes) * (nodes - 1) / nodes
    return (
        Transfer("expert", "dispatch", "network", own * far * sent),
        Transfer("expert", "combine", "network", own * far * back),
    )


def naive_exchange(spec: ModelSpec, ffn: MoE) -> tuple[float, float]:
    """Bytes of one token to its experts and back in one layer, a copy for each expert."""
    ranks = spec.parallelism.expert
    copies = ffn.num_experts_per_tok * (ranks - 1) / ranks
    sent, back = token_bytes(spec)
    return copies * sent, copies * back


def token_bytes(spec: ModelSpec) -> tuple[int, int]:
    """Bytes of one token's vector on the way to an expert, in FP8 with a scale for every block if so, and back."""
    hidden, item = spec.model.hidden_size, ITEM_BYTES[spec.precision.compute]
    fp8 = spec.precision.fp8
    if fp8 is None or not fp8.dispatch:
        return hidden * item, hidden * item
    scales = -(-hidden // fp8.activation_block[1]) * (4 if fp8.scales == "float32" else 1)
    return hidden + scales, hidden * item


def nodes_of_token(ffn: MoE, nodes: int) -> float:
    """Nodes that hold an expert of a token, on average over even choices; at most as many as it may use groups."""
    hit = nodes * (1 - (1 - 1 / nodes) ** ffn.num_experts_per_tok)
    groups = ffn.router.selection.groups
    if groups is None or groups.num < nodes:
        return hit
    return min(hit, float(groups.topk))


def _tensor(spec: ModelSpec, tokens: float, domain: int) -> tuple[Transfer, ...]:
    """Two gathers and two scatters of the sequence in each layer: before and after each half."""
    ranks = spec.parallelism.tensor
    if ranks == 1:
        return ()
    one = tokens * spec.model.hidden_size * ITEM_BYTES[spec.precision.compute] * (ranks - 1) / ranks
    link = span(ranks, 1, domain)
    return (Transfer("tensor", "all-gather", link, 2 * one), Transfer("tensor", "reduce-scatter", link, 2 * one))


def _context(spec: ModelSpec, run: LayerRun, tokens: float, domain: int) -> tuple[Transfer, ...]:
    """Keys and values of all ranks, as the cache would keep them: MLA gathers its latents."""
    ranks, variant = spec.parallelism.context, spec.model.attention[run.attention]
    if ranks == 1:
        return ()
    match variant:
        case MLA():
            width = variant.kv_lora_rank + variant.qk_rope_head_dim
        case GQA():
            width = 2 * variant.num_kv_heads * variant.head_dim // spec.parallelism.tensor
        case GatedDeltaNet():
            width = 0
        case other:
            assert_never(other)
    link = span(ranks, spec.parallelism.tensor, domain)
    gathered = tokens * width * ITEM_BYTES[spec.precision.compute] * (ranks - 1)
    return (Transfer("context", "all-gather", link, gathered),) if width else ()


def boundary_traffic(spec: ModelSpec, tokens: float, domain: int) -> tuple[Transfer, ...]:
    """What a stage hands to the next for a microbatch: the residual stream."""
    axes = mesh(spec.parallelism)
    if axes.pipeline == 1:
        return ()
    stride = axes.data * axes.context * axes.tensor
    handed = tokens / axes.tensor * spec.model.hidden_size * ITEM_BYTES[spec.precision.compute]
    return (Transfer("pipeline", "send", span(2, stride, domain), handed),)


def step_traffic(spec: ModelSpec, dense: float, experts: float, microbatches: int, domain: int) -> tuple[Transfer, ...]:
    """Gradients and weights over the data axis, once per step, of a rank with so many parameters of each kind.

    Gradients are reduced and scattered, weights gathered again. Weights that ZeRO 3 keeps scattered are gathered in
    both passes: once per step under a pipeline, which keeps them for all microbatches, else for each microbatch.
    """
    axes, precision = mesh(spec.parallelism), spec.precision
    weight, gradient = ITEM_BYTES[precision.compute], ITEM_BYTES[precision.gradients]
    gathers = 2 * (1 if axes.pipeline > 1 else microbatches) if spec.parallelism.data.zero == 3 else 1
    found = []
    for name, parameters, ranks, stride in (
        ("dense", dense, axes.data * axes.context, axes.tensor),
        ("experts", experts, axes.expert_data, axes.expert),
    ):
        share, link = parameters * (ranks - 1) / ranks, span(ranks, stride, domain)
        if share:
            found.append(Transfer("data", f"reduce-scatter of {name}", link, share * gradient))
            found.append(Transfer("data", f"all-gather of {name}", link, share * weight * gathers))
    return tuple(found)


def has_experts(spec: ModelSpec) -> bool:
    """Whether any layer has experts."""
    return any(isinstance(spec.model.ffn[run.ffn], MoE) for run in runs(spec.model))
