"""Matrix product in block-scaled FP8: a layer's output, and the gradient of its input (arXiv 2412.19437, 3.3).

    out = a @ b^T           a [M, K], a scale for each 1 x 128 block; b [N, K], a scale for each 128 x 128 block

Forward, a is the input and b the weight; backward, the output's gradient and the weight's transpose. Tensor cores add
FP8 products up to about 14 bits, so that each 128 of K become a sum of their own, which an FMA scales and adds to the
FP32 total (`product_tile.py`):

    total = fma(sum over 128 of a's and b's numbers, a's scale * b's scale, total)

The kernel is persistent: so many programs as the device holds walk over the tiles of the output, in bands of GROUP_M
rows of tiles, which find their rows of b in the cache. The reference multiplies dequantised matrices in FP32 at once.
It differs from the order above by FP32 rounding (6e-7 in relative Frobenius norm at K = 7168, and one unit of BF16 in
0.07 % of elements). On one core it takes 1.3 to 2.2 times as long as the product of FP32 matrices, where a loop over K
in the kernel's order takes 2.2 to 2.9 times.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from modelspec.kernels.block_scale import BLOCK, dequantize, scales_shape
from modelspec.kernels.configs import (
    BLOCK_SCALED_MM,
    POINTERS,
    SMALL,
    SPECIALIZED,
    architecture,
    block_scaled_mm_config,
    interpreted,
    multiprocessors,
)
from modelspec.kernels.linear import matmul_nt
from modelspec.kernels.operands import require_codes, require_matrix
from modelspec.kernels.product_tile import B, aligned, operand_types, product_tile, promises, tiles_of
from modelspec.kernels.triton_language import tl, triton
from modelspec.kernels.triton_op import TritonOp
from modelspec.kernels.variant import Arch, Config, Variant

# More parts of K than this cost more to add up than they save.
MOST_PARTS = 8

_SPECIALIZED: tl.constexpr = tl.constexpr(SPECIALIZED)


@triton.jit
def banded(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of the tile with this number: bands of GROUP_M rows, column after column within a band."""
    band = tile // (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - band * GROUP_M, GROUP_M)
    within = tile - band * GROUP_M * tiles_n
    return band * GROUP_M + within % height, within // height


@triton.jit
def block_scaled_mm_kernel(
    a,
    a_scales,
    b,
    b_scales,
    out,
    M,
    N,
    K,
    B_ROWS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    WHOLE_K: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    LOADS: tl.constexpr,
):
    """a [M, K] and b [N, K], row-major, as pointers or descriptors of tiles; a_scales [M, blocks], column-major;
    b_scales [N / 128, blocks], row-major, or with B_ROWS = 1 [N, blocks], column-major. out [M, N], or with PARTS > 1
    [PARTS, M, N], the sums over so many parts of K.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles = tiles_m * tiles_n
    blocks = tl.cdiv(K, B)
    if LOADS == _SPECIALIZED:
        a_tiles = tl.make_tensor_descriptor(a, [M, K], [K, 1], [BLOCK_M, B])
        b_tiles = tl.make_tensor_descriptor(b, [N, K], [K, 1], [BLOCK_N, B])
    else:
        a_tiles = a
        b_tiles = b
    for number in tl.range(tl.program_id(0), tiles * PARTS, tl.num_programs(0), warp_specialize=LOADS == _SPECIALIZED):
        if PARTS == 1:
            part = 0
            first = 0
            last = blocks
            tile_m, tile_n = banded(number, tiles_m, tiles_n, GROUP_M)
        else:
            part = number // tiles
            first = part * tl.cdiv(blocks, PARTS)
            last = tl.minimum(first + tl.cdiv(blocks, PARTS), blocks)
            tile_m, tile_n = banded(number % tiles, tiles_m, tiles_n, GROUP_M)
        top = tile_m * BLOCK_M
        left = tile_n * BLOCK_N
        if B_ROWS == 1:
            b_scales_tile = b_scales + first * N + left
            b_stride = N
        else:
            b_scales_tile = b_scales + (left // B_ROWS) * blocks + first
            b_stride = 1
        total = product_tile(
            a_tiles,
            top,
            M - top,
            a_scales + first * M + top,
            M,
            b_tiles,
            left,
            N - left,
            b_scales_tile,
            b_stride,
            K,
            first,
            last,
            B_ROWS,
            WHOLE_K,
            BLOCK_M,
            BLOCK_N,
            LOADS,
        )
        row = top + tl.arange(0, BLOCK_M)
        column = left + tl.arange(0, BLOCK_N)
        at = out + (row.to(tl.int64) + part * M)[:, None] * N + column[None, :]
        stored = (row < M)[:, None] & (column < N)[None, :]
        if ACCUMULATE:
            total += tl.load(at, mask=stored, other=0.0)
        tl.store(at, total.to(out.dtype.element_ty), mask=stored)


def run(
    config: Config,
    operands: tuple[Tensor, Tensor, Tensor, Tensor],
    out: Tensor,
    b_rows: int,
    parts: int = 1,
    accumulate: bool = False,
) -> None:
    """Launches the kernel: a, its scales, b, its scales; out [M, N], or [parts, M, N]; see the kernel.

    For benchmarks too, which compare configurations.
    """
    a, a_scales, b, b_scales = operands
    m, n = len(a), len(b)
    # Quantisers lay scales out like this, so that nothing is copied.
    a_scales, b_scales = a_scales.T.contiguous(), (b_scales.T if b_rows == 1 else b_scales).contiguous()
    a, b = aligned(a), aligned(b)
    block_m, block_n = config.constants["BLOCK_M"], config.constants["BLOCK_N"]
    if config.constants["LOADS"] == SPECIALIZED and not interpreted():
        triton.set_allocator(_scratch)
    tiles = triton.cdiv(m, block_m) * triton.cdiv(n, block_n) * parts
    block_scaled_mm_kernel[(min(tiles, config.programs * multiprocessors(a.device)),)](
        tiles_of(a, block_m, config),
        a_scales,
        tiles_of(b, block_n, config),
        b_scales,
        out,
        m,
        n,
        a.shape[1],
        B_ROWS=b_rows,
        ACCUMULATE=accumulate,
        # Descriptors give zeros outside by themselves.
        WHOLE_K=a.shape[1] % BLOCK == 0 or config.constants["LOADS"] != POINTERS,
        PARTS=parts,
        **config.options(),
    )


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:  # pragma: no cover - asked for by GPUs
    """Memory for descriptors that a kernel makes."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def checked(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, b_rows: int) -> None:
    """Raises ValueError unless both are matrices in FP8 with as many columns, and have scales for their blocks."""
    for name, matrix in (("a", a), ("b", b)):
        require_matrix(name, matrix)
        require_codes(name, matrix)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a {list(a.shape)} and b {list(b.shape)} must have as many columns: out = a @ b^T")
    for name, matrix, scales, rows in (("a", a, a_scales, 1), ("b", b, b_scales, b_rows)):
        expected = scales_shape(tuple(matrix.shape), (rows, BLOCK))
        if tuple(scales.shape) != expected:
            told = f"{name} {list(matrix.shape)} in blocks of {rows} x {BLOCK} has scales {list(expected)}"
            raise ValueError(f"{told}, not {list(scales.shape)}; quantise it along its columns")


def product(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, b_rows: int) -> Tensor:
    """The definition, in FP32."""
    checked(a, a_scales, b, b_scales, b_rows)
    if not a.shape[1]:  # oneDNN has no product of this kind.
        return a.new_zeros(len(a), len(b), dtype=torch.float32)
    wide_a = dequantize(a, a_scales, (1, BLOCK), torch.float32)
    return matmul_nt(wide_a, dequantize(b, b_scales, (b_rows, BLOCK), torch.float32))


def _reference(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return product(a, a_scales, b, b_scales, BLOCK).to(dtype)


def parts_of(m: int, n: int, k: int, config: Config, programs: int) -> int:
    """Into how many parts K is cut, a power of two: more than one where few rows leave most of the device idle."""
    tiles = -(-m // config.constants["BLOCK_M"]) * -(-n // config.constants["BLOCK_N"])
    parts = 1
    while m <= SMALL and parts < MOST_PARTS and 2 * parts * tiles <= programs and 2 * parts * BLOCK < k:
        parts *= 2
    return parts


def _launch(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    checked(a, a_scales, b, b_scales, BLOCK)
    (m, k), n = a.shape, b.shape[0]
    out = a.new_empty(m, n, dtype=dtype)
    if not out.numel() or not k:
        return out.zero_()
    config = block_scaled_mm_config(architecture(a.device), m)
    parts = parts_of(m, n, k, config, config.programs * multiprocessors(a.device))
    if parts == 1:
        run(config, (a, a_scales, b, b_scales), out, BLOCK)
        return out
    sums = a.new_empty(parts, m, n, dtype=torch.float32)
    run(config, (a, a_scales, b, b_scales), sums, BLOCK, parts)
    return sums.sum(0).to(dtype)


def _fake(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


# block_scaled_mm(a [M, K] E4M3, a_scales [M, ceil(K / 128)], b [N, K] E4M3, b_scales [ceil(N / 128), ceil(K / 128)],
#     dtype) -> [M, N] in `dtype`: BF16 or FP32. Raises ValueError if shapes or formats do not fit.
block_scaled_mm: TritonOp[..., Tensor] = TritonOp("block_scaled_mm", reference=_reference, launch=_launch, fake=_fake)


def variant(
    name: str, arch: Arch, config: Config, b_rows: int, out: str, accumulate: bool, whole_k: bool = True, parts: int = 1
) -> Variant:
    """One compilation of the kernel, and what it must come to."""
    a, b = operand_types(arch, config)
    signature = {"a": a, "a_scales": "*fp32", "b": b, "b_scales": "*fp32", "out": out}
    aligned = (*(name for name, kind in signature.items() if kind[0] == "*"), "M", "N", "K")
    signature |= dict.fromkeys(("M", "N", "K"), "i32")
    constants = {"B_ROWS": b_rows, "ACCUMULATE": accumulate, "WHOLE_K": whole_k, "PARTS": parts}
    kept = promises(arch, config, accumulate)
    if arch == "sm_90" and b_rows == BLOCK and config.num_warps == 4:
        # As many as a third program would leave: more are a sign of addresses that are kept and need not be.
        kept["registers"] = min(kept["registers"], 168)
    return Variant(name, block_scaled_mm_kernel, signature, constants, config, aligned, kept)


def variants(arch: Arch) -> Iterator[Variant]:
    """What the launcher may compile for an architecture, and the candidates that it may be compared with."""
    for name, config in BLOCK_SCALED_MM[arch].items():
        yield variant(f"block_scaled_mm_{name}", arch, config, BLOCK, "*bf16", False)
    large, small = (BLOCK_SCALED_MM[arch][name] for name in ("large", "small"))
    yield variant("block_scaled_mm_large_fp32", arch, large, BLOCK, "*fp32", False)
    if large.constants["LOADS"] == POINTERS:
        yield variant("block_scaled_mm_large_ragged", arch, large, BLOCK, "*bf16", False, whole_k=False)
    yield variant("block_scaled_mm_small_parts", arch, small, BLOCK, "*fp32", False, parts=8)
