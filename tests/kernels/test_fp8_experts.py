"""Experts in FP8 are a loop over experts whose matrices are rounded, pass by pass, and close to the experts in FP32."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from modelspec.kernels.experts import Experts, swiglu_experts
from modelspec.kernels.fp8_experts import ExpertLayers, fp8_experts
from modelspec.kernels.fp8_linear import Layer, Recipe, Sides
from modelspec.kernels.op import use
from modelspec.kernels.quantize_weight import quantize_weight
from modelspec.kernels.swiglu import SWIGLU, Gating, swiglu

Rounded = Callable[..., Tensor]
TOKENS, HIDDEN, WIDTH, NUM, K = 200, 72, 56, 5, 2
CLAMPED = Gating(1.702, 2.0, 1.0)
ALL = Recipe()


class Case(NamedTuple):
    """Operands of experts; `learned` are those with a gradient. The last expert is chosen by no token."""

    x: Tensor
    choice: Tensor
    weights: Tensor
    experts: Experts
    grad: Tensor

    @property
    def learned(self) -> list[Tensor]:
        return [self.x, self.weights, *(each for each in self.experts if each is not None)]


def case(dtype: torch.dtype = torch.float32, biases: bool = False, tokens: int = TOKENS) -> Case:
    shapes = [(NUM, 2 * WIDTH, HIDDEN), (NUM, HIDDEN, WIDTH)] + [(NUM, 2 * WIDTH), (NUM, HIDDEN)] * biases
    experts = Experts(*((torch.randn(shape) / 6).requires_grad_() for shape in shapes))
    choice = torch.rand(tokens, NUM - 1).argsort(-1)[:, :K]
    x, weights = torch.randn(tokens, HIDDEN).to(dtype).requires_grad_(), torch.rand(tokens, K).requires_grad_()
    return Case(x, choice, weights, experts, torch.randn(tokens, HIDDEN).to(dtype))


def layers(experts: Experts, recipe: Recipe = ALL, **options: bool) -> ExpertLayers:
    gate_up, down = (
        Layer(recipe, Sides(*quantize_weight(weight.detach(), recipe.ue8m0)))
        for weight in (experts.gate_up, experts.down)
    )
    return ExpertLayers(gate_up, down, **options)


def run(case: Case, layers: ExpertLayers, gating: Gating = SWIGLU) -> list[Tensor]:
    """The output, and the gradients of what is learned."""
    y = fp8_experts(case.x, case.choice, case.weights, case.experts, layers, gating)
    return [y.detach(), *torch.autograd.grad(y, case.learned, case.grad)]


def by_hand(case: Case, rounded: Rounded, recipe: Recipe, narrow: bool, dispatch: bool, gating: Gating) -> list[Tensor]:
    """The same, expert by expert, each matrix rounded where it enters a product. In FP32, without biases."""
    x, grad = case.x.detach().float(), case.grad.float()
    first, second = recipe.ue8m0 or dispatch, recipe.ue8m0
    if dispatch:
        x, grad = rounded(x, 1, 128, True), rounded(grad, 1, 128, True)
    out, grad_x = torch.zeros_like(x), torch.zeros_like(x)
    grad_weights = torch.zeros_like(case.weights)
    grad_gate_up, grad_down = torch.zeros_like(case.experts.gate_up), torch.zeros_like(case.experts.down)

    def narrowed(matrix: Tensor, on: bool, height: int, width: int, power_of_two: bool) -> Tensor:
        return rounded(matrix, height, width, power_of_two) if on else matrix

    for e in range(NUM - 1):
        token, slot = (case.choice == e).nonzero(as_tuple=True)
        scale = case.weights.detach()[token, slot][:, None]
        gate_up, down = case.experts.gate_up[e].detach(), case.experts.down[e].detach()
        rows, grad_rows = x[token], grad[token]
        hidden = narrowed(rows, recipe.forward, 1, 128, first) @ narrowed(gate_up, recipe.forward, 128, 128, second).T
        act = activated(hidden, gating) * scale
        y = narrowed(act, recipe.forward, 1, 128, second) @ narrowed(down, recipe.forward, 128, 128, second).T
        out.index_add_(0, token, y)

        kept = (rounded(hidden, 1, 128, second) if narrow else hidden).requires_grad_()
        act = activated(kept, gating)
        left = narrowed(grad_rows, recipe.dgrad, 1, 128, second or dispatch)
        grad_act = left @ narrowed(down, recipe.dgrad, 128, 128, second)
        grad_weights[token, slot] = (grad_act * act.detach()).sum(-1)
        left = narrowed(grad_rows, recipe.wgrad, 128, 1, second or dispatch)
        grad_down[e] = left.T @ narrowed(act.detach() * scale, recipe.wgrad, 128, 1, second)
        (grad_hidden,) = torch.autograd.grad(act, kept, grad_act * scale)
        left = narrowed(grad_hidden, recipe.dgrad, 1, 128, second)
        grad_x.index_add_(0, token, left @ narrowed(gate_up, recipe.dgrad, 128, 128, second))
        left = narrowed(grad_hidden, recipe.wgrad, 128, 1, second)
        grad_gate_up[e] = left.T @ narrowed(rows, recipe.wgrad, 128, 1, first)
    return [out, grad_x, grad_weights, grad_gate_up, grad_down]


def activated(hidden: Tensor, gating: Gating) -> Tensor:
    gate, up = hidden.chunk(2, dim=-1)
    if gating.limit is not None:
        gate, up = gate.clamp(max=gating.limit), up.clamp(-gating.limit, gating.limit)
    return gate * torch.sigmoid(gating.alpha * gate) * (up + gating.up_offset)


def error(ours: Tensor, truth: Tensor) -> float:
    """Relative Frobenius norm of the difference."""
    return float((ours.double() - truth.double()).norm() / truth.double().norm())


@pytest.mark.parametrize(
    ("recipe", "narrow", "dispatch", "gating"),
    [
        (ALL, False, False, SWIGLU),
        (Recipe(ue8m0=True), False, False, CLAMPED),
        (Recipe(dgrad=False, wgrad=False), False, False, SWIGLU),
        (Recipe(forward=False), True, False, SWIGLU),
        (Recipe(wgrad=False), False, True, SWIGLU),
        (ALL, True, True, SWIGLU),
    ],
    ids=["all", "ue8m0", "forward", "backward, narrow", "no wgrad, dispatch", "narrow, dispatch"],
)
def test_each_pass_is_a_loop_over_experts_with_rounded_matrices(
    recipe: Recipe, narrow: bool, dispatch: bool, gating: Gating, rounded: Rounded
) -> None:
    operands = case()
    ours = run(operands, layers(operands.experts, recipe, narrow=narrow, dispatch=dispatch), gating)
    theirs = by_hand(operands, rounded, recipe, narrow, dispatch, gating)
    # A sum in another order moves a few values over the edge between two codes.
    assert max(error(mine, expected) for mine, expected in zip(ours, theirs, strict=True)) < 0.002
    assert all(gradient[NUM - 1].abs().max() == 0 for gradient in ours[3:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", [{}, {"narrow": True}, {"dispatch": True}], ids=["plain", "narrow", "dispatch"])
def test_output_and_gradients_are_close_to_those_of_fp32(dtype: torch.dtype, options: dict[str, bool]) -> None:
    operands = case(dtype)
    ours = run(operands, layers(operands.experts, ALL, **options))
    y = swiglu_experts.reference(operands.x.float(), *operands[1:4], SWIGLU, swiglu.reference)
    theirs = [y.detach(), *torch.autograd.grad(y, operands.learned, operands.grad.float())]
    # Two products in a row, so up to twice the error of one squared.
    assert max(error(mine, exact) for mine, exact in zip(ours, theirs, strict=True)) < 0.08
    assert [each.dtype for each in ours] == [dtype, dtype, torch.float32, torch.float32, torch.float32]


def test_biases_and_clamps_work_as_in_fp32() -> None:
    operands = case(biases=True)
    ours = run(operands, layers(operands.experts), CLAMPED)
    y = swiglu_experts.reference(*operands[:4], CLAMPED, swiglu.reference)
    theirs = [y.detach(), *torch.autograd.grad(y, operands.learned, operands.grad)]
    # Elements that rounding moves over the limit lose their gradient.
    bounds = [0.08, 0.15, 0.06, 0.15, 0.08, 0.15, 1e-6]
    for mine, exact, bound in zip(ours, theirs, bounds, strict=True):
        assert error(mine, exact) < bound


def test_all_tokens_to_one_expert_and_no_tokens_at_all() -> None:
    operands = case(tokens=150)
    alone = operands._replace(choice=torch.full((150, 1), 3), weights=operands.weights[:, :1].detach().requires_grad_())
    y, _, _, grad_gate_up, grad_down = run(alone, layers(alone.experts))
    truth = swiglu_experts.reference(*alone[:4], SWIGLU, swiglu.reference)
    assert error(y, truth.detach()) < 0.08
    for gradient in (grad_gate_up, grad_down):
        assert gradient[3].abs().max() > 0 and gradient[[0, 1, 2, 4]].abs().max() == 0
    empty = case(tokens=0)
    y, _, _, *gradients = run(empty, layers(empty.experts))
    assert y.shape == (0, HIDDEN) and all(gradient.abs().max() == 0 for gradient in gradients)


def test_a_token_does_not_depend_on_the_order_of_tokens() -> None:
    operands = case()
    order = torch.randperm(TOKENS)
    moved = operands._replace(x=operands.x[order], choice=operands.choice[order], weights=operands.weights[order])
    ours = fp8_experts(*operands[:4], layers(operands.experts), SWIGLU)
    theirs = fp8_experts(*moved[:4], layers(operands.experts), SWIGLU)
    assert torch.equal(ours[order], theirs)


def test_frozen_experts_have_no_gradient_and_tokens_still_do() -> None:
    operands = case()
    frozen = operands._replace(experts=Experts(*(each.detach() for each in operands.experts[:2] if each is not None)))
    y = fp8_experts(*frozen[:4], layers(operands.experts), SWIGLU)
    grad_x, grad_weights = torch.autograd.grad(y, (frozen.x, frozen.weights), frozen.grad)
    expected = run(operands, layers(operands.experts))
    assert torch.equal(grad_x, expected[1]) and torch.equal(grad_weights, expected[2])


def test_the_kernels_give_what_the_references_give() -> None:
    torch.manual_seed(3)
    operands = case(torch.bfloat16, tokens=70)

    def of(form: Any) -> list[Tensor]:
        with use(form):
            y = fp8_experts(*operands[:4], layers(operands.experts), SWIGLU)
            return [y.detach(), *torch.autograd.grad(y, operands.learned, operands.grad)]

    for kernel, reference in zip(of("triton"), of("reference"), strict=True):
        assert error(kernel, reference) < 0.004


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_it_compiles_in_one_graph_with_the_same_gradients() -> None:
    operands = case(tokens=40)
    made = layers(operands.experts)

    def experts(x: Tensor, choice: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return fp8_experts(x, choice, weights, Experts(gate_up, down), made, SWIGLU)

    inputs = (*operands[:3], operands.experts.gate_up, operands.experts.down)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    ours, theirs = (torch.autograd.grad(f(*inputs), operands.learned, operands.grad) for f in (compiled, experts))
    torch.testing.assert_close(ours, theirs)
