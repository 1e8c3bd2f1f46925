"""What one microbatch keeps of each part of the model until its backward pass, in bytes.

Autograd saves what a backward pass reads. The functions here name it operation by operation, in the order of the
builders' code; a test and benchmarks/plan_memory.py compare with what autograd saves there. A tensor that two
operations read is kept once.
"""

from collections.abc import Iterable, Iterator
from typing import assert_never

from modelspec.plan.kept import INDEX, Form, Kept
from modelspec.plan.kept_attention import attention_kept, rotary_tables
from modelspec.plan.storage import ITEM_BYTES
from modelspec.schema import FFN, GQA, MLA, Dense, GatedDeltaNet, LayerRun, MoE
from modelspec.schema.ffn import SwiGLU

# As in kernels/: rows of logits that exist at once, and rows that an expert's are padded to on the CPU.
CHUNK_ROWS, _GRANULE = 512, 32


def kept_bytes(kept: Iterable[Kept], recompute: Iterable[str]) -> dict[str, int]:
    """Bytes by part of what is not computed again."""
    again = set(recompute)
    parts: dict[str, int] = {}
    for each in kept:
        if each.again not in again:
            parts[each.part] = parts.get(each.part, 0) + each.bytes
    return parts


def block_kept(form: Form, run: LayerRun) -> Iterator[Kept]:
    """One layer of a run: norms, attention, feed-forward network."""
    model = form.spec.model
    norm = run.norm or model.norm
    yield from form.norm("norm", norm, model.hidden_size)
    yield from attention_kept(form, model.attention[run.attention], norm)
    yield from form.norm("norm", norm, model.hidden_size)
    yield from _ffn(form, model.ffn[run.ffn])


def embedding_kept(form: Form) -> Iterator[Kept]:
    """The tokens' ids."""
    yield Kept("embedding", form.tokens * INDEX)


def head_kept(form: Form) -> Iterator[Kept]:
    """The final norm and the loss."""
    yield from form.norm("norm", form.spec.model.norm, form.spec.model.hidden_size)
    yield from loss_kept(form)


def loss_kept(form: Form) -> Iterator[Kept]:
    """The gradients that kernels/linear_cross_entropy.py computes in the forward pass: of its input and the head."""
    model = form.spec.model
    yield form.values("loss", model.hidden_size)
    yield Kept("loss", head_elements(form) * form.wide)


def head_elements(form: Form) -> int:
    """Elements of the head on one rank."""
    return -(-form.spec.model.vocab_size // form.spec.parallelism.tensor) * form.spec.model.hidden_size


def loss_buffers(form: Form) -> int:
    """What computing one loss needs beside: logits of a chunk, wide and narrow, and the head's gradient once more."""
    columns = -(-form.spec.model.vocab_size // form.spec.parallelism.tensor)
    chunk = min(form.tokens, CHUNK_ROWS) * columns * (form.wide + form.item)
    return chunk + head_elements(form) * form.wide


def mtp_bytes(form: Form) -> dict[str, int]:
    """Bytes by part that one module of multi-token prediction keeps, without its loss, under the recompute policy."""
    parts = layer_bytes(form, form.spec.model.mtp_layer())
    for part, size in kept_bytes(_around_mtp(form), form.spec.parallelism.recompute).items():
        parts[part] = parts.get(part, 0) + size
    return parts


def _around_mtp(form: Form) -> Iterator[Kept]:
    """A module's embedding, which is its own, its norms, and what its projection reads."""
    model = form.spec.model
    yield from embedding_kept(form)
    for _ in range(3):
        yield from form.norm("norm", model.norm, model.hidden_size)
    yield form.product_input("mtp", 2 * model.hidden_size, "norm")


def _ffn(form: Form, ffn: FFN) -> Iterator[Kept]:
    hidden = form.spec.model.hidden_size
    match ffn:
        case Dense():
            yield form.gathered_input("ffn", hidden)
            yield from _swiglu(form, "ffn", ffn.intermediate_size, ffn.activation)
        case MoE():
            yield from _router(form, ffn)
            if form.kernels == "device":
                yield from _experts_on_device(form, ffn)
            elif _is_fast(form, ffn):
                yield from _experts_fast(form, ffn)
            else:
                yield from _experts_plain(form, ffn)
            if ffn.shared_experts is not None:
                if form.spec.parallelism.tensor > 1:
                    yield form.gathered_input("shared_experts", hidden)
                yield from _swiglu(form, "shared_experts", ffn.shared_width, ffn.activation)
                if ffn.shared_experts.gate:
                    yield form.values("shared_experts", hidden + 1)
        case other:
            assert_never(other)


def _swiglu(form: Form, part: str, width: int, activation: SwiGLU) -> Iterator[Kept]:
    """Gate and up, and what the last product reads; under plain autograd what lies between them, too."""
    yield form.gated_input(part, 2 * width, form.tokens)
    if form.kernels == "cpu":
        yield form.values(part, width * _between(activation, fast=form.fused), "swiglu")
    yield form.product_input(part, width, "swiglu")


def _is_plain(activation: SwiGLU) -> bool:
    """Whether it is silu(gate) * up and nothing else."""
    return activation.alpha == 1.0 and activation.limit is None and activation.up_offset == 0.0


def _between(activation: SwiGLU, *, fast: bool) -> int:
    """Tensors as wide as the gate that autograd keeps between gate and up and their product."""
    if _is_plain(activation):
        return 0 if fast else 1
    # The gated value; the gate's sigmoid; with a limit the cut gate; up where it was cut or moved.
    cut = activation.limit is not None
    return 1 + (activation.alpha != 1.0) + cut + (cut or activation.up_offset > 0)


def _router(form: Form, moe: MoE) -> Iterator[Kept]:
    """Its input, which the experts read too, affinities, the choice and its weights; the balance loss."""
    part, hidden, item = "router", form.spec.model.hidden_size, ITEM_BYTES[form.spec.precision.router]
    own = item != form.item and form.kernels == "cpu"
    # Plain autograd's experts keep their rows alone.
    if form.fused or moe.shared_experts is not None or not own:
        yield form.values("ffn", hidden, "norm")
    numbers = moe.num_experts + 1
    if own:
        numbers += hidden
    if moe.router.renormalize:
        numbers += moe.num_experts_per_tok + 1
    yield Kept(part, form.tokens * (numbers * item + moe.num_experts_per_tok * INDEX))
    yield Kept(part, form.sequences * moe.num_experts * item)


def _is_fast(form: Form, moe: MoE) -> bool:
    """Whether kernels/experts.py takes its fast form on the CPU."""
    precision = form.spec.precision
    one_dtype = precision.compute == precision.router == precision.master_weights
    return form.fused and one_dtype and _is_plain(moe.activation) and not moe.bias


def _experts_fast(form: Form, moe: MoE) -> Iterator[Kept]:
    pairs = form.tokens * moe.num_experts_per_tok
    # An expert's rows are padded by half a granule on average, and to a whole one where it was chosen at all.
    # Those of a rank, for a tensor group, get its pairs.
    here = -(-moe.num_experts * form.spec.parallelism.tensor // form.spec.parallelism.expert)
    chosen = min(here, pairs)
    rows = max(pairs + chosen * (_GRANULE - 1) // 2, chosen * _GRANULE)
    if form.spec.parallelism.expert > 1:
        yield Kept("experts", pairs * (form.spec.model.hidden_size * form.item + INDEX))
    yield Kept("experts", rows * (2 * moe.intermediate_size * form.item + INDEX + form.item) + pairs * INDEX)


def _experts_plain(form: Form, moe: MoE) -> Iterator[Kept]:
    rows, hidden, width = form.tokens * moe.num_experts_per_tok, form.spec.model.hidden_size, moe.intermediate_size
    # Rows in and out, gate and up; the weights and three permutations.
    indices = 2 + (1 if moe.bias else 0)
    yield Kept("experts", rows * ((2 * hidden + 2 * width + 1) * form.item + indices * INDEX))
    # What lies between gate and up and their product, and the product.
    yield Kept("experts", rows * width * (_between(moe.activation, fast=False) + 1) * form.item, "swiglu")


def _experts_on_device(form: Form, moe: MoE) -> Iterator[Kept]:
    """The rows that other ranks sent, which cannot be computed again; gate and up; what the last product reads."""
    rows, hidden, width = form.expert_rows(moe), form.spec.model.hidden_size, moe.intermediate_size
    if form.spec.parallelism.expert > 1:
        yield form.product_input("experts", hidden, rows=rows)
    yield form.gated_input("experts", 2 * width, rows)
    yield form.product_input("experts", width, "swiglu", rows=rows)
    yield Kept("experts", rows * (INDEX + form.wide) + form.tokens * moe.num_experts_per_tok * INDEX)


def stage_kept(form: Form, runs: Iterable[LayerRun], *, first: bool, last: bool) -> dict[str, int]:
    """Bytes by part that one microbatch keeps on a pipeline stage of one rank, what is computed again left out.

    Tensor ranks divide all of it: heads and widths where these are cut, the sequence where not.
    """
    model, recompute, tensor = form.spec.model, form.spec.parallelism.recompute, form.spec.parallelism.tensor
    parts: dict[str, int] = {}

    def add(found: dict[str, int], times: int = 1) -> None:
        for part, size in found.items():
            parts[part] = parts.get(part, 0) + times * (size if part == "loss" else -(-size // tensor))

    used = set()
    for run in runs:
        used.add(run.attention)
        add(layer_bytes(form, run), run.repeat)
    if first:
        add(kept_bytes(embedding_kept(form), recompute))
    if last:
        add(kept_bytes(head_kept(form), recompute))
        if model.mtp is not None:
            used.add(model.mtp_layer().attention)
            add(mtp_bytes(form), model.mtp.depth)
            add(kept_bytes(loss_kept(form), ()), model.mtp.depth)
    add({"attention": sum(rotary_tables(form, model.attention[name]) for name in used)})
    return parts


def layer_bytes(form: Form, run: LayerRun) -> dict[str, int]:
    """Bytes by part that a layer keeps under the recompute policy: of layers that it names, input and choices."""
    recompute = form.spec.parallelism.recompute
    if "layer" in recompute:
        return kept_bytes([form.values("norm", form.spec.model.hidden_size), *_chosen(form, run)], ())
    return kept_bytes(block_kept(form, run), recompute)


def _chosen(form: Form, run: LayerRun) -> Iterator[Kept]:
    """Keys and experts, which are never chosen again, and what the balance loss, outside of the layer, keeps."""
    attention, ffn = form.spec.model.attention[run.attention], form.spec.model.ffn[run.ffn]
    if isinstance(attention, MLA) and attention.indexer is not None and form.length > attention.indexer.topk:
        yield Kept("attention", form.tokens * attention.indexer.topk * INDEX)
    if isinstance(ffn, MoE):
        item = ITEM_BYTES[form.spec.precision.router]
        yield Kept("router", form.tokens * ((ffn.num_experts + 1) * item + ffn.num_experts_per_tok * INDEX))
        yield Kept("router", form.sequences * ffn.num_experts * item)


def again_bytes(form: Form, run: LayerRun) -> int:
    """Bytes of one layer that the backward pass computes again, and which are there while it does; one rank's part."""
    whole = sum(each.bytes for each in block_kept(form, run))
    return -(-(whole - sum(layer_bytes(form, run).values())) // form.spec.parallelism.tensor)


def backward_bytes(form: Form, run: LayerRun) -> int:
    """Gradients that the backward pass of a layer's wider half holds at once, on one rank; bytes."""
    model = form.spec.model
    return -(
        -max(_attention_gradients(form, run), _ffn_gradients(form, model.ffn[run.ffn])) // form.spec.parallelism.tensor
    )


def _attention_gradients(form: Form, run: LayerRun) -> int:
    """Of queries, keys, values and the output, beside that of the residual stream."""
    variant = form.spec.model.attention[run.attention]
    match variant:
        case MLA():
            width = variant.num_heads * 2 * (variant.qk_nope_head_dim + variant.qk_rope_head_dim + variant.v_head_dim)
        case GQA():
            width = 2 * (variant.num_heads + variant.num_kv_heads) * variant.head_dim
        case GatedDeltaNet():
            width = 4 * (variant.num_qk_heads * variant.qk_head_dim + variant.num_v_heads * variant.v_head_dim)
        case other:
            assert_never(other)
    return form.tokens * (width + form.spec.model.hidden_size) * form.item


def _ffn_gradients(form: Form, ffn: FFN) -> int:
    """Of gate and up and their product, of the input and the output; of experts' rows, their input gathered again."""
    hidden = form.spec.model.hidden_size
    match ffn:
        case Dense():
            return form.tokens * (3 * ffn.intermediate_size + 2 * hidden) * form.item
        case MoE():
            return form.expert_rows(ffn) * (5 * ffn.intermediate_size + 2 * hidden) * form.item
        case other:
            assert_never(other)


def gathered_keys(form: Form, run: LayerRun) -> int:
    """Gradients of keys and values of the whole sequence, of latent attention of its latents; bytes."""
    parallelism, variant = form.spec.parallelism, form.spec.model.attention[run.attention]
    if parallelism.context == 1:
        return 0
    match variant:
        case MLA():
            width = variant.kv_lora_rank + variant.qk_rope_head_dim
        case GQA():
            width = 2 * -(-variant.num_kv_heads // parallelism.tensor) * variant.head_dim
        case GatedDeltaNet():
            width = 0
        case other:
            assert_never(other)
    return form.tokens * parallelism.context * width * form.item
