"""Quantising on a GPU gives the plain definition's bytes in every orientation, those of the CPU too.

FP8 stored transposed has been miscompiled on GPUs (triton-lang/triton#11111), which no other place shows.
"""

from typing import Any

import torch
from torch import Tensor

from modelspec.kernels.quantize import dequantize, quantize, quantize_both, quantize_transposed
from modelspec.kernels.triton_op import TritonOp

OPS: tuple[TritonOp[..., Any], ...] = (quantize, quantize_transposed, quantize_both)
SMALL = ((1, 576), (130, 200), (0, 300))
LARGE = ((4096, 7168), (1000, 2112), (16384, 1536), (1, 16384))


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
    for shape in SMALL + LARGE * large:
        for dtype in (torch.bfloat16, torch.float32):
            x = random(*shape, device, dtype)
            for op in OPS:
                for ue8m0 in (False, True):
                    about = (op.name, shape, dtype, ue8m0)
                    ours = op(x, ue8m0)
                    assert_same(ours, op.reference(x, ue8m0), about)
                    if x.numel() < 10**6:
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
    for shape in SMALL + LARGE * large:
        q, scales = quantize(random(*shape, device, torch.bfloat16), False)
        for dtype in (torch.bfloat16, torch.float32):
            assert_same((dequantize(q, scales, dtype),), (dequantize.reference(q, scales, dtype),), (shape, dtype))


def test_rows_beyond_two_to_the_31_elements_are_found(device: torch.device, large: bool) -> None:
    if not large:
        return
    rows = 2**31 // 7168 + 300
    x = torch.zeros(rows, 7168, device=device, dtype=torch.bfloat16)
    x[-200:] = random(200, 7168, device, torch.bfloat16)
    q, scales = quantize(x, False)
    assert_same((q[-200:], scales[-200:]), quantize.reference(x[-200:], False), "last rows")
