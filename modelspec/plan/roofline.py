"""What a step of inference computes, reads and sends, part by part.

Decoding reads every weight for few tokens and so waits for memory; prefill computes many tokens with each weight. Of
the experts a step reads those that its tokens touch: a token picks k of E, so n tokens leave one out with probability
(1 - k/E)^n. Attention has its cache to read.

Latent attention has two forms. Prefill rebuilds keys and values of every head and multiplies over their widths.
Decoding absorbs that projection into queries and outputs, which costs the same for one token, and attends over the
latents themselves: wider products, and nothing but the cache is read (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Each device holds its share of the experts. All else is cut over `tensor` devices, and as often as that fits it is
there again, with sequences of its own.
"""

from collections.abc import Iterator
from typing import assert_never

from modelspec.plan.flops import keys_read
from modelspec.plan.runs import runs
from modelspec.plan.serving_machine import Batch, Layout, Machine, Part
from modelspec.plan.storage import ITEM_BYTES
from modelspec.plan.traffic import nodes_of_token
from modelspec.schema import GQA, MLA, Attention, GatedDeltaNet, LayerRun, Model, MoE, Tensors
from modelspec.schema.base import linear, under

ITEM = ITEM_BYTES["bfloat16"]
# Channels that share an FP32 scale in what is sent in FP8.
_SCALED = 128


def step_parts(machine: Machine, model: Model, batch: Batch) -> Iterator[Part]:
    """Everything that one step of the main model does on the busiest device."""
    for run in runs(model):
        yield from _layer(machine, model, run, batch)
    yield _head(machine, model, batch)


def draft_parts(machine: Machine, model: Model, batch: Batch) -> Iterator[Part]:
    """Every module of multi-token prediction, over as many tokens of each sequence as the main model verifies."""
    if model.mtp is None:
        return
    depth = model.mtp.depth
    layer = model.mtp_layer().model_copy(update={"repeat": depth})
    yield from _layer(machine, model, layer, batch)
    tokens, tensor = _tokens(machine.layout, batch), machine.layout.tensor
    joined = linear(model.hidden_size, 2 * model.hidden_size)
    flops, read = _matrix(joined)
    yield Part("mtp.proj", 0, bf16=depth * flops * tokens / tensor, read=depth * read / tensor)
    head = _head(machine, model, batch)
    yield Part("mtp.head", 0, bf16=depth * head.bf16, read=depth * head.read)


def _tokens(layout: Layout, batch: Batch) -> int:
    """Tokens that a replica computes in one step."""
    return -(-batch.sequences // layout.replicas) * batch.queries


def _matrix(table: Tensors) -> tuple[int, int]:
    (weight,) = table.values()
    return 2 * weight.numel, weight.numel * ITEM


def _head(machine: Machine, model: Model, batch: Batch) -> Part:
    rows = _tokens(machine.layout, batch) // (batch.queries if batch.prefill else 1)
    flops, read = _matrix(linear(model.vocab_size, model.hidden_size))
    tensor = machine.layout.tensor
    return Part("lm_head", 0, bf16=flops * rows / tensor, read=read / tensor)


def _layer(machine: Machine, model: Model, run: LayerRun, batch: Batch) -> Iterator[Part]:
    layers, tensor = run.repeat, machine.layout.tensor
    tokens, variant = _tokens(machine.layout, batch), model.attention[run.attention]
    table = under("attention", variant.tensors(model.hidden_size, run.norm or model.norm))
    low, high = machine.products("layer", table)
    if isinstance(variant, MLA) and not batch.prefill:
        # Absorbed, the projection becomes two batched products over heads, which run in BF16.
        absorbed = 2 * table["attention.kv_b_proj.weight"].numel if machine.precision == "fp8" else 0
        low, high = low - absorbed, high + absorbed
    yield Part(
        f"attention.{run.attention}: projections",
        layers,
        fp8=layers * low * tokens / tensor,
        bf16=layers * high * tokens / tensor,
        read=layers * machine.weights("layer", table) / tensor,
        reduce=layers * _reduce(machine, model, tokens),
    )
    flops, read = core(variant, batch)
    sequences = tokens // batch.queries
    yield Part(
        f"attention.{run.attention}: core",
        0,
        attention=layers * sequences * flops / tensor,
        read=layers * sequences * read / cache_shares(variant, tensor),
    )
    yield from _ffn(machine, model, run, batch)


def _ffn(machine: Machine, model: Model, run: LayerRun, batch: Batch) -> Iterator[Part]:
    layers, layout, use = run.repeat, machine.layout, machine.efficiency
    tokens, ffn = _tokens(layout, batch), model.ffn[run.ffn]
    table = under("ffn", ffn.tensors(model.hidden_size))
    experts = {name: tensor for name, tensor in table.items() if name.startswith("ffn.experts.")}
    every = {name: tensor for name, tensor in table.items() if name not in experts}
    low, high = machine.products("layer", every)
    yield Part(
        f"ffn.{run.ffn}",
        layers,
        fp8=layers * low * tokens / layout.tensor,
        bf16=layers * high * tokens / layout.tensor,
        read=layers * machine.weights("layer", every) / layout.tensor,
        reduce=0.0 if experts else layers * _reduce(machine, model, tokens),
    )
    if not isinstance(ffn, MoE):
        return
    low, high = machine.products("layer", experts)
    share = batch.sequences * batch.queries * use.imbalance / layout.gpus
    yield Part(
        f"ffn.{run.ffn}: experts",
        0,
        fp8=layers * low * share,
        bf16=layers * high * share,
        read=layers * machine.weights("layer", experts) / ffn.num_experts * touched(machine, ffn, batch),
        exchange=layers * exchange(machine, model, ffn, tokens / layout.tensor, batch.prefill),
    )


def touched(machine: Machine, ffn: MoE, batch: Batch) -> float:
    """Experts that the busiest device reads in one step: those that a token of the batch picks, at least one."""
    slots = machine.layout.slots(ffn.num_experts)
    left_out = 1 - ffn.num_experts_per_tok / (slots * machine.layout.gpus)
    expected = slots * (1 - max(left_out, 0.0) ** (batch.sequences * batch.queries))
    return min(float(slots), max(1.0, machine.efficiency.imbalance * expected))


def exchange(machine: Machine, model: Model, ffn: MoE, tokens: float, prefill: bool) -> float:
    """Seconds in which a device's tokens reach their experts and return.

    Prefill sends one copy to each node and hands it on inside; decoding sends one for each expert, which takes fewer
    steps. Links inside and between nodes work at the same time. With FP8, tokens go in FP8 and return in BF16.
    """
    gpus, hardware, use = machine.layout.gpus, machine.hardware, machine.efficiency
    if gpus == 1:
        return 0.0
    domain = min(gpus, hardware.fast_domain)
    nodes, picks = -(-gpus // domain), ffn.num_experts_per_tok
    far = picks * (1 - domain / gpus)
    near = picks * (domain - 1) / gpus
    if prefill:
        far, near = nodes_of_token(ffn, nodes) * (1 - 1 / nodes), picks * (domain - 1) / domain
    hidden = model.hidden_size
    sent = hidden + -(-hidden // _SCALED) * 4 if machine.precision == "fp8" else hidden * ITEM
    copies = max(far / hardware.network_bandwidth, near / hardware.node_bandwidth) / use.network
    return tokens * copies * (sent + hidden * ITEM) + 2 * use.exchange_latency


def _reduce(machine: Machine, model: Model, tokens: int) -> float:
    """Seconds in which the devices that share a matrix add up their outputs, in BF16: inside each domain, then a share
    of it between domains.
    """
    tensor, hardware, use = machine.layout.tensor, machine.hardware, machine.efficiency
    if tensor == 1:
        return 0.0
    domain = min(tensor, hardware.fast_domain)
    output = 2 * tokens * model.hidden_size * ITEM
    inside = output * (domain - 1) / domain / hardware.node_bandwidth
    between = output / domain * (1 - domain / tensor) / hardware.network_bandwidth
    return (inside + between) / use.network + use.exchange_latency


def core(variant: Attention, batch: Batch) -> tuple[float, float]:
    """FLOPs between the projections of one layer for one sequence, and bytes of its cache that are read."""
    queries, context = batch.queries, batch.context
    match variant:
        case MLA(indexer=indexer):
            most, latent = (indexer.topk if indexer else None), variant.kv_lora_rank + variant.qk_rope_head_dim
            rebuilt = variant.qk_nope_head_dim + variant.qk_rope_head_dim + variant.v_head_dim
            width = rebuilt if batch.prefill else latent + variant.kv_lora_rank
            keys = _keys(batch, most)
            flops = queries * 2 * variant.num_heads * width * keys
            # The tokens of one sequence share what they read, but where each chooses its own.
            chosen = most is not None and most < context and not batch.prefill
            read = keys * latent * (queries if chosen else 1)
            if indexer and context > indexer.topk:
                flops += queries * 2 * indexer.num_heads * (indexer.head_dim + 1) * _keys(batch, None)
                read += context * indexer.head_dim
        case GQA():
            keys = _keys(batch, variant.sliding_window)
            flops = queries * 4 * variant.num_heads * variant.head_dim * keys
            read = keys * 2 * variant.num_kv_heads * variant.head_dim
        case GatedDeltaNet():
            memory = variant.num_v_heads * variant.qk_head_dim * variant.v_head_dim
            # Read and written once, in FP32.
            return queries * 3 * 2 * memory, 2 * memory * ITEM_BYTES["float32"]
        case other:
            assert_never(other)
    return flops, read * ITEM


def _keys(batch: Batch, most: int | None) -> float:
    """Keys that a token reads, on average over a prompt."""
    return float(keys_read(batch.context, most)) if batch.prefill else min(batch.context, most or batch.context)


def cache_shares(variant: Attention, tensor: int) -> int:
    """Over how many of `tensor` devices a layer's cache is cut: heads are, a latent stands on each."""
    match variant:
        case MLA():
            return 1
        case GQA():
            return min(tensor, variant.num_kv_heads)
        case GatedDeltaNet():
            return min(tensor, variant.num_qk_heads)
        case other:
            assert_never(other)
