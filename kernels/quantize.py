"""Activations in FP8, blocks of 1 x 128, in the orientations that the three products of a linear layer read.

    quantize(x, ue8m0)              -> q [M, K], scales [M, ceil(K / 128)]          for y = x W^T and grad_x = grad_y W
    quantize_transposed(x, ue8m0)   -> qT [K, M], scalesT [K, ceil(M / 128)]        for grad_W = grad_y^T x
    quantize_both(x, ue8m0)         -> all four, from one read of x
    dequantize(q, scales, dtype)    -> the values; weights with blocks of 128 x 128 too
    e5m6(x)                         -> x as 12 bits would keep it

x is a matrix [M, K] in BF16 or FP32; other shapes are refused (ValueError). Codes are row-major; scales are
column-major in memory, for a product reads them of many rows at one step of K. Tensor cores read both operands along
the dim that they sum over, so that the gradient of a weight, which sums over tokens, needs the transpose with blocks
along tokens: quantised anew from x, for quantising the codes of the other orientation a second time would add half the
error again.

E5M6 keeps the input of attention's output projection: 5 bits of exponent, 6 of mantissa, and scales of 1 x 128 that are
powers of two, so that BF16 holds its values as they are.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from modelspec.kernels import block_scale
from modelspec.kernels.block_scale import BLOCK, e4m3, scales_of
from modelspec.kernels.operands import require_codes, require_matrix
from modelspec.kernels.quantize_tile import B, largest, load_tile, scale_of, store_columns, store_rows
from modelspec.kernels.triton_language import tl, triton
from modelspec.kernels.triton_op import TritonOp
from modelspec.kernels.variant import Arch, Config, Variant, fp8_type

# 16 bytes a load and thread, four or more of them under way.
ROWS = Config({"R": 32}, num_warps=4)
# A tile of 128 x 128: of four warps it takes twice the registers, and of sixteen no two programs fit side by side.
TILE = Config({}, num_warps=8)

# IEEE 754's way of dividing 5 bits of exponent: bias 15, the highest exponent for infinities, subnormals below 2^-14.
E5M6_LARGEST = (2 - 2.0**-6) * 2.0**15
E5M6_LEAST_EXPONENT = -14
_E5M6_LARGEST: tl.constexpr = tl.constexpr(E5M6_LARGEST)
_E5M6_NORMAL: tl.constexpr = tl.constexpr(2.0**E5M6_LEAST_EXPONENT)
# FP32 between 2^3 and 2^4 has the subnormals' distance, 2^-20: adding this rounds to it.
_E5M6_SHIFT: tl.constexpr = tl.constexpr(12.0)


def blocks(size: int) -> int:
    """Blocks of 128 along a dim."""
    return (size + BLOCK - 1) // BLOCK


def codes_and_scales(like: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Memory for a matrix in blocks of 1 x 128, on the device of `like`: codes row-major, scales column-major."""
    codes = like.new_empty(rows, columns, dtype=e4m3(like.device))
    return codes, like.new_empty(blocks(columns), rows, dtype=torch.float32).T


def quantized_rows(x: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor]:
    """The definition: codes and scales of a matrix in blocks of 1 x 128."""
    q, scales = block_scale.quantize(x, (1, BLOCK), ue8m0, e4m3(x.device))
    return q, scales.T.clone(memory_format=torch.contiguous_format).T


def quantized_columns(x: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor]:
    """The definition: codes and scales of a matrix's transpose in blocks of 1 x 128."""
    q, scales = block_scale.quantize(x.contiguous(), (BLOCK, 1), ue8m0, e4m3(x.device))
    return q.T.clone(memory_format=torch.contiguous_format), scales.T


def constants(q: Tensor, ue8m0: bool) -> dict[str, Any]:
    """What a kernel must know of the format when it is compiled."""
    return {"LARGEST": torch.finfo(q.dtype).max, "UE8M0": ue8m0}


@triton.jit
def rows_kernel(x, q, scales, rows, columns, LARGEST: tl.constexpr, UE8M0: tl.constexpr, R: tl.constexpr):
    """One program: R rows of one column block. Neighbours take neighbouring column blocks."""
    across = tl.cdiv(columns, B)
    block = tl.program_id(0) % across
    row = tl.program_id(0) // across * R + tl.arange(0, R)
    tile = load_tile(x, row, row < rows, block * B + tl.arange(0, B), columns)
    store_rows(tile, q, scales, row, row < rows, rows, block, columns, LARGEST, UE8M0)


@triton.jit
def tile_kernel(
    x, q, scales, qt, scales_t, rows, columns, LARGEST: tl.constexpr, UE8M0: tl.constexpr, BOTH: tl.constexpr
):
    """One program: a tile of 128 x 128, to its transpose, and with BOTH to its own orientation too."""
    across = tl.cdiv(columns, B)
    block = tl.program_id(0) % across
    down = tl.program_id(0) // across
    row = down * B + tl.arange(0, B)
    column = block * B + tl.arange(0, B)
    if BOTH:
        tile = load_tile(x, row, row < rows, column, columns)
        store_rows(tile, q, scales, row, row < rows, rows, block, columns, LARGEST, UE8M0)
    # Once more, and out of the cache: a tile that lives until here takes the registers of a second program.
    tile = load_tile(x, row, row < rows, column, columns)
    store_columns(tile, qt, scales_t, down, rows, column, columns, LARGEST, UE8M0)


@triton.jit
def dequantize_kernel(q, scales, x, rows, columns, row_stride, column_stride, H: tl.constexpr, R: tl.constexpr):
    """One program: R rows of one column block, whose scales hold for H rows each."""
    across = tl.cdiv(columns, B)
    block = tl.program_id(0) % across
    row = tl.program_id(0) // across * R + tl.arange(0, R)
    column = block * B + tl.arange(0, B)
    tile = load_tile(q, row, row < rows, column, columns)
    at = (row // H).to(tl.int64) * row_stride + block.to(tl.int64) * column_stride
    scale = tl.load(scales + at, mask=row < rows, other=0.0)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    target = x + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(target, (tile * scale[:, None]).to(x.dtype.element_ty), mask=mask)


@triton.jit
def e5m6_kernel(x, y, rows, columns, R: tl.constexpr):
    """One program: R rows of one column block."""
    across = tl.cdiv(columns, B)
    block = tl.program_id(0) % across
    row = tl.program_id(0) // across * R + tl.arange(0, R)
    column = block * B + tl.arange(0, B)
    tile = load_tile(x, row, row < rows, column, columns)
    scale, inverse = scale_of(largest(tile, 1), _E5M6_LARGEST, True)
    scaled = tile * inverse[:, None]
    bits = scaled.to(tl.int32, bitcast=True)
    normal = ((bits + 0xFFFF + ((bits >> 17) & 1)) & -0x20000).to(tl.float32, bitcast=True)
    subnormal = (scaled + _E5M6_SHIFT) - _E5M6_SHIFT
    # NaN fails every comparison, and the sum keeps it.
    rounded = tl.where(tl.abs(scaled) >= _E5M6_NORMAL, normal, subnormal) * scale[:, None]
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(y + at, rounded.to(y.dtype.element_ty), mask=mask)


def _matrix(x: Tensor, ue8m0: bool) -> None:
    require_matrix("x", x)


def _quantize_reference(x: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor]:
    return quantized_rows(x, ue8m0)


def _quantize_launch(x: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor]:
    (rows, columns), x = x.shape, x.contiguous()
    q, scales = codes_and_scales(x, rows, columns)
    if x.numel():
        grid = (triton.cdiv(rows, ROWS.constants["R"]) * blocks(columns),)
        rows_kernel[grid](x, q, scales, rows, columns, **constants(q, ue8m0), **ROWS.options())
    return q, scales


def _quantize_fake(x: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor]:
    return codes_and_scales(x, x.shape[0], x.shape[1])


def _transposed_reference(x: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor]:
    return quantized_columns(x, ue8m0)


def _transposed_launch(x: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor]:
    (rows, columns), x = x.shape, x.contiguous()
    qt, scales_t = codes_and_scales(x, columns, rows)
    if x.numel():
        grid = (blocks(rows) * blocks(columns),)
        options = {**constants(qt, ue8m0), **TILE.options()}
        tile_kernel[grid](x, qt, scales_t, qt, scales_t, rows, columns, BOTH=False, **options)
    return qt, scales_t


def _transposed_fake(x: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor]:
    return codes_and_scales(x, x.shape[1], x.shape[0])


def _both_reference(x: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *quantized_rows(x, ue8m0), *quantized_columns(x, ue8m0)


def _both_launch(x: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (rows, columns), x = x.shape, x.contiguous()
    results = *codes_and_scales(x, rows, columns), *codes_and_scales(x, columns, rows)
    if x.numel():
        grid = (blocks(rows) * blocks(columns),)
        options = {**constants(results[0], ue8m0), **TILE.options()}
        tile_kernel[grid](x, *results, rows, columns, BOTH=True, **options)
    return results


def _both_fake(x: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *codes_and_scales(x, x.shape[0], x.shape[1]), *codes_and_scales(x, x.shape[1], x.shape[0])


def _height(q: Tensor, scales: Tensor) -> int:
    """Rows that share a scale. One row alone is the same either way."""
    return 1 if scales.shape[0] == q.shape[0] else BLOCK


def _dequantize_check(q: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
    require_matrix("q", q)
    require_codes("q", q)


def _dequantize_reference(q: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return block_scale.dequantize(q, scales, (_height(q, scales), BLOCK), dtype)


def _dequantize_launch(q: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    (rows, columns), q = q.shape, q.contiguous()
    x = q.new_empty(rows, columns, dtype=dtype)
    if q.numel():
        grid = (triton.cdiv(rows, ROWS.constants["R"]) * blocks(columns),)
        height = _height(q, scales)
        dequantize_kernel[grid](q, scales, x, rows, columns, *scales.stride(), H=height, **ROWS.options())
    return x


def _dequantize_fake(q: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return q.new_empty(q.shape, dtype=dtype)


def _e5m6_check(x: Tensor) -> None:
    require_matrix("x", x)


def _e5m6_reference(x: Tensor) -> Tensor:
    wide = F.pad(x.to(torch.float32), (0, -x.shape[-1] % BLOCK)).unflatten(-1, (blocks(x.shape[-1]), BLOCK))
    scales, inverse = scales_of(wide.abs().amax(-1, keepdim=True), E5M6_LARGEST, ue8m0=True)
    scaled = wide * inverse
    # Neighbours are 2^-6 of the power of two below them apart, and subnormals as far as the least normal numbers are.
    mantissa, exponent = torch.frexp(scaled)
    exponent = exponent.clamp(min=E5M6_LEAST_EXPONENT + 1)
    step = torch.ldexp(torch.ones_like(mantissa), exponent - 7)
    rounded = torch.where(scaled.isfinite(), (scaled / step).round() * step, scaled)
    values = (rounded * scales).flatten(-2)[..., : x.shape[-1]].to(x.dtype)
    return values.clone(memory_format=torch.contiguous_format)


def _e5m6_launch(x: Tensor) -> Tensor:
    (rows, columns), x = x.shape, x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        grid = (triton.cdiv(rows, ROWS.constants["R"]) * blocks(columns),)
        e5m6_kernel[grid](x, y, rows, columns, **ROWS.options())
    return y


def _e5m6_fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


quantize = TritonOp("quantize", _quantize_reference, _quantize_launch, _quantize_fake, check=_matrix)
quantize_transposed = TritonOp(
    "quantize_transposed", _transposed_reference, _transposed_launch, _transposed_fake, check=_matrix
)
quantize_both = TritonOp("quantize_both", _both_reference, _both_launch, _both_fake, check=_matrix)
dequantize = TritonOp(
    "dequantize", _dequantize_reference, _dequantize_launch, _dequantize_fake, check=_dequantize_check
)
e5m6 = TritonOp("e5m6", _e5m6_reference, _e5m6_launch, _e5m6_fake, check=_e5m6_check)

# Arguments of every kernel here that are multiples of 16, and what the tests hold it to.
ALIGNED = ("x", "q", "scales", "rows", "columns")
PROMISES = {"spills": 0, "registers": 128, "shared": 64_000}
QUANTISES = {**PROMISES, "casts": True}


def variants(arch: Arch) -> Iterator[Variant]:
    """The compilations that the launchers ask for."""
    codes, largest = format_of(arch)
    sizes = {"rows": "i32", "columns": "i32"}
    one = {"q": codes, "scales": "*fp32"}
    other = {"qt": codes, "scales_t": "*fp32"}
    for dtype, ue8m0 in (("bf16", False), ("bf16", True), ("fp32", False)):
        name = f"{dtype}-{'ue8m0' if ue8m0 else 'fp32'}"
        known = {"LARGEST": largest, "UE8M0": ue8m0}
        signature = {"x": f"*{dtype}", **one, **sizes}
        yield Variant(f"quantize-{name}", rows_kernel, signature, known, ROWS, ALIGNED, QUANTISES)
        signature = {"x": f"*{dtype}", **one, **other, **sizes}
        for op, both in (("quantize_both", True), ("quantize_transposed", False)):
            every = {**known, "BOTH": both}
            yield Variant(f"{op}-{name}", tile_kernel, signature, every, TILE, (*ALIGNED, "qt", "scales_t"), QUANTISES)
    signature = {"x": "*bf16", **one, **sizes, "row_stride": "i32", "column_stride": "i32"}
    for height in (1, BLOCK):
        name = f"dequantize-{height}"
        yield Variant(name, dequantize_kernel, signature, {"H": height}, ROWS, ALIGNED, PROMISES)
    signature = {"x": "*bf16", "y": "*bf16", **sizes}
    yield Variant("e5m6", e5m6_kernel, signature, {}, ROWS, ("x", "y", "rows", "columns"), PROMISES)


def format_of(arch: Arch) -> tuple[str, float]:
    """Pointer type of codes, as Triton spells it, and their largest number."""
    return ("*fp8e4b8", 240.0) if fp8_type(arch) == "fp8e4b8" else ("*fp8e4nv", 448.0)
