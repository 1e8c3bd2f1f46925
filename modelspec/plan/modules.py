"""The model part by part: each half of a run of layers, and what stands before and after them."""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from modelspec.plan.cache import layer_cache
from modelspec.plan.flops import Work, attention, ffn, head, multi_token_prediction
from modelspec.plan.runs import runs
from modelspec.schema import ModelSpec, Tensors
from modelspec.schema.base import linear


@dataclass(frozen=True, slots=True)
class Module:
    """A part of the model, named as in the spec, and how many layers have it.

    Counts are of all of them together: parameters (the norm before it included), those active for one token, forward
    FLOPs per token, and bytes of cache per token.
    """

    name: str
    layers: int
    parameters: int
    active: int
    forward_flops: Fraction
    kv_cache_bytes_per_token: int = 0


def modules(spec: ModelSpec, sequence_length: int) -> Iterator[Module]:
    """Every part in the order of computation; together they are the main model, and last multi-token prediction."""
    model = spec.model
    embedding = linear(model.vocab_size, model.hidden_size)
    yield _module("embed_tokens", 1, embedding, Work())
    for run in runs(model):
        table, variant = model.block_tensors(run), model.attention[run.attention]
        halves = {half: {k: v for k, v in table.items() if k.startswith(half)} for half in ("attention", "ffn")}
        work, kept = attention(model, variant, sequence_length), layer_cache(spec, variant).per_token
        yield _module(f"attention.{run.attention}", run.repeat, halves["attention"], work, kept)
        yield _module(f"ffn.{run.ffn}", run.repeat, halves["ffn"], ffn(model, model.ffn[run.ffn]))
    yield _module("norm", 1, model.norm.tensors(model.hidden_size), Work())
    yield _module("lm_head", 1, {} if model.tie_embeddings else embedding, head(model))
    if model.mtp is not None:
        one = model.model_copy(update={"mtp": model.mtp.model_copy(update={"depth": 1})})
        yield _module("mtp", model.mtp.depth, one.mtp_tensors(), multi_token_prediction(one, sequence_length))


def _module(name: str, layers: int, each: Tensors, work: Work, kept: int = 0) -> Module:
    return Module(
        name,
        layers,
        layers * sum(tensor.numel for tensor in each.values()),
        layers * sum(tensor.active for tensor in each.values()),
        layers * work.forward,
        layers * kept,
    )
