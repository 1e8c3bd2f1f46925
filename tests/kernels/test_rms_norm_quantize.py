"""RMSNorm fused with its quantisation: the norm to rounding, and exactly what quantising its output gives."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from modelspec.kernels.op import use
from modelspec.kernels.quantize import quantize
from modelspec.kernels.rms_norm_quantize import WIDEST, rms_norm_quantize

SHAPES = [(1, 1), (3, 576), (2, 2112), (1, 7168), (1, WIDEST), (1, WIDEST + 128), (0, 128), (2, 0)]


def given(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    x = torch.randn(rows, columns) * torch.randn(rows, 1).mul(3).exp()
    return x.to(dtype), 1 + torch.randn(columns) / 4, 1e-6


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_gives_the_norm_and_exactly_its_quantisation(
    shape: tuple[int, int], dtype: torch.dtype, ue8m0: bool
) -> None:
    arguments = (*given(*shape, dtype), ue8m0)
    with use("triton"):
        y, *quantized, rstd = rms_norm_quantize(*arguments)
    reference = rms_norm_quantize.reference(*arguments)
    for mine, other in zip((y, *quantized, rstd), reference, strict=True):
        assert (mine.shape, mine.stride(), mine.dtype) == (other.shape, other.stride(), other.dtype)
    for mine, other in zip(quantized, quantize(y, ue8m0), strict=True):
        torch.testing.assert_close(mine.float(), other.float(), rtol=0, atol=0)
    torch.testing.assert_close(rstd, reference[-1], rtol=1e-5, atol=0, equal_nan=True)
    # One unit in the last place of BF16.
    torch.testing.assert_close(y, reference[0], rtol=2.0**-7 if dtype == torch.bfloat16 else 1e-5, atol=0)


def test_reference_is_the_norm_in_double_precision_rounded() -> None:
    x, weight, eps = given(5, 300, torch.float32)
    y, _, _, rstd = rms_norm_quantize(x, weight, eps, False)
    exact = F.rms_norm(x.double(), (300,), weight.double(), eps)
    torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(rstd.double(), (x.double().square().mean(-1) + eps).rsqrt(), rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("form", ["reference", "triton"])
def test_nan_reaches_its_row_and_no_other(form: Any) -> None:
    x, weight, eps = given(3, 300, torch.bfloat16)
    x[1, 7] = math.nan
    with use(form):
        _, _, scales, rstd = rms_norm_quantize(x, weight, eps, True)
    assert scales.isnan().tolist() == [[False] * 3, [True] * 3, [False] * 3]
    assert rstd.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("form", ["reference", "triton"])
def test_it_is_a_proper_operator(form: Any) -> None:
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    with use(form):
        arguments = (*given(5, 130, torch.bfloat16), True)
        torch.library.opcheck(rms_norm_quantize.registered, arguments, test_utils=checks)


def test_it_compiles_in_one_graph() -> None:
    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm_quantize(x, weight, 1e-6, False)[0]

    x, weight, _ = given(5, 130, torch.float32)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight), norm(x, weight))
