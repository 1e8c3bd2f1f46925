"""Gradients of the experts' weights in FP8: the definition, the truth in FP32, and experts with no tokens or all."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from modelspec.kernels.block_scale import dequantize, quantize
from modelspec.kernels.configs import BLOCK_SCALED_WGRAD
from modelspec.kernels.grouped_scaled_wgrad import grouped_scaled_wgrad, grouped_scaled_wgrad_add, run
from modelspec.kernels.op import use
from modelspec.kernels.quantize_grouped import quantize_grouped_transposed
from modelspec.kernels.variant import Config

COUNTS = {
    "uneven": [1, 300, 5],
    "whole-blocks": [128, 256],
    "first-empty": [0, 64, 3],
    "middle-empty": [130, 0, 1],
    "last-empty": [5, 7, 0],
    "all-to-one": [0, 260, 0],
    "no-tokens": [0, 0],
}
# What the launchers choose from on each architecture.
CONFIGS = {arch: configs["large"] for arch, configs in BLOCK_SCALED_WGRAD.items()}
SIZES = [(128, 256), (65, 200), (576, 40), (1, 1)]
Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def along_tokens(rows: Tensor, counts: list[int], unused: int = 0) -> tuple[Tensor, Tensor]:
    """rows [tokens, size] -> their transpose in FP8, each expert's tokens from a multiple of 128 on, and its scales.

    After the last expert come so many unused blocks, which hold NaN.
    """
    each = [torch.cat([part, part.new_zeros(-len(part) % 128, rows.shape[1])]) for part in rows.split(counts)]
    q, scales = quantize(torch.cat(each).T, (1, 128))
    raw = torch.cat([q.view(torch.uint8), torch.full((len(q), 128 * unused), 0x7F, dtype=torch.uint8)], 1)
    scales = torch.cat([scales, torch.full((len(q), unused), torch.nan)], 1)
    return raw.view(q.dtype), scales.T.contiguous().T


def starts_of(counts: list[int]) -> Tensor:
    """Where each expert's tokens begin, and where the last one's end."""
    return torch.tensor([0, *(-(-count // 128) * 128 for count in counts)]).cumsum(0).to(torch.int32)


def operands(counts: list[int], n: int, k: int, unused: int = 1) -> Arguments:
    """Arguments of the op for experts with so many tokens."""
    # Magnitudes differ between blocks, so that a wrong scale shows.
    grad, x = (torch.randn(sum(counts), size) * torch.randn(sum(counts), 1).exp() for size in (n, k))
    return *along_tokens(grad, counts, unused), *along_tokens(x, counts, unused), starts_of(counts)


def kernel(*arguments: Tensor) -> Tensor:
    with use("triton"):
        return grouped_scaled_wgrad(*arguments)


def added(out: Tensor, *arguments: Tensor) -> Tensor:
    """`out` after the kernel has added to a copy of it."""
    out = out.clone()
    with use("triton"):
        grouped_scaled_wgrad_add(out, *arguments)
    return out


def assert_equal_up_to_order(found: Tensor, expected: Tensor) -> None:
    """Sums in FP32 may differ in their order."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.norm()))


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_the_kernel_computes_the_definition_for_experts_of_any_size(counts: list[int], poisoned: None) -> None:
    arguments = operands(counts, 65, 140)
    found = kernel(*arguments)
    assert_equal_up_to_order(found, grouped_scaled_wgrad.reference(*arguments))
    assert (found[torch.tensor(counts) == 0] == 0).all()
    assert (found[torch.tensor(counts) != 0] != 0).any() or not sum(counts)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_kernel_computes_the_definition_for_matrices_of_any_size(sizes: tuple[int, int], poisoned: None) -> None:
    arguments = operands([3, 0, 167], *sizes)
    assert_equal_up_to_order(kernel(*arguments), grouped_scaled_wgrad.reference(*arguments))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_every_shipped_configuration_computes_the_definition(config: Config, poisoned: None) -> None:
    arguments = operands([3, 0, 167], 130, 140)
    expected = grouped_scaled_wgrad.reference(*arguments)
    for accumulate, out in ((False, torch.empty_like(expected)), (True, torch.ones_like(expected))):
        run(config, arguments[:4], arguments[4], out, accumulate)
        assert_equal_up_to_order(out, expected + 1 if accumulate else expected)


def test_the_definition_is_the_sum_over_tokens_in_float64() -> None:
    counts = [3, 0, 167]
    grad, grad_scales, x, x_scales, starts = arguments = operands(counts, 65, 140)
    left = dequantize(grad, grad_scales, (1, 128), torch.float32).double()
    right = dequantize(x, x_scales, (1, 128), torch.float32).double()
    expected = torch.zeros(3, 65, 140, dtype=torch.float64)
    for expert, count in enumerate(counts):
        for token in range(int(starts[expert]), int(starts[expert]) + count):
            expected[expert] += left[:, token, None] * right[None, :, token]
    assert_equal_up_to_order(grouped_scaled_wgrad.reference(*arguments), expected.float())


def test_it_stays_near_the_product_of_what_was_quantised() -> None:
    counts = [700, 324]
    grad, x = torch.randn(1024, 70), torch.randn(1024, 130)
    found = kernel(*along_tokens(grad, counts), *along_tokens(x, counts), starts_of(counts)).double()
    parts = zip(grad.double().split(counts), x.double().split(counts), strict=True)
    truth = torch.stack([g.T @ each for g, each in parts])
    assert (found - truth).norm() / truth.norm() <= 0.04
    assert 1 - 2 * (found * truth).sum() / (found.square().sum() + truth.square().sum()) <= 1e-3


def test_the_same_arguments_give_the_same_bits() -> None:
    arguments = operands([70, 0, 300], 65, 140)
    assert torch.equal(kernel(*arguments), kernel(*arguments))


def test_powers_of_two_pass_through() -> None:
    grad, grad_scales, x, x_scales, starts = operands([70, 0, 300], 65, 140)
    plain = kernel(grad, grad_scales, x, x_scales, starts)
    assert torch.equal(kernel(grad, grad_scales * 8, x, x_scales / 2, starts), plain * 4)


def test_adding_leaves_gradients_of_experts_without_tokens_alone() -> None:
    counts = [70, 0, 300]
    arguments = operands(counts, 65, 140)
    before = torch.randn(3, 65, 140)
    # Not even 0 may be added to it.
    before[1, 0, 0] = -0.0
    after = added(before, *arguments)
    assert torch.equal(after, before + kernel(*arguments))
    assert torch.equal(after[1].view(torch.int32), before[1].view(torch.int32))
    expected = before.clone()
    grouped_scaled_wgrad_add.reference(expected, *arguments)
    assert_equal_up_to_order(after, expected)


def test_adding_two_halves_is_the_whole_up_to_order() -> None:
    grad, grad_scales, x, x_scales, _ = arguments = operands([256], 65, 140, unused=0)
    halves = [torch.tensor(ends, dtype=torch.int32) for ends in ([0, 128], [128, 256])]
    total = torch.zeros(1, 65, 140)
    for starts in halves:
        total = added(total, grad, grad_scales, x, x_scales, starts)
    assert_equal_up_to_order(total, kernel(*arguments))


def test_nothing_to_sum_over_gives_zeros(poisoned: None) -> None:
    empty = torch.empty(5, 0).to(torch.float8_e4m3fn), torch.empty(5, 0)
    starts = torch.zeros(3, dtype=torch.int32)
    assert torch.equal(kernel(*empty, *empty, starts), torch.zeros(2, 5, 5))
    assert torch.equal(added(torch.ones(2, 5, 5), *empty, *empty, starts), torch.ones(2, 5, 5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: (a[0][:, :-1], *a[1:]), "must have as many tokens, a multiple of 128"),
        (lambda a: (a[0], a[1][:, :-1], *a[2:]), r"a \[8, 384\] has scales \[8, 3\], not \[8, 2\]"),
    ],
    ids=["half-a-block", "a-scale-is-missing"],
)
def test_operands_that_do_not_fit_are_refused(change: object, message: str) -> None:
    arguments = change(operands([70, 3], 8, 16))  # type: ignore[operator]
    for form in (grouped_scaled_wgrad.reference, grouped_scaled_wgrad.launch):
        with pytest.raises(ValueError, match=message):
            form(*arguments)


@pytest.mark.parametrize("out", [torch.zeros(2, 16, 8), torch.zeros(2, 8, 16).double(), torch.zeros(2, 16, 8).mT])
def test_a_gradient_that_cannot_be_added_to_is_refused(out: Tensor) -> None:
    for form in (grouped_scaled_wgrad_add.reference, grouped_scaled_wgrad_add.launch):
        with pytest.raises(ValueError, match=r"must be \[2, 8, 16\] in FP32, row-major"):
            form(out, *operands([70, 3], 8, 16))


def test_ops_keep_what_they_promise_to_torch() -> None:
    # Not test_schema: it asks whether arguments were written to by a comparison that torch lacks for FP8.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = operands([5, 0, 7], 16, 24)
    torch.library.opcheck(grouped_scaled_wgrad.registered, arguments, test_utils=checks)
    torch.library.opcheck(grouped_scaled_wgrad_add.registered, (torch.randn(3, 16, 24), *arguments), test_utils=checks)


def test_compile_in_one_graph_and_fake_tensors_know_their_shape() -> None:
    arguments = operands([5, 0, 7], 16, 24)

    def both(out: Tensor, *arguments: Tensor) -> Tensor:
        grouped_scaled_wgrad_add(out, *arguments)
        return out + grouped_scaled_wgrad(*arguments)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    first, second = torch.ones(3, 16, 24), torch.ones(3, 16, 24)
    assert torch.equal(compiled(first, *arguments), both(second, *arguments))
    assert torch.equal(first, second)
    mode = FakeTensorMode()
    out = grouped_scaled_wgrad(*(mode.from_tensor(each) for each in arguments))
    assert (out.shape, out.dtype) == ((3, 16, 24), torch.float32)


@pytest.mark.parametrize("counts", [[1, 300, 5], [0, 64, 0], [0, 0]], ids=str)
def test_it_reads_what_the_quantiser_of_groups_writes(counts: list[int], poisoned: None) -> None:
    grad, x = torch.randn(sum(counts) + 3, 40), torch.randn(sum(counts) + 3, 65)
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    with use("triton"):
        *left, starts = quantize_grouped_transposed(grad, ends, False)
        *right, _ = quantize_grouped_transposed(x, ends, False)
    found = kernel(*left, *right, starts)
    parts = zip(grad[: sum(counts)].split(counts), x[: sum(counts)].split(counts), strict=True)
    truth = torch.stack([g.T @ each for g, each in parts])
    assert (found - truth).norm() <= 0.04 * truth.norm()
