"""Block-scaled FP8: small blocks of a matrix share one FP32 scale, so that 8 bits suffice (arXiv 2412.19437, 3.3).

A value is what its 8 bits say times the scale of its block, and the largest magnitude of a block becomes the largest
number of the format:

    amax = max |x|, at least 1e-12        scale = amax / 448        q = round(x * (448 / amax))

Power-of-two scales (`ue8m0`) are rounded up before anything is divided by them. Blocks are cut from the first row and
column on; those at the far edges hold what is left. Activations have blocks of 1 x 128, weights of 128 x 128. This is
the definition in plain torch. The kernels that only quantise give the same bits; those that compute something before,
SwiGLU or a norm, agree with their references up to the rounding of FP32, which now and then moves a code to the next.

NaN and infinities pass through the scale: whatever reads their block finds NaN.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from modelspec.kernels.e4m3 import widened

E4M3 = torch.float8_e4m3fn
# Along the dim that a product sums over, so many elements share a scale.
BLOCK = 128
# Keeps both quotients finite. A block of zeros has this over 448 as its scale, and codes of zero.
LEAST_AMAX = 1e-12
Block = tuple[int, int]


def e4m3(device: torch.device) -> torch.dtype:
    """E4M3 as a device has it: AMD's CDNA 3 knows only the variant up to 240 without negative zero."""
    if torch.version.hip is None or device.type != "cuda":
        return E4M3
    narrow = torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx94")
    return torch.float8_e4m3fnuz if narrow else E4M3


def scales_shape(shape: tuple[int, ...], block: Block) -> tuple[int, int]:
    """Blocks of a matrix of this shape: [ceil(rows / block rows), ceil(columns / block columns)]."""
    rows, columns = shape
    return -(-rows // block[0]), -(-columns // block[1])


def dequantize(q: Tensor, scales: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    """The values of matrices: q [..., rows, columns] in FP8 and FP32 scales, one per block -> the same in `dtype`.

    The product is taken in FP32 and rounded once.
    """
    return _scaled(widened(q), block, scales).to(dtype)


def quantize(x: Tensor, block: Block, ue8m0: bool = False, format: torch.dtype = E4M3) -> tuple[Tensor, Tensor]:
    """Matrices [..., rows, columns] in FP8, and the scales of their blocks in FP32.

    Rounds to nearest, ties to even, once, from the FP32 product.
    """
    wide = x.to(torch.float32)
    amax = _blocks(wide, block).abs().amax(dim=(-3, -1))
    scales, inverse = scales_of(amax, torch.finfo(format).max, ue8m0)
    return _scaled(wide, block, inverse).to(format, memory_format=torch.contiguous_format), scales


def scales_of(amax: Tensor, largest: float, ue8m0: bool) -> tuple[Tensor, Tensor]:
    """Scales of blocks with these largest magnitudes, and what to multiply values with to quantise them.

    The values come out at most at `largest`, up to half a unit of FP32, which rounds away: nothing saturates.
    """
    amax = amax.clamp(min=LEAST_AMAX)
    # Divided by tensors: torch replaces division by a number with multiplication on GPUs, and number / tensor anywhere.
    top = torch.full_like(amax, largest)
    if not ue8m0:
        return amax / top, top / amax
    scales = power_of_two_above(amax / top)
    return scales, torch.ones_like(scales) / scales


def power_of_two_above(x: Tensor) -> Tensor:
    """The least power of two that is not below x, a positive normal number in FP32; infinity and NaN stay."""
    carried = (x.view(torch.int32) + 0x7FFFFF) & 0x7F800000
    return torch.where(x.isnan(), x, carried.view(torch.float32))


def _blocks(x: Tensor, block: Block) -> Tensor:
    """[..., rows, columns] -> [..., blocks, rows of a block, blocks, columns of a block], padded with zeros."""
    down, across = scales_shape(tuple(x.shape[-2:]), block)
    padding = (0, -x.shape[-1] % block[1], 0, -x.shape[-2] % block[0])
    padded = F.pad(x, padding) if any(padding) else x
    return padded.reshape(*x.shape[:-2], down, block[0], across, block[1])


def _scaled(x: Tensor, block: Block, factors: Tensor) -> Tensor:
    """x times one factor per block."""
    wide = (_blocks(x, block) * factors[..., :, None, :, None]).flatten(-2).flatten(-3, -2)
    if wide.shape == x.shape:
        return wide
    return wide[..., : x.shape[-2], : x.shape[-1]].clone(memory_format=torch.contiguous_format)
