"""The configurations of a product against each other, so that the shipped table can name the fastest.

The winner of each shape is named in the table at the end. Specialised warps come last, in a section of their own: what
can hang a device must not take the other results with it.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import dense, grouped
from benchmarks.gpu.timing import Case, Place, Side, distance
from modelspec.kernels import block_scaled_mm, block_scaled_wgrad, grouped_scaled_mm, grouped_scaled_wgrad
from modelspec.kernels.block_scale import BLOCK
from modelspec.kernels.configs import BLOCK_SCALED_MM, BLOCK_SCALED_WGRAD, SPECIALIZED, architecture
from modelspec.kernels.variant import Config

DENSE = ((4096, 7168, 16384), (4096, 4096, 7168), (4096, 24576, 1536), (4096, 32768, 512), (64, 7168, 16384))
WGRAD = dense.WGRAD[:2]
GROUPED = grouped.FPROP[:2]
GROUPED_WGRAD = grouped.WGRAD[:1]


def plain(configs: Mapping[str, Config]) -> dict[str, Config]:
    """Configurations whose warps all do the same."""
    return {name: each for name, each in configs.items() if each.constants["LOADS"] != SPECIALIZED}


def contended(configs: Mapping[str, Config]) -> dict[str, Config]:
    """Those with specialised warps, and the one to beat."""
    return {"large": configs["large"]} | {name: c for name, c in configs.items() if name not in plain(configs)}


def dense_run(config: Config, b_rows: int, dtype: torch.dtype, x: dense.Operands) -> Tensor:
    """A dense product with this configuration."""
    out = x.a.new_empty(x.a.shape[0], x.b.shape[0], dtype=dtype)
    block_scaled_mm.run(config, x.scaled, out, b_rows)
    return out


def grouped_run(config: Config, x: Any) -> Tensor:
    """fprop or dgrad of the experts with this configuration."""
    out = x.a.new_empty(x.a.shape[0], x.b.shape[1])
    grouped_scaled_mm.run(config, x.scaled[:4], x.ends, out)
    return out


def grouped_wgrad_run(config: Config, x: Any) -> Tensor:
    """wgrad of the experts with this configuration."""
    out = x.a.new_empty(len(x.ends), x.a.shape[1], x.b.shape[1], dtype=torch.float32)
    grouped_scaled_wgrad.run(config, x.scaled[:4], x.scaled[4], out)
    return out


def dense_cases(place: Place, products: Mapping[str, Config], wgrads: Mapping[str, Config]) -> Iterator[Case]:
    """Dense products under these configurations."""
    for operation, shapes, configs, b_rows, dtype, reference in (
        ("fprop", DENSE, products, BLOCK, torch.bfloat16, block_scaled_mm.block_scaled_mm.reference),
        ("wgrad", WGRAD, wgrads, 1, torch.float32, block_scaled_wgrad.block_scaled_wgrad.reference),
    ):
        for shape in dense.DRY if place.dry else shapes:
            need = dense.work(shape, b_rows, dtype.itemsize)
            sides = [
                Side(name, partial(dense_run, config, b_rows, dtype), distance, dense.SAME, **need)
                for name, config in configs.items()
            ]
            make = dense.operands(place, shape, b_rows)
            yield Case(operation, "x".join(map(str, shape)), make, partial(_truth, reference), sides)


def _truth(reference: Any, x: Any) -> Tensor:
    return reference(*x.scaled)


def cases(place: Place) -> Iterator[Case]:
    """Every configuration without specialised warps."""
    arch = architecture(place.device)
    products, wgrads = plain(BLOCK_SCALED_MM[arch]), plain(BLOCK_SCALED_WGRAD[arch])
    yield from dense_cases(place, products, wgrads)
    for shape in grouped.DRY if place.dry else GROUPED:
        need = grouped.product_work(shape)
        sides = [Side(name, partial(grouped_run, c), distance, dense.SAME, **need) for name, c in products.items()]
        truth = partial(_truth, grouped_scaled_mm.grouped_scaled_mm.reference)
        yield Case("grouped fprop", "x".join(map(str, shape)), grouped.operands(place, shape), truth, sides)
    for shape in grouped.DRY if place.dry else GROUPED_WGRAD:
        need = grouped.wgrad_work(shape)
        sides = [Side(name, partial(grouped_wgrad_run, c), distance, dense.SAME, **need) for name, c in wgrads.items()]
        truth = partial(_truth, grouped_scaled_wgrad.grouped_scaled_wgrad.reference)
        yield Case("grouped wgrad", "x".join(map(str, shape)), grouped.wgrad_operands(place, shape), truth, sides)


def specialized_cases(place: Place) -> Iterator[Case]:
    """Specialised warps against the shipped configuration."""
    arch = architecture(place.device)
    yield from dense_cases(place, contended(BLOCK_SCALED_MM[arch]), contended(BLOCK_SCALED_WGRAD[arch]))
