"""Tokens to their experts and back: each is copied once for every expert that it goes to, and its copies are summed.

    rows = permute(x, row, weights)             # rows[row[t, j]] = w[t, j] * x[t]
    out = unpermute(rows, row, weights)         # out[t] = sum over j < k of w[t, j] * rows[row[t, j]]

`row` is where `sort_by_expert` puts a token's copies; without weights they are 1. The two are adjoint, so that each is
the other's gradient; that of the weights is `pair_dots`, w[t, j] = <x[t], rows[row[t, j]]>. One program owns a token:
it writes all of its copies, or adds them up in FP32 in the order of j. So there are no atomics, and the sum is the same
every time.

Tokens in FP8 are moved as they are, and `permute_scales` moves their scales.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from modelspec.kernels.triton_language import tl, triton
from modelspec.kernels.triton_op import TritonOp
from modelspec.kernels.variant import Arch, Config, Variant

# 16 bytes a thread in BF16.
MOVE = Config({"BLOCK": 1024}, num_warps=4)
SCALES = Config({"BLOCK": 256}, num_warps=4)


@triton.jit
def row_of(at, count):
    """A row that is there: where the index lies outside, the nearest."""
    return tl.minimum(tl.maximum(tl.load(at), 0), count - 1)


@triton.jit
def permute_kernel(x, row, weights, rows, width, k, count, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """One program: a token. x [tokens, width], row [tokens, k], weights [tokens, k] -> rows [tokens * k, width]."""
    t = tl.program_id(0).to(tl.int64)
    for left in range(0, width, BLOCK):
        column = left + tl.arange(0, BLOCK)
        values = tl.load(x + t * width + column, mask=column < width)
        for j in range(k):
            to = rows + row_of(row + t * k + j, count).to(tl.int64) * width + column
            if WEIGHTED:
                weight = tl.load(weights + t * k + j).to(tl.float32)
                tl.store(to, (values.to(tl.float32) * weight).to(rows.dtype.element_ty), mask=column < width)
            else:
                tl.store(to, values, mask=column < width)


@triton.jit
def unpermute_kernel(rows, row, weights, out, width, k, count, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """One program: a token. rows [tokens * k, width], row [tokens, k], weights [tokens, k] -> out [tokens, width]."""
    t = tl.program_id(0).to(tl.int64)
    for left in range(0, width, BLOCK):
        column = left + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for j in range(k):
            at = rows + row_of(row + t * k + j, count).to(tl.int64) * width + column
            values = tl.load(at, mask=column < width, other=0.0).to(tl.float32)
            if WEIGHTED:
                weight = tl.load(weights + t * k + j).to(tl.float32)
                total = tl.fma(values, tl.broadcast_to(weight, (BLOCK,)), total)
            else:
                total += values
        tl.store(out + t * width + column, total.to(out.dtype.element_ty), mask=column < width)


@triton.jit
def dots_kernel(x, rows, row, out, width, k, count, BLOCK: tl.constexpr):
    """One program: a pair. x [tokens, width], rows [tokens * k, width], row [tokens, k] -> out [tokens, k]."""
    pair = tl.program_id(0).to(tl.int64)
    x += pair // k * width
    rows += row_of(row + pair, count).to(tl.int64) * width
    total = tl.zeros((BLOCK,), tl.float32)
    for left in range(0, width, BLOCK):
        column = left + tl.arange(0, BLOCK)
        ours = tl.load(x + column, mask=column < width, other=0.0).to(tl.float32)
        theirs = tl.load(rows + column, mask=column < width, other=0.0).to(tl.float32)
        total = tl.fma(ours, theirs, total)
    tl.store(out + pair, tl.sum(total, 0))


@triton.jit
def permute_scales_kernel(scales, token, out, tokens, rows, BLOCK: tl.constexpr):
    """One program: BLOCK rows at one block of columns. scales [blocks, tokens] -> out [blocks, rows] in memory."""
    across = tl.cdiv(rows, BLOCK)
    row = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    block = (tl.program_id(0) // across).to(tl.int64)
    source = tl.minimum(tl.maximum(tl.load(token + row, mask=row < rows, other=0), 0), tokens - 1)
    tl.store(out + block * rows + row, tl.load(scales + block * tokens + source, mask=row < rows), mask=row < rows)


def _wide(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute in: FP32, or float64 where an operand is."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _permute_reference(x: Tensor, row: Tensor, weights: Tensor | None = None) -> Tensor:
    rows = _permute_fake(x, row, weights)
    for j, to in enumerate(row.unbind(1)):
        if weights is None:
            _bits(rows)[to] = _bits(x)
        else:
            rows[to] = (x.to(_wide(x)) * weights[:, j, None].to(_wide(x))).to(x.dtype)
    return rows


def _bits(x: Tensor) -> Tensor:
    """FP8 as integers: torch moves those."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


def _permute_launch(x: Tensor, row: Tensor, weights: Tensor | None = None) -> Tensor:
    rows = _permute_fake(x, row, weights)
    (tokens, k), width = row.shape, x.shape[1]
    if rows.numel():
        _move(permute_kernel, _bits(x), row, weights, _bits(rows), tokens, width, k)
    return rows


def _move(kernel: Any, source: Tensor, row: Tensor, weights: Tensor | None, target: Tensor, *sizes: int) -> None:
    """Launches one of the two kernels that move rows: a program for each token."""
    tokens, width, k = sizes
    given = row if weights is None else weights
    operands = source.contiguous(), row.contiguous(), given.contiguous(), target
    kernel[(tokens,)](*operands, width, k, tokens * k, WEIGHTED=weights is not None, **MOVE.options())


def _permute_fake(x: Tensor, row: Tensor, weights: Tensor | None = None) -> Tensor:
    return x.new_empty(row.numel(), x.shape[1])


# permute(x [tokens, width], row [tokens, k] int32, weights [tokens, k] or None) -> [tokens * k, width] in x's dtype
# Differentiable in x and weights. x may be FP8 without weights.
permute: TritonOp[..., Tensor] = TritonOp(
    "permute", reference=_permute_reference, launch=_permute_launch, fake=_permute_fake
)


def _unpermute_reference(rows: Tensor, row: Tensor, weights: Tensor | None = None) -> Tensor:
    total = rows.new_zeros(row.shape[0], rows.shape[1], dtype=_wide(rows))
    for j, source in enumerate(row.unbind(1)):
        values = rows[source].to(total.dtype)
        total += values if weights is None else values * weights[:, j, None].to(total.dtype)
    return total.to(rows.dtype)


def _unpermute_launch(rows: Tensor, row: Tensor, weights: Tensor | None = None) -> Tensor:
    out = _unpermute_fake(rows, row, weights)
    if out.numel():
        _move(unpermute_kernel, rows, row, weights, out, row.shape[0], rows.shape[1], row.shape[1])
    return out


def _unpermute_fake(rows: Tensor, row: Tensor, weights: Tensor | None = None) -> Tensor:
    return rows.new_empty(row.shape[0], rows.shape[1])


# unpermute(rows [tokens * k, width], row [tokens, k] int32, weights [tokens, k] or None) -> [tokens, width] in rows'
#     dtype. Differentiable in rows and weights.
unpermute: TritonOp[..., Tensor] = TritonOp(
    "unpermute", reference=_unpermute_reference, launch=_unpermute_launch, fake=_unpermute_fake
)


def _dots_reference(x: Tensor, rows: Tensor, row: Tensor) -> Tensor:
    wide = _wide(x)
    x, rows = x.to(wide).contiguous(), rows.contiguous()
    each = [torch.linalg.vecdot(x, rows[source].to(wide)) for source in row.unbind(1)]
    return torch.stack(each, 1) if each else _dots_fake(x, rows, row)


def _dots_launch(x: Tensor, rows: Tensor, row: Tensor) -> Tensor:
    out = _dots_fake(x, rows, row)
    if out.numel():
        (_, k), width = row.shape, x.shape[1]
        operands = x.contiguous(), rows.contiguous(), row.contiguous()
        dots_kernel[(row.numel(),)](*operands, out, width, k, row.numel(), **MOVE.options())
    return out


def _dots_fake(x: Tensor, rows: Tensor, row: Tensor) -> Tensor:
    return x.new_empty(row.shape, dtype=_wide(x))


# pair_dots(x [tokens, width], rows [tokens * k, width], row [tokens, k] int32) -> [tokens, k] in FP32; differentiable
pair_dots: TritonOp[[Tensor, Tensor, Tensor], Tensor] = TritonOp(
    "pair_dots", reference=_dots_reference, launch=_dots_launch, fake=_dots_fake
)


def _scales_reference(scales: Tensor, token: Tensor) -> Tensor:
    return scales.T[:, token].T


def _scales_launch(scales: Tensor, token: Tensor) -> Tensor:
    out = _scales_fake(scales, token)
    if out.numel():
        (rows, blocks), tokens = out.shape, scales.shape[0]
        grid = (triton.cdiv(rows, SCALES.constants["BLOCK"]) * blocks,)
        permute_scales_kernel[grid](scales.T.contiguous(), token.contiguous(), out, tokens, rows, **SCALES.options())
    return out


def _scales_fake(scales: Tensor, token: Tensor) -> Tensor:
    return scales.new_empty(scales.shape[1], token.shape[0]).T


# permute_scales(scales [tokens, blocks] in column-major memory, token [rows] int32) -> [rows, blocks], column-major:
#     the scales of rows that `permute` copied in FP8
permute_scales: TritonOp[[Tensor, Tensor], Tensor] = TritonOp(
    "permute_scales", reference=_scales_reference, launch=_scales_launch, fake=_scales_fake
)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    moved, row, weights = inputs
    # Only the gradient of weights reads what was moved.
    ctx.save_for_backward(None if weights is None else moved, row, weights)


def _remember_all(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _permute_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
    x, row, weights = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    grad_x = unpermute(grad, row, weights) if wanted[0] else None
    grad_weights = pair_dots(x, grad, row).to(weights.dtype) if weights is not None and wanted[2] else None
    return grad_x, None, grad_weights


def _unpermute_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
    rows, row, weights = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    grad_rows = permute(grad, row, weights) if wanted[0] else None
    grad_weights = pair_dots(grad, rows, row).to(weights.dtype) if weights is not None and wanted[2] else None
    return grad_rows, None, grad_weights


def _dots_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, rows, row = ctx.saved_tensors
    return unpermute(rows, row, grad), permute(x, row, grad), None


permute.gradient(_permute_backward, _remember)
unpermute.gradient(_unpermute_backward, _remember)
pair_dots.gradient(_dots_backward, _remember_all)


def variants(arch: Arch) -> Iterator[Variant]:
    """What the launchers may compile for BF16 and FP8, the same for every architecture."""
    sizes = {"width": "i32", "k": "i32", "count": "i32"}
    promises = {"spills": 0, "registers": 128, "shared": 49_152}
    there = {"x": "*bf16", "row": "*i32", "weights": "*fp32", "rows": "*bf16", **sizes}
    back = {"rows": "*bf16", "row": "*i32", "weights": "*fp32", "out": "*bf16", **sizes}
    codes = {"x": "*u8", "row": "*i32", "weights": "*i32", "rows": "*u8", **sizes}
    dots = {"x": "*bf16", "rows": "*bf16", "row": "*i32", "out": "*fp32", **sizes}
    scales = {"scales": "*fp32", "token": "*i32", "out": "*fp32", "tokens": "i32", "rows": "i32"}
    for name, kernel, signature, constants in (
        ("permute_bf16", permute_kernel, there, {"WEIGHTED": False}),
        ("permute_bf16_weighted", permute_kernel, there, {"WEIGHTED": True}),
        ("permute_fp8", permute_kernel, codes, {"WEIGHTED": False}),
        ("unpermute_bf16", unpermute_kernel, back, {"WEIGHTED": False}),
        ("unpermute_bf16_weighted", unpermute_kernel, back, {"WEIGHTED": True}),
        ("pair_dots", dots_kernel, dots, {}),
        ("permute_scales", permute_scales_kernel, scales, {}),
    ):
        config = SCALES if kernel is permute_scales_kernel else MOVE
        # Pointers are aligned, and so is the width.
        aligned = tuple(each for each, kind in signature.items() if kind[0] == "*" or each == "width")
        yield Variant(name, kernel, signature, constants, config, aligned, promises)
