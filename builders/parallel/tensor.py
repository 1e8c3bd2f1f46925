"""The tensor axis: matrices cut over ranks by heads and widths, sequences between them (arXiv 1909.08053, 2205.05198).

The first product of a half of a layer is cut by its outputs, the last by its inputs, so that each rank computes some of
the heads, or some of the width, and adds a summand of the result. Between the halves every rank has its part of the
sequence: it is gathered before a half, and the summands are summed and scattered after it. So norms and the residual
stream are divided too, and a parameter that stands whole on all ranks has a gradient that is their sum.

Routing works on each rank's part of the sequence, and experts are not cut here: they are divided by the expert axis.
Heads of keys and values that are fewer than ranks stand whole on all of them, and each rank reads that of its queries.
"""

from typing import assert_never

from torch import Tensor, nn

from modelspec import layout, schema
from modelspec.builders.attention import Attention
from modelspec.builders.attention.gqa import GQA
from modelspec.builders.layers import Linear, SwiGLU
from modelspec.builders.parallel.collectives import gathered, scattered_sum
from modelspec.builders.parallel.mesh import Axis


def local_spec(spec: schema.ModelSpec, ranks: int) -> schema.ModelSpec:
    """A spec whose vocabulary, heads and widths are one rank's: what it builds."""
    if ranks == 1:
        return spec
    model = spec.model
    narrow = {
        "attention": {name: _narrow_attention(variant, ranks) for name, variant in model.attention.items()},
        "ffn": {name: _narrow_ffn(variant, ranks) for name, variant in model.ffn.items()},
        "vocab_size": model.vocab_size // ranks,
    }
    return spec.model_copy(update={"model": model.model_copy(update=narrow)})


def _narrow_attention(variant: schema.Attention, ranks: int) -> schema.Attention:
    match variant:
        case schema.MLA():
            return variant.model_copy(update={"num_heads": variant.num_heads // ranks})
        case schema.GQA(num_kv_heads=keys):
            few = keys if keys < ranks else keys // ranks
            return variant.model_copy(update={"num_heads": variant.num_heads // ranks, "num_kv_heads": few})
        case schema.GatedDeltaNet():
            raise ValueError("gated DeltaNet is not cut over tensor ranks: see checks")
        case _:
            assert_never(variant)


def _narrow_ffn(variant: schema.FFN, ranks: int) -> schema.FFN:
    match variant:
        case schema.Dense():
            return variant.model_copy(update={"intermediate_size": variant.intermediate_size // ranks})
        case schema.MoE(shared_experts=None):
            return variant
        case schema.MoE(shared_experts=shared):
            assert shared is not None
            one = {"num": 1, "intermediate_size": variant.shared_width // ranks}
            return variant.model_copy(update={"shared_experts": shared.model_copy(update=one)})
        case _:
            assert_never(variant)


def cut_dim(name: str, spec: schema.ModelSpec) -> int | None:
    """The dim along which a spec's tensor axis cuts a parameter; None where it stands whole on every rank."""
    return layout.tensor_cut(name, spec.parallelism.tensor, layout.attention_of(name, spec.model))


def tensor_parallel(model: nn.Module, spec: schema.ModelSpec, axis: Axis) -> None:
    """Puts the collectives around attention and feed-forward networks of a model that `local_spec` of `spec` built."""
    for name, module in model.named_modules():
        if isinstance(module, Attention | SwiGLU):
            module.register_forward_pre_hook(lambda _, args: (gather(args[0], axis), *args[1:]))
            module.register_forward_hook(lambda half, _, y: reduce_scatter(_summand(half, y, axis.size), axis))
        variant = layout.attention_of(name, spec.model)
        if isinstance(module, GQA) and isinstance(variant, schema.GQA) and variant.num_kv_heads < axis.size:
            head = axis.rank * variant.num_kv_heads // axis.size
            for proj in (module.k_proj, module.v_proj):
                _only(proj, head * variant.head_dim, variant.head_dim)


def _summand(half: nn.Module, y: Tensor, ranks: int) -> Tensor:
    """The output of a rank's half of a layer with its share of the last bias alone, which all ranks have added."""
    last = half.down_proj if isinstance(half, SwiGLU) else half.o_proj
    assert isinstance(last, Linear)
    return y if last.bias is None else y - last.bias.to(y.dtype) * (1 - 1 / ranks)


def _only(proj: nn.Module, start: int, length: int) -> None:
    """Lets a projection that stands whole give so many of its outputs alone."""
    proj.register_forward_hook(lambda *call: call[-1].narrow(-1, start, length))


def gather(x: Tensor, axis: Axis) -> Tensor:
    """x [..., positions, hidden] of all ranks, one after the other."""
    return gathered(x, x.ndim - 2, axis)


def reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    """The sum over ranks of x [..., positions, hidden], of which each gets its part of the positions."""
    return scattered_sum(x, x.ndim - 2, axis)
