"""Quantising on a GPU gives the plain definition's bytes in every orientation, those of the CPU too.

FP8 stored transposed has been miscompiled on GPUs (triton-lang/triton#11111), which no other place shows.
"""

from typing import Any

import torch
from torch import Tensor

from modelspec.kernels.quantize import dequantize, quantize, quantize_both, quantize_transposed
from modelspec.kernels.quantize_grouped import quantize_grouped_both, quantize_grouped_transposed
from modelspec.kernels.quantize_weight import quantize_weight
from modelspec.kernels.rms_norm_quantize import rms_norm_quantize
from modelspec.kernels.swiglu_quantize import swiglu_quantize, swiglu_quantize_both
from modelspec.kernels.triton_op import TritonOp

OPS: tuple[TritonOp[..., Any], ...] = (quantize, quantize_transposed, quantize_both, quantize_weight)
SMALL = ((1, 576), (130, 200), (0, 300))
LARGE = ((4096, 7168), (1000, 2112), (1, 16384), (0, 300))


def random(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Rows of very different size, zeros among them."""
    x = torch.randn(rows, columns, device=device) * torch.randn(rows, 1, device=device).mul(4).exp()
    return torch.where(torch.rand(rows, columns, device=device) < 0.05, 0.0, x).to(dtype)


def assert_same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], about: object) -> None:
    """The same shapes and bytes, any NaN for NaN."""
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape, about
        wide, expected = mine.cpu().float(), other.cpu().float()
        wrong = ~((wide == expected) | (wide.isnan() & expected.isnan()))
        assert not wrong.any(), f"{about}: {int(wrong.sum())} of {wrong.numel()} differ, first at {wrong.nonzero()[0]}"


def test_every_orientation_has_the_bytes_of_the_definition(device: torch.device, large: bool) -> None:
    shapes = LARGE if large else SMALL
    plain = [(shape, torch.bfloat16, False) for shape in shapes]
    for shape, dtype, ue8m0 in (*plain, (shapes[0], torch.float32, False), (shapes[0], torch.bfloat16, True)):
        x = random(*shape, device, dtype)
        for op in OPS:
            ours, about = op(x, ue8m0), (op.name, shape, dtype, ue8m0)
            assert_same(ours, op.reference(x, ue8m0), about)
            if x.numel() < 10**7:
                assert_same(ours, op.reference(x.cpu(), ue8m0), ("on CPU", *about))


def test_the_edges_of_the_format_have_the_bytes_of_the_definition(device: torch.device, large: bool) -> None:
    del large
    edges = [0.0, -0.0, 1e-30, 1e-12, 448.0, 464.0, 1e4, 3e38, 2.0**-9, 2.0**-10, 1.0625, float("inf"), float("nan")]
    x = torch.zeros(len(edges), 256, device=device)
    x[:, 0] = torch.tensor(edges, device=device)
    # Ties between neighbours, in a block whose scale is 1.
    x[:, 128:] = torch.linspace(-448, 448, 128, device=device).round()
    for op in OPS:
        assert_same(op(x, False), op.reference(x, False), op.name)


def test_dequantising_gives_the_bytes_of_the_definition(device: torch.device, large: bool) -> None:
    for shape in LARGE if large else SMALL:
        q, scales = quantize(random(*shape, device, torch.bfloat16), False)
        for dtype in (torch.bfloat16, torch.float32):
            assert_same((dequantize(q, scales, dtype),), (dequantize.reference(q, scales, dtype),), (shape, dtype))


def test_experts_have_blocks_of_their_own(device: torch.device, large: bool) -> None:
    for rows, columns in ((5000, 7168) if large else (200, 144),):
        x = random(rows, columns, device, torch.bfloat16)
        ends = torch.tensor([rows // 3, rows // 3, rows // 3 + 1, rows - 5], device=device, dtype=torch.int32)
        for op in (quantize_grouped_transposed, quantize_grouped_both):
            assert_same(op(x, ends, False), op.reference(x, ends, False), (op.name, rows, columns))


def test_fused_quantisers_give_the_values_of_the_definition(device: torch.device, large: bool) -> None:
    """Sums in another order and another exponential change a code here and there."""
    for rows, columns in ((4096, 2048), (1000, 7168)) if large else ((70, 144),):
        gate_up = torch.randn(rows, 2 * columns, device=device, dtype=torch.bfloat16)
        weights = torch.rand(rows, device=device)
        x, weight = gate_up[:, :columns].contiguous(), torch.rand(columns, device=device, dtype=torch.bfloat16)
        swiglu, norm = (gate_up, weights, False), (x, weight, 1e-6, False)
        pairs = [(swiglu_quantize.reference(*swiglu), swiglu_quantize(*swiglu))]
        theirs, ours = swiglu_quantize_both.reference(*swiglu), swiglu_quantize_both(*swiglu)
        pairs += [(theirs[:2], ours[:2]), (theirs[2:], ours[2:])]
        theirs, ours = rms_norm_quantize.reference(*norm), rms_norm_quantize(*norm)
        pairs += [(theirs[1:3], ours[1:3])]
        torch.testing.assert_close(ours[0], theirs[0], rtol=2**-7, atol=1e-6)
        torch.testing.assert_close(ours[3], theirs[3], rtol=1e-5, atol=0)
        for expected, found in pairs:
            wide, truth = (dequantize.reference(*each, torch.float32) for each in (found, expected))
            error = float(torch.linalg.vector_norm(wide - truth) / torch.linalg.vector_norm(truth))
            assert error <= 5e-3, (rows, columns, error)


def test_rows_beyond_two_to_the_31_elements_are_found(device: torch.device, large: bool) -> None:
    if not large:
        return
    rows = 2**31 // 7168 + 300
    x = torch.zeros(rows, 7168, device=device, dtype=torch.bfloat16)
    x[-200:] = random(200, 7168, device, torch.bfloat16)
    q, scales = quantize(x, False)
    assert_same((q[-200:], scales[-200:]), quantize.reference(x[-200:], False), "last rows")
