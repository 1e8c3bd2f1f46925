"""The gated activation's relatives, and biased experts, against their equations written out."""

import pytest
import torch
from torch.nn import functional as F

from modelspec.kernels.experts import Experts, swiglu_experts
from modelspec.kernels.swiglu import Gating, swiglu, swiglu_gradients


def test_clamped_and_shifted_activation() -> None:
    gate, up = torch.linspace(-12, 12, 49, dtype=torch.float64), torch.linspace(12, -9, 49, dtype=torch.float64)
    expected = []
    for g, u in zip(gate.tolist(), up.tolist(), strict=True):
        g, u = min(g, 7.0), max(-7.0, min(u, 7.0))
        expected.append(g / (1 + torch.exp(torch.tensor(-1.702 * g, dtype=torch.float64)).item()) * (u + 1.0))
    torch.testing.assert_close(swiglu(gate, up, Gating(1.702, 7.0, 1.0)), torch.tensor(expected, dtype=torch.float64))


def test_without_constants_it_is_silu_times_up() -> None:
    gate, up = torch.randn(50), torch.randn(50)
    torch.testing.assert_close(swiglu(gate, up, Gating()), F.silu(gate) * up)


@pytest.mark.parametrize("gating", [Gating(), Gating(1.702, 2.0, 1.0)], ids=["silu", "clamped"])
def test_gradients_without_autograd_are_those_of_autograd(gating: Gating) -> None:
    gate, up = (torch.randn(200).double().mul_(3).requires_grad_() for _ in range(2))
    grad = torch.randn(200).double()
    expected = torch.autograd.grad(swiglu.reference(gate, up, gating), (gate, up), grad)
    torch.testing.assert_close(swiglu_gradients(grad, gate.detach(), up.detach(), gating), expected)


def test_biased_experts_are_those_of_a_loop() -> None:
    x, choice, weights = torch.randn(9, 5).double(), torch.rand(9, 4).argsort(-1)[:, :2], torch.rand(9, 2).double()
    experts = Experts(*(torch.randn(*s).double().requires_grad_() for s in ((4, 6, 5), (4, 5, 3), (4, 6), (4, 5))))
    gate_up, down, gate_up_bias, down_bias = experts
    assert gate_up_bias is not None and down_bias is not None
    gating = Gating(1.7, 1.5, 1.0)
    rows = []
    for token in range(9):
        row = torch.zeros(5, dtype=torch.float64)
        for slot in range(2):
            e = int(choice[token, slot])
            gate, up = (gate_up[e] @ x[token] + gate_up_bias[e]).chunk(2)
            row = row + weights[token, slot] * (down[e] @ swiglu(gate, up, gating) + down_bias[e])
        rows.append(row)
    mine, theirs = swiglu_experts(x, choice, weights, experts, gating, swiglu.reference), torch.stack(rows)
    torch.testing.assert_close(mine, theirs)
    wanting = (gate_up, down, gate_up_bias, down_bias)
    cotangent = torch.randn_like(mine)
    torch.testing.assert_close(
        torch.autograd.grad(mine, wanting, cotangent), torch.autograd.grad(theirs, wanting, cotangent)
    )
