"""Gradients of experts' activation in one pass are those of autograd, in every element that is written."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from modelspec.kernels.op import use
from modelspec.kernels.swiglu_backward import swiglu_backward

FORMS = pytest.mark.parametrize("form", ["triton", "reference"])


def operands(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(rows, width).to(dtype), (torch.randn(rows, 2 * width) * 3).to(dtype), torch.rand(rows)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 72), (3, 1536), (2, 1024)])
@pytest.mark.usefixtures("poisoned")
def test_it_is_the_gradient_of_the_scaled_activation(rows: int, width: int, dtype: torch.dtype, form: Any) -> None:
    grad, gate_up, weights = operands(rows, width, dtype)
    wide, scale = gate_up.double().requires_grad_(), weights.double().requires_grad_()
    gate, up = wide.chunk(2, dim=-1)
    expected = torch.autograd.grad(F.silu(gate) * up * scale[:, None], (wide, scale), grad.double())
    with use(form):
        of_gate_up, of_weights = swiglu_backward(grad, gate_up, weights)
    assert of_gate_up.dtype == dtype and of_weights.dtype == torch.float32
    rtol, atol = (2**-8, 1e-6) if dtype == torch.bfloat16 else (1e-5, 1e-5)
    torch.testing.assert_close(of_gate_up.double(), expected[0], rtol=rtol, atol=atol)
    torch.testing.assert_close(of_weights.double(), expected[1], rtol=1e-4, atol=1e-4)


@FORMS
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (4, 0)])
def test_nothing_gives_zeros(rows: int, width: int, form: Any) -> None:
    with use(form):
        of_gate_up, of_weights = swiglu_backward(*operands(rows, width, torch.float32))
    assert of_gate_up.shape == (rows, 2 * width) and torch.equal(of_weights, torch.zeros(rows))


def test_torch_knows_the_operation() -> None:
    torch.library.opcheck(swiglu_backward.registered, operands(4, 24, torch.float32))
