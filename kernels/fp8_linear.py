"""A linear layer whose three products run in block-scaled FP8 (arXiv 2412.19437, section 3.3).

    forward     y      = x W^T          blocks of x along channels,   of W 128 x 128
    dgrad       grad_x = grad_y W       blocks of grad_y along channels,   of W^T the same codes transposed
    wgrad       grad_W = grad_y^T x     blocks of both along tokens

Each product reads its operands along the dim that it sums over, so x and grad_y are each quantised in two orientations,
both from the original and in one pass. What is kept for wgrad is x in FP8. Layers that read the same x one after
another share it (`Latest`). W is quantised by the caller, once for all passes between two updates. A product that the
recipe leaves out runs in x's dtype.

Two options of the paper: the input may be kept in E5M6 (see `e5m6`), and quantised from that again for wgrad; and a
gated activation before the layer may keep its own inputs in FP8, from which its output is computed again.
"""

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from modelspec.kernels.block_scaled_mm import block_scaled_mm
from modelspec.kernels.block_scaled_wgrad import block_scaled_wgrad
from modelspec.kernels.fp8_health import Health, Kind
from modelspec.kernels.linear import matmul_nt, matmul_tn
from modelspec.kernels.quantize import dequantize, e5m6, quantize, quantize_both, quantize_transposed
from modelspec.kernels.swiglu import Gating, swiglu, swiglu_gradients


class Recipe(NamedTuple):
    """Which products run in FP8, and whether scales are powers of two."""

    forward: bool = True
    dgrad: bool = True
    wgrad: bool = True
    ue8m0: bool = False


class Sides(NamedTuple):
    """A matrix in FP8, and its transpose; None where nothing reads it.

    Of activations and gradients [M, K]: q [M, K] with scales [M, ceil(K / 128)], qt [K, M] with [K, ceil(M / 128)].
    Of weights [N, K]: q [N, K] with scales [ceil(N / 128), ceil(K / 128)], and qt and scales_t are their transposes.
    """

    q: Tensor | None = None
    scales: Tensor | None = None
    qt: Tensor | None = None
    scales_t: Tensor | None = None

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """What a product along the rows reads; it must be there."""
        assert self.q is not None and self.scales is not None
        return self.q, self.scales

    @property
    def columns(self) -> tuple[Tensor, Tensor]:
        """What a product along the columns reads; it must be there."""
        assert self.qt is not None and self.scales_t is not None
        return self.qt, self.scales_t


def sides(x: Tensor, rows: bool, columns: bool, ue8m0: bool) -> Sides:
    """x [M, K] with blocks along its rows, along its columns, or both, from one read of x."""
    if rows and columns:
        return Sides(*quantize_both(x, ue8m0))
    if rows:
        return Sides(*quantize(x, ue8m0))
    return Sides(None, None, *quantize_transposed(x, ue8m0)) if columns else Sides()


class Layer(NamedTuple):
    """How a layer computes: its recipe, its weight in FP8 (see `Sides`), who counts what FP8 loses, and who remembers
    the input that came before.
    """

    recipe: Recipe
    weight: Sides
    health: Health | None = None
    latest: "Latest | None" = None

    def narrowed(self, x: Tensor, rows: bool, columns: bool) -> Sides:
        """An activation in FP8: x [..., K] as a matrix."""
        if self.latest is not None and (known := self.latest.of(x, rows, columns)) is not None:
            return known
        matrix = x.detach().flatten(0, -2)
        narrow = self.counted("activation", matrix, sides(matrix, rows, columns, self.recipe.ue8m0))
        if self.latest is not None:
            self.latest.remember(x, rows, columns, narrow)
        return narrow

    def narrowed_gradient(self, grad: Tensor, rows: bool, columns: bool) -> Sides:
        """A gradient in FP8, where the products that read it run in FP8."""
        recipe = self.recipe
        return self.counted(
            "gradient", grad, sides(grad, rows and recipe.dgrad, columns and recipe.wgrad, recipe.ue8m0)
        )

    def counted(self, kind: Kind, x: Tensor, narrow: Sides) -> Sides:
        """`narrow`, which x became, after a look at it."""
        if self.health is not None and narrow.q is not None:
            self.health.count(kind, x, narrow.q)
        return narrow

    def output(self, x: Tensor, narrow: Sides, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """x W^T [M, N] in `dtype`."""
        if not self.recipe.forward:
            return matmul_nt(x.to(dtype), weight.to(dtype))
        return block_scaled_mm(*narrow.rows, *self.weight.rows, dtype)

    def input_gradient(self, grad: Tensor, narrow: Sides, weight: Tensor) -> Tensor:
        """grad W [M, K], in grad's dtype."""
        if not self.recipe.dgrad:
            return matmul_nt(grad, weight.to(grad.dtype).T)
        return block_scaled_mm(*narrow.rows, *self.weight.columns, grad.dtype)

    def weight_gradient(self, grad: Tensor, narrow: Sides, x: Tensor, kept: Sides) -> Tensor:
        """grad^T x [N, K], in FP32 out of FP8, else in grad's dtype. Of x, what FP8 needs may be made here."""
        if not self.recipe.wgrad:
            return matmul_tn(grad, x.to(grad.dtype))
        if kept.qt is None:
            kept = sides(x, False, True, self.recipe.ue8m0)
        return block_scaled_wgrad(*narrow.columns, *kept.columns)


class Latest:
    """The latest input in FP8, for what reads it next too: gate and up, or queries, keys and values."""

    def __init__(self) -> None:
        self._input: Callable[[], Tensor | None] = lambda: None
        self._as: tuple[int, bool, bool] | None = None
        self._narrow = Sides()

    def of(self, x: Tensor, rows: bool, columns: bool) -> Sides | None:
        """x in FP8 if it is the latest input, has not changed, and was wanted in the same orientations."""
        known = self._input() is x and not x.is_inference() and self._as == (x._version, rows, columns)
        return self._narrow if known else None

    def remember(self, x: Tensor, rows: bool, columns: bool, narrow: Sides) -> None:
        """For as long as x lives, and nothing comes after it."""
        if not x.is_inference():  # Such a tensor does not tell of changes.
            self._input, self._as, self._narrow = ref(x, self._forget), (x._version, rows, columns), narrow

    def _forget(self, of: object) -> None:
        if of is self._input:
            self._narrow = Sides()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: Layer, narrow: Sides, keeps: bool) -> Tensor:
        kept = x if keeps and narrow.qt is None else None
        ctx.layer = layer
        ctx.save_for_backward(weight, kept, narrow.qt, narrow.scales_t)
        return layer.output(x, narrow, weight, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, x, qt, scales_t = ctx.saved_tensors
        layer, grad = ctx.layer, grads[0].contiguous()
        of_x, of_weight = ctx.needs_input_grad[:2]
        narrow = layer.narrowed_gradient(grad, of_x, of_weight)
        grad_x = layer.input_gradient(grad, narrow, weight) if of_x else None
        grad_weight = None
        if of_weight:
            grad_weight = layer.weight_gradient(grad, narrow, x, Sides(qt=qt, scales_t=scales_t)).to(weight.dtype)
        return grad_x, grad_weight, None, None, None


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, layer: Layer, gating: Gating, keeps: bool
    ) -> Tensor:
        ctx.layer, ctx.gating, ctx.dtype = layer, gating, gate.dtype
        if keeps:
            kept = (*quantize(gate, layer.recipe.ue8m0), *quantize(up, layer.recipe.ue8m0))
            ctx.save_for_backward(weight, *kept)
        x = _activated(gate, up, gating)
        return layer.output(x, layer.narrowed(x, layer.recipe.forward, False), weight, gate.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        layer, grad = ctx.layer, grads[0].contiguous()
        gate, up = dequantize(kept[0], kept[1], ctx.dtype), dequantize(kept[2], kept[3], ctx.dtype)
        of_weight = ctx.needs_input_grad[2]
        narrow = layer.narrowed_gradient(grad, True, of_weight)
        grad_weight = None
        if of_weight:
            x = _activated(gate, up, ctx.gating)
            grad_weight = layer.weight_gradient(grad, narrow, x, Sides()).to(weight.dtype)
        grad_x = layer.input_gradient(grad, narrow, weight)
        return *swiglu_gradients(grad_x, gate, up, ctx.gating), grad_weight, None, None, None


def fp8_linear(x: Tensor, weight: Tensor, layer: Layer, *, keep_e5m6: bool = False, keep_wide: bool = False) -> Tensor:
    """x [..., in] in BF16 or FP32, weight [out, in] and the same in FP8 -> [..., out] in x's dtype.

    The gradient of `weight` is FP32 out of the product, then in weight's dtype. With `keep_e5m6` x is first rounded to
    E5M6, the layer computes with that, and wgrad quantises it anew; the rounding has gradient 1. With `keep_wide` x is
    kept as it is, where it costs nothing, and wgrad quantises it anew.
    """
    given = _RoundE5M6.apply(x.flatten(0, -2)) if keep_e5m6 else x
    keeps = torch.is_grad_enabled() and weight.requires_grad
    columns = keeps and layer.recipe.wgrad and not (keep_e5m6 or keep_wide)
    narrow = layer.narrowed(given, layer.recipe.forward, columns)
    y = _Linear.apply(given.flatten(0, -2), weight, layer, narrow, keeps)
    return y.view(*x.shape[:-1], weight.shape[0])


def fp8_gated_linear(gate: Tensor, up: Tensor, weight: Tensor, layer: Layer, gating: Gating) -> Tensor:
    """`fp8_linear` of the gated activation of gate and up [..., in], which are kept in FP8 for the backward pass.

    The output is that of the activation itself. Its gradients, and the input of wgrad, are computed from gate and up as
    FP8 keeps them.
    """
    rows = gate.flatten(0, -2), up.flatten(0, -2)
    y = _GatedLinear.apply(*rows, weight, layer, gating, torch.is_grad_enabled())
    return y.view(*gate.shape[:-1], weight.shape[0])


def _activated(gate: Tensor, up: Tensor, gating: Gating) -> Tensor:
    """The activation in FP32, which is rounded once."""
    return swiglu.reference(gate.to(torch.float32), up.to(torch.float32), gating)


class _RoundE5M6(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return e5m6(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]
