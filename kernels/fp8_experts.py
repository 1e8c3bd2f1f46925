"""The routed experts of a mixture in block-scaled FP8 (arXiv 2412.19437, section 3.3), as `fp8_linear.py` is for one
weight: each token's weighted sum over the SwiGLU networks of its experts.

    rows  = x of each (token, expert) pair, sorted by expert
    y     = grouped(activation(grouped(rows, gate_up)) * weight of the pair, down)       out[t] = sum of t's rows of y

Pairs are scaled by their routing weights where rows are narrow, before the second product. In the transposes that wgrad
reads, blocks of 128 tokens hold rows of one expert only. The activation's output is computed again in the backward
pass, from its input, which may be kept in FP8.

With `dispatch` tokens and gradients reach their experts in FP8 with power-of-two scales. One process has no wire: each
is rounded once, where it would be sent, and quantised again along tokens for wgrad, again with powers of two, which
keeps the codes and moves their exponents alone.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from modelspec.kernels.experts import Experts
from modelspec.kernels.fp8_health import Kind
from modelspec.kernels.fp8_linear import Layer, Sides
from modelspec.kernels.grouped_mm import grouped_mm, grouped_mm_backward
from modelspec.kernels.grouped_scaled_mm import grouped_scaled_mm
from modelspec.kernels.grouped_scaled_wgrad import grouped_scaled_wgrad
from modelspec.kernels.permute import permute, permute_scales, unpermute
from modelspec.kernels.quantize import dequantize, quantize
from modelspec.kernels.quantize_grouped import quantize_grouped_both, quantize_grouped_transposed
from modelspec.kernels.sort_by_expert import Pairs, sort_by_expert
from modelspec.kernels.swiglu import SWIGLU, Gating, swiglu, swiglu_gradients
from modelspec.kernels.swiglu_backward import swiglu_backward
from modelspec.kernels.swiglu_quantize import swiglu_quantize, swiglu_quantize_grouped_transposed


class ExpertLayers(NamedTuple):
    """The two layers of the experts, whose weights in FP8 are stacked, and the options that concern them.

    `narrow` keeps the activation's input in FP8, `dispatch` sends tokens in FP8.
    """

    gate_up: Layer
    down: Layer
    narrow: bool = False
    dispatch: bool = False


class _Kept(NamedTuple):
    """The input of a grouped product as wgrad needs it: in FP8 with blocks along tokens, and where experts start."""

    qt: Tensor
    scales_t: Tensor
    starts: Tensor


class _Grouped(NamedTuple):
    """A layer of all experts over rows that are sorted by expert; compare `Layer`, which is one weight."""

    layer: Layer
    weight: Tensor
    pairs: Pairs
    # Whether scales of the input and of the gradient are powers of two.
    x_ue8m0: bool
    grad_ue8m0: bool

    def output(self, narrow: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
        """[rows, out] in `dtype` of rows in FP8."""
        return grouped_scaled_mm(*narrow, *self.layer.weight.rows, self.pairs.ends, dtype)

    def wide_output(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """[rows, out] without FP8."""
        return grouped_mm(rows.to(dtype), self.weight.to(dtype), self.pairs.ends)

    def narrowed_gradient(self, rows: Tensor, tokens: Tensor | None, of_x: bool, of_weight: bool) -> Sides:
        """The gradient in FP8 as the products that are wanted read it; where rows are copies of tokens, from these."""
        dgrad, wgrad = of_x and self.layer.recipe.dgrad, of_weight and self.layer.recipe.wgrad
        pairs, ue8m0 = self.pairs, self.grad_ue8m0
        if tokens is None and dgrad and wgrad:
            narrow = Sides(*quantize_grouped_both(rows, pairs.ends, ue8m0)[:4])
            return self.layer.counted("gradient", rows, narrow)
        q, scales, qt, scales_t = None, None, None, None
        if dgrad and tokens is not None:
            q, scales = self.moved("gradient", tokens, ue8m0)
        elif dgrad:
            q, scales = self.layer.counted("gradient", rows, Sides(*quantize(rows, ue8m0))).rows
        if wgrad:
            qt, scales_t, _ = quantize_grouped_transposed(rows, pairs.ends, ue8m0)
        return Sides(q, scales, qt, scales_t)

    def moved(self, kind: Kind, tokens: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor]:
        """Tokens in FP8, each quantised once, as rows."""
        q, scales = self.layer.counted(kind, tokens, Sides(*quantize(tokens, ue8m0))).rows
        return permute(q, self.pairs.row), permute_scales(scales, self.pairs.token)

    def input_gradient(self, grad: Tensor, narrow: Sides) -> Tensor:
        """[rows, in] in grad's dtype."""
        if not self.layer.recipe.dgrad:
            return grouped_mm(grad, self.weight.to(grad.dtype).mT, self.pairs.ends)
        return grouped_scaled_mm(*narrow.rows, *self.layer.weight.columns, self.pairs.ends, grad.dtype)

    def weight_gradient(self, grad: Tensor, narrow: Sides, x: Tensor | _Kept) -> Tensor:
        """[experts, out, in] of rows of the gradient and of the input."""
        if isinstance(x, _Kept):
            return grouped_scaled_wgrad(*narrow.columns, *x).to(self.weight.dtype)
        wide = self.weight.to(grad.dtype)
        return grouped_mm_backward(grad, x.to(grad.dtype), wide, self.pairs.ends)[1].to(self.weight.dtype)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        choice: Tensor,
        weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        gate_up_bias: Tensor | None,
        down_bias: Tensor | None,
        layers: ExpertLayers,
        gating: Gating,
        keeps: bool,
    ) -> Tensor:
        pairs = sort_by_expert(choice, gate_up.shape[0])
        first, second = _products(layers, gate_up, down, pairs)
        if layers.dispatch:
            x = _sent(x)
        if layers.gate_up.recipe.forward:
            hidden = first.output(first.moved("activation", x, first.x_ue8m0), x.dtype)
        else:
            hidden = first.wide_output(permute(x, pairs.row), x.dtype)
        if gate_up_bias is not None:
            hidden = hidden + gate_up_bias.to(x.dtype)[_experts_of_rows(pairs)]
        scale = permute(weights.new_ones(len(weights), 1), pairs.row, weights)
        if layers.down.recipe.forward:
            y = second.output(_narrow_activation(second, hidden, scale, gating), x.dtype)
        else:
            y = second.wide_output(_activated(hidden, gating) * scale, x.dtype)
        if down_bias is not None:
            y = y + (down_bias[_experts_of_rows(pairs)] * scale).to(x.dtype)
        if keeps:
            ctx.layers, ctx.gating, ctx.dtype = layers, gating, x.dtype
            ctx.kept = layers.gate_up.recipe.wgrad and gate_up.requires_grad
            rows = permute(x, pairs.row) if gate_up.requires_grad else None
            kept: tuple[Tensor | None, ...] = (rows,)
            if ctx.kept and rows is not None:
                kept = quantize_grouped_transposed(rows, pairs.ends, first.x_ue8m0)
            inner = quantize(hidden, layers.gate_up.recipe.ue8m0) if layers.narrow else (hidden,)
            ctx.save_for_backward(gate_up, down, gate_up_bias, down_bias, scale, *pairs, *inner, *kept)
        return unpermute(y, pairs.row)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate_up, down, gate_up_bias, down_bias, scale, *saved = ctx.saved_tensors
        layers, pairs, saved = ctx.layers, Pairs(*saved[:3]), saved[3:]
        hidden, kept = (saved[0], saved[1:])
        if layers.narrow:
            hidden, kept = dequantize(saved[0], saved[1], ctx.dtype), saved[2:]
        first, second = _products(layers, gate_up, down, pairs)
        x_needs, _, _, gate_up_needs, down_needs, *_ = ctx.needs_input_grad

        grad = _sent(grads[0]) if layers.dispatch else grads[0].contiguous()
        rows = permute(grad, pairs.row)
        narrow = second.narrowed_gradient(rows, grad, True, down_needs)
        grad_hidden, grad_scale = _activation_gradients(second.input_gradient(rows, narrow), hidden, scale, ctx.gating)
        grad_down = None
        if down_needs and layers.down.recipe.wgrad:
            x = _Kept(*_narrow_activation_t(second, hidden, scale, ctx.gating))
            grad_down = second.weight_gradient(rows, narrow, x)
        elif down_needs:
            grad_down = second.weight_gradient(rows, narrow, _activated(hidden, ctx.gating) * scale)
        narrow = first.narrowed_gradient(grad_hidden, None, x_needs, gate_up_needs)
        grad_gate_up = None
        if gate_up_needs:
            grad_gate_up = first.weight_gradient(grad_hidden, narrow, _Kept(*kept) if ctx.kept else kept[0])
        grad_x = unpermute(first.input_gradient(grad_hidden, narrow), pairs.row) if x_needs else None
        grad_gate_up_bias = grad_down_bias = None
        if gate_up_bias is not None:
            grad_gate_up_bias = _sum_per_expert(grad_hidden, pairs, gate_up_bias)
        if down_bias is not None:
            bias = down_bias[_experts_of_rows(pairs)].to(torch.float32)
            grad_scale = grad_scale + torch.linalg.vecdot(rows.to(torch.float32), bias)
            grad_down_bias = _sum_per_expert(rows * scale, pairs, down_bias)
        grad_weights = grad_scale[pairs.row].to(scale.dtype)
        biases = grad_gate_up_bias, grad_down_bias
        return grad_x, None, grad_weights, grad_gate_up, grad_down, *biases, None, None, None


def _products(layers: ExpertLayers, gate_up: Tensor, down: Tensor, pairs: Pairs) -> tuple[_Grouped, _Grouped]:
    first, second, sent = layers.gate_up, layers.down, layers.dispatch
    return (
        _Grouped(first, gate_up, pairs, x_ue8m0=first.recipe.ue8m0 or sent, grad_ue8m0=first.recipe.ue8m0),
        _Grouped(second, down, pairs, x_ue8m0=second.recipe.ue8m0, grad_ue8m0=second.recipe.ue8m0 or sent),
    )


def _narrow_activation(down: _Grouped, hidden: Tensor, scale: Tensor, gating: Gating) -> tuple[Tensor, Tensor]:
    """The activation of every row, scaled, in FP8: what the second product reads."""
    if gating == SWIGLU:
        q, scales = swiglu_quantize(hidden, scale[:, 0], down.x_ue8m0)
    else:
        q, scales = quantize(_activated(hidden, gating) * scale, down.x_ue8m0)
    if (health := down.layer.health) is not None:
        health.count("activation", _activated(hidden[: health.ROWS], gating) * scale[: health.ROWS], q[: health.ROWS])
    return q, scales


def _narrow_activation_t(
    down: _Grouped, hidden: Tensor, scale: Tensor, gating: Gating
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with blocks along tokens, for wgrad."""
    ends, ue8m0 = down.pairs.ends, down.x_ue8m0
    if gating == SWIGLU:
        return swiglu_quantize_grouped_transposed(hidden, scale[:, 0], ends, ue8m0)
    return quantize_grouped_transposed(_activated(hidden, gating) * scale, ends, ue8m0)


def _activation_gradients(grad: Tensor, hidden: Tensor, scale: Tensor, gating: Gating) -> tuple[Tensor, Tensor]:
    """Gradients of the activation's input and of its rows' scales, given that of the scaled activation."""
    if gating == SWIGLU:
        return swiglu_backward(grad, hidden, scale[:, 0])
    wide, (gate, up) = grad.to(torch.float32), hidden.to(torch.float32).chunk(2, dim=-1)
    parts = swiglu_gradients(wide * scale, gate, up, gating)
    return torch.cat(parts, dim=-1).to(hidden.dtype), torch.linalg.vecdot(wide, _activated(hidden, gating))


def _activated(hidden: Tensor, gating: Gating) -> Tensor:
    gate, up = hidden.to(torch.float32).chunk(2, dim=-1)
    return swiglu.reference(gate, up, gating)


def _sent(x: Tensor) -> Tensor:
    """x as it arrives, in its own dtype: BF16 holds 4 bits times a power of two exactly."""
    return dequantize(*quantize(x.contiguous(), True), x.dtype)


def _experts_of_rows(pairs: Pairs) -> Tensor:
    """The expert of each row, int64 [rows]."""
    rows = torch.arange(pairs.token.shape[0], dtype=torch.int32, device=pairs.token.device)
    return torch.searchsorted(pairs.ends, rows, right=True)


def _sum_per_expert(rows: Tensor, pairs: Pairs, like: Tensor) -> Tensor:
    sums = rows.new_zeros(like.shape, dtype=torch.float32)
    return sums.index_add_(0, _experts_of_rows(pairs), rows.to(torch.float32)).to(like.dtype)


def fp8_experts(
    x: Tensor, choice: Tensor, weights: Tensor, experts: Experts, layers: ExpertLayers, gating: Gating
) -> Tensor:
    """x [tokens, hidden] in BF16 or FP32, choice [tokens, k] int64, weights [tokens, k] -> [tokens, hidden], as x is.

    Gradients of the experts' weights are FP32 out of the products, then in the weights' dtype.
    """
    return _Experts.apply(x.contiguous(), choice, weights, *experts, layers, gating, torch.is_grad_enabled())
