"""Weights in FP8, blocks of 128 x 128, and their transposes.

    quantize_weight(w, ue8m0) -> q [..., N, K], scales [..., ceil(N / 128), ceil(K / 128)], qT [..., K, N], scalesT

The forward product sums over K and that of the input's gradient over N. Both sides of a block are 128 long, so that the
transpose holds the same codes and the same scales: nothing is rounded twice. w is one matrix [N, K] or one per expert
[E, N, K], in BF16 or FP32.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from modelspec.kernels import block_scale
from modelspec.kernels.block_scale import BLOCK, e4m3
from modelspec.kernels.quantize import QUANTISES, TILE, blocks, constants, format_of
from modelspec.kernels.quantize_tile import B, largest, load_tile, scale_of
from modelspec.kernels.triton_language import tl, triton
from modelspec.kernels.triton_op import TritonOp
from modelspec.kernels.variant import Arch, Variant


@triton.jit
def weight_kernel(w, q, scales, qt, scales_t, rows, columns, LARGEST: tl.constexpr, UE8M0: tl.constexpr):
    """One program: one block of one matrix."""
    across = tl.cdiv(columns, B)
    down = tl.cdiv(rows, B)
    block = tl.program_id(0) % across
    above = tl.program_id(0) // across % down
    matrix = (tl.program_id(0) // (across * down)).to(tl.int64)
    row = above * B + tl.arange(0, B)
    column = block * B + tl.arange(0, B)
    start = matrix * rows * columns
    tile = load_tile(w + start, row, row < rows, column, columns)
    scale, inverse = scale_of(largest(largest(tile, 1), 0), LARGEST, UE8M0)
    codes = tile * inverse
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(q + start + row.to(tl.int64)[:, None] * columns + column[None, :], codes.to(q.dtype.element_ty), mask=mask)
    tl.store(scales + matrix * down * across + above * across + block, scale)
    mask = (column < columns)[:, None] & (row < rows)[None, :]
    at = qt + start + column.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(at, tl.trans(codes).to(qt.dtype.element_ty), mask=mask)
    tl.store(scales_t + matrix * down * across + block * down + above, scale)


def _memory(w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *outer, rows, columns = w.shape
    format = e4m3(w.device)
    return (
        w.new_empty(*outer, rows, columns, dtype=format),
        w.new_empty(*outer, blocks(rows), blocks(columns), dtype=torch.float32),
        w.new_empty(*outer, columns, rows, dtype=format),
        w.new_empty(*outer, blocks(columns), blocks(rows), dtype=torch.float32),
    )


def _check(w: Tensor, ue8m0: bool) -> None:
    if w.ndim < 2:
        raise ValueError(f"w {list(w.shape)} must be a matrix [N, K], or one for each expert [E, N, K]")


def _reference(w: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, scales = block_scale.quantize(w, (BLOCK, BLOCK), ue8m0, e4m3(w.device))
    qt, scales_t = (each.mT.clone(memory_format=torch.contiguous_format) for each in (q, scales))
    return q, scales, qt, scales_t


def _launch(w: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    w = w.contiguous()
    results = _memory(w)
    q, scales = results[:2]
    if w.numel():
        options = {**constants(q, ue8m0), **TILE.options()}
        weight_kernel[(scales.numel(),)](w, *results, *w.shape[-2:], **options)
    return results


def _fake(w: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _memory(w)


quantize_weight = TritonOp("quantize_weight", _reference, _launch, _fake, check=_check)


def variants(arch: Arch) -> Iterator[Variant]:
    """The compilations that the launcher asks for."""
    codes, top = format_of(arch)
    results = {"q": codes, "scales": "*fp32", "qt": codes, "scales_t": "*fp32"}
    for dtype, ue8m0 in (("bf16", False), ("fp32", False), ("fp32", True)):
        signature = {"w": f"*{dtype}", **results, "rows": "i32", "columns": "i32"}
        name = f"quantize_weight-{dtype}-{'ue8m0' if ue8m0 else 'fp32'}"
        known = {"LARGEST": top, "UE8M0": ue8m0}
        # Triton 3.6 takes 235 for one variant. Weights are quantised once a step: not worth a second read.
        promises = {**QUANTISES, "registers": 255}
        yield Variant(name, weight_kernel, signature, known, TILE, tuple(signature), promises)
