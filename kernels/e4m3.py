"""FP8 in the format E4M3: sign, 4 bits of exponent, 3 of mantissa; and matrices of it whose blocks share FP32 scales.

    value = q * scale of its block          a block: 1 or 128 rows times 128 columns

The rows of a half-precision number that hold an E4M3 number's bits have 2^-8 of its value, subnormals too, so that a
shift and a mask widen it; torch's own cast on CPU goes value by value and takes 17 times as long (2.96 against 0.17 ms
for 2^20 values on one core).
"""

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
# As AMD's CDNA 3 has it: half the range, one NaN and no negative zero.
E4M3_FNUZ = torch.float8_e4m3fnuz
# Columns that share a scale.
BLOCK = 128


def widened(q: Tensor) -> Tensor:
    """E4M3 [...] as FP32, exactly."""
    small = _widened_small(q)
    return q.float() if small is None else small.mul_(256.0)


def dequantized(q: Tensor, scales: Tensor, block_rows: int) -> Tensor:
    """The values of a matrix in FP32: E4M3 [rows, columns], FP32 scales [ceil(rows / block_rows), ceil(columns / 128)]."""
    small = _widened_small(q)
    # A power of two: both products are exact wherever the scale is not close to FP32's limits.
    values, scales = (q.float(), scales) if small is None else (small, scales * 256.0)
    if block_rows > 1:
        scales = scales.repeat_interleave(block_rows, 0)[: len(q)]
    whole = q.shape[1] // BLOCK * BLOCK
    values[:, :whole].unflatten(1, (-1, BLOCK)).mul_(scales[:, : whole // BLOCK, None])
    if whole < q.shape[1]:
        values[:, whole:].mul_(scales[:, -1:])
    return values


def _widened_small(q: Tensor) -> Tensor | None:
    """2^-8 of the values, or None where the shift does not apply or would lose a NaN."""
    if q.dtype != E4M3 or q.device.type != "cpu" or (q.view(torch.uint8).bitwise_and(127) == 127).any():
        return None
    # Sign-extended, bits 14 and 15 both hold the sign after the shift; the exponent's highest bit must be 0.
    bits = q.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~(1 << 14))
    return bits.view(torch.float16).float()
