"""Grouped matrix product in block-scaled FP8: rows sorted by expert, one weight per expert (arXiv 2412.19437, 3.3).

    out[rows of expert e] = a[rows of expert e] @ b[e]^T

a has one scale for 128 values of a row, b one for a block of 128x128. This is both passes through the experts of a
mixture: forward with the weights, and for the gradient of the input with their transposes.

How many rows each expert has is known on the device alone, so the launch cannot depend on it. A fixed number of
programs walks over one list of tiles, expert after expert, that each program derives from `ends` by a prefix sum. A
tile never crosses the end of an expert: its last rows are masked, so no row needs padding. Rows after the last expert
form a group of their own that has no weight, and become zeros.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from modelspec.kernels.block_scale import dequantize
from modelspec.kernels.triton_language import tl, triton
from modelspec.kernels.triton_op import TritonOp
from modelspec.kernels.variant import Arch, Config, Variant, fp8_type

# Values of a row of a, and rows and columns of b, that share a scale. The kernel's steps along K are one block long.
BLOCK = 128


def _reference(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, ends: Tensor) -> Tensor:
    wide = dequantize(a, a_scales, (1, BLOCK), torch.float32)
    out = wide.new_zeros(a.shape[0], b.shape[1])
    for expert, (begin, end) in enumerate(pairwise([0, *ends.tolist()])):
        out[begin:end] = wide[begin:end] @ dequantize(b[expert], b_scales[expert], (BLOCK, BLOCK), torch.float32).T
    return out.to(torch.bfloat16)


@triton.jit
def expert_tiles(ends, experts, columns, BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr):
    """After each expert, the number of tiles up to there, [EXPERTS], where `columns` tiles lie side by side."""
    expert = tl.arange(0, EXPERTS)
    end = tl.load(ends + expert, mask=expert < experts, other=0)
    begin = tl.load(ends + expert - 1, mask=(expert > 0) & (expert < experts), other=0)
    return tl.cumsum(tl.cdiv(end - begin, BLOCK_M) * columns, 0)


@triton.jit
def in_groups(tile, rows, columns, GROUP_M: tl.constexpr):
    """Row and column of a tile: GROUP_M rows of tiles go together, column by column, to share what L2 holds."""
    first = tile // (GROUP_M * columns) * GROUP_M
    height = tl.minimum(rows - first, GROUP_M)
    within = tile - first * columns
    return first + within % height, within // height


@triton.jit
def grouped_scaled_mm_kernel(
    a,
    a_scales,
    b,
    b_scales,
    ends,
    out,
    M,
    N,
    K,
    experts,
    a_scales_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EXPERTS: tl.constexpr,
    WHOLE_K: tl.constexpr,
):
    columns = tl.cdiv(N, BLOCK_N)
    steps = tl.cdiv(K, BLOCK_K)
    sums = expert_tiles(ends, experts, columns, BLOCK_M, EXPERTS)
    rest = M - tl.load(ends + experts - 1)
    tiles = tl.max(sums, 0) + tl.cdiv(rest, BLOCK_M) * columns
    inner = tl.arange(0, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        passed = sums <= tile
        # Past all experts, `expert` is their number: the group without a weight.
        expert = tl.minimum(tl.sum(passed.to(tl.int32), 0), experts)
        begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
        end = tl.load(ends + expert, mask=expert < experts, other=M)
        first = tl.max(tl.where(passed, sums, 0), 0)
        m, n = in_groups(tile - first, tl.cdiv(end - begin, BLOCK_M), columns, GROUP_M)

        # Whole rows count in 64 bits, what lies within a tile in 32. What lies outside is read inside, and not stored.
        top = begin + m * BLOCK_M
        left = n * BLOCK_N
        row = tl.arange(0, BLOCK_M)
        column = tl.arange(0, BLOCK_N)
        near_row = tl.minimum(row, M - 1 - top)
        near_column = tl.minimum(column, N - 1 - left)
        a_tile = a + top.to(tl.int64) * K
        b_tile = b + (expert.to(tl.int64) * N + left) * K
        a_at = near_row[:, None] * K + inner[None, :]
        b_at = near_column[:, None] * K + inner[None, :]
        a_scales_tile = a_scales + top
        b_scales_tile = b_scales + (expert * tl.cdiv(N, 128) + left // 128) * steps
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(0, tl.where(expert < experts, steps, 0)):
            if WHOLE_K:
                x = tl.load(a_tile + a_at)
                y = tl.load(b_tile + b_at)
            else:
                inside = inner[None, :] < K - step * BLOCK_K
                x = tl.load(a_tile + a_at, mask=inside, other=0.0)
                y = tl.load(b_tile + b_at, mask=inside, other=0.0)
            scale = tl.load(a_scales_tile + near_row) * tl.load(b_scales_tile + step)
            total = tl.fma(tl.dot(x, y.T), tl.broadcast_to(scale[:, None], (BLOCK_M, BLOCK_N)), total)
            a_tile += BLOCK_K
            b_tile += BLOCK_K
            a_scales_tile += a_scales_stride
        out_tile = out + top.to(tl.int64) * N + left
        inside = (row < end - top)[:, None] & (column < N - left)[None, :]
        tl.store(out_tile + row[:, None] * N + column[None, :], total.to(out.dtype.element_ty), mask=inside)


# BLOCK_N divides 128: then one scale of b covers a step of a tile.
_CONFIGS: dict[Arch, Config] = {
    # Two programs share a multiprocessor, and one promotes while the other multiplies.
    "sm_90": Config({"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": BLOCK, "GROUP_M": 16}, num_warps=4, num_stages=3),
    "sm_100": Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": BLOCK, "GROUP_M": 8}, num_warps=8, num_stages=4),
    "gfx942": Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": BLOCK, "GROUP_M": 8}, num_warps=8, num_stages=2),
    "gfx950": Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": BLOCK, "GROUP_M": 8}, num_warps=8, num_stages=2),
}


def _launch(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, ends: Tensor) -> Tensor:
    (m, k), (experts, n, _) = a.shape, b.shape
    out = a.new_empty(m, n, dtype=torch.bfloat16)
    if out.numel() == 0:
        return out
    if k == 0 or experts == 0:
        return out.zero_()
    config = _CONFIGS["sm_90"]
    most = (triton.cdiv(m, config.constants["BLOCK_M"]) + experts) * triton.cdiv(n, config.constants["BLOCK_N"])
    grouped_scaled_mm_kernel[(min(most, 4),)](
        a,
        a_scales,
        b,
        b_scales,
        ends,
        out,
        m,
        n,
        k,
        experts,
        a_scales.stride(1),
        EXPERTS=triton.next_power_of_2(experts),
        WHOLE_K=k % BLOCK == 0,
        **config.options(),
    )
    return out


def _fake(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, ends: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=torch.bfloat16)


# grouped_scaled_mm(a [M, K] E4M3, a_scales [M, ceil(K / 128)] in column-major memory, b [experts, N, K] E4M3,
#     b_scales [experts, ceil(N / 128), ceil(K / 128)], ends [experts] int32) -> [M, N] in BF16
grouped_scaled_mm: TritonOp[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] = TritonOp(
    "grouped_scaled_mm", reference=_reference, launch=_launch, fake=_fake
)


def variants(arch: Arch) -> Iterator[Variant]:
    """What the launcher may compile for an architecture."""
    fp8 = "*" + fp8_type(arch)
    signature = {"a": fp8, "a_scales": "*fp32", "b": fp8, "b_scales": "*fp32", "ends": "*i32", "out": "*bf16"}
    signature |= dict.fromkeys(("M", "N", "K", "experts", "a_scales_stride"), "i32")
    config = _CONFIGS[arch]
    for whole in (True, False):
        yield Variant(
            name=f"grouped_scaled_mm{'' if whole else '_ragged_k'}",
            kernel=grouped_scaled_mm_kernel,
            signature=signature,
            constants={"EXPERTS": 256, "WHOLE_K": whole},
            config=config,
            aligned=("a", "a_scales", "b", "b_scales", "ends", "out", "N", "K"),
        )
