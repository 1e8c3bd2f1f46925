"""Quantising weights: kernels give the reference's bits, and a transpose holds the same values."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from modelspec.kernels.op import use
from modelspec.kernels.quantize import dequantize
from modelspec.kernels.quantize_weight import quantize_weight

SHAPES = [(1, 1), (130, 300), (2, 130, 129), (3, 128, 40), (0, 128), (2, 5, 0)]


def assert_same_bits(ours: Any, theirs: Any) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.shape, mine.stride(), mine.dtype) == (other.shape, other.stride(), other.dtype)
        torch.testing.assert_close(mine.float(), other.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_gives_the_bits_of_the_reference(shape: tuple[int, ...], dtype: torch.dtype, ue8m0: bool) -> None:
    w = torch.randn(shape).mul(torch.randn((*shape[:-1], 1)).exp()).to(dtype)
    with use("triton"):
        ours = quantize_weight(w, ue8m0)
    assert_same_bits(ours, quantize_weight.reference(w, ue8m0))


def test_each_block_has_one_scale_and_the_transpose_the_same_values() -> None:
    w = torch.randn(130, 300)
    q, scales, qt, scales_t = quantize_weight(w, False)
    blocks = [[part.abs().max() / 448 for part in row.split(128, 1)] for row in w.split(128, 0)]
    torch.testing.assert_close(scales, torch.tensor(blocks), rtol=1e-7, atol=0)
    values = dequantize(q, scales, torch.float32)
    assert torch.equal(values.T, dequantize(qt, scales_t, torch.float32))
    assert 0.024 < (values - w).norm() / w.norm() < 0.0275


def test_experts_are_quantised_as_they_are_alone() -> None:
    w = torch.randn(3, 40, 200)
    together = quantize_weight(w, True)
    for expert in range(3):
        assert_same_bits([each[expert] for each in together], quantize_weight(w[expert], True))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("form", ["reference", "triton"])
def test_nan_reaches_its_block_and_no_other(form: Any) -> None:
    w = torch.randn(200, 200)
    w[150, 20] = math.nan
    with use(form):
        q, scales, _, scales_t = quantize_weight(w, True)
    assert scales.isnan().tolist() == scales_t.mT.isnan().tolist() == [[False, False], [True, False]]
    assert dequantize(q, scales, torch.float32).isnan().sum() == 72 * 128


@pytest.mark.parametrize("form", ["reference", "triton"])
def test_it_is_a_proper_operator(form: Any) -> None:
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    with use(form):
        for shape in ((5, 130), (2, 5, 130)):
            torch.library.opcheck(quantize_weight.registered, (torch.randn(shape), True), test_utils=checks)


def test_it_compiles_in_one_graph() -> None:
    def transposed(w: Tensor) -> Tensor:
        return dequantize(*quantize_weight(w, False)[2:], torch.float32)

    w = torch.randn(5, 130)
    compiled = torch.compile(transposed, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(w), transposed(w))
