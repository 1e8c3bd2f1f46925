"""The grouped FP8 product: its definition, the truth in FP32, groups of any size, and what may not change it."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from modelspec.kernels.block_scale import dequantize, quantize
from modelspec.kernels.configs import BLOCK_SCALED_MM
from modelspec.kernels.grouped_scaled_mm import grouped_scaled_mm, run
from modelspec.kernels.op import use
from modelspec.kernels.variant import Config

COUNTS = {
    "uneven": [1, 70, 5],
    "first-empty": [0, 64, 3],
    "middle-empty": [65, 0, 1],
    "last-empty": [5, 7, 0],
    "all-to-one": [0, 130, 0],
    "one-expert": [66],
    "no-rows": [0, 0, 0],
}
# What the launcher chooses from on each architecture.
CONFIGS = {
    f"{arch}-{name}": config
    for arch, configs in BLOCK_SCALED_MM.items()
    for name, config in configs.items()
    if name in ("large", "small")
}
SIZES = [(128, 256), (65, 200), (144, 576), (1, 1)]


def rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """In FP8, with a scale for 128 values of a row, the scales in column-major memory."""
    q, scales = quantize(x, (1, 128))
    return q, scales.T.contiguous().T


def weights(w: Tensor) -> tuple[Tensor, Tensor]:
    """In FP8, with a scale for a block of 128x128 of each expert."""
    each = [quantize(one, (128, 128)) for one in w]
    return torch.stack([q for q, _ in each]), torch.stack([scales for _, scales in each])


def operands(counts: list[int], n: int, k: int, rest: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments of the op for groups of so many rows, and `rest` rows after the last."""
    # Magnitudes differ between blocks, so that a wrong scale shows.
    x = torch.randn(sum(counts) + rest, k) * torch.randn(sum(counts) + rest, 1).exp()
    w = torch.randn(len(counts), n, k) * torch.randn(len(counts), 1, 1).exp()
    return *rows(x), *weights(w), torch.tensor(counts).cumsum(0).to(torch.int32)


def kernel(*arguments: Tensor) -> Tensor:
    with use("triton"):
        return grouped_scaled_mm(*arguments)


def assert_equal_up_to_rounding(found: Tensor, expected: Tensor) -> None:
    """Both are in BF16; sums in FP32 may differ in their order, near zero by more than a rounding of the result."""
    torch.testing.assert_close(found.float(), expected.float(), rtol=2**-7, atol=1e-6 * float(expected.float().norm()))


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_the_kernel_computes_the_definition_for_groups_of_any_size(counts: list[int], poisoned: None) -> None:
    arguments = operands(counts, 65, 200)
    assert_equal_up_to_rounding(kernel(*arguments), grouped_scaled_mm.reference(*arguments))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_kernel_computes_the_definition_for_matrices_of_any_size(sizes: tuple[int, int], poisoned: None) -> None:
    arguments = operands([3, 0, 67], *sizes)
    assert_equal_up_to_rounding(kernel(*arguments), grouped_scaled_mm.reference(*arguments))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_every_shipped_configuration_computes_the_definition(config: Config, poisoned: None) -> None:
    for n, k in ((65, 200), (130, 256), (7, 3)):
        arguments = operands([3, 0, 150], n, k, rest=5)
        out = torch.empty(158, n, dtype=torch.bfloat16)
        run(config, arguments[:4], arguments[4], out)
        assert_equal_up_to_rounding(out, grouped_scaled_mm.reference(*arguments))


def test_many_experts_and_more_rows_of_tiles_than_go_together(poisoned: None) -> None:
    arguments = operands([0, 1, 2, 1100, *[1, 0, 3] * 5], 130, 128)
    assert_equal_up_to_rounding(kernel(*arguments), grouped_scaled_mm.reference(*arguments))


def test_the_definition_is_the_product_of_the_values_in_float64() -> None:
    a, a_scales, b, b_scales, ends = operands([3, 0, 67], 144, 576)
    x = dequantize(a, a_scales, (1, 128), torch.float32).double()
    expected = torch.zeros(70, 144, dtype=torch.float64)
    for expert, (begin, end) in enumerate(pairwise([0, *ends.tolist()])):
        w = dequantize(b[expert], b_scales[expert], (128, 128), torch.float32).double()
        for row in range(begin, end):
            expected[row] = w @ x[row]
    assert_equal_up_to_rounding(grouped_scaled_mm.reference(a, a_scales, b, b_scales, ends), expected.bfloat16())


def test_it_stays_near_the_product_of_what_was_quantised() -> None:
    x, w, ends = torch.randn(96, 2048), torch.randn(2, 128, 2048), torch.tensor([40, 96], dtype=torch.int32)
    found = kernel(*rows(x), *weights(w), ends).double()
    truth = torch.cat([x[:40] @ w[0].T, x[40:] @ w[1].T]).double()
    assert (found - truth).norm() / truth.norm() <= 0.04
    assert 1 - 2 * (found * truth).sum() / (found.square().sum() + truth.square().sum()) <= 1e-3


@pytest.mark.parametrize("counts", [[5, 64], [0, 0]], ids=["after-experts", "no-expert-has-rows"])
def test_rows_after_the_last_expert_become_zeros(counts: list[int], poisoned: None) -> None:
    a, a_scales, *others = operands(counts, 65, 200, rest=67)
    a.view(torch.uint8)[sum(counts) :] = 0x7F
    a_scales[sum(counts) :] = torch.nan
    out = kernel(a, a_scales, *others)
    assert (out[sum(counts) :] == 0).all()
    assert out.isfinite().all()
    assert_equal_up_to_rounding(out, grouped_scaled_mm.reference(a, a_scales, *others))


def test_a_row_that_is_not_a_number_stays_alone() -> None:
    a, a_scales, *others = operands([5, 64], 65, 200)
    clean = kernel(a, a_scales, *others)
    a_scales[4, 1] = torch.nan
    out = kernel(a, a_scales, *others)
    assert out[4].isnan().all()
    assert torch.equal(out[torch.arange(69) != 4], clean[torch.arange(69) != 4])


def test_fp32_out_is_what_bf16_out_is_rounded_from(poisoned: None) -> None:
    arguments = operands([5, 64], 65, 200, rest=3)
    with use("triton"):
        wide = grouped_scaled_mm(*arguments, torch.float32)
    assert wide.dtype == torch.float32
    assert torch.equal(wide.bfloat16(), kernel(*arguments))
    expected = grouped_scaled_mm.reference(*arguments, torch.float32)
    torch.testing.assert_close(wide, expected, rtol=1e-5, atol=1e-6 * float(expected.norm()))


def test_powers_of_two_pass_through() -> None:
    a, a_scales, b, b_scales, ends = operands([5, 64], 65, 200)
    plain = kernel(a, a_scales, b, b_scales, ends)
    assert torch.equal(kernel(a, a_scales * 8, b, b_scales / 2, ends), plain * 4)


def test_experts_in_another_order_give_the_same_rows() -> None:
    a, a_scales, b, b_scales, _ = operands([5, 66], 65, 200)
    moved = torch.cat([torch.arange(5, 71), torch.arange(5)])
    there = kernel(a, a_scales, b, b_scales, torch.tensor([5, 71], dtype=torch.int32))
    turned = a.view(torch.uint8)[moved].view(a.dtype), a_scales[moved].T.contiguous().T
    back = kernel(*turned, b.view(torch.uint8).flip(0).view(b.dtype), b_scales.flip(0), torch.tensor([66, 71]).int())
    assert torch.equal(back, there[moved])


@pytest.mark.parametrize("shape", [(0, 5, 7), (3, 0, 7), (3, 5, 0)], ids=["no-rows", "no-outputs", "no-inputs"])
def test_nothing_in_gives_nothing_or_zeros(shape: tuple[int, int, int], poisoned: None) -> None:
    m, n, k = shape
    a, b = torch.empty(m, k).to(torch.float8_e4m3fn), torch.empty(1, n, k).to(torch.float8_e4m3fn)
    blocks, ends = -(-k // 128), torch.tensor([m], dtype=torch.int32)
    arguments = a, torch.ones(blocks, m).T, b, torch.ones(1, -(-n // 128), blocks), ends
    for out in (kernel(*arguments), grouped_scaled_mm.reference(*arguments)):
        assert (out.shape, out.dtype) == ((m, n), torch.bfloat16)
        assert (out == 0).all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({4: torch.tensor([5], dtype=torch.int32)}, "2 weights, scales of 2 and 1 ends must be of as many experts"),
        ({0: torch.zeros(12, 129).to(torch.float8_e4m3fn)}, "must have as many columns"),
        ({1: torch.ones(12, 1)}, r"has scales \[12, 2\], not \[12, 1\]"),
    ],
    ids=["an-end-is-missing", "a-column-is-missing", "scales-are-missing"],
)
def test_operands_that_do_not_fit_are_refused(changed: dict[int, Tensor], message: str) -> None:
    arguments = [changed.get(i, each) for i, each in enumerate(operands([5, 7], 16, 130))]
    for form in (grouped_scaled_mm.reference, grouped_scaled_mm.launch):
        with pytest.raises(ValueError, match=message):
            form(*arguments)


def test_op_keeps_what_it_promises_to_torch() -> None:
    # Not test_schema: it asks whether arguments were written to by a comparison that torch lacks for FP8.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(grouped_scaled_mm.registered, operands([5, 0, 7], 16, 130), test_utils=checks)


def test_compiles_in_one_graph_and_fake_tensors_know_its_shape() -> None:
    arguments = operands([5, 0, 7], 16, 130)

    def twice(*arguments: Any) -> Tensor:
        return grouped_scaled_mm(*arguments) * 2

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), twice(*arguments))
    mode = FakeTensorMode()
    out = grouped_scaled_mm(*(mode.from_tensor(each) for each in arguments))
    assert (out.shape, out.dtype) == ((12, 16), torch.bfloat16)
