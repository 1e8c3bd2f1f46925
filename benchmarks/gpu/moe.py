"""The experts' part of a mixture layer, forward and backward: in FP8 beside itself in BF16.

BF16 comes twice: as the same layer with a recipe that leaves every product wide, so that moves and activation are the
same code, and as the plain layer of torch's operations. FP8's weights are quantised once for an optimizer step, so that
one side finds them ready and the other quantises them at each call, as with one micro-batch in a step.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.timing import Case, Place, Side, distance
from modelspec.kernels.experts import Experts, swiglu_experts
from modelspec.kernels.fp8_experts import ExpertLayers, fp8_experts
from modelspec.kernels.fp8_linear import Layer, Recipe, Sides
from modelspec.kernels.op import use
from modelspec.kernels.quantize_weight import quantize_weight
from modelspec.kernels.swiglu import SWIGLU, swiglu

# Tokens, channels, width of an expert, experts, of which each token takes so many.
SHAPE = (8192, 7168, 2048, 32, 8)
DRY = (24, 144, 128, 4, 2)
# Quantised are x, both weights and both gradients, and errors of 2.6 % each add up along the way.
NEAR = 1e-1

Results = tuple[Tensor, ...]


class Inputs(NamedTuple):
    """x [tokens, hidden], choice and weights [tokens, k], the experts' weights, and the gradient of the output."""

    x: Tensor
    choice: Tensor
    weights: Tensor
    experts: Experts
    grad: Tensor
    layers: ExpertLayers


WIDE = Recipe(forward=False, dgrad=False, wgrad=False)


def layers(experts: Experts) -> ExpertLayers:
    """Both weights of all experts in FP8, in both orientations."""
    gate_up, down = (Sides(*quantize_weight(each.detach(), False)) for each in (experts.gate_up, experts.down))
    return ExpertLayers(Layer(Recipe(), gate_up), Layer(Recipe(), down))


def _make(place: Place, shape: tuple[int, int, int, int, int]) -> Callable[[int], Inputs]:
    tokens, hidden, width, num, k = shape

    def normal(generator: torch.Generator, *sizes: int, std: float = 1.0) -> Tensor:
        drawn = torch.randn(sizes, generator=generator, device=place.device, dtype=torch.bfloat16)
        return (drawn * std).requires_grad_()

    def make(seed: int) -> Inputs:
        generator = torch.Generator(place.device).manual_seed(seed)
        gate_up = normal(generator, num, 2 * width, hidden, std=hidden**-0.5)
        down = normal(generator, num, hidden, width, std=width**-0.5)
        scores = torch.rand(tokens, num, generator=generator, device=place.device)
        weights, choice = scores.topk(k)
        weights = (weights / weights.sum(-1, keepdim=True)).to(torch.bfloat16).requires_grad_()
        experts = Experts(gate_up, down)
        x, grad = normal(generator, tokens, hidden), normal(generator, tokens, hidden).detach()
        return Inputs(x, choice, weights, experts, grad, layers(experts))

    return make


def in_torch(x: Inputs) -> Results:
    """Output and gradients of the plain layer."""
    y = swiglu_experts.reference(x.x, x.choice, x.weights, x.experts, SWIGLU, swiglu.reference)
    return _results(y, x)


def in_fp8(x: Inputs, ready: bool) -> Results:
    """Output and gradients of the layer in FP8."""
    with use("triton"):
        y = fp8_experts(x.x, x.choice, x.weights, x.experts, x.layers if ready else layers(x.experts), SWIGLU)
        return _results(y, x)


def in_bf16(x: Inputs) -> Results:
    """Output and gradients of the same layer without FP8."""
    with use("triton"):
        wide = ExpertLayers(Layer(WIDE, Sides()), Layer(WIDE, Sides()))
        return _results(fp8_experts(x.x, x.choice, x.weights, x.experts, wide, SWIGLU), x)


def _results(y: Tensor, x: Inputs) -> Results:
    wanted = (x.x, x.weights, x.experts.gate_up, x.experts.down)
    return y.detach(), *torch.autograd.grad(y, wanted, x.grad)


def farthest(results: Results, truth: Results) -> float:
    """The largest distance of any of them."""
    return max(distance(a, b) for a, b in zip(results, truth, strict=True))


def cases(place: Place) -> Iterator[Case]:
    """One layer of V3's sizes."""
    shape = DRY if place.dry else SHAPE
    tokens, hidden, width, num, k = shape
    rows, weights = tokens * k, 3 * num * hidden * width
    flops = 3 * 2 * rows * 3 * hidden * width
    # Rows of the products' inputs and outputs, forward and twice backward, and three looks at the weights.
    moved = 3 * rows * (2 * hidden + 3 * width)
    yield Case(
        "MoE forward and backward",
        "x".join(map(str, shape)),
        _make(place, shape),
        in_torch,
        [
            Side("ours", lambda x: in_fp8(x, True), farthest, NEAR, 2 * moved + 4 * weights, flops),
            Side("ours, weights too", lambda x: in_fp8(x, False), farthest, NEAR, 2 * moved + 9 * weights, flops),
            Side("BF16", in_bf16, farthest, 2e-2, 2 * moved + 6 * weights, flops, "bf16"),
            Side("torch", in_torch, farthest, 2e-2, 2 * moved + 6 * weights, flops, "bf16", ours=False),
        ],
    )
