"""The three products of a linear layer in block-scaled FP8, over DeepSeek-V3's shapes, beside those that torch has.

Torch multiplies in BF16, in FP8 with one scale for each row, and, where cuBLAS has it, in FP8 with our blocks. All but
the product with a scale for each row read the same numbers.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.timing import Case, Place, Side, distance
from modelspec.kernels.block_scale import BLOCK, quantize
from modelspec.kernels.block_scaled_mm import block_scaled_mm
from modelspec.kernels.block_scaled_wgrad import block_scaled_wgrad
from modelspec.kernels.quantize import quantized_rows

Shape = tuple[int, int, int]
# Rows of a, rows of b, and what is summed over: tokens, outputs, inputs.
FPROP: tuple[Shape, ...] = (
    (4096, 7168, 16384),
    (4096, 4096, 7168),
    (4096, 7168, 2048),
    (4096, 24576, 1536),
    (4096, 2112, 7168),
    (4096, 32768, 512),
    (64, 7168, 16384),
)
# Tokens, inputs, outputs.
DGRAD: tuple[Shape, ...] = ((4096, 7168, 4096), (4096, 2048, 7168), (4096, 16384, 7168))
# Outputs, inputs, tokens.
WGRAD: tuple[Shape, ...] = ((7168, 16384, 4096), (4096, 7168, 4096), (24576, 1536, 4096), (2112, 7168, 4096))
DRY: tuple[Shape, ...] = ((80, 144, 272),)

# Beside an emulation of the same product: BF16's rounding, and what tensor cores cut from sums of 128.
SAME = 5e-3
# Beside an emulation in FP8, a product of the numbers before they were quantised in blocks, or quantised in rows.
NEAR = 8e-2


class Operands(NamedTuple):
    """a [M, K] and b [N, K], in BF16 and in FP8: as our products take them, and as those of torch do."""

    a: Tensor
    b: Tensor
    # Codes and scales of a, then of b.
    scaled: tuple[Tensor, Tensor, Tensor, Tensor]
    # The same with b's scales as cuBLAS wants them.
    blocks: tuple[Tensor, Tensor, Tensor, Tensor]
    # The same with a scale for each row, [M, 1] and [1, N].
    rows: tuple[Tensor, Tensor, Tensor, Tensor]


def operands(place: Place, shape: Shape, b_rows: int) -> Callable[[int], Operands]:
    """Random operands by seed; b in blocks of b_rows x 128."""
    m, n, k = shape

    def make(seed: int) -> Operands:
        a, b = place.randn(m, k, seed=seed), place.randn(n, k, seed=seed + 100)
        qa, a_scales = quantized_rows(a, False)
        qb, b_scales = quantized_rows(b, False) if b_rows == 1 else quantize(b, (BLOCK, BLOCK))
        # cuBLAS reads the scales of a weight along K, in whole fours.
        padded = b_scales if b_rows == 1 else F.pad(b_scales, (0, -b_scales.shape[1] % 4)).T
        row_qb, row_b_scales = _by_rows(b)
        rows = (*_by_rows(a), row_qb, row_b_scales.T.contiguous())
        return Operands(a, b, (qa, a_scales, qb, b_scales), (qa, a_scales, qb, padded), rows)

    return make


def _by_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.float()
    scales = wide.abs().amax(1, keepdim=True) / 448
    return (wide / scales).to(torch.float8_e4m3fn), scales


def work(shape: Shape, b_rows: int, out_bytes: int) -> dict[str, Any]:
    """FLOPs and bytes of a product in FP8: operands and scales read once, the result written once."""
    m, n, k = shape
    scales = 4 * -(-k // BLOCK) * (m + -(-n // b_rows))
    return {"flops": 2 * m * n * k, "bytes": m * k + n * k + scales + m * n * out_bytes}


def by_torch(shape: Shape, b_rows: int) -> list[Side]:
    """What torch has for the same product, with BF16 results."""
    m, n, k = shape
    wide: dict[str, Any] = {"flops": 2 * m * n * k, "bytes": 2 * (m * k + n * k + m * n), "format": "bf16"}
    narrow = work(shape, b_rows, 2)
    return [
        Side("BF16", lambda x: x.a @ x.b.T, distance, NEAR, **wide, ours=False),
        Side("FP8 rows", scaled_rows, distance, NEAR, **narrow, ours=False),
        Side("FP8 blocks", lambda x: scaled_blocks(x, b_rows), distance, SAME, **narrow, ours=False),
    ]


def scaled_rows(x: Operands) -> Tensor:
    """torch's product with a scale for each row, in the mode that does not promote sums."""
    qa, a_scales, qb, b_scales = x.rows
    return torch.ops.aten._scaled_mm(qa, qb.T, a_scales, b_scales, out_dtype=torch.bfloat16, use_fast_accum=True)


def scaled_blocks(x: Operands, b_rows: int) -> Tensor:
    """torch's product in our blocks."""
    from torch.nn.functional import ScalingType

    qa, a_scales, qb, b_scales = x.blocks
    recipe = ScalingType.BlockWise1x128 if b_rows == 1 else ScalingType.BlockWise128x128
    return F.scaled_mm(*(qa, qb.T, a_scales, ScalingType.BlockWise1x128, b_scales, recipe), output_dtype=torch.bfloat16)


def cases(place: Place) -> Iterator[Case]:
    """fprop, dgrad, wgrad."""
    for name, shapes in (("fprop", FPROP), ("dgrad", DGRAD)):
        for shape in DRY if place.dry else shapes:
            ours = Side("ours", lambda x: block_scaled_mm.launch(*x.scaled), distance, SAME, **work(shape, BLOCK, 2))
            yield Case(
                name,
                "x".join(map(str, shape)),
                operands(place, shape, BLOCK),
                lambda x: block_scaled_mm.reference(*x.scaled),
                [ours, *by_torch(shape, BLOCK)],
            )
    for shape in DRY if place.dry else WGRAD:
        ours = Side("ours", lambda x: block_scaled_wgrad.launch(*x.scaled), distance, SAME, **work(shape, 1, 4))
        yield Case(
            "wgrad",
            "x".join(map(str, shape)),
            operands(place, shape, 1),
            lambda x: block_scaled_wgrad.reference(*x.scaled),
            [ours, *by_torch(shape, 1)],
        )
