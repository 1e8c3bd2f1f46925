"""Block-scaled FP8: small blocks of a matrix share one FP32 scale, so that 8 bits suffice (arXiv 2412.19437, 3.3).

A value is what its 8 bits say times the scale of its block. Blocks are cut from the first row and column on; those at
the far edges hold what is left.
"""

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
Block = tuple[int, int]


def scales_shape(shape: tuple[int, ...], block: Block) -> tuple[int, int]:
    """Blocks of a matrix of this shape: [ceil(rows / block rows), ceil(columns / block columns)]."""
    rows, columns = shape
    return -(-rows // block[0]), -(-columns // block[1])


def dequantize(weight: Tensor, scales: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    """The values of a matrix: weight [rows, columns] in FP8 and FP32 scales, one per block -> the matrix in `dtype`.

    The product is taken in FP32 and rounded once.
    """
    return (weight.to(torch.float32) * _spread(scales, weight, block)).to(dtype)


def quantize(weight: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """A matrix in FP8 and its scales: the largest magnitude of a block becomes 448, the largest number of E4M3."""
    rows, columns = scales_shape(tuple(weight.shape), block)
    padded = weight.new_zeros(rows * block[0], columns * block[1], dtype=torch.float32)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    amax = padded.view(rows, block[0], columns, block[1]).abs().amax(dim=(1, 3))
    # Any scale gives zeros back; the least normal one keeps tiny blocks from a scale that rounds to 0.
    scales = (amax / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    scaled = weight.to(torch.float32) / _spread(scales, weight, block)
    return scaled.clamp(-LARGEST, LARGEST).to(E4M3), scales


def _spread(scales: Tensor, weight: Tensor, block: Block) -> Tensor:
    """One scale per element of the matrix."""
    wide = scales.repeat_interleave(block[0], 0)[: weight.shape[0]]
    return wide.repeat_interleave(block[1], 1)[:, : weight.shape[1]]
