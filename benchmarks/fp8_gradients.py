"""The error of each layer's gradients in FP8 against FP32, for the right recipe and for wrong ones made on purpose.

What FP8 does to a loss drowns in noise for a long time; what it does to gradients shows in one step. A model that has
trained a while gets one batch, in FP32 and in FP8 by each recipe, and two errors are taken:

    weights     the gradient of each weight in FP8: relative Frobenius norm of the difference
    tokens      the gradient that arrives at each linear layer's input: the same for each token, and their mean

The second counts each token alike. Scales that many tokens share lose those with small gradients, which weigh little in
a norm over all. Wrong recipes replace what quantises, in references alone.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import mean
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn

from modelspec import schema
from modelspec.builders import fp8
from modelspec.builders.build import build
from modelspec.builders.layers import Linear
from modelspec.builders.model import LossWeights, Transformer
from modelspec.kernels import block_scale, fp8_experts, fp8_linear, quantize, quantize_grouped, swiglu_quantize

Quantised = tuple[Tensor, Tensor]
# Whoever makes codes and scales of a matrix does it by this name.
_PLACES = (quantize, quantize_grouped, swiglu_quantize)


def coarse(height: int | None, width: int | None) -> Callable[[Tensor, bool], Quantised]:
    """Codes and scales with blocks of height x width, None for the whole side, spread to blocks of 1 x 128."""

    def quantized_rows(x: Tensor, ue8m0: bool) -> Quantised:
        block = (height or max(x.shape[0], 1), width or -(-max(x.shape[1], 1) // 128) * 128)
        q, scales = block_scale.quantize(x, block, ue8m0)
        spread = scales.repeat_interleave(block[0], 0)[: x.shape[0]].repeat_interleave(block[1] // 128, 1)
        return q, spread.T.contiguous().T

    return quantized_rows


def one_scale(weight: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize_weight` with one scale for each matrix."""
    block = tuple(-(-side // 128) * 128 for side in weight.shape[-2:])
    q, scales = block_scale.quantize(weight, (block[0], block[1]), ue8m0)
    scales = scales.repeat_interleave(block[0] // 128, -2).repeat_interleave(block[1] // 128, -1)
    return q, scales, q.mT.contiguous(), scales.mT.contiguous()


@contextmanager
def blocks_on_gradients() -> Iterator[None]:
    """Blocks of 128 x 128 on activation gradients, as on weights."""

    def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
        def narrowed_gradient(*args: Any, **kwargs: Any) -> Any:
            with ExitStack() as stack:
                for place in _PLACES:
                    stack.enter_context(patch.object(place, "quantized_rows", coarse(128, 128)))
                return original(*args, **kwargs)

        return narrowed_gradient

    with ExitStack() as stack:
        for owner in (fp8_linear.Layer, fp8_experts._Grouped):
            stack.enter_context(patch.object(owner, "narrowed_gradient", wrapped(owner.narrowed_gradient)))
        yield


@contextmanager
def one_scale_per_tensor() -> Iterator[None]:
    """One scale for a whole activation, gradient or weight."""
    with ExitStack() as stack:
        for place in _PLACES:
            stack.enter_context(patch.object(place, "quantized_rows", coarse(None, None)))
        stack.enter_context(patch.object(fp8, "quantize_weight", one_scale))
        yield


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
    """Gradients of a model's weights in FP8, and those that arrive at the inputs of its linear layers, by name."""

    def __init__(self, spec: schema.ModelSpec, trained: Transformer, windows: Tensor) -> None:
        model = build(spec)
        model.load_state_dict(trained.state_dict())
        self.inputs: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if isinstance(module, Linear) and schema.in_fp8(f"{name}.weight"):
                module.register_full_backward_hook(self._hook(name))
        loss = model(windows[:, :-1], windows[:, 1:], loss_weights=LossWeights(mtp=0.3, balance=1e-4)).loss
        assert loss is not None
        loss.backward()
        self.weights = {
            name: parameter.grad
            for name, parameter in model.named_parameters()
            if schema.in_fp8(name) and parameter.grad is not None
        }

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, grad_input: tuple[Tensor | None, ...], _: Any) -> None:
            if grad_input[0] is not None:
                self.inputs[name] = grad_input[0].detach().flatten(0, -2)

        return keep


def gradient_errors(spec: schema.ModelSpec, trained: Transformer, windows: Tensor) -> dict[str, Any]:
    """Errors of every recipe against FP32: `spec` has FP8, `windows` are tokens [batch, length + 1]."""
    narrow = spec.precision.fp8
    assert narrow is not None
    exact = Seen(_with(spec, None), trained, windows)
    found = {}
    for name, (options, wrong) in RECIPES.items():
        with wrong():
            seen = Seen(_with(spec, narrow.model_copy(update=options)), trained, windows)
        weights = {key: _error(seen.weights[key], truth) for key, truth in exact.weights.items()}
        tokens = {key: _error_of_tokens(seen.inputs[key], truth) for key, truth in exact.inputs.items()}
        found[name] = {
            "weights": {"mean": mean(weights.values()), "largest": max(weights.values()), "layers": weights},
            "tokens": {"mean": mean(tokens.values()), "largest": max(tokens.values()), "layers": tokens},
        }
    return found


def _with(spec: schema.ModelSpec, fp8: schema.FP8 | None) -> schema.ModelSpec:
    precision = spec.precision.model_copy(update={"fp8": fp8, "compute": "float32"})
    return spec.model_copy(update={"precision": precision})


def _error(ours: Tensor, truth: Tensor) -> float:
    return float((ours - truth).norm() / truth.norm())


def _error_of_tokens(ours: Tensor, truth: Tensor) -> float:
    size = truth.norm(dim=1)
    return float(((ours - truth).norm(dim=1) / size)[size > 0].mean())
