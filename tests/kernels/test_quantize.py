"""Quantising activations: kernels give the reference's bits, and the reference is what arithmetic says."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from modelspec.kernels.block_scale import E4M3, LEAST_AMAX
from modelspec.kernels.fp8_health import Health
from modelspec.kernels.op import use
from modelspec.kernels.quantize import dequantize, e5m6, quantize, quantize_both, quantize_transposed
from modelspec.kernels.triton_op import TritonOp

OPS: list[TritonOp[..., Any]] = [quantize, quantize_transposed, quantize_both]
# All but test_schema, which multiplies results: torch has no product of FP8.
CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
SHAPES = [(1, 576), (130, 200), (7, 128), (128, 1), (0, 300), (3, 0)]


def random(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of very different size, with zeros among them."""
    x = torch.randn(rows, columns) * torch.randn(rows, 1).mul(4).exp()
    return torch.where(torch.rand(rows, columns) < 0.05, 0.0, x).to(dtype)


def assert_same_bits(ours: Any, theirs: Any) -> None:
    """Shapes, layouts and all values, NaN wherever there is one."""
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.shape, mine.stride(), mine.dtype) == (other.shape, other.stride(), other.dtype)
        torch.testing.assert_close(mine.float(), other.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_kernel_gives_the_bits_of_the_reference(
    op: TritonOp[..., Any], shape: tuple[int, int], dtype: torch.dtype, ue8m0: bool
) -> None:
    x = random(*shape, dtype)
    with use("triton"):
        ours = op(x, ue8m0)
    assert_same_bits(ours, op.reference(x, ue8m0))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantising_kernel_gives_the_bits_of_the_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    q, scales = quantize(random(*shape), False)
    blocks = scales[::128].contiguous()
    for given in (scales, blocks):
        with use("triton"):
            ours = dequantize(q, given, dtype)
        assert_same_bits([ours], [dequantize.reference(q, given, dtype)])


@pytest.mark.parametrize("ue8m0", [False, True])
def test_a_scale_is_the_largest_magnitude_over_448(ue8m0: bool) -> None:
    x = random(9, 300)
    q, scales = quantize(x, ue8m0)
    assert (q.dtype, q.shape, scales.shape, scales.stride()) == (E4M3, (9, 300), (9, 3), (1, 9))
    for row in range(9):
        for block in range(3):
            values = x[row, block * 128 : (block + 1) * 128].double()
            scale = float(values.abs().max()) / 448
            scale = 2.0 ** math.ceil(math.log2(scale)) if ue8m0 else scale
            assert float(scales[row, block]) == pytest.approx(scale, rel=1e-7)
            codes = q[row, block * 128 : (block + 1) * 128].double()
            # Half a unit in the last of 3 bits, or half the least subnormal.
            error = (codes - values / scale).abs()
            assert (error <= torch.clamp(values.abs() / scale / 16, min=2.0**-10) * (1 + 1e-6)).all()


def test_other_orientation_is_that_of_the_transpose() -> None:
    x = random(200, 130)
    q, scales, qt, scales_t = quantize_both(x, False)
    assert_same_bits((q, scales), quantize(x, False))
    assert_same_bits((qt, scales_t), quantize(x.T.contiguous(), False))
    assert_same_bits((qt, scales_t), quantize_transposed(x, False))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("form", ["reference", "triton"])
@pytest.mark.parametrize("ue8m0", [False, True])
def test_nan_and_infinities_reach_their_block_and_no_other(form: Any, ue8m0: bool) -> None:
    x = random(4, 300)
    x[0, 5], x[1, 130], x[2, 299] = math.nan, math.inf, -math.inf
    broken = torch.zeros(4, 3, dtype=torch.bool)
    broken[0, 0] = broken[1, 1] = broken[2, 2] = True
    with use(form):
        q, scales, qt, scales_t = quantize_both(x, ue8m0)
        values = dequantize(q, scales, torch.float32)
        other = dequantize(qt, scales_t, torch.float32).T
    assert torch.equal(~scales.isfinite(), broken)
    assert torch.equal(values.isnan(), broken.repeat_interleave(128, 1)[:, :300])
    assert torch.equal(other.isnan(), ~x.isfinite().all(0).expand(4, -1))


@pytest.mark.parametrize("form", ["reference", "triton"])
def test_zeros_and_tiny_values_have_finite_scales(form: Any) -> None:
    x = torch.zeros(3, 128)
    x[1], x[2] = 1e-30, 1e-45
    with use(form):
        q, scales = quantize(x, False)
    assert (q.float() == 0).all()
    torch.testing.assert_close(scales, torch.full((3, 1), LEAST_AMAX / 448), rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", ["reference", "triton"])
@pytest.mark.parametrize("format", [E4M3, torch.float8_e4m3fnuz], ids=str)
def test_the_largest_value_becomes_the_largest_code(
    form: Any, format: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a clamp, at every mantissa of 10 bits and at the ends of FP32."""
    if form == "triton" and format == torch.float8_e4m3fnuz and triton.__version__.startswith("3.6."):
        pytest.skip("triton 3.6 interprets no kernels with this format")
    monkeypatch.setattr("modelspec.kernels.quantize.e4m3", lambda device: format)
    rows = 2**10
    x = torch.zeros(rows, 2)
    x[:, 0] = (1 + torch.arange(rows) / rows) * 2.0 ** torch.linspace(-38, 126, rows).round()
    x[-1, 0], x[-2, 0] = torch.finfo(torch.float32).max, LEAST_AMAX
    x[:, 1] = -x[:, 0]
    with use(form):
        q, scales = quantize(x, False)
        powers = quantize(x, True)[1]
    assert q.dtype == format
    largest = torch.finfo(format).max
    assert torch.equal(q.float(), torch.tensor([largest, -largest]).expand(rows, 2))
    assert torch.equal(torch.frexp(powers).mantissa, torch.full((rows, 1), 0.5))
    assert ((powers >= scales) & (powers < 2 * scales)).all()


@pytest.mark.parametrize("ue8m0", [False, True])
def test_a_power_of_two_moves_to_the_scales(ue8m0: bool) -> None:
    x = random(5, 200)
    q, scales, qt, scales_t = quantize_both(x, ue8m0)
    assert_same_bits(quantize_both(x * 2.0**-7, ue8m0), (q, scales * 2.0**-7, qt, scales_t * 2.0**-7))


def test_errors_are_those_of_three_bits() -> None:
    """Relative to the norm, of Gaussian values: measured 0.0257, and 0.0266 with powers of two."""
    x = torch.randn(512, 512)
    for ue8m0, most in ((False, 0.0262), (True, 0.0272)):
        q, scales = quantize(x, ue8m0)
        error = (dequantize(q, scales, torch.float32) - x).norm() / x.norm()
        assert 0.024 < error < most


def test_quantising_twice_with_powers_of_two_changes_nothing_but_what_underflows() -> None:
    x = torch.randn(256, 256)
    q, scales = quantize(x, True)
    once = dequantize(q, scales, torch.float32)
    twice = dequantize(*quantize_transposed(once, True), torch.float32).T
    assert (once - twice).abs().max() <= scales.max() * 2.0**-10


def every_e5m6() -> Tensor:
    """All finite numbers that are not negative: mantissas of 6 bits for 31 exponents, subnormals first."""
    exponent, mantissa = torch.meshgrid(torch.arange(31), torch.arange(64), indexing="ij")
    normal = (1 + mantissa / 64) * 2.0 ** (exponent - 15.0)
    return torch.where(exponent == 0, mantissa / 64 * 2.0**-14, normal).flatten()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("form", ["reference", "triton"])
def test_e5m6_rounds_to_the_nearest_number_of_12_bits_and_ties_to_even(form: Any) -> None:
    numbers = every_e5m6()
    middle = (numbers[1:] + numbers[:-1]) / 2
    below, above = (torch.nextafter(middle, torch.tensor(side)) for side in (0.0, math.inf))
    even = torch.where(torch.arange(len(middle)) % 2 == 0, numbers[:-1], numbers[1:])
    values = torch.cat([numbers, middle, below, above])
    wanted = torch.cat([numbers, even, numbers[:-1], numbers[1:]])
    # Rows of 127 of them and the largest number, so that their scale is 1; negative ones in every other column.
    rows = F.pad(values, (0, -len(values) % 127)).view(-1, 127)
    x = F.pad(rows, (1, 0), value=65024.0)
    expected = F.pad(F.pad(wanted, (0, -len(values) % 127)).view(-1, 127), (1, 0), value=65024.0)
    sign = torch.tensor([1.0, -1.0]).repeat(64)
    with use(form):
        assert torch.equal(e5m6(x * sign), expected * sign)
        # A power of two moves to the scales.
        assert torch.equal(e5m6(x * 2.0**-20), expected * 2.0**-20)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_e5m6_kernel_gives_the_bits_of_the_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = random(*shape, dtype)
    with use("triton"):
        ours = e5m6(x)
    assert_same_bits([ours], [e5m6.reference(x)])
    assert torch.equal(ours.bfloat16().to(dtype), ours)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("form", ["reference", "triton"])
def test_e5m6_keeps_what_is_not_finite_to_its_block(form: Any) -> None:
    x = random(2, 256)
    x[0, 5], x[1, 130] = math.nan, math.inf
    with use(form):
        broken = e5m6(x).isnan()
    assert broken[0, :128].all()
    assert broken[1, 128:].all()
    assert not broken[0, 128:].any()
    assert not broken[1, :128].any()


def test_shares_of_what_underflows_and_of_what_is_largest() -> None:
    x = torch.tensor([[448.0, 1.0, 1e-4, 0.0], [448.0, -448.0, 0.0, 1e-5]])
    health = Health(x.device)
    health.count("activation", x, quantize(x, False)[0])
    health.count("weight", torch.zeros(2, 2), torch.zeros(2, 2).to(E4M3))
    assert health.underflow() == pytest.approx({"activation": 2 / 6, "weight": 0, "gradient": 0})
    assert health.saturation() == pytest.approx({"activation": 3 / 8, "weight": 0, "gradient": 0})


@pytest.mark.parametrize("form", ["reference", "triton"])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_ops_are_proper_operators(op: TritonOp[..., Any], form: Any) -> None:
    with use(form):
        torch.library.opcheck(op.registered, (random(5, 130), True), test_utils=CHECKS)
        torch.library.opcheck(e5m6.registered, (random(5, 130),))
        given = (*quantize(random(5, 130), True), torch.bfloat16)
        torch.library.opcheck(dequantize.registered, given, test_utils=CHECKS)


@pytest.mark.parametrize("form", ["reference", "triton"])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_arguments_are_left_as_they_were(op: TritonOp[..., Any], form: Any) -> None:
    x = random(5, 130)
    before = x.clone()
    with use(form):
        op(x, True)
    assert torch.equal(x, before)


def test_ops_compile_in_one_graph() -> None:
    x = random(5, 130)

    def there_and_back(x: Tensor) -> Tensor:
        return dequantize(*quantize_both(x, False)[2:], torch.float32)

    compiled: Callable[[Tensor], Tensor] = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), there_and_back(x))


def test_shapes_are_known_without_data() -> None:
    results = quantize_both(torch.empty(5, 130, device="meta"), False)
    for mine, other in zip(results, quantize_both(random(5, 130), False), strict=True):
        assert (mine.shape, mine.stride(), mine.dtype) == (other.shape, other.stride(), other.dtype)
