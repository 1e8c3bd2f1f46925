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
from torch.nn import functional as F

from modelspec.kernels.experts import Experts
from modelspec.kernels.fp8_health import Kind
from modelspec.kernels.fp8_linear import Layer
from modelspec.kernels.grouped_mm import grouped_mm, grouped_mm_backward
from modelspec.kernels.grouped_scaled_mm import grouped_scaled_mm
from modelspec.kernels.grouped_scaled_wgrad import grouped_scaled_wgrad
from modelspec.kernels.permute import permute, permute_scales, unpermute
from modelspec.kernels.quantize import dequantize, quantize, quantize_transposed
from modelspec.kernels.sort_by_expert import Pairs, sort_by_expert
from modelspec.kernels.swiglu import Gating, swiglu, swiglu_gradients


class ExpertLayers(NamedTuple):
    """The two layers of the experts, whose weights in FP8 are stacked, and the options that concern them.

    `narrow` keeps the activation's input in FP8, `dispatch` sends tokens in FP8.
    """

    gate_up: Layer
    down: Layer
    narrow: bool = False
    dispatch: bool = False


def quantize_grouped_transposed(x: Tensor, ends: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The transpose of rows sorted by expert, in blocks of 128 rows of one expert, and where experts start in it."""
    sizes = torch.diff(ends, prepend=ends.new_zeros(1))
    starts = F.pad(((sizes + 127) // 128 * 128).cumsum(0), (1, 0)).to(torch.int32)
    expert = torch.searchsorted(ends, torch.arange(len(x), dtype=torch.int32, device=x.device), right=True)
    at = torch.arange(len(x), device=x.device) - (ends - sizes)[expert] + starts[expert]
    padded = x.new_zeros(-(-len(x) // 128) * 128 + 128 * len(ends), x.shape[1])
    padded[at] = x
    return *quantize_transposed(padded, ue8m0), starts


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

    def kept(self, x: Tensor) -> _Kept:
        """The input's rows for wgrad."""
        return _Kept(*quantize_grouped_transposed(x, self.pairs.ends, self.x_ue8m0))

    def output(self, x: Tensor, dtype: torch.dtype, *, of_tokens: bool = False) -> Tensor:
        """[rows, out] in `dtype` of rows, or of tokens, which go to their experts first."""
        if not self.layer.recipe.forward:
            rows = permute(x, self.pairs.row) if of_tokens else x
            return grouped_mm(rows.to(dtype), self.weight.to(dtype), self.pairs.ends)
        narrow = self._narrowed("activation", x, self.x_ue8m0, of_tokens)
        copies = self.layer.weight
        return grouped_scaled_mm(*narrow, copies.q, copies.scales, self.pairs.ends, dtype)

    def input_gradient(self, grad: Tensor, *, of_tokens: bool = False) -> Tensor:
        """[rows, in] in grad's dtype, of rows or of tokens."""
        if not self.layer.recipe.dgrad:
            rows = permute(grad, self.pairs.row) if of_tokens else grad
            return grouped_mm(rows, self.weight.to(grad.dtype).mT, self.pairs.ends)
        narrow = self._narrowed("gradient", grad, self.grad_ue8m0, of_tokens)
        copies = self.layer.weight
        return grouped_scaled_mm(*narrow, copies.qt, copies.scales_t, self.pairs.ends, grad.dtype)

    def _narrowed(self, kind: Kind, x: Tensor, ue8m0: bool, of_tokens: bool) -> tuple[Tensor, Tensor]:
        q, scales = quantize(x, ue8m0)
        if self.layer.health is not None:
            self.layer.health.count(kind, x, q)
        return (permute(q, self.pairs.row), permute_scales(scales, self.pairs.token)) if of_tokens else (q, scales)

    def weight_gradient(self, grad: Tensor, x: Tensor | _Kept) -> Tensor:
        """[experts, out, in] of rows of the gradient and of the input."""
        if isinstance(x, Tensor) and not self.layer.recipe.wgrad:
            wide = self.weight.to(grad.dtype)
            return grouped_mm_backward(grad, x.to(grad.dtype), wide, self.pairs.ends)[1].to(self.weight.dtype)
        qt, scales_t, _ = quantize_grouped_transposed(grad, self.pairs.ends, self.grad_ue8m0)
        kept = self.kept(x) if isinstance(x, Tensor) else x
        return grouped_scaled_wgrad(qt, scales_t, *kept).to(self.weight.dtype)


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
        hidden = first.output(x, x.dtype, of_tokens=True)
        if gate_up_bias is not None:
            hidden = hidden + gate_up_bias.to(x.dtype)[_experts_of_rows(pairs)]
        scale = permute(weights.new_ones(len(weights), 1), pairs.row, weights)
        y = second.output(_activated(hidden, gating) * scale, x.dtype)
        if down_bias is not None:
            y = y + (down_bias[_experts_of_rows(pairs)] * scale).to(x.dtype)
        if keeps:
            ctx.layers, ctx.gating, ctx.dtype = layers, gating, x.dtype
            ctx.kept = layers.gate_up.recipe.wgrad and gate_up.requires_grad
            rows = permute(x, pairs.row) if gate_up.requires_grad else None
            kept = first.kept(rows) if ctx.kept and rows is not None else (rows,)
            inner = quantize(hidden, layers.gate_up.recipe.ue8m0) if layers.narrow else (hidden,)
            ctx.save_for_backward(gate_up, down, gate_up_bias, down_bias, scale, *pairs, *inner, *kept)
        return unpermute(y, pairs.row)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate_up, down, gate_up_bias, down_bias, scale, *saved = ctx.saved_tensors
        layers, pairs, saved = ctx.layers, Pairs(*saved[:3]), saved[3:]
        hidden, kept = (dequantize(*saved[:2], ctx.dtype), saved[2:]) if layers.narrow else (saved[0], saved[1:])
        first, second = _products(layers, gate_up, down, pairs)
        needs, gate_up_needs, down_needs = ctx.needs_input_grad, *ctx.needs_input_grad[3:5]

        grad = _sent(grads[0]) if layers.dispatch else grads[0].contiguous()
        rows = permute(grad, pairs.row)
        activated = _activated(hidden, ctx.gating)
        grad_scaled = second.input_gradient(grad, of_tokens=True).to(torch.float32)
        grad_scale = torch.linalg.vecdot(grad_scaled, activated)
        grad_down = second.weight_gradient(rows, activated * scale) if down_needs else None
        gate, up = hidden.to(torch.float32).chunk(2, dim=-1)
        grad_hidden = torch.cat(swiglu_gradients(grad_scaled * scale, gate, up, ctx.gating), dim=-1).to(ctx.dtype)
        grad_gate_up = None
        if gate_up_needs:
            grad_gate_up = first.weight_gradient(grad_hidden, _Kept(*kept) if ctx.kept else kept[0])
        grad_x = unpermute(first.input_gradient(grad_hidden), pairs.row) if needs[0] else None
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
