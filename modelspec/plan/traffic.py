"""What ranks send to each other, in bytes: every collective of one layer and microbatch, and those of a step.

All figures are of one rank and one direction, so that bytes over a link's bandwidth are seconds. Ranks that are next to
each other share a node as far as it goes: tensor first, then context, then data; experts take the same ranks.

Tokens go to their experts in one of two ways. The naive exchange sends a copy for each expert. The deduplicated one
sends a copy to each node that has one of them and hands it on inside the node; a router that limits a token to few
groups of experts bounds the copies (DeepSeek-V3, arXiv 2412.19437, section 3.2.2).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, assert_never

from modelspec.layout import mesh, microbatch_size, microbatches, stages_of
from modelspec.plan.stages import rank_parameters, runs_of_stages
from modelspec.plan.storage import ITEM_BYTES
from modelspec.schema import GQA, MLA, GatedDeltaNet, LayerRun, ModelSpec, MoE

# What the exchange with experts would send without deduplication.
NAIVE = ("naive dispatch", "naive combine")
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
    return (
        *_expert(spec, run, tokens, domain),
        *_tensor(spec, run, tokens, domain),
        *_context(spec, run, tokens, domain),
    )


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


def naive_exchange(spec: ModelSpec, run: LayerRun, tokens: float, domain: int) -> tuple[Transfer, ...]:
    """Tokens of a layer to their experts and back, a copy for each expert: what deduplication saves beside it."""
    ffn, ranks = spec.model.ffn[run.ffn], spec.parallelism.expert
    if not isinstance(ffn, MoE) or ranks <= domain:
        return ()
    copies = tokens / spec.parallelism.tensor * ffn.num_experts_per_tok * (ranks - 1) / ranks
    ways = zip(NAIVE, token_bytes(spec), strict=True)
    return tuple(Transfer("expert", name, "network", copies * each) for name, each in ways)


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


def _tensor(spec: ModelSpec, run: LayerRun, tokens: float, domain: int) -> tuple[Transfer, ...]:
    """A gather and a scatter of the sequence around each half of a layer; routed experts take a rank's part of it."""
    ranks, ffn = spec.parallelism.tensor, spec.model.ffn[run.ffn]
    if ranks == 1:
        return ()
    halves = 1 if isinstance(ffn, MoE) and ffn.shared_experts is None else 2
    one = tokens * spec.model.hidden_size * ITEM_BYTES[spec.precision.compute] * (ranks - 1) / ranks
    link = span(ranks, 1, domain)
    return tuple(Transfer("tensor", name, link, halves * one) for name in ("all-gather", "reduce-scatter"))


def _context(spec: ModelSpec, run: LayerRun, tokens: float, domain: int) -> tuple[Transfer, ...]:
    """Keys and values of all ranks, as the cache would keep them: MLA gathers its latents."""
    ranks, variant = spec.parallelism.context, spec.model.attention[run.attention]
    if ranks == 1:
        return ()
    match variant:
        case MLA():
            width = variant.kv_lora_rank + variant.qk_rope_head_dim
        case GQA():
            width = 2 * max(variant.num_kv_heads // spec.parallelism.tensor, 1) * variant.head_dim
        case GatedDeltaNet():
            width = 0
        case other:
            assert_never(other)
    link = span(ranks, spec.parallelism.tensor, domain)
    gathered = tokens * width * ITEM_BYTES[spec.precision.compute] * (ranks - 1)
    return (Transfer("context", "all-gather", link, gathered),) if width else ()


def choice_traffic(spec: ModelSpec, run: LayerRun, tokens: float, length: int, domain: int) -> tuple[Transfer, ...]:
    """Keys of all ranks that an indexer chooses from, in the forward pass of one layer; the choice has no backward."""
    ranks, variant = spec.parallelism.context, spec.model.attention[run.attention]
    indexer = variant.indexer if isinstance(variant, MLA) else None
    if ranks == 1 or indexer is None or length <= indexer.topk:
        return ()
    link = span(ranks, spec.parallelism.tensor, domain)
    gathered = tokens * indexer.head_dim * ITEM_BYTES[spec.precision.compute] * (ranks - 1)
    return (Transfer("context", "all-gather of the indexer's keys", link, gathered),)


def boundary_traffic(spec: ModelSpec, tokens: float, domain: int) -> tuple[Transfer, ...]:
    """What a stage hands to the next for a microbatch: the residual stream."""
    axes = mesh(spec.parallelism)
    if axes.pipeline == 1:
        return ()
    stride = axes.data * axes.context * axes.tensor
    handed = tokens / axes.tensor * spec.model.hidden_size * ITEM_BYTES[spec.precision.compute]
    return (Transfer("pipeline", "send", span(2, stride, domain), handed),)


def step_traffic(spec: ModelSpec, dense: float, experts: float, microbatches: int, domain: int) -> tuple[Transfer, ...]:
    """Gradients and weights over the data axis in a step, of a rank with so many parameters of each kind.

    Gradients are reduced and scattered, weights gathered again: once per step. From ZeRO 2 on gradients stay scattered,
    so that every microbatch scatters its own; under ZeRO 3 weights do, and both passes of every microbatch gather them.
    """
    axes, precision, zero = mesh(spec.parallelism), spec.precision, spec.parallelism.data.zero
    weight, gradient = ITEM_BYTES[precision.compute], ITEM_BYTES[precision.gradients]
    scatters, gathers = microbatches if zero >= 2 else 1, 2 * microbatches if zero == 3 else 1
    found = []
    for name, parameters, ranks, stride in (
        ("dense", dense, axes.data * axes.context, axes.tensor),
        ("experts", experts, axes.expert_data, axes.expert),
    ):
        share, link = parameters * (ranks - 1) / ranks, span(ranks, stride, domain)
        if share:
            found.append(Transfer("data", f"reduce-scatter of {name}", link, share * gradient * scatters))
            found.append(Transfer("data", f"all-gather of {name}", link, share * weight * gathers))
    return tuple(found)


def rank_traffic(spec: ModelSpec, batch_size: int, sequence_length: int, domain: int) -> tuple[Transfer, ...]:
    """What one step of so many sequences makes a rank send, collective by collective: of the rank that sends most.

    Experts stand in it twice: as they are sent, deduplicated by node, and as the naive exchange would be.
    """
    axes, parallelism = mesh(spec.parallelism), spec.parallelism
    count = max(microbatches(parallelism, batch_size), 1)
    tokens = microbatch_size(parallelism, batch_size) * sequence_length / axes.context
    stages = runs_of_stages(spec.model, axes.stages)
    held = stages_of(parallelism.pipeline.schedule, axes.pipeline, axes.stages_per_rank)
    boundary = boundary_traffic(spec, tokens, domain)
    found = []
    for rank, (dense, experts) in zip(held, rank_parameters(spec), strict=True):
        layers = [run for stage in rank for run in _with_mtp(spec, stages, stage)]
        # Forward and backward, once for every microbatch.
        sent = [
            replace(each, bytes=each.bytes * run.repeat * 2 * count)
            for run in layers
            for each in (*layer_traffic(spec, run, tokens, domain), *naive_exchange(spec, run, tokens, domain))
        ]
        sent += [
            replace(each, bytes=each.bytes * run.repeat * count)
            for run in layers
            for each in choice_traffic(spec, run, tokens, sequence_length, domain)
        ]
        sent += [replace(each, bytes=each.bytes * len(rank) * 2 * count) for each in boundary]
        found.append(_merged([*sent, *step_traffic(spec, dense, experts, count, domain)]))
    return max(found, key=lambda sent: sum(each.bytes for each in sent if each.name not in NAIVE))


def _with_mtp(spec: ModelSpec, stages: Sequence[tuple[LayerRun, ...]], stage: int) -> Iterator[LayerRun]:
    """The layers of a stage; on the last one also the blocks of multi-token prediction."""
    yield from stages[stage]
    if spec.model.mtp is not None and stage == len(stages) - 1:
        yield spec.model.mtp_layer().model_copy(update={"repeat": spec.model.mtp.depth})


def _merged(sent: Iterable[Transfer]) -> tuple[Transfer, ...]:
    """Transfers of the same collective over the same link as one."""
    sums: dict[tuple[Axis, str, Link], float] = {}
    for each in sent:
        key = each.axis, each.name, each.link
        sums[key] = sums.get(key, 0.0) + each.bytes
    return tuple(Transfer(*key, total) for key, total in sums.items())
