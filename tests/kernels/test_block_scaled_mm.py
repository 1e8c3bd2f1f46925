"""The product of two block-scaled FP8 matrices: the kernel and its reference against the definition in float64, and
against the product of what was quantised.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from modelspec.kernels import block_scaled_mm as module
from modelspec.kernels.block_scale import quantize
from modelspec.kernels.block_scaled_mm import block_scaled_mm, parts_of, run
from modelspec.kernels.configs import POINTERS, SPECIALIZED, tiles
from modelspec.kernels.op import use
from modelspec.kernels.variant import Config

pytestmark = pytest.mark.usefixtures("poisoned")

# Not test_schema: it asks whether arguments were written to by a comparison that torch lacks for FP8.
CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
SHAPES = [(1, 576, 256), (3, 130, 128), (65, 192, 1536), (130, 33, 144), (66, 7, 100), (129, 130, 1)]


def matrices(m: int, n: int, k: int, tail: float = 0.0) -> tuple[Tensor, Tensor]:
    """Two matrices [m, k] and [n, k]; with a tail their magnitudes are spread over exp(tail * normal)."""
    a, b = torch.randn(m, k), torch.randn(n, k)
    return (a * (tail * torch.randn(m, k)).exp(), b * (tail * torch.randn(n, k)).exp()) if tail else (a, b)


def quantized(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments of the product; scales of a in column-major memory, as the quantiser leaves them."""
    (qa, a_scales), (qb, b_scales) = quantize(a, (1, 128)), quantize(b, (128, 128))
    return qa, a_scales.T.contiguous().T, qb, b_scales


def exact(qa: Tensor, a_scales: Tensor, qb: Tensor, b_scales: Tensor, b_rows: int = 128) -> Tensor:
    """The product of the same codes and scales in float64."""
    wide_a = qa.double() * a_scales.double().repeat_interleave(128, 1)[:, : qa.shape[1]]
    spread = b_scales.double().repeat_interleave(b_rows, 0)[: len(qb)].repeat_interleave(128, 1)
    return wide_a @ (qb.double() * spread[:, : qb.shape[1]]).T


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm())


def in_both(*args: Any) -> list[Tensor]:
    """What the reference and the kernel give."""
    results = []
    for form in ("reference", "triton"):
        with use(form):
            results.append(block_scaled_mm(*args))
    return results


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_forms_are_the_product_of_the_dequantised(shape: tuple[int, int, int]) -> None:
    args = quantized(*matrices(*shape))
    for result in in_both(*args, torch.float32):
        # FP32 sums of terms that cancel: the error is measured against their size.
        torch.testing.assert_close(result.double(), exact(*args), rtol=0, atol=2e-6 * float(exact(*args).abs().max()))
    for result in in_both(*args):
        assert result.dtype == torch.bfloat16
        torch.testing.assert_close(result.double(), exact(*args), rtol=2**-8, atol=1e-5 * float(exact(*args).std(None)))


@pytest.mark.parametrize("tail", [0.0, 1.0])
def test_quantising_costs_as_little_as_the_format_allows(tail: float) -> None:
    """Bounds as DeepGEMM has them for 1 - 2 <x, y> / (<x, x> + <y, y>), and 4 % in Frobenius norm."""
    a, b = matrices(96, 200, 1024, tail)
    truth = a.double() @ b.double().T
    for result in in_both(*quantized(a, b)):
        wide = result.double()
        assert relative(result, truth) <= 0.04
        assert 1 - 2 * (wide * truth).sum() / (wide.square() + truth.square()).sum() <= 1e-3


@pytest.mark.parametrize(
    "config",
    [tiles(64, 128, 4, 3, POINTERS), tiles(128, 128, 4, 4, SPECIALIZED), tiles(16, 64, 4, 2, POINTERS, group=2)],
    ids=["pointers", "specialized", "small"],
)
@pytest.mark.parametrize("parts", [1, 2])
def test_every_way_to_load_gives_the_same(config: Config, parts: int) -> None:
    for m, n, k in [(70, 129, 272), (1, 64, 384), (130, 257, 130)]:
        args = quantized(*matrices(m, n, k))
        out = torch.empty(parts, m, n)
        run(config, args, out, 128, parts)
        torch.testing.assert_close(out.sum(0).double(), exact(*args), rtol=0, atol=1e-5 * float(exact(*args).std()))


def test_few_rows_share_a_device_by_parts_of_k_and_many_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    small = tiles(64, 64, 4, 4)
    assert parts_of(1, 576, 7168, small, programs=396) == 8
    assert parts_of(64, 7168, 2048, small, programs=396) == 2
    assert parts_of(65, 576, 7168, small, programs=396) == 1
    # No part may be empty.
    assert parts_of(1, 64, 256, small, programs=396) == 1
    monkeypatch.setattr(module, "parts_of", lambda *_: 4)
    args = quantized(*matrices(5, 40, 700))
    _, ours = in_both(*args)
    torch.testing.assert_close(ours.double(), exact(*args), rtol=2**-8, atol=1e-4)


def test_powers_of_two_pass_through_and_rows_stay_in_their_order() -> None:
    a, b = matrices(40, 136, 256)
    _, once = in_both(*quantized(a, b))
    _, scaled = in_both(*quantized(a * 2.0**9, b * 2.0**-4))
    torch.testing.assert_close(scaled, once * 2.0**5, rtol=0, atol=0)
    order = torch.randperm(40)
    _, permuted = in_both(*quantized(a[order], b))
    torch.testing.assert_close(permuted, once[order], rtol=0, atol=0)


def test_more_rows_and_zeros_along_k_change_nothing() -> None:
    a, b = matrices(40, 136, 256)
    _, once = in_both(*quantized(a, b))
    _, longer = in_both(*quantized(torch.cat([a, torch.randn(60, 256)]), torch.cat([b, torch.randn(120, 256)])))
    torch.testing.assert_close(longer[:40, :128], once[:, :128], rtol=0, atol=0)
    pad = torch.nn.functional.pad
    _, wider = in_both(*quantized(pad(a, (0, 130)), pad(b, (0, 130))))
    torch.testing.assert_close(wider, once, rtol=0, atol=0)


def test_nan_of_a_row_stays_in_its_row() -> None:
    a, b = matrices(9, 20, 256)
    a[4, 130] = torch.nan
    for result in in_both(*quantized(a, b)):
        assert result[4].isnan().all()
        assert result[torch.arange(9) != 4].isfinite().all()


def test_the_format_of_cdna_3_is_multiplied_as_it_is() -> None:
    a, b = torch.randn(5, 128), torch.randn(7, 128)
    fnuz = torch.float8_e4m3fnuz
    args = ((a * 50).to(fnuz), torch.rand(5, 1), (b * 50).to(fnuz), torch.rand(1, 1))
    for result in in_both(*args, torch.float32):
        torch.testing.assert_close(result.double(), exact(*args), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("shape", [(0, 8, 256), (8, 0, 256), (4, 8, 0)], ids=str)
def test_what_is_empty_gives_zeros_or_nothing(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    blocks = -(-k // 128)
    e4m3 = torch.float8_e4m3fn
    args = (
        torch.empty(m, k).to(e4m3),
        torch.empty(m, blocks),
        torch.empty(n, k).to(e4m3),
        torch.empty(-(-n // 128), blocks),
    )
    for result in in_both(*args):
        assert result.shape == (m, n)
        assert (result == 0).all()


def test_operands_in_any_layout_are_taken() -> None:
    args = quantized(*matrices(20, 130, 256))
    _, once = in_both(*args)
    qa, a_scales, qb, b_scales = args
    turned = (qa.T.contiguous().T, a_scales.contiguous(), qb.T.contiguous().T, b_scales.T.contiguous().T)
    shifted = torch.empty(qa.numel() + 1, dtype=qa.dtype)[1:].view_as(qa).copy_(qa)
    for again in (turned, (shifted, *args[1:])):
        torch.testing.assert_close(in_both(*again)[1], once, rtol=0, atol=0)


def test_shapes_that_do_not_fit_are_refused() -> None:
    qa, a_scales, qb, b_scales = quantized(*matrices(20, 130, 256))
    for form in ("reference", "triton"):
        with use(form):
            with pytest.raises(ValueError, match="as many columns"):
                block_scaled_mm(qa[:, :128], a_scales, qb, b_scales)
            with pytest.raises(
                ValueError, match=r"b \[130, 256\] in blocks of 128 x 128 has scales \[2, 2\], not \[130"
            ):
                block_scaled_mm(qa, a_scales, qb, torch.ones(130, 2))


def test_torch_sees_one_operator() -> None:
    args = quantized(*matrices(4, 130, 200))
    torch.library.opcheck(block_scaled_mm.registered, args, test_utils=CHECKS)
    compiled = torch.compile(lambda *xs: block_scaled_mm(*xs) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), block_scaled_mm(*args) * 2, rtol=0, atol=0)
