"""The tensor axis: matrices cut over ranks by heads and widths, sequences between them (arXiv 1909.08053, 2205.05198).

The first product of a half of a layer is cut by its outputs, the last by its inputs, so that each rank computes some of
the heads, or some of the width, and adds a summand of the result. Between the halves every rank has its part of the
sequence: it is gathered before a half, and the summands are summed and scattered after it. So norms and the residual
stream are divided too, and a parameter that stands whole on all ranks has a gradient that is their sum.

Routing works on each rank's part of the sequence, and experts are not cut here: they are divided by the expert axis.
"""

from typing import cast

from torch import Tensor, nn

from modelspec import schema
from modelspec.builders.attention import Attention
from modelspec.builders.ffn.moe import Experts, MoE
from modelspec.builders.layers import Linear, SwiGLU
from modelspec.builders.parallel.collectives import gathered, scattered_sum
from modelspec.builders.parallel.mesh import Axis


def local_spec(spec: schema.ModelSpec, ranks: int) -> schema.ModelSpec:
    """A spec whose vocabulary, heads and dense widths are one rank's: what it builds."""
    if ranks == 1:
        return spec
    model = spec.model
    attention = {name: _narrow_attention(variant, ranks) for name, variant in model.attention.items()}
    ffn = {
        name: variant.model_copy(update={"intermediate_size": variant.intermediate_size // ranks})
        if isinstance(variant, schema.Dense)
        else variant
        for name, variant in model.ffn.items()
    }
    narrow = {"attention": attention, "ffn": ffn, "vocab_size": model.vocab_size // ranks}
    return spec.model_copy(update={"model": model.model_copy(update=narrow)})


def _narrow_attention(variant: schema.Attention, ranks: int) -> schema.Attention:
    heads = ["num_heads", "num_kv_heads"] if isinstance(variant, schema.GQA) else ["num_heads"]
    return variant.model_copy(update={name: getattr(variant, name) // ranks for name in heads})


def shrink(model: nn.Module, hidden_size: int, tensor: int, expert: int) -> None:
    """Puts one rank's experts and its width of shared experts in the place of all, in a model on the meta device."""
    for module in list(model.modules()):
        if not isinstance(module, MoE):
            continue
        if expert > 1:
            few = module.spec.model_copy(update={"num_experts": module.spec.num_experts // expert})
            module.experts = Experts(few, hidden_size)
        if tensor > 1 and module.shared_experts is not None:
            module.shared_experts = SwiGLU(hidden_size, module.spec.shared_width // tensor, module.spec)


def tensor_parallel(model: nn.Module, axis: Axis) -> None:
    """Puts the collectives around attention and feed-forward networks, which are those of one rank."""
    for module in model.modules():
        if isinstance(module, Attention | SwiGLU):
            module.register_forward_pre_hook(lambda _, args: (gather(args[0], axis), *args[1:]))
            module.register_forward_hook(lambda _, args, summand: reduce_scatter(cast(Tensor, summand), axis))
            last = module.down_proj if isinstance(module, SwiGLU) else module.o_proj
            assert isinstance(last, Linear)
            if last.bias is not None:
                # All ranks add it to their summand: so each may add its share of it alone.
                last.register_forward_hook(lambda linear, _, y: _less(cast(Tensor, y), linear, 1 - 1 / axis.size))


def _less(y: Tensor, linear: nn.Module, share: float) -> Tensor:
    """A product's output without so much of its bias."""
    return y - linear.get_parameter("bias").to(y.dtype) * share


def gather(x: Tensor, axis: Axis) -> Tensor:
    """x [..., positions, hidden] of all ranks, one after the other."""
    return gathered(x, x.ndim - 2, axis)


def reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    """The sum over ranks of x [..., positions, hidden], of which each gets its part of the positions."""
    return scattered_sum(x, x.ndim - 2, axis)


# Parts of a name that say: it stands whole on every rank.
_WHOLE = (
    "norm.",
    ".router.",
    "q_a_proj.",
    "kv_a_proj.",
    ".indexer.",
    "shared_gate.",
    "experts.gate_up_",
    "experts.down_",
)


def cut_dim(name: str) -> int | None:
    """The dim along which the tensor axis cuts a parameter; None where it stands whole on every rank."""
    mtp_projection = name.startswith("mtp.") and name.endswith(".proj.weight")
    if mtp_projection or (".shared_experts." not in name and any(part in name for part in _WHOLE)):
        return None
    if name.endswith(("o_proj.bias", "down_proj.bias")):
        return None
    return 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0
