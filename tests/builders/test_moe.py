"""The mixture of experts against a loop over tokens and their experts."""

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from modelspec.builders.ffn.moe import MoE
from modelspec.kernels.op import use
from modelspec.schema import ModelSpec
from modelspec.schema import MoE as MoESpec

Tiny = Callable[..., ModelSpec]


def make(spec: ModelSpec, dtype: torch.dtype = torch.float32) -> MoE:
    """A mixture with random weights; its router leaves some experts of ten unused for few tokens."""
    moe_spec = spec.model.ffn["moe"]
    assert isinstance(moe_spec, MoESpec)
    moe = MoE(moe_spec, 24, dtype).to(dtype)
    with torch.no_grad():
        for tensor in (*moe.parameters(), *moe.buffers()):
            tensor.normal_(0, 0.3)
    return moe


def one_by_one(moe: MoE, x: Tensor) -> Tensor:
    """Every token through each of its experts, and through the shared ones."""
    choice = moe.router(x)
    rows = []
    for token, experts, weights in zip(x, choice.experts.tolist(), choice.weights, strict=True):
        row = torch.zeros_like(token)
        for expert, weight in zip(experts, weights, strict=True):
            gate, up = (moe.experts.gate_up_proj[expert] @ token).chunk(2)
            row = row + weight * (moe.experts.down_proj[expert] @ (F.silu(gate) * up))
        if (shared := moe.shared_experts) is not None:
            hidden = F.silu(shared.gate_proj.weight @ token) * (shared.up_proj.weight @ token)
            row = row + shared.down_proj.weight @ hidden
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("form", ["fastest", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("tokens", [1, 2, 35], ids=lambda n: f"{n}-tokens")
@pytest.mark.parametrize("shared", [None, {"num": 1}, {"num": 2, "intermediate_size": 5}], ids=["none", "one", "two"])
def test_output_and_gradients_equal_a_loop_over_tokens(
    shared: dict[str, int] | None,
    tokens: int,
    dtype: torch.dtype,
    form: Literal["fastest", "reference"],
    tiny: Tiny,
) -> None:
    moe = make(tiny(moe={"shared_experts": shared, "intermediate_size": 8}), dtype)
    x = torch.randn(1, tokens, 24, dtype=dtype, requires_grad=True)
    cotangent = torch.randn(tokens, 24, dtype=dtype)
    with use(form):
        output, _ = moe(x)
        found = torch.autograd.grad((output[0] * cotangent).sum(), (x, *moe.parameters()))
    expected = one_by_one(moe, x[0])
    wanted = torch.autograd.grad((expected * cotangent).sum(), (x, *moe.parameters()))
    torch.testing.assert_close(output[0], expected)
    for name, mine, theirs in zip(("x", *dict(moe.named_parameters())), found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_experts_without_tokens_have_a_zero_gradient(tiny: Tiny) -> None:
    moe = make(tiny())
    output, routing = moe(torch.randn(1, 1, 24))
    output.sum().backward()
    assert routing.counts.sum() == 4
    assert moe.experts.down_proj.grad is not None
    used = moe.experts.down_proj.grad.flatten(1).abs().sum(-1) > 0
    assert used.tolist() == (routing.counts > 0).tolist()


def test_all_tokens_on_the_same_experts_are_all_computed(tiny: Tiny) -> None:
    moe = make(tiny())
    assert moe.router.selection_bias is not None
    moe.router.selection_bias.copy_(torch.tensor([9.0, 9, 9, 9, 0, 0, 0, 0, 0, 0]))
    x = torch.randn(2, 30, 24)
    output, routing = moe(x)
    assert routing.counts.tolist() == [60] * 4 + [0] * 6
    torch.testing.assert_close(output.flatten(0, 1), one_by_one(moe, x.flatten(0, 1)))
