"""Every operation with two forms: the fast one gives the reference's outputs and gradients, wherever it applies."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from modelspec.kernels.attention import causal_attention
from modelspec.kernels.experts import Experts, swiglu_experts, tokens_per_expert
from modelspec.kernels.linear import linear
from modelspec.kernels.op import Op, use
from modelspec.kernels.rms_norm import rms_norm
from modelspec.kernels.rotate import rotate
from modelspec.kernels.swiglu import SWIGLU, swiglu

Random = Callable[..., Tensor]


def _experts(random: Random, tokens: int, k: int, experts: int) -> tuple[Any, ...]:
    choice = torch.rand(tokens, experts).argsort(-1)[:, :k]
    return random(tokens, 5), choice, random(tokens, k), random(experts, 6, 5), random(experts, 5, 3)


def _angles(random: Random, length: int, pairs: int) -> tuple[Tensor, Tensor]:
    angle = random(length, pairs).detach()
    return angle.cos(), angle.sin()


def _flat(form: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A form of the experts that takes its weights one by one."""
    return lambda x, choice, weights, up, down: form(x, choice, weights, Experts(up, down), SWIGLU, swiglu.reference)


EXPERTS: Op[..., Tensor] = Op(
    reference=_flat(swiglu_experts.reference), fast=_flat(swiglu_experts), applies=lambda *tensors: True
)

# Operation, and its arguments made of `random(*shape)`, which gives a tensor that wants a gradient.
CASES: dict[str, tuple[Op[..., Tensor], Callable[[Random], tuple[Any, ...]]]] = {
    "linear-matrix": (linear, lambda r: (r(7, 5), r(3, 5))),
    "linear-batched": (linear, lambda r: (r(2, 3, 5), r(4, 5))),
    "linear-of-a-view": (linear, lambda r: (r(5, 7).mT, r(3, 5))),
    "rms_norm": (rms_norm, lambda r: (r(2, 3, 6), r(6), 1e-6)),
    "rms_norm-large-eps": (rms_norm, lambda r: (r(4, 6), r(6), 0.5)),
    "rms_norm-of-a-view": (rms_norm, lambda r: (r(2, 3, 10)[..., :6], r(6), 1e-6)),
    "rms_norm-of-turned-heads": (rms_norm, lambda r: (r(2, 4, 3, 6).transpose(1, 2), r(6), 1e-6)),
    "swiglu": (swiglu, lambda r: (r(2, 3, 6), r(2, 3, 6))),
    "rotate-interleaved": (rotate, lambda r: (r(2, 3, 4, 6), *_angles(r, 4, 3), "interleaved")),
    "rotate-half-split": (rotate, lambda r: (r(2, 3, 4, 6), *_angles(r, 4, 3), "half_split")),
    "rotate-at-an-odd-offset": (rotate, lambda r: (r(4, 9)[:, 3:], *_angles(r, 4, 3), "interleaved")),
    "rotate-of-a-view": (rotate, lambda r: (r(2, 4, 3, 8)[..., 2:].transpose(1, 2), *_angles(r, 4, 3), "interleaved")),
    "attention-one-token": (causal_attention, lambda r: (r(1, 2, 1, 4), r(1, 2, 1, 4), r(1, 2, 1, 3), 0.5)),
    "attention": (causal_attention, lambda r: (r(2, 2, 9, 4), r(2, 2, 9, 4), r(2, 2, 9, 3), 0.5)),
    "attention-over-blocks": (causal_attention, lambda r: (r(1, 1, 70, 2), r(1, 1, 70, 2), r(1, 1, 70, 1), 0.5)),
    "experts": (EXPERTS, lambda r: _experts(r, 9, 2, 4)),
    "experts-mostly-empty": (EXPERTS, lambda r: _experts(r, 1, 2, 8)),
    "experts-all-used": (EXPERTS, lambda r: _experts(r, 3, 3, 3)),
    "experts-over-granules": (EXPERTS, lambda r: _experts(r, 100, 2, 3)),
    "experts-without-tokens": (EXPERTS, lambda r: _experts(r, 0, 2, 3)),
}


@pytest.fixture(params=CASES.values(), ids=list(CASES))
def case(request: pytest.FixtureRequest) -> tuple[Op[..., Tensor], tuple[Any, ...]]:
    """An operation and its arguments, in float64."""
    op, arguments = request.param
    return op, arguments(lambda *shape: torch.randn(shape, dtype=torch.float64, requires_grad=True))


def test_fast_form_gives_the_references_outputs_and_gradients(case: tuple[Op[..., Tensor], tuple[Any, ...]]) -> None:
    op, arguments = case
    wanting = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    fastest, reference = op(*arguments), op.reference(*arguments)
    cotangent = torch.randn_like(reference)
    torch.testing.assert_close(fastest, reference)
    torch.testing.assert_close(
        torch.autograd.grad(fastest, wanting, cotangent), torch.autograd.grad(reference, wanting, cotangent)
    )


def test_fast_form_is_as_exact_in_float32(case: tuple[Op[..., Tensor], tuple[Any, ...]]) -> None:
    op, arguments = case
    narrow = [
        a.detach().float().requires_grad_() if isinstance(a, Tensor) and a.requires_grad else a for a in arguments
    ]
    narrow = [a.float() if isinstance(a, Tensor) and a.dtype == torch.float64 else a for a in narrow]
    wanting = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    narrow_wanting = [a for a in narrow if isinstance(a, Tensor) and a.requires_grad]
    fastest, reference = op(*narrow), op.reference(*arguments)
    cotangent = torch.randn_like(reference)
    torch.testing.assert_close(fastest.double(), reference, rtol=1e-5, atol=1e-5)
    for mine, exact in zip(
        torch.autograd.grad(fastest, narrow_wanting, cotangent.float()),
        torch.autograd.grad(reference, wanting, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_finite_differences(case: tuple[Op[..., Tensor], tuple[Any, ...]]) -> None:
    op, arguments = case
    assert torch.autograd.gradcheck(op, arguments, fast_mode=True)


def test_arguments_are_left_as_they_were(case: tuple[Op[..., Tensor], tuple[Any, ...]]) -> None:
    op, arguments = case
    before = [a.detach().clone() if isinstance(a, Tensor) else a for a in arguments]
    output = op(*arguments)
    cotangent = torch.ones_like(output)
    output.backward(cotangent)
    for argument, value in zip(arguments, before, strict=True):
        assert torch.equal(argument, value) if isinstance(argument, Tensor) else argument == value
    assert (cotangent == 1).all()


def test_a_second_backward_pass_gives_the_same(case: tuple[Op[..., Tensor], tuple[Any, ...]]) -> None:
    op, arguments = case
    wanting = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    output = op(*arguments)
    first, second = (torch.autograd.grad(output.sum(), wanting, retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_use_chooses_the_form() -> None:
    chosen: list[str] = []
    op: Op[[], None] = Op(
        reference=lambda: chosen.append("reference"), fast=lambda: chosen.append("fast"), applies=lambda: True
    )
    op()
    with use("reference"):
        op()
        with use("fastest"):
            op()
    op()
    assert chosen == ["fast", "reference", "fast", "fast"]


def test_narrow_and_mixed_dtypes_take_the_reference() -> None:
    x, weight = torch.randn(2, 4).bfloat16(), torch.ones(4).bfloat16()
    assert torch.equal(rms_norm(x, weight, 1e-6), rms_norm.reference(x, weight, 1e-6))
    assert rms_norm(x, weight, 1e-6).dtype == torch.bfloat16


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tokens_per_expert_are_counted(device: str) -> None:
    experts = torch.tensor([[0, 3], [3, 1], [3, 0]], device=device)
    counts = tokens_per_expert(experts, 5)
    assert (counts.shape, counts.dtype) == ((5,), torch.int64)
    assert device == "meta" or counts.tolist() == [2, 1, 0, 3, 0]
