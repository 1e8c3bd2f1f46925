"""SwiGLU fused with its quantisation: what quantising its FP32 output gives, up to the last bits of exp."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from modelspec.kernels.op import use
from modelspec.kernels.quantize import dequantize, quantize, quantize_transposed
from modelspec.kernels.quantize_grouped import quantize_grouped_transposed
from modelspec.kernels.swiglu_quantize import (
    swiglu_quantize,
    swiglu_quantize_both,
    swiglu_quantize_grouped_transposed,
)
from modelspec.kernels.triton_op import TritonOp

OPS: list[TritonOp[..., Any]] = [swiglu_quantize, swiglu_quantize_both, swiglu_quantize_grouped_transposed]
SHAPES = [(1, 200), (130, 129), (7, 128), (0, 5)]


def arguments(op: TritonOp[..., Any], shape: tuple[int, int], weighted: bool, dtype: torch.dtype) -> tuple[Any, ...]:
    rows, width = shape
    gate_up = (torch.randn(rows, 2 * width) * 3).to(dtype)
    weights = torch.rand(rows) if weighted else None
    grouped = op is swiglu_quantize_grouped_transposed
    ends = torch.tensor([rows // 3, rows // 3, rows - rows // 4], dtype=torch.int32)
    return (gate_up, weights, ends, False) if grouped else (gate_up, weights, False)


def values(results: tuple[Tensor, ...]) -> list[Tensor]:
    """Codes with their scales multiplied out; starts as they are."""
    pairs = [dequantize(results[at], results[at + 1], torch.float32) for at in range(0, len(results) - 1, 2)]
    return pairs + [each for each in results if each.dtype == torch.int32]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_kernel_differs_from_the_reference_by_rare_single_codes(
    op: TritonOp[..., Any], shape: tuple[int, int], dtype: torch.dtype, weighted: bool
) -> None:
    given = arguments(op, shape, weighted, dtype)
    with use("triton"):
        ours = op(*given)
    theirs = op.reference(*given)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.shape, mine.stride(), mine.dtype) == (other.shape, other.stride(), other.dtype)
    for mine, other in zip(values(ours), values(theirs), strict=True):
        far = (mine - other).abs() > other.abs() * 1e-6
        assert far.sum() <= far.numel() * 1e-3 + 1
        # The next code is at most an eighth away, or a subnormal.
        torch.testing.assert_close(
            mine, other, rtol=0.126, atol=float(other.abs().max()) * 2.0**-17 if other.numel() else 0
        )


@pytest.mark.parametrize("weighted", [False, True])
def test_they_are_what_quantising_the_activation_gives(weighted: bool) -> None:
    gate_up, weights, ends, _ = arguments(swiglu_quantize_grouped_transposed, (130, 200), weighted, torch.bfloat16)
    gate, up = gate_up.float().chunk(2, dim=-1)
    a = gate * torch.sigmoid(gate) * up
    a = a if weights is None else a * weights[:, None]
    for mine, other in (
        (swiglu_quantize(gate_up, weights, True), quantize(a, True)),
        (swiglu_quantize_both(gate_up, weights, True), (*quantize(a, True), *quantize_transposed(a, True))),
        (
            swiglu_quantize_grouped_transposed(gate_up, weights, ends, True),
            quantize_grouped_transposed(a, ends, True),
        ),
    ):
        for ours, theirs in zip(values(mine), values(other), strict=True):
            assert ((ours - theirs).abs() > theirs.abs() * 1e-6).sum() <= ours.numel() * 1e-3


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("form", ["reference", "triton"])
def test_large_gates_are_exact_and_nan_reaches_its_block(form: Any) -> None:
    gate_up = torch.ones(3, 512)
    gate_up[0, 0], gate_up[1, 0], gate_up[2, 0] = 1e4, -1e4, math.nan
    with use(form):
        found = dequantize(*swiglu_quantize(gate_up, None, True), torch.float32)
    assert found[0, 0] == pytest.approx(1e4, rel=1 / 16)
    assert found[1, 0] == 0
    assert found[2].isnan().tolist() == [True] * 128 + [False] * 128
    torch.testing.assert_close(found[:, 128:].nan_to_num(), F.silu(torch.ones(3, 128)), rtol=1 / 16, atol=0)


@pytest.mark.parametrize("form", ["reference", "triton"])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_they_are_proper_operators(op: TritonOp[..., Any], form: Any) -> None:
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    with use(form):
        for weighted in (False, True):
            given = arguments(op, (5, 130), weighted, torch.bfloat16)
            torch.library.opcheck(op.registered, given, test_utils=checks)


def test_they_compile_in_one_graph() -> None:
    def activation(gate_up: Tensor) -> Tensor:
        return dequantize(*swiglu_quantize_both(gate_up, None, False)[:2], torch.float32)

    gate_up = torch.randn(5, 260)
    compiled = torch.compile(activation, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(gate_up), activation(gate_up))
