"""Gradients of the experts' weights in block-scaled FP8: for each expert a sum over its tokens.

    grad_weight[e] = a[:, tokens of expert e] @ b[:, tokens of expert e]^T          a = grad_y^T [N, T], b = x^T [K, T]

Both are quantised along tokens, a scale for 128 of them. So that no block holds tokens of two experts, each expert's
tokens begin at a multiple of 128, and zeros fill its last block; `starts` says where, on the device alone.

A tile of a gradient has one owner and one order of sums, so that it is the same each time, also where it is added to a
gradient that stands.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from modelspec.kernels.block_scale import BLOCK
from modelspec.kernels.block_scaled_mm import banded, product
from modelspec.kernels.configs import (
    architecture,
    block_scaled_wgrad_config,
    multiprocessors,
)
from modelspec.kernels.operands import require_ascending, require_codes, require_int32, require_matrix
from modelspec.kernels.product_tile import B, aligned, operand_types, product_tile, promises, tiles_of
from modelspec.kernels.triton_language import tl, triton
from modelspec.kernels.triton_op import TritonOp
from modelspec.kernels.variant import Arch, Config, Variant


@triton.jit
def grouped_scaled_wgrad_kernel(
    a,
    a_scales,
    b,
    b_scales,
    starts,
    out,
    N,
    K,
    T,
    experts,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    LOADS: tl.constexpr,
):
    """a [N, T] and b [K, T], row-major, as pointers or descriptors of tiles; a_scales [N, T / 128] and b_scales
    [K, T / 128], column-major; out [experts, N, K].
    """
    tiles_m = tl.cdiv(N, BLOCK_M)
    tiles_n = tl.cdiv(K, BLOCK_N)
    for number in range(tl.program_id(0), experts * tiles_m * tiles_n, tl.num_programs(0)):
        expert = number // (tiles_m * tiles_n)
        # In blocks, so that the compiler sees that tokens are read from multiples of 128 on.
        first = tl.minimum(tl.maximum(tl.load(starts + expert) // B, 0), T // B)
        last = tl.minimum(tl.load(starts + expert + 1) // B, T // B)
        tile_m, tile_n = banded(number % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)
        top = tile_m * BLOCK_M
        left = tile_n * BLOCK_N
        total = product_tile(
            a,
            top,
            N - top,
            a_scales + first.to(tl.int64) * N + top,
            N,
            b,
            left,
            K - left,
            b_scales + first.to(tl.int64) * K + left,
            K,
            T,
            first,
            last,
            1,
            True,
            BLOCK_M,
            BLOCK_N,
            LOADS,
        )
        row = tl.arange(0, BLOCK_M)
        column = tl.arange(0, BLOCK_N)
        at = out + (expert.to(tl.int64) * N + top) * K + left + row[:, None] * K + column[None, :]
        # An expert without tokens leaves a gradient that stands alone.
        height = tl.where(first < last, N - top, 0) if ACCUMULATE else N - top
        stored = (row < height)[:, None] & (column < K - left)[None, :]
        if ACCUMULATE:
            total += tl.load(at, mask=stored, other=0.0)
        tl.store(at, total, mask=stored)


def run(
    config: Config,
    operands: tuple[Tensor, Tensor, Tensor, Tensor],
    starts: Tensor,
    out: Tensor,
    accumulate: bool = False,
) -> None:
    """Launches the kernel: a, its scales, b, its scales. For benchmarks too, which compare configurations."""
    a, a_scales, b, b_scales = operands
    (experts, n, k), t = out.shape, a.shape[1]
    # All are as they should be already, unless a caller made them by other means than the quantisers.
    a, b, a_scales, b_scales = aligned(a), aligned(b), a_scales.T.contiguous(), b_scales.T.contiguous()
    block_m, block_n = config.constants["BLOCK_M"], config.constants["BLOCK_N"]
    tiles = experts * triton.cdiv(n, block_m) * triton.cdiv(k, block_n)
    grouped_scaled_wgrad_kernel[(min(tiles, config.programs * multiprocessors(a.device)),)](
        tiles_of(a, block_m, config),
        a_scales,
        tiles_of(b, block_n, config),
        b_scales,
        starts.contiguous(),
        out,
        n,
        k,
        t,
        experts,
        ACCUMULATE=accumulate,
        **config.options(),
    )


def _checked(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> None:
    """Raises ValueError unless both are matrices in FP8 with whole blocks of tokens, as many, and scales for them."""
    for name, matrix in (("a", a), ("b", b)):
        require_matrix(name, matrix)
        require_codes(name, matrix)
    tokens = a.shape[1]
    if b.shape[1] != tokens or tokens % BLOCK:
        told = f"a {list(a.shape)} and b {list(b.shape)} must have as many tokens, a multiple of {BLOCK}"
        raise ValueError(f"{told}: quantise them by groups, with starts at multiples of {BLOCK}")
    for name, matrix, scales in (("a", a, a_scales), ("b", b, b_scales)):
        expected = [matrix.shape[0], tokens // BLOCK]
        if list(scales.shape) != expected:
            raise ValueError(f"{name} {list(matrix.shape)} has scales {expected}, not {list(scales.shape)}")


def _reference(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, starts: Tensor) -> Tensor:
    _checked(a, a_scales, b, b_scales)
    out = _fake(a, a_scales, b, b_scales, starts)
    for expert, (begin, end) in enumerate(pairwise(require_ascending("starts", starts, a.shape[1]))):
        tokens, blocks = slice(begin, end), slice(begin // BLOCK, end // BLOCK)
        out[expert] = product(a[:, tokens], a_scales[:, blocks], b[:, tokens], b_scales[:, blocks], 1)
    return out


def _launch(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, starts: Tensor) -> Tensor:
    _checked(a, a_scales, b, b_scales)
    require_int32("starts", starts)
    out = _fake(a, a_scales, b, b_scales, starts)
    if not out.numel() or not a.shape[1]:
        return out.zero_()
    run(block_scaled_wgrad_config(architecture(a.device)), (a, a_scales, b, b_scales), starts, out)
    return out


def _fake(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, starts: Tensor) -> Tensor:
    return a.new_empty(starts.shape[0] - 1, a.shape[0], b.shape[0], dtype=torch.float32)


# grouped_scaled_wgrad(a [N, T] E4M3, a_scales [N, T / 128], b [K, T] E4M3, b_scales [K, T / 128],
#     starts [experts + 1] int32, multiples of 128) -> [experts, N, K] in FP32
# Tokens from starts[e] up to starts[e + 1] are expert e's; those after the last start are nobody's. Raises ValueError
# if shapes do not fit.
grouped_scaled_wgrad: TritonOp[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] = TritonOp(
    "grouped_scaled_wgrad", reference=_reference, launch=_launch, fake=_fake
)


def _add_reference(out: Tensor, a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, starts: Tensor) -> None:
    _checked_out(out, a, b, starts)
    out += _reference(a, a_scales, b, b_scales, starts)


def _add_launch(out: Tensor, a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, starts: Tensor) -> None:
    _checked(a, a_scales, b, b_scales)
    require_int32("starts", starts)
    _checked_out(out, a, b, starts)
    if out.numel() and a.shape[1]:
        config = block_scaled_wgrad_config(architecture(a.device))
        run(config, (a, a_scales, b, b_scales), starts, out, accumulate=True)


def _add_fake(out: Tensor, a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, starts: Tensor) -> None:
    pass


def _checked_out(out: Tensor, a: Tensor, b: Tensor, starts: Tensor) -> None:
    expected = [starts.shape[0] - 1, a.shape[0], b.shape[0]]
    if list(out.shape) != expected or out.dtype != torch.float32 or not out.is_contiguous():
        found = f"{list(out.shape)} in {out.dtype}" + (" with gaps or turned" if not out.is_contiguous() else "")
        raise ValueError(f"the gradient to add to is {found}: it must be {expected} in FP32, row-major")


# grouped_scaled_wgrad_add(out [experts, N, K] FP32, a, a_scales, b, b_scales, starts): adds the gradients to `out`.
grouped_scaled_wgrad_add: TritonOp[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None] = TritonOp(
    "grouped_scaled_wgrad_add", reference=_add_reference, launch=_add_launch, fake=_add_fake, mutates=("out",)
)


def variants(arch: Arch) -> Iterator[Variant]:
    """What the launchers may compile for an architecture."""
    config = block_scaled_wgrad_config(arch)
    yield _variant("grouped_scaled_wgrad", arch, config, False)
    yield _variant("grouped_scaled_wgrad_add", arch, config, True)


def _variant(name: str, arch: Arch, config: Config, accumulate: bool) -> Variant:
    a, b = operand_types(arch, config)
    signature = {"a": a, "a_scales": "*fp32", "b": b, "b_scales": "*fp32", "starts": "*i32", "out": "*fp32"}
    aligned = (*(name for name, kind in signature.items() if kind[0] == "*"), "N", "K", "T")
    signature |= dict.fromkeys(("N", "K", "T", "experts"), "i32")
    kernel, constants = grouped_scaled_wgrad_kernel, {"ACCUMULATE": accumulate}
    return Variant(name, kernel, signature, constants, config, aligned, promises(arch, config, accumulate))
