"""AdamW against torch's, and BF16 moments against a loop written out."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from modelspec import schema
from modelspec.builders.optim import AdamW, build_optimizer, clip_gradients, set_learning_rate, squares

ADAMW = schema.AdamW(type="adamw", betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def _model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 6), nn.LayerNorm(6)).to(dtype)


def _gradients(model: nn.Module, step: int) -> None:
    torch.manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


def _optimizer(model: nn.Module, states: schema.Dtype) -> AdamW:
    return build_optimizer(model, ADAMW, schema.Precision(optimizer_states=states))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_with_unrounded_moments_it_is_torchs_adamw_bit_for_bit(dtype: torch.dtype) -> None:
    ours, theirs = _model(dtype), _model(dtype)
    matrices = [p for p in theirs.parameters() if p.ndim >= 2]
    others = [p for p in theirs.parameters() if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(
        groups,
        betas=ADAMW.betas,
        eps=ADAMW.eps,
        weight_decay=ADAMW.weight_decay,
        fused=True,
    )
    optimizer = _optimizer(ours, "float64" if dtype == torch.float64 else "float32")
    for step in range(5):
        for model, each in ((ours, optimizer), (theirs, reference)):
            _gradients(model, step)
            set_learning_rate(each, 1e-2 / (step + 1))
            each.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_bf16_moments_match_a_plain_loop() -> None:
    model = nn.Linear(7, 5, bias=False)
    optimizer = _optimizer(model, "bfloat16")
    weight = model.weight.detach().clone()
    m, v = torch.zeros_like(weight, dtype=torch.bfloat16), torch.zeros_like(weight, dtype=torch.bfloat16)
    for step in range(1, 6):
        _gradients(model, step)
        assert model.weight.grad is not None
        gradient = model.weight.grad.clone()
        set_learning_rate(optimizer, 1e-2)
        optimizer.step()
        m_wide = 0.9 * m.float() + 0.1 * gradient
        v_wide = 0.95 * v.float() + 0.05 * gradient**2
        weight -= 1e-2 * 0.1 * weight
        weight -= 1e-2 * (m_wide / (1 - 0.9**step)) / ((v_wide / (1 - 0.95**step)).sqrt() + 1e-8)
        m, v = m_wide.bfloat16(), v_wide.bfloat16()
        torch.testing.assert_close(model.weight.detach(), weight, rtol=1e-5, atol=1e-7)
    state = optimizer.state[model.weight]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
    # One unit in the last place of BF16: the kernel may round the FP32 sum the other way.
    torch.testing.assert_close(state["exp_avg"], m, rtol=2**-7, atol=1e-6)
    torch.testing.assert_close(state["exp_avg_sq"], v, rtol=2**-7, atol=1e-6)


def test_bf16_weights_are_updated_in_fp32_and_rounded_once() -> None:
    model = nn.Linear(4, 4, bias=False).bfloat16()
    optimizer = _optimizer(model, "float32")
    before = model.weight.detach().float()
    _gradients(model, 0)
    assert model.weight.grad is not None
    sign = model.weight.grad.float().sign()
    set_learning_rate(optimizer, 0.01)
    optimizer.step()
    # The first step of Adam is the sign of the gradient.
    expected = (before * (1 - 0.01 * 0.1) - 0.01 * sign).bfloat16()
    torch.testing.assert_close(model.weight.detach(), expected, rtol=2**-7, atol=0.0)


def test_decay_falls_on_matrices_and_embeddings_only() -> None:
    model = _model()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = _optimizer(model, "float32")
    set_learning_rate(optimizer, 0.5)
    optimizer.step()
    for old, new in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), old * 0.95 if old.ndim >= 2 else old)


def test_parameters_without_gradient_are_left_alone() -> None:
    model = _model()
    optimizer = _optimizer(model, "bfloat16")
    optimizer.step()
    assert not optimizer.state


def test_the_norm_of_a_million_elements_is_exact_where_single_precision_is_not() -> None:
    gradient = torch.rand(2048, 512, generator=torch.Generator().manual_seed(3))
    exact = float(gradient.double().square().sum())
    assert float(squares(gradient)) == pytest.approx(exact, rel=1e-12)
    assert float(squares(gradient.bfloat16())) == pytest.approx(float(gradient.bfloat16().double().square().sum()))


@pytest.mark.parametrize("limit", [None, 1.0, 1e6])
def test_clipping_gives_the_norm_and_scales_only_what_is_too_large(limit: float | None) -> None:
    model = _model()
    _gradients(model, 0)
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    expected = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
    assert clip_gradients(model, limit) == pytest.approx(expected, rel=1e-12)
    scale = min((limit or math.inf) / expected, 1.0)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient * scale)
