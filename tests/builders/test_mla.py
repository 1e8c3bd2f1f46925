"""Multi-head latent attention against the equations, query by query, and against the known ways to get it wrong."""

from collections.abc import Callable
from math import sqrt
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from modelspec import schema
from modelspec.builders.attention import rotary_of
from modelspec.builders.attention.mla import MLA
from modelspec.kernels.op import use
from modelspec.schema import ModelSpec

Tiny = Callable[..., ModelSpec]


def paper_attention(attention: MLA, x: Tensor, wrong: str = "") -> Tensor:
    """Equations 1 to 11 of arXiv 2412.19437 for one sequence x [length, hidden], without YaRN."""
    spec = attention.spec
    nope, rope, width = spec.qk_nope_head_dim, spec.qk_rope_head_dim, spec.v_head_dim

    def norm(c: Tensor, module: Any) -> Tensor:
        return c / ((c * c).mean(-1, keepdim=True) + 1e-6).sqrt() * module.weight

    def turn(vector: Tensor, position: int) -> Tensor:
        """The rotation by complex numbers."""
        if spec.rope == "none":
            return vector
        pairs = torch.arange(0, rope, 2, dtype=torch.float64) / rope
        turns = torch.polar(torch.ones_like(pairs), position * spec.rope.theta**-pairs)
        interleaved = (spec.rope.layout == "interleaved") != (wrong == "other-layout")
        if interleaved:
            even, odd = vector[0::2], vector[1::2]
        else:
            even, odd = vector[: rope // 2], vector[rope // 2 :]
        turned = torch.complex(even, odd) * turns
        if interleaved:
            return torch.stack((turned.real, turned.imag), dim=-1).flatten()
        return torch.cat((turned.real, turned.imag))

    if spec.q_lora_rank is None:
        queries = x @ attention.q_proj.weight.T
    else:
        queries = norm(x @ attention.q_a_proj.weight.T, attention.q_a_norm) @ attention.q_b_proj.weight.T
    latent, key_rope = (x @ attention.kv_a_proj.weight.T).split([spec.kv_lora_rank, rope], dim=-1)
    latent = norm(latent, attention.kv_a_norm)
    if wrong == "rope-key-normalised":
        key_rope = key_rope / ((key_rope * key_rope).mean(-1, keepdim=True) + 1e-6).sqrt()
    up = latent @ attention.kv_b_proj.weight.T

    scale = (nope + rope) ** -0.5
    if wrong == "scale-without-rope-dims":
        scale *= sqrt((nope + rope) / nope)

    rows = []
    for t in range(len(x)):
        heads = []
        for h in range(spec.num_heads):
            query = queries[t].view(spec.num_heads, nope + rope)[h]
            if wrong == "rope-before-nope":
                query = query.roll(nope)
            query = torch.cat((query[:nope], turn(query[nope:], t)))
            scores, values = [], []
            for s in range(t + 1):
                pair = up[s].view(spec.num_heads, nope + width)[h]
                if wrong == "all-keys-then-all-values":
                    keys, vals = up[s].split([spec.num_heads * nope, spec.num_heads * width])
                    pair = torch.cat((keys[h * nope : (h + 1) * nope], vals[h * width : (h + 1) * width]))
                key = torch.cat((pair[:nope], turn(key_rope[s], s)))
                scores.append(query @ key * scale)
                values.append(pair[nope:])
            heads.append(torch.stack(scores).softmax(0) @ torch.stack(values))
        rows.append(attention.o_proj.weight @ torch.cat(heads))
    return torch.stack(rows)


def make(spec: ModelSpec) -> MLA:
    """An attention with random weights in float64."""
    mla = spec.model.attention["mla"]
    assert isinstance(mla, schema.MLA)
    attention = MLA(mla, spec.model.hidden_size).double()
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return attention


def ours(attention: MLA, x: Tensor) -> Tensor:
    """Our attention over one sequence."""
    return attention(x[None], rotary_of(attention.spec, torch.arange(len(x)), x.dtype))[0]


VARIANTS: dict[str, dict[str, Any]] = {
    "interleaved": {},
    "half-split": {"rope": {"layout": "half_split"}},
    "no-rope": {"rope": "none"},
    "queries-not-compressed": {"q_lora_rank": None},
    "values-as-wide-as-keys": {"v_head_dim": 10},
}


@pytest.mark.parametrize("form", ["fastest", "reference"])
@pytest.mark.parametrize("mla", VARIANTS.values(), ids=VARIANTS.keys())
def test_output_and_gradients_follow_the_equations(
    mla: dict[str, Any], form: Literal["fastest", "reference"], tiny: Tiny
) -> None:
    attention = make(tiny(mla=mla))
    x = torch.randn(9, 24, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(9, 24, dtype=torch.float64)
    inputs = (x, *attention.parameters())
    with use(form):
        output = ours(attention, x)
        found = torch.autograd.grad((output * cotangent).sum(), inputs)
    expected = paper_attention(attention, x)
    torch.testing.assert_close(output, expected)
    for mine, wanted in zip(found, torch.autograd.grad((expected * cotangent).sum(), inputs), strict=True):
        torch.testing.assert_close(mine, wanted)


MISTAKES = [
    "other-layout",
    "rope-before-nope",
    "all-keys-then-all-values",
    "rope-key-normalised",
    "scale-without-rope-dims",
]


@pytest.mark.parametrize("wrong", MISTAKES)
@pytest.mark.parametrize("layout", ["interleaved", "half_split"])
def test_known_mistakes_would_be_seen(wrong: str, layout: str, tiny: Tiny) -> None:
    attention = make(tiny(mla={"rope": {"layout": layout, "theta": 10}}))
    x = torch.randn(9, 24, dtype=torch.float64)
    assert (ours(attention, x) - paper_attention(attention, x, wrong)).abs().amax() > 1e-2


@pytest.mark.parametrize("length", [1, 63, 64, 65, 130, 1100])
@pytest.mark.parametrize("width", [5, 10], ids=["narrow-values", "equal-widths"])
def test_any_length_is_causal(length: int, width: int, tiny: Tiny) -> None:
    attention = make(tiny(mla={"v_head_dim": width}))
    x = torch.randn(length, 24, dtype=torch.float64)
    with torch.no_grad():
        whole = ours(attention, x)
        with use("reference"):
            torch.testing.assert_close(whole, ours(attention, x))
        prefix = ours(attention, x[: length // 2 + 1])
    torch.testing.assert_close(whole[: length // 2 + 1], prefix)
