"""The gradient of a weight from block-scaled FP8: the kernel and its reference against float64."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from modelspec.kernels.block_scale import quantize
from modelspec.kernels.block_scaled_mm import run
from modelspec.kernels.block_scaled_wgrad import block_scaled_wgrad, block_scaled_wgrad_add
from modelspec.kernels.configs import POINTERS, SPECIALIZED, tiles
from modelspec.kernels.op import use

pytestmark = pytest.mark.usefixtures("poisoned")

# Not test_schema: it asks whether arguments were written to by a comparison that torch lacks for FP8.
CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
SHAPES = [(1, 576, 128), (130, 70, 384), (65, 129, 144), (33, 20, 75), (5, 3, 1)]


def quantized(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments of the product, both with blocks of 1 x 128 and scales in column-major memory."""
    (qa, a_scales), (qb, b_scales) = quantize(a, (1, 128)), quantize(b, (1, 128))
    return qa, a_scales.T.contiguous().T, qb, b_scales.T.contiguous().T


def random(n: int, k: int, t: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return quantized(torch.randn(n, t), torch.randn(k, t))


def exact(qa: Tensor, a_scales: Tensor, qb: Tensor, b_scales: Tensor) -> Tensor:
    """The product of the same codes and scales in float64."""
    tokens = qa.shape[1]
    a, b = (q.double() * s.double().repeat_interleave(128, 1)[:, :tokens] for q, s in ((qa, a_scales), (qb, b_scales)))
    return a @ b.T


def close(ours: Tensor, theirs: Tensor) -> None:
    """Equal but for FP32 sums of terms that cancel: the error is measured against the largest."""
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=2e-6 * float(theirs.abs().max()))


@pytest.mark.parametrize(("shape", "form"), list(product(SHAPES, ["reference", "triton"])), ids=str)
def test_it_is_the_product_of_the_dequantised(shape: tuple[int, int, int], form: Any) -> None:
    args = random(*shape)
    with use(form):
        gradient = block_scaled_wgrad(*args)
    assert gradient.dtype == torch.float32
    close(gradient, exact(*args))


@pytest.mark.parametrize(("shape", "form"), list(product(SHAPES, ["reference", "triton"])), ids=str)
def test_it_adds_to_a_gradient_that_stands(shape: tuple[int, int, int], form: Any) -> None:
    args = random(*shape)
    before = torch.randn(shape[0], shape[1])
    out = before.clone()
    with use(form):
        block_scaled_wgrad_add(out, *args)
    close(out, before + exact(*args))


@pytest.mark.parametrize(
    "config", [tiles(64, 64, 4, 2, POINTERS), tiles(128, 128, 4, 3, SPECIALIZED)], ids=["pointers", "specialized"]
)
def test_every_way_to_load_gives_the_same(config: Any) -> None:
    args = random(70, 130, 300)
    out = torch.empty(70, 130)
    run(config, args, out, 1)
    close(out, exact(*args))


def test_quantising_along_tokens_costs_as_little_as_the_format_allows() -> None:
    a, b = torch.randn(130, 1024), torch.randn(96, 1024)
    truth = a.double() @ b.double().T
    with use("triton"):
        ours = block_scaled_wgrad(*quantized(a, b)).double()
    assert (ours - truth).norm() / truth.norm() <= 0.04
    assert 1 - 2 * (ours * truth).sum() / (ours.square() + truth.square()).sum() <= 1e-3


def test_powers_of_two_pass_through_and_tokens_of_zeros_add_nothing() -> None:
    a, b = torch.randn(20, 200), torch.randn(30, 200)
    with use("triton"):
        once = block_scaled_wgrad(*quantized(a, b))
        scaled = block_scaled_wgrad(*quantized(a * 2.0**7, b * 2.0**-3))
        padded = block_scaled_wgrad(*quantized(*(torch.nn.functional.pad(x, (0, 100)) for x in (a, b))))
    torch.testing.assert_close(scaled, once * 2.0**4, rtol=0, atol=0)
    torch.testing.assert_close(padded, once, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["reference", "triton"])
def test_without_tokens_it_is_zero_and_what_stands_stays(form: Any) -> None:
    args = (torch.empty(4, 0).to(torch.float8_e4m3fn), torch.empty(4, 0)) * 2
    out = torch.randn(4, 4)
    before = out.clone()
    with use(form):
        assert (block_scaled_wgrad(*args) == torch.zeros(4, 4)).all()
        block_scaled_wgrad_add(out, *args)
    torch.testing.assert_close(out, before, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["reference", "triton"])
def test_a_gradient_that_does_not_fit_is_refused(form: Any) -> None:
    args = random(6, 5, 128)
    with use(form):
        for out in (torch.zeros(5, 6), torch.zeros(6, 5).bfloat16(), torch.zeros(5, 6).T):
            with pytest.raises(ValueError, match=r"must be \[6, 5\] in FP32, row-major"):
                block_scaled_wgrad_add(out, *args)
        with pytest.raises(ValueError, match="quantise it along its columns"):
            block_scaled_wgrad(*args[:3], torch.ones(1, 1))


def test_torch_sees_one_operator_each() -> None:
    args = random(6, 5, 130)
    torch.library.opcheck(block_scaled_wgrad.registered, args, test_utils=CHECKS)
    torch.library.opcheck(block_scaled_wgrad_add.registered, (torch.randn(6, 5), *args), test_utils=CHECKS)

    def twice(out: Tensor, *xs: Tensor) -> Tensor:
        block_scaled_wgrad_add(out, *xs)
        return out + block_scaled_wgrad(*xs)

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(torch.ones(6, 5), *args), twice(torch.ones(6, 5), *args), rtol=0, atol=0)
