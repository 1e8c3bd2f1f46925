"""Floating-point operations per token, by closed forms, exactly.

A multiplication with its addition are two. Counted are products with weights and the core of attention, in the form
that training and prefill compute; norms, activations, softmax and the lookup of embeddings are free. A query at
position t of causal attention sees t keys, so half of the sequence on average (Megatron-LM counts so, and PyTorch's
counter twice as much: it takes the full square). A window or a choice of keys bounds t.

A backward pass is two forward passes: the gradients of the input and of the weight. The choice of keys of sparse
attention has none: it carries no gradient.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import assert_never

from modelspec.plan.runs import runs
from modelspec.schema import FFN, GQA, MLA, Attention, GatedDeltaNet, LayerRun, Model, ModelSpec, Tensors, TensorSpec
from modelspec.timeline import stage_spec


@dataclass(frozen=True, slots=True)
class Work:
    """Forward FLOPs per token: of what gradients flow through, and of the choice of keys, which gets none."""

    learned: Fraction = Fraction(0)
    choice: Fraction = Fraction(0)

    def __add__(self, other: "Work") -> "Work":
        return Work(self.learned + other.learned, self.choice + other.choice)

    def __mul__(self, times: int) -> "Work":
        return Work(self.learned * times, self.choice * times)

    @property
    def forward(self) -> Fraction:
        """FLOPs of a forward pass."""
        return self.learned + self.choice

    @property
    def training(self) -> Fraction:
        """FLOPs of a forward and a backward pass."""
        return 3 * self.learned + self.choice


@dataclass(frozen=True, slots=True)
class Flops:
    """FLOPs per token, averaged over a sequence.

    `forward` and `training` are the main model's. `training_with_mtp` adds multi-token prediction, and
    `training_with_recompute` to that what the backward pass computes again: it is what the device executes.
    """

    forward: Fraction
    training: Fraction
    training_with_mtp: Fraction
    training_with_recompute: Fraction


def number(value: Fraction) -> int | float:
    """As data has it: an integer where it is one, else the nearest float."""
    return int(value) if value.denominator == 1 else float(value)


def default_sequence_length(spec: ModelSpec) -> int:
    """That of the first stage of training; without training the model's longest; tokens."""
    return spec.training.stages[0].sequence_length if spec.training else spec.model.max_position


def flops(spec: ModelSpec, sequence_length: int) -> Flops:
    """FLOPs per token of sequences of so many tokens. What is recomputed is what the first stage of training says."""
    model = spec.model
    main = sum((block(model, run, sequence_length) * run.repeat for run in runs(model)), head(model))
    mtp = multi_token_prediction(model, sequence_length)
    first = stage_spec(spec, 0) if spec.training else spec
    again = sum(_again(model, run, sequence_length, first.parallelism.recompute) for run in _blocks(model))
    with_mtp = main.training + mtp.training
    return Flops(main.forward, main.training, with_mtp, with_mtp + again)


def assumptions(spec: ModelSpec) -> tuple[str, ...]:
    """How `flops` counts, in sentences: what holds of every model, and of the mechanisms of this one."""
    used = [spec.model.attention[run.attention] for run in _blocks(spec.model)]
    sentences = [
        "A multiplication with its addition are two FLOPs; products with weights and attention count, the head too; "
        "the embedding's lookup, norms and activations are free.",
        "Causal attention reads half of the sequence on average; a backward pass is two forward passes.",
    ]
    if any(isinstance(variant, GQA) and variant.sliding_window for variant in used):
        sentences.append("A sliding window reads at most its own length.")
    if any(isinstance(variant, MLA) and variant.indexer for variant in used):
        sentences.append(
            "Sparse attention reads at most topk keys; scoring all keys, where there are more, has no backward pass."
        )
    if any(isinstance(variant, GatedDeltaNet) for variant in used):
        sentences.append("Gated DeltaNet recalls, corrects and reads its memory once for each token.")
    return tuple(sentences)


def block(model: Model, run: LayerRun, sequence_length: int) -> Work:
    """One layer of a run."""
    return attention(model, model.attention[run.attention], sequence_length) + ffn(model, model.ffn[run.ffn])


def attention(model: Model, variant: Attention, sequence_length: int) -> Work:
    """One layer's projections and what runs between them."""
    table = variant.tensors(model.hidden_size, model.norm)
    match variant:
        case MLA():
            chosen = variant.indexer.topk if variant.indexer else None
            widths = variant.qk_nope_head_dim + variant.qk_rope_head_dim + variant.v_head_dim
            core = 2 * variant.num_heads * widths * keys_read(sequence_length, chosen)
            return Work(core + products(without_indexer(table)), _choice(model, variant, sequence_length))
        case GQA():
            keys = keys_read(sequence_length, variant.sliding_window)
            return Work(4 * variant.num_heads * variant.head_dim * keys + products(table))
        case GatedDeltaNet():
            memory = variant.num_v_heads * variant.qk_head_dim * variant.v_head_dim
            return Work(3 * 2 * memory + products(table))
        case other:
            assert_never(other)


def ffn(model: Model, variant: FFN) -> Work:
    """One layer's network, or its router, the experts of a token and the shared ones."""
    return Work(products(variant.tensors(model.hidden_size)))


def head(model: Model) -> Work:
    """The output head, tied or not."""
    return Work(Fraction(2 * model.vocab_size * model.hidden_size))


def multi_token_prediction(model: Model, sequence_length: int) -> Work:
    """Every module: the projection of two representations to one, the block, the shared head."""
    if model.mtp is None:
        return Work()
    projection = Work(Fraction(2 * 2 * model.hidden_size**2))
    return (projection + block(model, model.mtp_layer(), sequence_length) + head(model)) * model.mtp.depth


def keys_read(sequence_length: int, most: int | None) -> Fraction:
    """Mean over t from 0 to `sequence_length` of the keys that a query at t reads: t, or `most` if that is less."""
    reach = min(sequence_length, most or sequence_length)
    return reach - Fraction(reach**2, 2 * sequence_length)


def without_indexer(table: Mapping[str, TensorSpec]) -> Tensors:
    """The part of attention's table that gradients flow through."""
    return {name: tensor for name, tensor in table.items() if not name.startswith("indexer.")}


def up_projections(model: Model, variant: Attention) -> Fraction:
    """Products of one token with the matrices that lead out of latents: what `mla_up_projection` computes again."""
    table = variant.tensors(model.hidden_size, model.norm)
    return products({name: tensor for name, tensor in table.items() if name.startswith(("q_b_", "kv_b_"))})


def products(table: Mapping[str, TensorSpec]) -> Fraction:
    """Products of one token with the matrices of a table; of stacked experts with those that it uses."""
    return Fraction(2 * sum(tensor.active for tensor in table.values() if is_matrix(tensor)))


def is_matrix(tensor: TensorSpec) -> bool:
    """Whether a token is multiplied with it: neither a norm's weight nor a bias."""
    return len(tensor.shape) - (tensor.experts_per_token is not None) > 1


def _choice(model: Model, variant: MLA, sequence_length: int) -> Fraction:
    """The indexer: its projections, a score of each head for every key, their weighted sum. 0 where all are read."""
    indexer = variant.indexer
    if indexer is None or variant.q_lora_rank is None or sequence_length <= indexer.topk:
        return Fraction(0)
    scores = 2 * indexer.num_heads * (indexer.head_dim + 1) * keys_read(sequence_length, None)
    return scores + products(indexer.tensors(model.hidden_size, variant.q_lora_rank))


def _blocks(model: Model) -> Iterator[LayerRun]:
    """Every run of layers, and the blocks of multi-token prediction as one more."""
    yield from runs(model)
    if model.mtp is not None:
        yield model.mtp_layer().model_copy(update={"repeat": model.mtp.depth})


def _again(model: Model, run: LayerRun, sequence_length: int, recompute: tuple[str, ...]) -> Fraction:
    """What the backward pass of a run computes again. Norms and activations are free here, as in the forward pass."""
    variant = model.attention[run.attention]
    if "layer" in recompute:
        each = block(model, run, sequence_length).forward
    elif "mla_up_projection" in recompute and isinstance(variant, MLA):
        each = up_projections(model, variant)
    else:
        each = Fraction(0)
    return each * run.repeat
