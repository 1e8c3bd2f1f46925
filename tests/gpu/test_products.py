"""Products in FP8 on a GPU are those of an emulation with the same scales, under every shipped configuration.

Tensor cores cut sums of 128 products to about 14 bits; what else may differ is the rounding to BF16.
"""

import torch
from torch import Tensor

from modelspec.kernels import block_scaled_mm, block_scaled_wgrad, grouped_scaled_mm, grouped_scaled_wgrad
from modelspec.kernels.block_scale import BLOCK, quantize
from modelspec.kernels.configs import BLOCK_SCALED_MM, BLOCK_SCALED_WGRAD, SPECIALIZED, architecture
from modelspec.kernels.quantize import quantized_rows
from modelspec.kernels.quantize_grouped import quantize_grouped_transposed

# Each is compiled anew where a size is 1, or no multiple of 16 or of 128: so large shapes are few, and all of them
# differ in that. The first two run under every configuration.
SMALL = ((70, 144, 272), (1, 144, 272))
LARGE = ((4096, 2112, 7168), (333, 576, 16384), (1000, 144, 272), (1, 2112, 7168))
# Groups of rows: empty ones, one of a single row, and all rows in one.
SMALL_GROUPS = ([30, 30, 31, 70], [0, 0, 70, 70])
LARGE_GROUPS = ([1000, 1000, 1001, 3000], [0, 4096, 4096, 4096])
NEAR = 4e-3

Operands = tuple[Tensor, Tensor, Tensor, Tensor]


def operands(m: int, n: int, k: int, b_rows: int, device: torch.device) -> Operands:
    """a [m, k] and b [n, k] in FP8, with scales that differ much."""
    a = torch.randn(m, k, device=device) * torch.randn(m, 1, device=device).exp()
    b = torch.randn(n, k, device=device) * torch.randn(n, 1, device=device).exp()
    return *quantized_rows(a, False), *(quantized_rows(b, False) if b_rows == 1 else quantize(b, (BLOCK, BLOCK)))


def assert_near(ours: Tensor, theirs: Tensor, about: object) -> None:
    """Both finite, and near by their Frobenius norms."""
    assert ours.shape == theirs.shape, about
    error = float(torch.linalg.vector_norm(ours.float() - theirs.float()) / torch.linalg.vector_norm(theirs.float()))
    assert error <= NEAR, f"{about}: relative error {error}"


def test_dense_products_under_every_configuration(device: torch.device, large: bool) -> None:
    arch = architecture(device)
    shapes = LARGE if large else SMALL
    for m, n, k in shapes:
        given = operands(m, n, k, BLOCK, device)
        expected = block_scaled_mm.block_scaled_mm.reference(*given)
        assert_near(block_scaled_mm.block_scaled_mm(*given), expected, (m, n, k))
        for name, config in BLOCK_SCALED_MM[arch].items():
            # A configuration that may hang a device is measured alone, at the end.
            if config.constants["LOADS"] != SPECIALIZED and (m, n, k) in shapes[:2]:
                out = expected.new_empty(m, n)
                block_scaled_mm.run(config, given, out, BLOCK)
                assert_near(out, expected, (name, m, n, k))


def test_dense_gradients_of_weights_under_every_configuration(device: torch.device, large: bool) -> None:
    arch = architecture(device)
    shapes = LARGE if large else SMALL
    for t, n, k in shapes[:2]:
        given = operands(n, k, t, 1, device)
        expected = block_scaled_wgrad.block_scaled_wgrad.reference(*given)
        assert_near(block_scaled_wgrad.block_scaled_wgrad(*given), expected, (t, n, k))
        for name, config in BLOCK_SCALED_WGRAD[arch].items():
            if config.constants["LOADS"] != SPECIALIZED:
                out = torch.empty_like(expected)
                block_scaled_mm.run(config, given, out, 1)
                assert_near(out, expected, (name, t, n, k))
        summed = torch.ones_like(expected)
        block_scaled_wgrad.block_scaled_wgrad_add(summed, *given)
        assert_near(summed - 1, expected, ("added", t, n, k))


def test_experts_multiply_their_own_rows_alone(device: torch.device, large: bool) -> None:
    arch = architecture(device)
    n, k = (2112, 7168) if large else (144, 272)
    for after in LARGE_GROUPS if large else SMALL_GROUPS:
        # Rows after the last expert become zeros.
        rows, ends = after[-1] + 9, torch.tensor(after, device=device, dtype=torch.int32)
        a, a_scales, b, b_scales = operands(rows, n, k, BLOCK, device)
        weights, scales = (torch.stack([each] * len(after)) for each in (b, b_scales))
        scales = scales * torch.arange(1, len(after) + 1, device=device)[:, None, None]
        given = a, a_scales, weights, scales, ends
        expected = grouped_scaled_mm.grouped_scaled_mm.reference(*given)
        for name, config in BLOCK_SCALED_MM[arch].items():
            if config.constants["LOADS"] != SPECIALIZED:
                out = expected.new_empty(rows, n)
                grouped_scaled_mm.run(config, given[:4], ends, out)
                assert_near(out, expected, (name, after))
                assert not out[after[-1] :].any(), (name, after)


def test_experts_without_rows_have_gradients_of_zero(device: torch.device, large: bool) -> None:
    n, k = (2112, 1536) if large else (144, 272)
    for after in LARGE_GROUPS if large else SMALL_GROUPS:
        ends = torch.tensor(after, device=device, dtype=torch.int32)
        grad, x = (torch.randn(after[-1], size, device=device) for size in (n, k))
        qa, a_scales, _ = quantize_grouped_transposed(grad, ends, False)
        qb, b_scales, starts = quantize_grouped_transposed(x, ends, False)
        given = qa, a_scales, qb, b_scales, starts
        expected = grouped_scaled_wgrad.grouped_scaled_wgrad.reference(*given)
        ours = grouped_scaled_wgrad.grouped_scaled_wgrad(*given)
        assert_near(ours, expected, after)
        summed = torch.ones_like(expected)
        grouped_scaled_wgrad.grouped_scaled_wgrad_add(summed, *given)
        assert_near(summed - 1, expected, ("added", after))
        for expert, (begin, end) in enumerate(zip([0, *after[:-1]], after, strict=True)):
            if begin == end:
                assert not ours[expert].any(), after
                assert (summed[expert] == 1).all(), after


def test_a_product_has_the_same_bits_each_time(device: torch.device, large: bool) -> None:
    m, n, k = (2048, 2112, 7168) if large else (70, 144, 272)
    given = operands(m, n, k, BLOCK, device)
    first = block_scaled_mm.block_scaled_mm(*given)
    for _ in range(20 if large else 2):
        assert torch.equal(block_scaled_mm.block_scaled_mm(*given), first)
