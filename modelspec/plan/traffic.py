"""What ranks send to each other, in bytes: every collective of one layer and microbatch, and those of a step.

All figures are of one rank and one direction, so that bytes over a link's bandwidth are seconds. Ranks that are next to
each other share a node as far as it goes: tensor first, then context, then data; experts take the same ranks.

Tokens go to their experts in one of two ways. The naive exchange sends a copy for each expert. The deduplicated one
sends a copy to each node that has one of them and hands it on inside the node; a router that limits a token to few
groups of experts bounds the copies (DeepSeek-V3, arXiv 2412.19437, section 3.2.2).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Literal, assert_never

from modelspec.layout import mesh, microbatch_size, microbatches, splits_backward, stages_of
from modelspec.plan.kept import INDEX
from modelspec.plan.stages import runs_of_stages
from modelspec.plan.state import Held, rank_held, shards
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

    @property
    def collective(self) -> str:
        """What ranks call together."""
        return "all-to-all" if self.axis == "expert" else self.name.split(" of ")[0]


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


def again_traffic(spec: ModelSpec, run: LayerRun, tokens: float, domain: int) -> tuple[Transfer, ...]:
    """What a layer's backward pass sends once more of its forward pass, to compute again as the spec says."""
    recompute, variant = spec.parallelism.recompute, spec.model.attention[run.attention]
    if "layer" in recompute:
        return layer_traffic(spec, run, tokens, domain)
    if "mla_up_projection" in recompute and isinstance(variant, MLA):
        return _context(spec, run, tokens, domain)
    return ()


def _expert(spec: ModelSpec, run: LayerRun, tokens: float, domain: int) -> tuple[Transfer, ...]:
    ffn, ranks = spec.model.ffn[run.ffn], spec.parallelism.expert
    if not isinstance(ffn, MoE) or ranks == 1:
        return ()
    own = tokens / spec.parallelism.tensor
    sent, back = token_bytes(spec)
    if not by_node(ranks, domain):
        copies, link = ffn.num_experts_per_tok * (ranks - 1) / ranks, span(ranks, 1, domain)
        return (
            Transfer("expert", "dispatch", link, own * copies * sent),
            Transfer("expert", "combine", link, own * copies * back),
        )
    nodes = ranks // domain
    far = nodes_of_token(ffn, nodes) * (nodes - 1) / nodes
    return (
        Transfer("expert", "dispatch", "network", own * far * sent),
        Transfer("expert", "combine", "network", own * far * back),
    )


def by_node(ranks: int, domain: int) -> bool:
    """Whether tokens are deduplicated: where ranks of experts fill several nodes. Else they go straight."""
    return ranks > domain and ranks % domain == 0


def _inside_exchange(spec: ModelSpec, run: LayerRun, tokens: float, domain: int) -> tuple[Transfer, ...]:
    """What a deduplicated exchange hands on inside nodes, which it does while the network is busy."""
    ffn, ranks = spec.model.ffn[run.ffn], spec.parallelism.expert
    if not isinstance(ffn, MoE) or not by_node(ranks, domain) or domain == 1:
        return ()
    copies = tokens / spec.parallelism.tensor * ffn.num_experts_per_tok * (domain - 1) / domain
    ways = zip(("dispatch", "combine"), token_bytes(spec), strict=True)
    return tuple(Transfer("expert", name, "node", copies * each) for name, each in ways)


def _pair_traffic(spec: ModelSpec, run: LayerRun, tokens: float, domain: int) -> tuple[tuple[Transfer, ...], ...]:
    """Beside tokens: weights of pairs, whose gradients come back; and, forward alone, how many rows go and which."""
    ffn, ranks = spec.model.ffn[run.ffn], spec.parallelism.expert
    if not isinstance(ffn, MoE) or ranks == 1:
        return (), ()
    pairs = tokens / spec.parallelism.tensor * ffn.num_experts_per_tok
    item = ITEM_BYTES[spec.precision.router]
    hops: list[tuple[int, Link]] = [(ranks, span(ranks, 1, domain))]
    labels: list[Transfer] = []
    if by_node(ranks, domain):
        hops = [(ranks // domain, "network"), (domain, "node")]
        labels = [Transfer("expert", "labels", "network", pairs * INDEX * (1 - domain / ranks))]
    weights = tuple(Transfer("expert", "weights", link, pairs * item * (size - 1) / size) for size, link in hops)
    size, link = hops[-1]
    labels.append(Transfer("expert", "counts", link, ffn.num_experts * INDEX * size / ranks * (size - 1) / size))
    return weights, tuple(labels)


def _balance(spec: ModelSpec, run: LayerRun, sequences: float, domain: int) -> tuple[Transfer, ...]:
    """Shares of experts in whole sequences, which ranks see in parts."""
    ffn, parallelism = spec.model.ffn[run.ffn], spec.parallelism
    ranks = parallelism.context * parallelism.tensor
    balance = spec.training.losses.balance if spec.training is not None else None
    if not isinstance(ffn, MoE) or ranks == 1 or not balance:
        return ()
    axis: Axis = "context" if parallelism.context > 1 else "tensor"
    shares = sequences * ffn.num_experts * ITEM_BYTES[spec.precision.router]
    return (Transfer(axis, "all-reduce of experts' shares", span(ranks, 1, domain), shares * 2 * (ranks - 1) / ranks),)


def _vocabulary(spec: ModelSpec, tokens: float, embeds: int, losses: int, domain: int) -> tuple[Transfer, ...]:
    """Embeddings are summed and scattered, what a loss reads is gathered; then three numbers of each row."""
    ranks, item = spec.parallelism.tensor, ITEM_BYTES[spec.precision.compute]
    if ranks == 1:
        return ()
    link, one = span(ranks, 1, domain), tokens * spec.model.hidden_size * item * (ranks - 1) / ranks
    rows = tokens * 3 * max(item, ITEM_BYTES["float32"])
    return (
        Transfer("tensor", "reduce-scatter of embeddings", link, embeds * one),
        Transfer("tensor", "all-gather of the loss's input", link, losses * one),
        Transfer("tensor", "all-reduce of the loss", link, losses * rows * 2 * (ranks - 1) / ranks),
    )


_UNDONE = {"all-gather": "reduce-scatter", "reduce-scatter": "all-gather"}


def _backward(each: Transfer) -> Transfer:
    """What undoes a collective in the backward pass."""
    return replace(each, name=each.name.replace(each.collective, _UNDONE.get(each.collective, each.collective), 1))


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

    Without ZeRO gradients are summed everywhere. Under ZeRO 1 they are reduced and scattered, weights gathered again,
    once per step, and replicas sum their shares. From ZeRO 2 on, without a pipeline, every microbatch scatters its own;
    under ZeRO 3 both passes of every microbatch gather weights. Under a pipeline these stay from a backward pass to the
    next forward pass: then passes gather them that come after a forward pass, one more than there are microbatches; and
    where a schedule splits backward passes, to the end of the step, as under ZeRO 2.
    """
    axes, precision, zero = mesh(spec.parallelism), spec.precision, spec.parallelism.data.zero
    weight, gradient = ITEM_BYTES[precision.compute], ITEM_BYTES[precision.gradients]
    often = zero >= 2 and axes.pipeline == 1
    scatters, gathers = microbatches if often else 1, 1
    if zero == 3 and not splits_backward(spec.parallelism.pipeline):
        gathers = 2 * microbatches if often else microbatches + 1
    found = []
    copies = spec.parallelism.data.replicate if zero else 1
    for name, parameters, ranks, stride, replicas in (
        ("dense", dense, axes.data * axes.context, axes.tensor, copies),
        ("experts", experts, axes.expert_data, axes.expert, gcd(copies, axes.expert_data)),
    ):
        shard = ranks // replicas if zero else 1
        share, link = parameters * (shard - 1) / shard, span(ranks, stride, domain)
        if share:
            found.append(Transfer("data", f"reduce-scatter of {name}", link, share * gradient * scatters))
            found.append(Transfer("data", f"all-gather of {name}", link, share * weight * gathers))
        alike = ranks // shard
        if alike > 1 and parameters:
            summed = 2 * parameters / shard * (alike - 1) / alike * gradient * scatters
            found.append(Transfer("data", f"all-reduce of {name}", link, summed))
    return tuple(found)


def _copies_traffic(spec: ModelSpec, held: Sequence[Held], copied: bool, domain: int) -> tuple[Transfer, ...]:
    """Once in a step: gradients of what stands whole on tensor ranks, and of an embedding on two pipeline ranks."""
    axes, zero = mesh(spec.parallelism), spec.parallelism.data.zero
    shard = shards(spec)["dense"] if zero else 1
    item = ITEM_BYTES[spec.precision.gradients] / shard
    dense = [each for each in held if each.shard != "experts"]
    whole = sum(each.elements * each.times for each in dense if each.elements == each.tensor.numel)
    found = []
    if axes.tensor > 1:
        summed = whole * item * 2 * (axes.tensor - 1) / axes.tensor
        found.append(Transfer("tensor", "all-reduce of whole gradients", span(axes.tensor, 1, domain), summed))
    if copied:
        edge = spec.model.vocab_size * spec.model.hidden_size / axes.tensor * item
        link = span(axes.pipeline, axes.data * axes.context * axes.tensor, domain)
        found.append(Transfer("pipeline", "all-reduce of the embedding", link, edge))
    return tuple(found)


def rank_traffic(spec: ModelSpec, batch_size: int, sequence_length: int, domain: int) -> tuple[Transfer, ...]:
    """What one step of so many sequences makes a rank send, collective by collective: of the rank that sends most.

    Experts stand in it twice: as they are sent, deduplicated by node, and as the naive exchange would be.
    """
    found = all_traffic(spec, batch_size, sequence_length, domain)
    return max(found, key=lambda sent: sum(each.bytes for each in sent if each.name not in NAIVE))


def all_traffic(
    spec: ModelSpec, batch_size: int, sequence_length: int, domain: int
) -> tuple[tuple[Transfer, ...], ...]:
    """The same of every pipeline rank."""
    axes, parallelism, model = mesh(spec.parallelism), spec.parallelism, spec.model
    count, size = max(microbatches(parallelism, batch_size), 1), microbatch_size(parallelism, batch_size)
    tokens = size * sequence_length / axes.context
    stages = runs_of_stages(model, axes.stages)
    held = stages_of(parallelism.pipeline.schedule, axes.pipeline, axes.stages_per_rank)
    owner = {stage: rank for rank, here in enumerate(held) for stage in here}
    twice = (model.mtp is not None or model.tie_embeddings) and owner[0] != owner[axes.stages - 1]
    passes = 2 if "layer" in parallelism.recompute else 1
    depth = model.mtp.depth if model.mtp is not None else 0
    found = []
    for rank, here in enumerate(held):
        first, last = 0 in here, axes.stages - 1 in here
        sent: list[Transfer] = []

        def add(each: Iterable[Transfer], forward: int, backward: int, sent: list[Transfer] = sent) -> None:
            """So many times for a microbatch. What is summed for all carries no gradient here."""
            for one in each:
                back = 0 if one.collective == "all-reduce" else backward
                sent.append(replace(one, bytes=one.bytes * forward * count))
                sent.append(replace(_backward(one), bytes=one.bytes * back * count))

        for run in [run for stage in here for run in _with_mtp(spec, stages, stage)]:
            add(layer_traffic(spec, run, tokens, domain), run.repeat, run.repeat)
            add(again_traffic(spec, run, tokens, domain), run.repeat, 0)
            inside, naive = (each(spec, run, tokens, domain) for each in (_inside_exchange, naive_exchange))
            weights, labels = _pair_traffic(spec, run, tokens, domain)
            add((*inside, *naive, *weights), passes * run.repeat, run.repeat)
            add(choice_traffic(spec, run, tokens, sequence_length, domain), run.repeat, 0)
            add(labels, passes * run.repeat, 0)
            add(_balance(spec, run, size, domain), run.repeat, 0)
        add(_vocabulary(spec, tokens, first + last * depth, last * (1 + depth), domain), 1, 1)
        boundaries = sum(owner.get(stage + way, rank) != rank for stage in here for way in (1, -1))
        add(boundary_traffic(spec, tokens, domain), boundaries, 0)
        runs = (run for stage in here for run in stages[stage])
        tensors = [each for each in rank_held(spec, runs, first=first, last=last) if each.tensor.kind == "parameter"]
        experts = sum(each.elements * each.times for each in tensors if each.shard == "experts")
        dense = sum(each.elements * each.times for each in tensors) - experts
        sent += step_traffic(spec, dense, experts, count, domain)
        sent += _copies_traffic(spec, tensors, twice and (first or last), domain)
        found.append(_merged(each for each in sent if each.bytes))
    return tuple(found)


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
