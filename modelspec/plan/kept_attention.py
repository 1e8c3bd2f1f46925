"""What a layer's attention keeps of one microbatch, from the output of the norm before it to its own output."""

from collections.abc import Iterator
from typing import assert_never

from modelspec.plan.kept import Form, Kept
from modelspec.schema import GQA, MLA, Attention, GatedDeltaNet, Norm
from modelspec.schema.parallelism import Recompute

PART = "attention"
# As in kernels/attention.py and kernels/gated_delta.py: queries per block of latent attention on the CPU, and the
# longest text for which their probabilities are kept; tokens per chunk of the delta rule.
_BLOCK, _LONGEST, _CHUNK = 64, 1024, 64


def attention_kept(form: Form, variant: Attention, norm: Norm) -> Iterator[Kept]:
    """All that a variant keeps; `norm` is the kind of its layer."""
    hidden = form.spec.model.hidden_size
    yield form.gathered_input(PART, hidden)
    match variant:
        case MLA():
            yield from _mla(form, variant)
        case GQA():
            yield from _gqa(form, variant, norm)
        case GatedDeltaNet():
            yield from _gated_deltanet(form, variant)
        case other:
            assert_never(other)


def rotary_tables(form: Form, variant: Attention) -> int:
    """Bytes of cos and sin, which all layers of a variant share; every tensor rank has them in whole."""
    tensor = form.spec.parallelism.tensor
    return 0 if variant.rope == "none" else form.length * variant.rotated * form.item * tensor


def _mla(form: Form, mla: MLA) -> Iterator[Kept]:
    qk = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    yield from (form.on_all(each) for each in _latents(form, mla))
    yield from _core(
        form,
        heads=mla.num_heads,
        kv_heads=mla.num_heads,
        qk=qk,
        v=mla.v_head_dim,
        # Values are a view of what keys and values are rebuilt into.
        v_kept=mla.qk_nope_head_dim + mla.v_head_dim,
        masked=mla.indexer is not None and form.length > mla.indexer.topk,
        again="mla_up_projection",
        # Queries that were not compressed have nothing to come from again.
        q_again=None if mla.q_lora_rank is None else "mla_up_projection",
    )


def _latents(form: Form, mla: MLA) -> Iterator[Kept]:
    """Of queries, keys and values: their norms, and what the products out of them read."""
    again = form.spec.parallelism.recompute
    from_latents = "mla_up_projection" in again and "norm" not in again
    # Products that are done again need more of their input than the gradient of a weight does.
    latent = form.values if from_latents else form.product_input
    if mla.q_lora_rank is not None:
        yield from form.norm(PART, None, mla.q_lora_rank)
        yield latent(PART, mla.q_lora_rank, "norm")
    positioned = mla.kv_lora_rank + mla.qk_rope_head_dim
    yield from form.norm(PART, None, mla.kv_lora_rank, kept=positioned)
    if form.keys > form.tokens:
        # Those of whole sequences, with the keys' part beside them.
        yield Kept(PART, form.keys * positioned * form.item, "mla_up_projection")
        if "mla_up_projection" not in again:
            return
    yield latent(PART, mla.kv_lora_rank, "norm")
    if from_latents and not form.fused:
        # The keys' part with position comes again from there, which no norm of theirs keeps.
        yield form.values(PART, positioned)


def _gqa(form: Form, gqa: GQA, norm: Norm) -> Iterator[Kept]:
    queries, keys = gqa.num_heads * gqa.head_dim, gqa.num_kv_heads * gqa.head_dim
    if gqa.qk_norm == "full":
        yield from form.norm(PART, norm, queries)
        yield from form.norm(PART, norm, keys)
    elif gqa.qk_norm == "per_head":
        yield from form.norm(PART, norm, gqa.head_dim, vectors=gqa.num_heads)
        yield from form.norm(PART, norm, gqa.head_dim, vectors=gqa.num_kv_heads)
    if gqa.output_gate:
        yield form.values(PART, queries)
        if form.kernels == "cpu":
            yield form.values(PART, queries)
    yield from _core(
        form,
        heads=gqa.num_heads,
        kv_heads=gqa.num_kv_heads,
        qk=gqa.head_dim,
        v=gqa.head_dim,
        v_kept=gqa.head_dim,
        masked=gqa.sliding_window is not None,
        sinks=gqa.sinks,
    )
    if gqa.output_gate and form.kernels == "device":
        yield form.product_input(PART, queries)


def _core(
    form: Form,
    *,
    heads: int,
    kv_heads: int,
    qk: int,
    v: int,
    v_kept: int,
    masked: bool,
    again: Recompute | None = None,
    q_again: Recompute | None = None,
    sinks: bool = False,
) -> Iterator[Kept]:
    """Softmax over keys, and the input of the output projection."""
    square = form.sequences * heads * form.length
    context = form.spec.parallelism.context
    length = form.length * context
    plain = not masked and not sinks
    yield from form.attention_output(PART, heads * v)
    if form.kernels == "device":
        yield form.values(PART, heads * qk, q_again)
        yield Kept(PART, form.keys * kv_heads * (qk + v_kept) * form.item, again)
        yield form.numbers(PART, heads)
    elif sinks:
        yield form.values(PART, heads * (qk + context * (qk + v)))
        yield Kept(PART, form.length * length)
        yield Kept(PART, square * (length + 1) * form.wide)
        if form.wide != form.item:
            yield Kept(PART, square * length * form.item)
    elif qk == v:
        yield form.values(PART, heads * qk, q_again)
        yield form.values(PART, heads * v)
        yield Kept(PART, form.keys * kv_heads * (qk + v_kept) * form.item, again)
        yield form.numbers(PART, heads)
        if masked:
            yield Kept(PART, form.length * length * form.item)
    elif form.fused and plain and heads == kv_heads and length <= _LONGEST:
        yield form.values(PART, heads * qk, q_again)
        # Of context ranks, which take a chunk from either end, both have copies of the keys that they see.
        keys, again = (form.keys, again) if context == 1 else (form.keys + form.tokens // 2, None)
        yield Kept(PART, keys * heads * qk * form.item, again)
        # A copy, which is not what the latents gave.
        yield Kept(PART, keys * heads * v * form.item)
        yield Kept(PART, form.sequences * heads * _probabilities(form) * form.item)
    else:
        yield form.numbers(PART, heads * (qk + context * (qk + v)))
        yield Kept(PART, square * length * form.wide)


def _probabilities(form: Form) -> int:
    """Entries that one head keeps of a sequence; a chunk of context ranks sees all of the chunks before it."""
    context = form.spec.parallelism.context
    if context == 1:
        return _blocks_of_probabilities(form.length)
    chunk = form.length // 2
    return (2 * context - 1) * chunk**2 + 2 * _blocks_of_probabilities(chunk)


def _blocks_of_probabilities(length: int) -> int:
    """Entries of all blocks of queries, each with the keys up to its own end."""
    whole, rest = divmod(length, _BLOCK)
    return _BLOCK**2 * whole * (whole + 1) // 2 + rest * length


def _gated_deltanet(form: Form, gdn: GatedDeltaNet) -> Iterator[Kept]:
    """The delta rule by chunks under plain autograd, in at least FP32, which all kernels run today."""
    keys, values = gdn.num_qk_heads * gdn.qk_head_dim, gdn.num_v_heads * gdn.v_head_dim
    channels = 2 * keys + values
    # The padded input of the convolution and its output.
    yield Kept(PART, form.sequences * channels * (form.length + gdn.conv_kernel - 1) * form.item)
    yield form.values(PART, channels)
    # Queries and keys before they get length 1: in BF16 a wide copy, else a view of what all three are cut from.
    yield form.values(PART, channels) if form.wide == form.item else form.numbers(PART, 2 * keys)
    yield form.numbers(PART, 2 * gdn.num_qk_heads + 3 * gdn.num_v_heads)
    yield from _chunks(form, gdn)
    # Norm over heads of values, its gate, their product.
    if form.wide == form.item:
        yield Kept(PART, form.tokens * gdn.num_v_heads * form.item, "norm")
    else:
        yield from form.norm(PART, None, gdn.v_head_dim, vectors=gdn.num_v_heads)
    yield form.values(PART, values, "norm")
    yield form.values(PART, 2 * values)
    yield form.product_input(PART, values)


def _chunks(form: Form, gdn: GatedDeltaNet) -> Iterator[Kept]:
    size = min(_CHUNK, form.length)
    chunks = -(-form.length // size)
    rows = form.sequences * gdn.num_v_heads * chunks * size
    qk, v = gdn.qk_head_dim, gdn.v_head_dim
    # Squares of a chunk: decay, k k^T, that times beta, the system, q k^T, scores. Rows: k, q, v, the solution,
    # corrections, k as the memory takes it; from the second chunk on q as the memory is read with.
    squares, row = 6 * size, 2 * qk + v + (v + qk) + v + qk + (qk if chunks > 1 else 0)
    yield Kept(PART, rows * (squares + row + 3) * form.wide)
    yield Kept(PART, form.sequences * gdn.num_v_heads * chunks * qk * v * form.wide)
    yield Kept(PART, 2 * size**2)
    # All outputs, of which the norm's input is a view.
    if form.wide == form.item:
        yield Kept(PART, rows * v * form.wide)
