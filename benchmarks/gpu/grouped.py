"""The products of a mixture's experts in block-scaled FP8, rows sorted by expert, beside torch's in BF16.

V3's experts are 2048 wide in a model of 7168. Routers do not share out tokens evenly, so neither does this: the largest
expert gets a few times as many rows as the smallest, one gets none, and few groups end at a multiple of a tile.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.dense import NEAR, SAME
from benchmarks.gpu.timing import Case, Place, Side, distance
from modelspec.kernels.block_scale import BLOCK, quantize
from modelspec.kernels.grouped_scaled_mm import grouped_scaled_mm
from modelspec.kernels.grouped_scaled_wgrad import grouped_scaled_wgrad
from modelspec.kernels.quantize import quantized_rows
from modelspec.kernels.quantize_grouped import quantize_grouped_transposed

# Experts, rows in all, outputs, inputs.
Shape = tuple[int, int, int, int]
FPROP: tuple[Shape, ...] = ((8, 32768, 4096, 7168), (8, 32768, 7168, 2048), (32, 65536, 4096, 7168))
DGRAD: tuple[Shape, ...] = ((8, 32768, 7168, 4096), (8, 32768, 2048, 7168))
WGRAD: tuple[Shape, ...] = ((8, 32768, 4096, 7168), (8, 32768, 7168, 2048), (32, 65536, 4096, 7168))
DRY: tuple[Shape, ...] = ((3, 150, 144, 272),)


def ends_of(place: Place, experts: int, rows: int) -> Tensor:
    """Ends of uneven groups, the second of which is empty: int32 [experts], the last of them `rows`."""
    shares = torch.rand(experts, generator=torch.Generator().manual_seed(0)) + 0.5
    shares[1] = 0
    ends = (shares.cumsum(0) / shares.sum() * rows).to(torch.int32)
    ends[-1] = rows
    return ends.to(place.device)


class Operands(NamedTuple):
    """Rows [M, K] and weights [experts, N, K], in BF16 and in FP8."""

    a: Tensor
    b: Tensor
    ends: Tensor
    scaled: tuple[Tensor, ...]


def operands(place: Place, shape: Shape) -> Callable[[int], Operands]:
    """For fprop and dgrad."""
    experts, m, n, k = shape
    ends = ends_of(place, experts, m)

    def make(seed: int) -> Operands:
        a, b = place.randn(m, k, seed=seed), place.randn(experts, n, k, seed=seed + 100)
        # One expert after the other: in FP32 all of them would fill a card.
        qb, b_scales = (torch.stack(part) for part in zip(*(quantize(w, (BLOCK, BLOCK)) for w in b), strict=True))
        return Operands(a, b, ends, (*quantized_rows(a, False), qb, b_scales, ends))

    return make


def wgrad_operands(place: Place, shape: Shape) -> Callable[[int], Operands]:
    """Gradients [M, N] and inputs [M, K], and both in FP8 along the rows of each expert."""
    experts, m, n, k = shape
    ends = ends_of(place, experts, m)

    def make(seed: int) -> Operands:
        grad, x = place.randn(m, n, seed=seed), place.randn(m, k, seed=seed + 100)
        qa, a_scales, _ = quantize_grouped_transposed.reference(grad, ends, False)
        qb, b_scales, starts = quantize_grouped_transposed.reference(x, ends, False)
        return Operands(grad, x, ends, (qa, a_scales, qb, b_scales, starts))

    return make


def product_work(shape: Shape) -> dict[str, Any]:
    """FLOPs and bytes of fprop and dgrad; nobody needs the weight of the empty expert."""
    experts, m, n, k = shape
    weights = (experts - 1) * n * k
    scales = 4 * -(-k // BLOCK) * (m + (experts - 1) * -(-n // BLOCK))
    return {"flops": 2 * m * n * k, "bytes": m * k + weights + scales + 2 * m * n}


def wgrad_work(shape: Shape) -> dict[str, Any]:
    """FLOPs and bytes of wgrad, padding left out."""
    experts, m, n, k = shape
    return {"flops": 2 * m * n * k, "bytes": m * (n + k) + 4 * (m // BLOCK) * (n + k) + 4 * experts * n * k}


def cases(place: Place) -> Iterator[Case]:
    """fprop, dgrad, wgrad."""
    for name, shapes in (("grouped fprop", FPROP), ("grouped dgrad", DGRAD)):
        for shape in DRY if place.dry else shapes:
            experts, m, n, k = shape
            wide = 2 * (m * k + (experts - 1) * n * k + m * n)
            yield Case(
                name,
                "x".join(map(str, shape)),
                operands(place, shape),
                lambda x: grouped_scaled_mm.reference(*x.scaled),
                [
                    Side("ours", lambda x: grouped_scaled_mm.launch(*x.scaled), distance, SAME, **product_work(shape)),
                    Side("BF16", _by_torch, distance, NEAR, wide, 2 * m * n * k, "bf16", ours=False),
                ],
            )
    for shape in DRY if place.dry else WGRAD:
        experts, m, n, k = shape
        wide = 2 * (m * k + experts * n * k + m * n)
        yield Case(
            "grouped wgrad",
            "x".join(map(str, shape)),
            wgrad_operands(place, shape),
            lambda x: grouped_scaled_wgrad.reference(*x.scaled),
            [
                Side("ours", lambda x: grouped_scaled_wgrad.launch(*x.scaled), distance, SAME, **wgrad_work(shape)),
                Side("BF16", _wgrad_by_torch, distance, NEAR, wide, 2 * m * n * k, "bf16", ours=False),
            ],
        )


def _by_torch(x: Operands) -> Tensor:
    return F.grouped_mm(x.a, x.b.mT, offs=x.ends)


def _wgrad_by_torch(x: Operands) -> Tensor:
    return F.grouped_mm(x.a.T, x.b, offs=x.ends)
