"""The head and its loss in one op, against the two written out."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from modelspec.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference


def operands(
    rows: int, vocabulary: int = 37, width: int = 12, dtype: torch.dtype = torch.float32, ignored: float = 0.2
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and targets, some of which are ignored."""
    hidden = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, vocabulary, (rows,)).where(torch.rand(rows) >= ignored, -100)
    return hidden, weight, targets


def written_out(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The sum of -log of each valid target's probability."""
    probabilities = (hidden @ weight.T).softmax(-1)
    valid = [(row, target) for row, target in enumerate(targets.tolist()) if target != -100]
    return -sum((probabilities[row, target].log() for row, target in valid), start=hidden.new_zeros(()))


@pytest.mark.parametrize("rows", [1, 2, 255, 256, 257, 700])
def test_loss_and_gradients_equal_the_definition(rows: int) -> None:
    hidden, weight, targets = operands(rows, dtype=torch.float64)
    for definition in (written_out, linear_cross_entropy_reference):
        ours, wanted = linear_cross_entropy(hidden, weight, targets), definition(hidden, weight, targets)
        torch.testing.assert_close(ours, wanted)
        torch.testing.assert_close(
            torch.autograd.grad(3.0 * ours, (hidden, weight)), torch.autograd.grad(3.0 * wanted, (hidden, weight))
        )


def test_gradcheck() -> None:
    hidden, weight, targets = operands(5, vocabulary=6, width=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(linear_cross_entropy, (hidden, weight, targets))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_narrow_dtypes_are_near_float64(dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight, targets = operands(300, dtype=dtype)
    wide_hidden, wide_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    ours = linear_cross_entropy(hidden, weight, targets)
    wanted = linear_cross_entropy(wide_hidden, wide_weight, targets)
    assert ours.dtype == torch.float32
    assert (ours - wanted).abs() <= tolerance * wanted
    for mine, theirs in zip(
        torch.autograd.grad(ours, (hidden, weight)),
        torch.autograd.grad(wanted, (wide_hidden, wide_weight)),
        strict=True,
    ):
        assert mine.dtype == dtype
        assert (mine - theirs).norm() <= tolerance * theirs.norm()


def test_ignored_rows_have_no_loss_and_no_gradient() -> None:
    hidden, weight, targets = operands(300, ignored=0.0)
    targets[100:] = -100
    loss = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(loss, F.cross_entropy(hidden[:100] @ weight.T, targets[:100], reduction="sum"))
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert (gradient[100:] == 0).all()
    assert (gradient[:100].abs().sum(-1) > 0).all()


def test_rows_that_are_ignored_may_hold_anything() -> None:
    hidden, weight, targets = operands(6, ignored=0.0)
    spoiled = hidden.detach().clone()
    spoiled[2] = float("inf")
    targets[2] = -100
    loss = linear_cross_entropy(spoiled, weight.detach(), targets)
    torch.testing.assert_close(loss, linear_cross_entropy(hidden.detach(), weight.detach(), targets))


def test_all_rows_ignored_cost_nothing() -> None:
    hidden, weight, targets = operands(5, ignored=1.1)
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert loss == 0
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad.abs().sum() == weight.grad.abs().sum() == 0


@pytest.mark.parametrize("scale", [1e3, 1e-3])
def test_extreme_logits_stay_finite(scale: float) -> None:
    hidden, weight, targets = operands(20)
    loss = linear_cross_entropy(hidden * scale, weight, targets)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_either_operand_may_need_no_gradient(frozen: str) -> None:
    hidden, weight, targets = operands(300)
    wanted = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), (hidden, weight))
    hidden, weight = (
        t.detach().requires_grad_(frozen not in (name, "both")) for name, t in (("hidden", hidden), ("weight", weight))
    )
    loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.requires_grad == (frozen != "both")
    if frozen != "both":
        loss.backward()
    for tensor, gradient in zip((hidden, weight), wanted, strict=True):
        if tensor.requires_grad:
            assert tensor.grad is not None
            torch.testing.assert_close(tensor.grad, gradient)
