"""One tile of a block-scaled FP8 product: the loop that the kernels of all products share.

Tensor cores add FP8 products up to about 14 bits, so that each 128 along K become a sum of their own, which an FMA
scales and adds to the FP32 total.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from modelspec.kernels.block_scale import BLOCK
from modelspec.kernels.configs import DESCRIPTORS, POINTERS, SPECIALIZED
from modelspec.kernels.triton_language import tl, triton
from modelspec.kernels.variant import Arch, Config, fp8_type

# Values along K that share a scale, and the length of a step.
B: tl.constexpr = tl.constexpr(BLOCK)
_POINTERS: tl.constexpr = tl.constexpr(POINTERS)


@triton.jit
def product_tile(
    a,
    a_top,
    a_height,
    a_scales,
    a_stride,
    b,
    b_top,
    b_height,
    b_scales,
    b_stride,
    K,
    first,
    last,
    B_ROWS: tl.constexpr,
    WHOLE_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOADS: tl.constexpr,
):
    """The sum over blocks `first` to `last` along K of a's rows from a_top on times b's from b_top on.

    a and b are matrices of K columns, as pointers or descriptors of tiles. Of the rows that the tile spans a_height and
    b_height exist; results for others are arbitrary. a_scales points at the scale of row a_top and block `first`, rows
    side by side and blocks a_stride apart; so does b_scales with B_ROWS = 1, otherwise one scale holds for all of b's
    rows here.
    """
    # Whole rows count in 64 bits, what lies within a tile in 32. Rows that do not exist are read at the last that does.
    a_row = tl.minimum(tl.arange(0, BLOCK_M), a_height - 1)
    b_row = tl.minimum(tl.arange(0, BLOCK_N), b_height - 1)
    inner = tl.arange(0, B)
    a_tile, b_tile = a, b
    a_at = a_row[:, None] * K + inner[None, :]
    b_at = b_row[:, None] * K + inner[None, :]
    if LOADS == _POINTERS:
        a_tile += a_top.to(tl.int64) * K + first * B
        b_tile += b_top.to(tl.int64) * K + first * B
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(first, last):
        if LOADS == _POINTERS:
            if WHOLE_K:
                x = tl.load(a_tile + a_at)
                y = tl.load(b_tile + b_at)
            else:
                inside = inner[None, :] < K - block * B
                x = tl.load(a_tile + a_at, mask=inside, other=0.0)
                y = tl.load(b_tile + b_at, mask=inside, other=0.0)
            a_tile += B
            b_tile += B
        else:
            x = a.load([a_top, block * B])
            y = b.load([b_top, block * B])
        scale = tl.load(a_scales + a_row)
        products = tl.dot(x, y.T)
        if B_ROWS == 1:
            # One scale after the other: their product would take as many registers as the total.
            products *= tl.load(b_scales + b_row)[None, :]
        else:
            # Loaded once per row: a scalar races in Triton's pipeline for Blackwell (meta-pytorch/tritonbench#1163).
            scale *= tl.load(b_scales + a_row * 0)
        total = tl.fma(products, tl.broadcast_to(scale[:, None], (BLOCK_M, BLOCK_N)), total)
        a_scales += a_stride
        b_scales += b_stride
    return total


def aligned(matrix: Tensor) -> Tensor:
    """Row-major, and every row begins at a multiple of 16 bytes, as wide loads ask for: a copy of what does not."""
    if matrix.shape[-1] % 16:
        return F.pad(matrix.view(torch.uint8), (0, -matrix.shape[-1] % 16)).view(matrix.dtype)
    matrix = matrix.contiguous()
    return matrix.clone() if matrix.data_ptr() % 16 else matrix


def tiles_of(matrix: Tensor, rows: int, config: Config) -> Any:
    """A matrix as a kernel takes it: as a descriptor of tiles of so many rows, or where there are none, itself."""
    if config.constants["LOADS"] != DESCRIPTORS:
        return matrix
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, [rows, BLOCK])


def operand_types(arch: Arch, config: Config) -> tuple[str, str]:
    """The types of a and b in the signature of a variant."""
    fp8, tall, wide = fp8_type(arch), config.constants["BLOCK_M"], config.constants["BLOCK_N"]
    if config.constants["LOADS"] == DESCRIPTORS:
        return f"tensordesc<{fp8}[{tall},{BLOCK}]>", f"tensordesc<{fp8}[{wide},{BLOCK}]>"
    return f"*{fp8}", f"*{fp8}"


def promises(arch: Arch, config: Config, accumulate: bool = False) -> dict[str, Any]:
    """What a kernel around the loop is held to: no spills, an FMA for each product, room for programs side by side."""
    if not arch.startswith("sm"):
        shared = {"gfx942": 65_536, "gfx950": 163_840}[arch]
        return {"spills": 0, "registers": 256, "shared": shared // config.programs}
    specialized = config.constants["LOADS"] == SPECIALIZED
    # Of twelve warps eight multiply, and four do no more than load.
    warps, multiplying = (12, 8) if specialized else (config.num_warps, config.num_warps)
    per_thread = config.constants["BLOCK_M"] * config.constants["BLOCK_N"] // (32 * multiplying)
    return {
        "spills": 0,
        # Registers come in eights, and a thread has 255 at most.
        "registers": min(255, 65_536 // (32 * warps * config.programs) // 8 * 8),
        "shared": 232_448 // config.programs,
        "fma": per_thread,
        "add": per_thread if accumulate else 0,
        "specialized": specialized,
    }
