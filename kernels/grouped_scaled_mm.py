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

from modelspec.kernels.block_scale import BLOCK
from modelspec.kernels.block_scaled_mm import banded, checked, product
from modelspec.kernels.configs import (
    BLOCK_SCALED_MM,
    DESCRIPTORS,
    architecture,
    block_scaled_mm_config,
    multiprocessors,
)
from modelspec.kernels.operands import require_ascending, require_int32
from modelspec.kernels.product_tile import B, aligned, operand_types, product_tile, promises, tiles_of
from modelspec.kernels.triton_language import tl, triton
from modelspec.kernels.triton_op import TritonOp
from modelspec.kernels.variant import Arch, Config, Variant


def _checked(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, ends: Tensor) -> None:
    """Raises ValueError unless every expert has a weight of as many columns as a, and all blocks have their scales."""
    if not len(b) == len(b_scales) == len(ends):
        found = f"{len(b)} weights, scales of {len(b_scales)} and {len(ends)} ends"
        raise ValueError(f"{found} must be of as many experts")
    require_int32("ends", ends)
    for weight, scales in zip(b[:1], b_scales[:1], strict=True):
        checked(a, a_scales, weight, scales, BLOCK)


def _reference(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, ends: Tensor, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    _checked(a, a_scales, b, b_scales, ends)
    within = require_ascending("ends", ends, len(a))
    out = a.new_zeros(a.shape[0], b.shape[1], dtype=dtype)
    for expert, (begin, end) in enumerate(pairwise([0, *within])):
        out[begin:end] = product(a[begin:end], a_scales[begin:end], b[expert], b_scales[expert], BLOCK)
    return out


@triton.jit
def within(index, most):
    """The nearest index from 0 to `most`."""
    return tl.minimum(tl.maximum(index, 0), most)


@triton.jit
def expert_tiles(ends, experts, rows, columns, BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr):
    """After each expert, the number of tiles up to there, [EXPERTS], where `columns` tiles lie side by side."""
    expert = tl.arange(0, EXPERTS)
    end = tl.load(ends + expert, mask=expert < experts, other=0)
    begin = tl.load(ends + expert - 1, mask=(expert > 0) & (expert < experts), other=0)
    height = tl.maximum(within(end, rows) - within(begin, rows), 0)
    return tl.cumsum(tl.cdiv(height, BLOCK_M) * columns, 0)


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
    EXPERTS: tl.constexpr,
    WHOLE_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    LOADS: tl.constexpr,
):
    """a [M, K] and b [experts * N, K], row-major, as pointers or descriptors of tiles; a_scales [M, blocks],
    column-major; b_scales [experts, N / 128, blocks], row-major; out [M, N].
    """
    tiles_n = tl.cdiv(N, BLOCK_N)
    blocks = tl.cdiv(K, B)
    sums = expert_tiles(ends, experts, M, tiles_n, BLOCK_M, EXPERTS)
    rest = M - within(tl.load(ends + experts - 1), M)
    tiles = tl.max(sums, 0) + tl.cdiv(rest, BLOCK_M) * tiles_n
    for number in range(tl.program_id(0), tiles, tl.num_programs(0)):
        passed = sums <= number
        # Past all experts, `expert` is their number: the group without a weight.
        expert = tl.minimum(tl.sum(passed.to(tl.int32), 0), experts)
        begin = within(tl.load(ends + expert - 1, mask=expert > 0, other=0), M)
        end = within(tl.load(ends + expert, mask=expert < experts, other=M), M)
        before = tl.max(tl.where(passed, sums, 0), 0)
        tile_m, tile_n = banded(number - before, tl.cdiv(end - begin, BLOCK_M), tiles_n, GROUP_M)
        top = begin + tile_m * BLOCK_M
        left = tile_n * BLOCK_N
        total = product_tile(
            a,
            top,
            M - top,
            a_scales + top,
            M,
            b,
            expert * N + left,
            N - left,
            b_scales + (expert * tl.cdiv(N, B) + left // B) * blocks,
            1,
            K,
            0,
            tl.where(expert < experts, blocks, 0),
            B,
            WHOLE_K,
            BLOCK_M,
            BLOCK_N,
            LOADS,
        )
        row = tl.arange(0, BLOCK_M)
        column = tl.arange(0, BLOCK_N)
        at = out + top.to(tl.int64) * N + left + row[:, None] * N + column[None, :]
        stored = (row < end - top)[:, None] & (column < N - left)[None, :]
        tl.store(at, total.to(out.dtype.element_ty), mask=stored)


def run(config: Config, operands: tuple[Tensor, Tensor, Tensor, Tensor], ends: Tensor, out: Tensor) -> None:
    """Launches the kernel: a, its scales, b, its scales. For benchmarks too, which compare configurations."""
    a, a_scales, b, b_scales = operands
    a, b, a_scales, b_scales = aligned(a), aligned(b), a_scales.T.contiguous(), b_scales.contiguous()
    (m, k), (experts, n, _) = a.shape, b.shape
    block_m, block_n = config.constants["BLOCK_M"], config.constants["BLOCK_N"]
    # Each expert has one broken tile at most, and so has the rest.
    most = (triton.cdiv(m, block_m) + experts) * triton.cdiv(n, block_n)
    grouped_scaled_mm_kernel[(min(most, config.programs * multiprocessors(a.device)),)](
        tiles_of(a, block_m, config),
        a_scales,
        tiles_of(b.view(-1, k), block_n, config),
        b_scales,
        ends.contiguous(),
        out,
        m,
        n,
        k,
        experts,
        EXPERTS=triton.next_power_of_2(experts),
        # Descriptors give zeros outside by themselves.
        WHOLE_K=k % BLOCK == 0 or config.constants["LOADS"] == DESCRIPTORS,
        **config.options(),
    )


def _launch(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, ends: Tensor, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    _checked(a, a_scales, b, b_scales, ends)
    (m, k), (experts, n, _) = a.shape, b.shape
    out = a.new_empty(m, n, dtype=dtype)
    if not out.numel() or not k or not experts:
        return out.zero_()
    run(block_scaled_mm_config(architecture(a.device), m // experts), (a, a_scales, b, b_scales), ends, out)
    return out


def _fake(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, ends: Tensor, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=dtype)


# grouped_scaled_mm(a [M, K] E4M3, a_scales [M, ceil(K / 128)] in column-major memory, b [experts, N, K] E4M3,
#     b_scales [experts, ceil(N / 128), ceil(K / 128)], ends [experts] int32, dtype) -> [M, N] in `dtype`: BF16 or FP32
# Raises ValueError if shapes do not fit.
grouped_scaled_mm: TritonOp[..., Tensor] = TritonOp(
    "grouped_scaled_mm", reference=_reference, launch=_launch, fake=_fake
)


def variants(arch: Arch) -> Iterator[Variant]:
    """What the launcher may compile for an architecture, with BF16 out."""
    for size in ("large", "small"):
        config = BLOCK_SCALED_MM[arch][size]
        yield _variant(f"grouped_scaled_mm_{size}", arch, config, True)
        if config.constants["LOADS"] != DESCRIPTORS:
            yield _variant(f"grouped_scaled_mm_{size}_ragged", arch, config, False)


def _variant(name: str, arch: Arch, config: Config, whole_k: bool) -> Variant:
    a, b = operand_types(arch, config)
    signature = {"a": a, "a_scales": "*fp32", "b": b, "b_scales": "*fp32", "ends": "*i32", "out": "*bf16"}
    aligned = (*(name for name, kind in signature.items() if kind[0] == "*"), "N", "K")
    signature |= dict.fromkeys(("M", "N", "K", "experts"), "i32")
    constants = {"EXPERTS": 512, "WHOLE_K": whole_k}
    kernel = grouped_scaled_mm_kernel
    return Variant(name, kernel, signature, constants, config, aligned, promises(arch, config))
