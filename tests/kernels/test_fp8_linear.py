"""A linear layer in FP8 is the layer of rounded matrices, pass by pass, and close to the layer in FP32."""

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock
from weakref import ref

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from modelspec.kernels import fp8_linear as module
from modelspec.kernels.fp8_health import Health
from modelspec.kernels.fp8_linear import Latest, Layer, Recipe, Sides, fp8_gated_linear, fp8_linear
from modelspec.kernels.op import use
from modelspec.kernels.quantize_weight import quantize_weight
from modelspec.kernels.swiglu import SWIGLU, Gating

Rounded = Callable[..., Tensor]
ROWS, INPUTS, OUTPUTS = 150, 200, 140
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
PASSES = pytest.mark.parametrize(
    "recipe",
    [Recipe(), Recipe(ue8m0=True), Recipe(dgrad=False, wgrad=False), Recipe(forward=False), Recipe(wgrad=False)],
    ids=["all", "ue8m0", "forward", "backward", "no wgrad"],
)


def operands(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and the output's gradient, with a few large values as models have them."""
    x, weight, grad = torch.randn(ROWS, INPUTS), torch.randn(OUTPUTS, INPUTS) / 14, torch.randn(ROWS, OUTPUTS)
    x[:, 7] *= 30
    grad[3] *= 50
    return x.to(dtype).requires_grad_(), weight.requires_grad_(), grad.to(dtype)


def error(ours: Tensor, truth: Tensor) -> float:
    """Relative Frobenius norm of the difference."""
    ours, truth = ours.detach().double(), truth.detach().double()
    return float((ours - truth).norm() / truth.norm())


def layer_of(weight: Tensor, recipe: Recipe, health: Health | None = None) -> Layer:
    return Layer(recipe, Sides(*quantize_weight(weight.detach(), recipe.ue8m0)), health)


def close(ours: Tensor, expected: Tensor) -> None:
    """Equal but for the order of sums in FP32, and one rounding to BF16."""
    torch.testing.assert_close(ours.float(), expected.float(), rtol=2**-7 if ours.dtype == torch.bfloat16 else 1e-5,
                               atol=2e-5 * float(expected.abs().max()))  # fmt: skip


@DTYPES
@PASSES
def test_each_pass_is_the_product_of_rounded_matrices(dtype: torch.dtype, recipe: Recipe, rounded: Rounded) -> None:
    x, weight, grad = operands(dtype)
    y = fp8_linear(x, weight, layer_of(weight, recipe))
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), grad)

    def narrow(matrix: Tensor, height: int, width: int, in_fp8: bool) -> Tensor:
        matrix = matrix.detach()
        return rounded(matrix, height, width, power_of_two=recipe.ue8m0) if in_fp8 else matrix.to(dtype).float()

    close(y, narrow(x, 1, 128, recipe.forward) @ narrow(weight, 128, 128, recipe.forward).T)
    close(grad_x, narrow(grad, 1, 128, recipe.dgrad) @ narrow(weight, 128, 128, recipe.dgrad))
    expected = narrow(grad, 128, 1, recipe.wgrad).T @ narrow(x, 128, 1, recipe.wgrad)
    close(grad_weight if recipe.wgrad else grad_weight.to(dtype), expected)
    assert (y.dtype, grad_x.dtype, grad_weight.dtype) == (dtype, dtype, torch.float32)


@DTYPES
def test_output_and_gradients_are_close_to_those_of_fp32(dtype: torch.dtype) -> None:
    x, weight, grad = operands(dtype)
    y = fp8_linear(x, weight, layer_of(weight, Recipe()))
    truth = F.linear(x.float(), weight)
    assert error(y, truth) <= 0.04
    ours, theirs = (torch.autograd.grad(out, (x, weight), grad.to(out.dtype)) for out in (y, truth))
    assert max(error(mine, exact) for mine, exact in zip(ours, theirs, strict=True)) <= 0.06


def test_leading_dims_are_rows() -> None:
    x, weight, _ = operands(torch.float32)
    layer = layer_of(weight, Recipe())
    assert torch.equal(fp8_linear(x.view(3, 50, -1), weight, layer).flatten(0, 1), fp8_linear(x, weight, layer))
    assert fp8_linear(x[:0], weight, layer).shape == (0, OUTPUTS)


WRONG: dict[str, tuple[int, int]] = {"blocks of 128 x 128": (128, 128), "one scale per tensor": (10**9, 10**9)}


@pytest.mark.parametrize("block", WRONG.values(), ids=WRONG)
def test_coarser_scales_of_a_gradient_give_larger_errors(
    block: tuple[int, int], rounded: Rounded, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, _ = operands(torch.float32)
    # Tokens whose gradients differ by orders of magnitude, as those of frequent and of rare words do.
    grad = torch.randn(ROWS, OUTPUTS) * torch.logspace(0, -6, ROWS)[torch.randperm(ROWS), None]

    def small_tokens_error() -> float:
        (grad_x,) = torch.autograd.grad(fp8_linear(x, weight, layer_of(weight, Recipe(wgrad=False))), x, grad)
        truth = grad @ weight.detach()
        lost = (grad_x - truth).norm(dim=1) / truth.norm(dim=1)
        return float(lost.mean())

    right = small_tokens_error()
    assert right < 0.05
    monkeypatch.setattr(module, "quantize", lambda x, ue8m0: coarse(x, block, rounded(x, *block)))
    assert small_tokens_error() > 2 * right


def coarse(x: Tensor, block: tuple[int, int], values: Tensor) -> tuple[Tensor, Tensor]:
    """x in FP8 with scales of other blocks, spread to blocks of 1 x 128."""
    codes, scales = torch.empty(x.shape, dtype=torch.float8_e4m3fn), torch.empty(x.shape[0], -(-x.shape[1] // 128))
    for top in range(0, x.shape[0], block[0]):
        for index, left in enumerate(range(0, x.shape[1], 128)):
            rows, columns = slice(top, top + block[0]), slice(left, left + 128)
            area = x[rows] if block[1] > 128 else x[rows, columns]
            scale = area.abs().max().clamp(min=1e-12) / 448
            codes[rows, columns] = (values[rows, columns] / scale).to(torch.float8_e4m3fn)
            scales[rows, index] = scale
    return codes, scales


def test_what_wgrad_reads_was_quantised_from_the_input_itself(rounded: Rounded) -> None:
    """From FP8 with FP32 scales it would have the error of both: about the square root of 2 as much."""
    x, weight, grad = operands(torch.float32)
    grad_weight = torch.autograd.grad(fp8_linear(x, weight, layer_of(weight, Recipe())), weight, grad)[0]
    twice = rounded(grad, 128, 1).T @ rounded(rounded(x.detach(), 1, 128), 128, 1)
    truth = grad.T @ x.detach()
    assert error(grad_weight, truth) < 0.9 * error(twice, truth)


@DTYPES
def test_the_input_may_be_kept_in_e5m6(dtype: torch.dtype, rounded: Rounded) -> None:
    x, weight, grad = operands(dtype)
    y = fp8_linear(x, weight, layer_of(weight, Recipe()), keep_e5m6=True)
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), grad)
    # Numbers of 7 significant bits; blocks' scales are powers of two, so that none of them moves.
    mantissa, exponent = torch.frexp(x.detach().float())
    kept = torch.ldexp((mantissa * 128).round() / 128, exponent)
    assert 0.001 < error(kept, x.detach()) < 0.01
    close(y, rounded(kept, 1, 128) @ rounded(weight.detach(), 128, 128).T)
    close(grad_weight, rounded(grad, 128, 1).T @ rounded(kept, 128, 1))
    close(grad_x, rounded(grad, 1, 128) @ rounded(weight.detach(), 128, 128))


@DTYPES
@pytest.mark.parametrize("gating", [SWIGLU, Gating(1.702, 2.0, 1.0)], ids=["silu", "clamped"])
def test_an_activation_may_keep_its_input_in_fp8(dtype: torch.dtype, gating: Gating, rounded: Rounded) -> None:
    gate, up = (torch.randn(ROWS, INPUTS).to(dtype).requires_grad_() for _ in range(2))
    _, weight, grad = operands(dtype)
    y = fp8_gated_linear(gate, up, weight, layer_of(weight, Recipe()), gating)
    grad_gate, grad_up, grad_weight = torch.autograd.grad(y, (gate, up, weight), grad)

    def activated(gate: Tensor, up: Tensor) -> Tensor:
        if gating.limit is not None:
            gate, up = gate.clamp(max=gating.limit), up.clamp(-gating.limit, gating.limit)
        return gate * torch.sigmoid(gating.alpha * gate) * (up + gating.up_offset)

    bound = 1e-4 if dtype == torch.float32 else 0.005
    x = activated(gate.detach().float(), up.detach().float())
    assert error(y, rounded(x, 1, 128) @ rounded(weight.detach(), 128, 128).T) < bound
    kept = [rounded(part.detach(), 1, 128).to(dtype).float().requires_grad_() for part in (gate, up)]
    again = activated(*kept)
    assert error(grad_weight, rounded(grad, 128, 1).T @ rounded(again.detach(), 128, 1)) < bound
    grad_again = rounded(grad, 1, 128) @ rounded(weight.detach(), 128, 128)
    for ours, theirs in zip((grad_gate, grad_up), torch.autograd.grad(again, kept, grad_again), strict=True):
        assert error(ours, theirs) < bound


def test_a_weight_that_does_not_learn_keeps_no_input(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, grad = operands(torch.float32)
    calls = count_calls(monkeypatch, "quantize", "quantize_both", "quantize_transposed")
    y = fp8_linear(x, weight.detach(), layer_of(weight, Recipe()))
    y.backward(grad)
    assert x.grad is not None and calls == {"quantize": 2, "quantize_both": 0, "quantize_transposed": 0}


def test_without_autograd_only_the_forward_orientation_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, _ = operands(torch.float32)
    calls = count_calls(monkeypatch, "quantize", "quantize_both", "quantize_transposed")
    with torch.no_grad():
        fp8_linear(x, weight, layer_of(weight, Recipe()))
    assert calls == {"quantize": 1, "quantize_both": 0, "quantize_transposed": 0}


def test_input_and_gradient_are_each_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, grad = operands(torch.float32)
    calls = count_calls(monkeypatch, "quantize", "quantize_both", "quantize_transposed")
    fp8_linear(x, weight, layer_of(weight, Recipe())).backward(grad)
    assert calls == {"quantize": 0, "quantize_both": 2, "quantize_transposed": 0}


def count_calls(monkeypatch: pytest.MonkeyPatch, *names: str) -> dict[str, int]:
    """How often the layer calls what has these names, from now on."""
    calls = dict.fromkeys(names, 0)

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls[name] += 1
            return function(*args)

        return call

    for name in names:
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    return calls


def test_not_a_number_is_not_hidden() -> None:
    x, weight, grad = operands(torch.float32)
    with torch.no_grad():
        x[5, 3] = float("nan")
        grad[9, 2] = float("inf")
    y = fp8_linear(x, weight, layer_of(weight, Recipe()))
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), grad)
    assert y[5].isnan().all() and y[4].isfinite().all()
    assert not grad_x[9].isfinite().any() and grad_x[8].isfinite().all()
    assert not grad_weight.isfinite().all()


def test_health_counts_codes_at_both_ends() -> None:
    x, weight = torch.full((128, 256), 3.0), torch.randn(128, 256, requires_grad=True)
    x[:, :128] = 1e-9
    x[:, 0] = 1.0
    health = Health(x.device)
    y = fp8_linear(x.requires_grad_(), weight, layer_of(weight, Recipe(), health))
    # Half of all are alike, so each has the largest code; of the others one in a block has, and 127 become zero.
    assert health.saturation()["activation"] == pytest.approx((128 + 1) / 256)
    assert health.underflow()["activation"] == pytest.approx(127 / 256)
    assert not health.has_counted("gradient")
    y.sum().backward()
    assert health.saturation()["gradient"] == 1.0 and health.underflow()["gradient"] == 0.0


def test_layers_that_read_one_input_quantise_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, grad = operands(torch.bfloat16)
    quantised = Mock(wraps=module.sides)
    monkeypatch.setattr(module, "sides", quantised)
    plain, latest = layer_of(weight, Recipe()), Latest()
    sharing = plain._replace(latest=latest)

    def run(layer: Layer) -> tuple[Tensor, ...]:
        ys = [fp8_linear(x, weight, layer) for _ in range(2)]
        return *ys, *torch.autograd.grad(sum(ys, torch.zeros(())), (x, weight), grad)

    assert all(torch.equal(one, other) for one, other in zip(run(sharing), run(plain), strict=True))
    # Two gradients each; of the inputs, one and two.
    assert quantised.call_count == 2 + 1 + 2 + 2
    quantised.reset_mock()
    with torch.no_grad():
        fp8_linear(x, weight, sharing)
        assert quantised.call_count == 1, "in fewer orientations"
        fp8_linear(x, weight, sharing)
        x.mul_(2)
        assert torch.equal(fp8_linear(x, weight, sharing), fp8_linear(x, weight, plain))
    with torch.inference_mode():
        assert torch.equal(fp8_linear(x * 3, weight, sharing), fp8_linear(x * 3, weight, plain))


def test_an_input_in_fp8_is_not_remembered_beyond_its_life() -> None:
    weight = torch.randn(128, 256)
    layer = layer_of(weight, Recipe())._replace(latest=Latest())
    x = torch.randn(4, 256)
    codes = ref(layer.narrowed(x, True, False).q)
    assert codes() is not None
    del x
    assert codes() is None


def test_the_kernels_give_what_the_references_give() -> None:
    def run(form: Any) -> list[Tensor]:
        torch.manual_seed(1)
        x, weight, grad = operands(torch.bfloat16)
        with use(form):
            y = fp8_linear(x, weight, layer_of(weight, Recipe()))
        y.backward(grad)
        assert x.grad is not None and weight.grad is not None
        return [y.detach(), x.grad, weight.grad]

    for kernel, reference in zip(run("triton"), run("reference"), strict=True):
        close(kernel, reference)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_it_compiles_in_one_graph_with_the_same_gradients() -> None:
    x, weight, grad = operands(torch.float32)
    layer = layer_of(weight, Recipe())

    def layered(x: Tensor, weight: Tensor) -> Tensor:
        return fp8_linear(x, weight, layer)

    compiled = torch.compile(layered, fullgraph=True, backend="aot_eager")
    ours, theirs = (torch.autograd.grad(f(x, weight), (x, weight), grad) for f in (compiled, layered))
    torch.testing.assert_close(ours, theirs)
