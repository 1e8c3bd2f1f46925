"""The error of each layer's gradients in FP8 against FP32, for the right recipe and for wrong ones made on purpose.

What FP8 does to a loss drowns in noise for a long time; what it does to gradients shows in one step. A model that has
trained a while gets one batch, in FP32 and in FP8 by each recipe, and these relative errors are taken:

    model       of each weight's gradient, through the whole model in FP8
    weight      of each linear layer's weight gradient, the layer alone in FP8 and all that it reads from FP32
    input       of the gradient at its input, likewise
    quiet       the same of the twentieth of tokens with the smallest gradients, each counted alike

Noise of other layers, and tokens that go to other experts, are in the first alone. The last is where scales that tokens
share lose first: small gradients weigh little in a norm over all. Wrong recipes replace what quantises, in references.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import mean
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from modelspec import schema
from modelspec.builders import fp8
from modelspec.builders.build import build
from modelspec.builders.layers import Linear
from modelspec.builders.model import LossWeights, Transformer
from modelspec.kernels import block_scale, fp8_experts, fp8_linear
from modelspec.kernels.quantize_grouped import padded_rows, padded_starts

Sides = tuple[Tensor, Tensor]


class Coarse:
    """Quantisers by their names, with blocks of height x width, None for the whole side, spread to those of 1 x 128."""

    def __init__(self, height: int | None, width: int | None) -> None:
        self.height, self.width = height, width
        self.calls = 0

    def quantize(self, x: Tensor, ue8m0: bool) -> Sides:
        self.calls += 1
        block = (self.height or max(x.shape[0], 1), self.width or -(-max(x.shape[1], 1) // 128) * 128)
        q, scales = block_scale.quantize(x.contiguous(), block, ue8m0)
        spread = scales.repeat_interleave(block[0], 0)[: x.shape[0]].repeat_interleave(block[1] // 128, 1)
        return q, spread[:, : -(-x.shape[1] // 128)].T.contiguous().T

    def quantize_transposed(self, x: Tensor, ue8m0: bool) -> Sides:
        return self.quantize(x.T, ue8m0)

    def quantize_both(self, x: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return *self.quantize(x, ue8m0), *self.quantize(x.T, ue8m0)

    def quantize_grouped_transposed(self, x: Tensor, ends: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor]:
        starts, row = padded_starts(ends), torch.arange(len(x))
        expert = torch.bucketize(row, ends, right=True)
        padded = x.new_zeros(padded_rows(len(x), len(ends)), x.shape[1])
        padded[starts[expert] + row - torch.cat([ends.new_zeros(1), ends])[expert]] = x
        return *self.quantize(padded.T, ue8m0), starts

    def quantize_grouped_both(self, x: Tensor, ends: Tensor, ue8m0: bool) -> tuple[Tensor, ...]:
        return *self.quantize(x, ue8m0), *self.quantize_grouped_transposed(x, ends, ue8m0)

    def swiglu_quantize(self, gate_up: Tensor, weights: Tensor, ue8m0: bool) -> Sides:
        return self.quantize(_activated(gate_up, weights), ue8m0)

    def swiglu_quantize_grouped_transposed(
        self, gate_up: Tensor, weights: Tensor, ends: Tensor, ue8m0: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.quantize_grouped_transposed(_activated(gate_up, weights), ends, ue8m0)

    def quantize_weight(self, weight: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One scale for each matrix."""
        rows, columns = (-(-side // 128) * 128 for side in weight.shape[-2:])
        q, scales = block_scale.quantize(weight, (rows, columns), ue8m0)
        scales = scales.repeat_interleave(rows // 128, -2).repeat_interleave(columns // 128, -1)
        return q, scales, q.mT.contiguous(), scales.mT.contiguous()

    @contextmanager
    def everywhere(self, *others: Any) -> Iterator[None]:
        """In the place of the layers' quantisers, and of those that `others` use."""
        with ExitStack() as stack:
            for place in (fp8_linear, fp8_experts, *others):
                for name in (each for each in vars(Coarse) if "quantize" in each and hasattr(place, each)):
                    stack.enter_context(patch.object(place, name, getattr(self, name)))
            yield


def _activated(gate_up: Tensor, weights: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up * weights[:, None]


@contextmanager
def blocks_on_gradients() -> Iterator[None]:
    """Blocks of 128 x 128 on activation gradients, as on weights."""
    coarse = Coarse(128, 128)

    def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
        def narrowed_gradient(*args: Any, **kwargs: Any) -> Any:
            with coarse.everywhere():
                return original(*args, **kwargs)

        return narrowed_gradient

    with ExitStack() as stack:
        for owner in (fp8_linear.Layer, fp8_experts._Grouped):
            stack.enter_context(patch.object(owner, "narrowed_gradient", wrapped(owner.narrowed_gradient)))
        yield
    assert coarse.calls, "nothing was replaced"


@contextmanager
def one_scale_per_tensor() -> Iterator[None]:
    """One scale for a whole activation, gradient or weight."""
    coarse = Coarse(None, None)
    with coarse.everywhere(fp8):
        yield
    assert coarse.calls, "nothing was replaced"


@contextmanager
def as_it_is() -> Iterator[None]:
    yield


Recipe = tuple[dict[str, Any], Callable[[], Any]]
RECIPES: dict[str, Recipe] = {
    "1x128 and 128x128, FP32 scales": ({}, as_it_is),
    "power-of-two scales": ({"scales": "ue8m0"}, as_it_is),
    "E5M6, SwiGLU input and dispatch in FP8": (
        {"attention_output": "e5m6", "swiglu_input": "e4m3", "dispatch": True},
        as_it_is,
    ),
    "wrong: 128x128 on gradients": ({}, blocks_on_gradients),
    "wrong: one scale per tensor": ({}, one_scale_per_tensor),
}


class Seen:
    """A pass in FP32 or FP8: gradients of weights by name; of linear layers the inputs and the outputs' gradients."""

    def __init__(self, spec: schema.ModelSpec, trained: Transformer, windows: Tensor) -> None:
        model = build(spec)
        model.load_state_dict(trained.state_dict())
        self.inputs: dict[str, Tensor] = {}
        self.grads: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if isinstance(module, Linear) and schema.in_fp8(f"{name}.weight"):
                module.register_forward_hook(self._input(name))
                module.register_full_backward_hook(self._grad(name))
        loss = model(windows[:, :-1], windows[:, 1:], loss_weights=LossWeights(mtp=0.3, balance=1e-4)).loss
        assert loss is not None
        loss.backward()
        self.parameters = dict(model.named_parameters())
        self.weights = {
            name: parameter.grad
            for name, parameter in self.parameters.items()
            if schema.in_fp8(name) and parameter.grad is not None
        }

    def _input(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...], _: Any) -> None:
            self.inputs[name] = inputs[0].detach().flatten(0, -2)

        return keep

    def _grad(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, _: Any, grads: tuple[Tensor, ...]) -> None:
            self.grads[name] = grads[0].detach().flatten(0, -2)

        return keep


def gradient_errors(spec: schema.ModelSpec, trained: Transformer, windows: Tensor) -> dict[str, Any]:
    """Errors of every recipe against FP32: `spec` has FP8, `windows` are tokens [batch, length + 1]."""
    narrow = spec.precision.fp8
    assert narrow is not None
    exact = Seen(_with(spec, None), trained, windows)
    found = {}
    for name, (options, wrong) in RECIPES.items():
        changed = narrow.model_copy(update=options)
        with wrong():
            seen = Seen(_with(spec, changed), trained, windows)
            # Formats that tensors are kept in between layers change nothing in a layer alone.
            single = "attention_output" not in options
            alone = {key: _alone(exact, key, fp8.Policy(changed)) for key in exact.grads} if single else {}
        errors = {"model": {key: _error(seen.weights[key], truth) for key, truth in exact.weights.items()}}
        if alone:
            errors |= {kind: {key: each[kind] for key, each in alone.items()} for kind in ("weight", "input", "quiet")}
        found[name] = {kind: {"mean": mean(each.values()), "layers": each} for kind, each in errors.items()}
    return found


def _alone(exact: Seen, name: str, policy: fp8.Policy) -> dict[str, float]:
    """Errors of one layer in FP8 that reads what it read in FP32."""
    x, grad = exact.inputs[name].requires_grad_(), exact.grads[name]
    weight = exact.parameters[f"{name}.weight"].detach().requires_grad_()
    y = fp8_linear.fp8_linear(x, weight, fp8.NarrowWeight(policy).layer(weight))
    of_x, of_weight = torch.autograd.grad(y, (x, weight), grad)
    truth = grad @ weight.detach()
    size = truth.norm(dim=1)
    quiet = (size > 0) & (size <= size[size > 0].quantile(0.05))
    return {
        "weight": _error(of_weight, grad.T @ x.detach()),
        "input": _error(of_x, truth),
        "quiet": float(((of_x - truth).norm(dim=1) / size)[quiet].mean()),
    }


def _with(spec: schema.ModelSpec, fp8: schema.FP8 | None) -> schema.ModelSpec:
    precision = spec.precision.model_copy(update={"fp8": fp8, "compute": "float32"})
    return spec.model_copy(update={"precision": precision})


def _error(ours: Tensor, truth: Tensor) -> float:
    return float((ours - truth).norm() / truth.norm())
