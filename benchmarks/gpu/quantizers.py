"""Quantisers beside a copy of what they read: they do little arithmetic, so that moving bytes is all there is to it.

The result must be that of the plain definition, byte by byte.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.grouped import ends_of
from benchmarks.gpu.timing import Case, Place, Side, differing
from modelspec.kernels.block_scale import BLOCK
from modelspec.kernels.quantize import dequantize, quantize, quantize_both, quantize_transposed
from modelspec.kernels.quantize_grouped import quantize_grouped_transposed
from modelspec.kernels.quantize_weight import quantize_weight

# Tokens and channels; the same of experts; outputs and inputs of a weight.
SHAPES = ((32768, 7168), (4096, 7168), (32768, 4096))
EXPERTS = 8
WEIGHT = (7168, 16384)
DRY = (130, 272)
# Bytes of FP32 scales for an element.
SCALE = 4 / BLOCK

Results = tuple[Tensor, ...]


def case(
    place: Place, name: str, op: Any, shape: tuple[int, int], bytes: float, *options: Any, ends: Tensor | None = None
) -> Case:
    """An op on a matrix, with so many bytes for each element read and written."""
    rows, columns = DRY if place.dry else shape
    given = options if ends is None else (ends, *options)

    def copied(x: Tensor) -> Results:
        return (x.clone(),)

    def right(result: Results, truth: Results) -> float:
        return 0.0

    size = rows * columns
    return Case(
        name,
        f"{rows}x{columns}",
        place.matrices(rows, columns),
        lambda x: op.reference(x, *given),
        [
            Side("ours", lambda x: op.launch(x, *given), differing, 0.0, bytes * size),
            Side("copy", copied, right, 0.0, 4 * size, format="bf16", ours=False),
        ],
    )


def cases(place: Place) -> Iterator[Case]:
    """Activations in each orientation, in both, and along the tokens of experts; weights; and back."""
    one, both = 3 + SCALE, 4 + 2 * SCALE
    for shape in SHAPES[:1] if place.dry else SHAPES:
        yield case(place, "quantize", quantize, shape, one, False)
        yield case(place, "quantize_transposed", quantize_transposed, shape, one, False)
        yield case(place, "quantize_both", quantize_both, shape, both, False)
    first = SHAPES[0]
    yield case(place, "quantize_both, powers of two", quantize_both, first, both, True)
    ends = ends_of(place, EXPERTS, DRY[0] if place.dry else first[0])
    yield case(place, "quantize_grouped_transposed", quantize_grouped_transposed, first, one, False, ends=ends)
    # Both orientations of codes; their scales are one for 128 x 128.
    yield case(place, "quantize_weight", quantize_weight, WEIGHT, 4, False)
    yield dequantizing(place)


def dequantizing(place: Place) -> Case:
    """FP8 to BF16."""
    rows, columns = DRY if place.dry else SHAPES[0]

    def narrow(seed: int) -> Results:
        return quantize.reference(place.randn(rows, columns, seed=seed), False)

    def wide(form: Callable[..., Tensor]) -> Callable[[Results], Results]:
        return lambda narrow: (form(*narrow, torch.bfloat16),)

    side = Side("ours", wide(dequantize.launch), differing, 0.0, (3 + SCALE) * rows * columns)
    return Case("dequantize", f"{rows}x{columns}", narrow, wide(dequantize.reference), [side])
