"""What the kernels that quantise share: one tile in registers to its FP8 codes and scales (`block_scale.py` defines).

    amax = largest(x, 1)                            # of each row
    scale, inverse = scale_of(amax, LARGEST, UE8M0)
    q = x * inverse[:, None]                        # then cast as it is stored

Nothing is clamped: a value comes out at most half a unit of FP32 above the largest code, and rounds to it. Maxima are
taken of bit patterns. For magnitudes they are ordered as the numbers are, and NaN is above all, so that it reaches the
scale; a maximum of floats would drop NaN, and the one that keeps it (max.NaN) has been miscompiled beside transposed
stores of FP8 (triton-lang/triton#11111). For the same reason tiles are transposed in FP32, before the cast.
"""

from modelspec.kernels.block_scale import BLOCK, LEAST_AMAX
from modelspec.kernels.triton_language import tl, triton

B: tl.constexpr = tl.constexpr(BLOCK)
_LEAST: tl.constexpr = tl.constexpr(LEAST_AMAX)


@triton.jit
def largest(x, axis: tl.constexpr):
    """Largest magnitude along an axis, NaN if there is one."""
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(magnitude, axis).to(tl.float32, bitcast=True)


@triton.jit
def scale_of(amax, LARGEST: tl.constexpr, UE8M0: tl.constexpr):
    """Scales of blocks with these largest magnitudes, and what to multiply with."""
    amax = tl.where(amax < _LEAST, _LEAST, amax)
    top = tl.zeros_like(amax) + LARGEST
    scale = tl.div_rn(amax, top)
    inverse = tl.div_rn(top, amax)
    if UE8M0:
        carried = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        scale = tl.where(scale != scale, scale, carried.to(tl.float32, bitcast=True))
        inverse = tl.div_rn(tl.zeros_like(scale) + 1.0, scale)
    return scale, inverse


@triton.jit
def load_tile(x, row, row_mask, column, columns):
    """Rows and columns of x [rows, columns] in FP32, zeros outside."""
    mask = row_mask[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    return tl.load(x + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rows(x, q, scales, row, row_mask, rows, block, columns, LARGEST: tl.constexpr, UE8M0: tl.constexpr):
    """Quantises a tile [R, 128] in blocks of 1 x 128 to column block `block` of q [rows, columns], row-major, and of
    scales [rows, blocks], column-major.
    """
    scale, inverse = scale_of(largest(x, 1), LARGEST, UE8M0)
    column = block * B + tl.arange(0, B)
    mask = row_mask[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(q + at, (x * inverse[:, None]).to(q.dtype.element_ty), mask=mask)
    tl.store(scales + block.to(tl.int64) * rows + row, scale, mask=row_mask)


@triton.jit
def store_columns(x, q, scales, block, rows, column, columns, LARGEST: tl.constexpr, UE8M0: tl.constexpr):
    """Quantises a tile [128, 128] in blocks of 128 x 1 to the transpose: to column block `block` of q [columns, rows],
    row-major, and of scales [columns, blocks], column-major.
    """
    scale, inverse = scale_of(largest(x, 0), LARGEST, UE8M0)
    row = block * B + tl.arange(0, B)
    column_mask = column < columns
    mask = column_mask[:, None] & (row < rows)[None, :]
    at = column.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(q + at, tl.trans(x * inverse[None, :]).to(q.dtype.element_ty), mask=mask)
    tl.store(scales + block.to(tl.int64) * columns + column, scale, mask=column_mask)
