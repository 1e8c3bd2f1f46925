"""Triton's interpreter casts as torch does once it is repaired, over every value that could show a difference."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from modelspec.kernels.triton_language import tl, triton

E4M3 = torch.float8_e4m3fn


@triton.jit
def cast_kernel(source, target, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source + at, mask=at < count)
    tl.store(target + at, values.to(target.dtype.element_ty), mask=at < count)


def interpreted(values: Tensor, dtype: torch.dtype) -> Tensor:
    target = torch.empty(values.shape, dtype=dtype)
    cast_kernel[(triton.cdiv(len(values), 4096),)](values, target, len(values), BLOCK=4096)
    return target


def values_that_matter(dtype: torch.dtype) -> Tensor:
    """Every value of a format with its neighbours in FP32, the middle between it and the next one with its own, what is
    below the least and above the largest, infinities and NaN; and every value of BF16.
    """
    bits = torch.arange(256, dtype=torch.uint8) if dtype.itemsize == 1 else torch.arange(-(2**15), 2**15).short()
    exact = bits.view(dtype).float()
    finite = exact[exact.isfinite()].sort().values
    middles = (finite[1:] + finite[:-1]) / 2
    points = torch.cat([finite, middles, finite[-1:] * 1.5, finite[-1:] * 2, finite[:1] * 2])
    around = [torch.nextafter(points, torch.tensor(side)) for side in (-np.inf, np.inf)]
    every_bf16 = torch.arange(-(2**15), 2**15).short().view(torch.bfloat16).float()
    edges = torch.tensor([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 3.4e38])
    return torch.cat([points, *around, every_bf16, edges])


def same(ours: Tensor, theirs: Tensor) -> Tensor:
    """Where two results agree bit by bit, NaN with any NaN."""
    raw = torch.uint8 if ours.dtype.itemsize == 1 else torch.int16
    both_nan = ours.float().isnan() & theirs.float().isnan()
    return (ours.view(raw) == theirs.view(raw)) | both_nan


@pytest.mark.parametrize("dtype", [E4M3, torch.float8_e5m2, torch.bfloat16], ids=str)
def test_a_cast_down_is_that_of_torch(dtype: torch.dtype) -> None:
    values = values_that_matter(dtype)
    wrong = ~same(interpreted(values, dtype), values.to(dtype))
    assert not wrong.any(), values[wrong][:10]


def test_a_cast_of_scaled_data_is_that_of_torch() -> None:
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * 100
    assert same(interpreted(values, E4M3), values.to(E4M3)).all()


@pytest.mark.parametrize("dtype", [E4M3, torch.float8_e5m2, torch.bfloat16], ids=str)
def test_a_cast_up_is_exact(dtype: torch.dtype) -> None:
    bits = torch.arange(256, dtype=torch.uint8) if dtype.itemsize == 1 else torch.arange(-(2**15), 2**15).short()
    values = bits.view(dtype)
    torch.testing.assert_close(interpreted(values, torch.float32), values.float(), rtol=0, atol=0, equal_nan=True)


def test_the_repair_is_still_needed() -> None:
    """Fails once Triton casts right by itself: then the repair in conftest.py may go."""
    repaired: Any = interpreter._convert_float
    values = np.array([126.24, 1e4], dtype=np.float32)
    cast = repaired.original(values, tl.float32, tl.float8e4nv, None)
    assert torch.from_numpy(cast).view(E4M3).tolist() != torch.from_numpy(values).to(E4M3).tolist()
