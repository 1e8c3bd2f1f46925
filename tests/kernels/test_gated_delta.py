"""The gated delta rule: chunks against steps, steps against the equation as it is printed, and what the rule means."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from modelspec.kernels.gated_delta import CHUNK, gated_delta_chunks, gated_delta_steps

Rule = Callable[..., Tensor]
LENGTHS = [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 17]


class Inputs(NamedTuple):
    """Arguments of the rule."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_alpha: Tensor
    beta: Tensor


def inputs(length: int, dtype: torch.dtype = torch.float64) -> Inputs:
    """Random arguments with keys of length 1, values wider than keys."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, 3, length, *shape, dtype=dtype)

    made = (
        normal(6) * 0.4,
        torch.nn.functional.normalize(normal(6), dim=-1),
        normal(7),
        -normal().exp() / 4,
        normal().sigmoid(),
    )
    return Inputs(*(tensor.requires_grad_() for tensor in made))


def printed(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor) -> Tensor:
    """The equation with its matrices, for one head: q and k [length, qk], v [length, dim]."""
    memory = torch.zeros(v.shape[-1], k.shape[-1], dtype=v.dtype)
    rows = []
    for t in range(len(v)):
        kept = log_alpha[t].exp() * (torch.eye(k.shape[-1], dtype=v.dtype) - beta[t] * torch.outer(k[t], k[t]))
        memory = memory @ kept + beta[t] * torch.outer(v[t], k[t])
        rows.append(memory @ q[t])
    return torch.stack(rows)


def gradients(output: Tensor, wanted: Inputs) -> tuple[Tensor, ...]:
    """Gradients of a fixed random function of the output."""
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=output.dtype)
    return torch.autograd.grad((output * cotangent).sum(), wanted)


@pytest.mark.parametrize("length", [1, 9])
def test_steps_are_the_printed_equation(length: int) -> None:
    made = inputs(length)
    heads = [printed(*(tensor[b, h] for tensor in made)) for b in range(2) for h in range(3)]
    expected = torch.stack(heads).unflatten(0, (2, 3))
    found = gated_delta_steps(*made)
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(gradients(found, made), gradients(expected, made), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("length", LENGTHS)
def test_chunks_give_the_outputs_and_gradients_of_steps(length: int) -> None:
    made = inputs(length)
    expected, found = gated_delta_steps(*made), gated_delta_chunks(*made)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for mine, theirs in zip(gradients(found, made), gradients(expected, made), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


def test_a_strong_decay_hides_no_weak_one_and_overflows_nothing() -> None:
    made = inputs(2 * CHUNK, torch.float32)
    with torch.no_grad():
        made.log_alpha[:, :, 1::5] = -1000.0
    expected = gated_delta_steps(*(tensor.double() for tensor in made))
    found = gated_delta_chunks(*made)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert all(gradient.isfinite().all() for gradient in gradients(found, made))


@pytest.mark.parametrize("form", [gated_delta_steps, gated_delta_chunks])
def test_a_value_written_again_under_its_key_replaces_the_old_one(form: Rule) -> None:
    key = torch.nn.functional.normalize(torch.randn(6, dtype=torch.float64), dim=0)
    q = k = key.expand(1, 1, 3, 6)
    v = torch.randn(1, 1, 3, 7, dtype=torch.float64)
    nothing_forgotten, all_replaced = torch.zeros(1, 1, 3).double(), torch.ones(1, 1, 3).double()
    torch.testing.assert_close(form(q, k, v, nothing_forgotten, all_replaced), v)


@pytest.mark.parametrize("form", [gated_delta_steps, gated_delta_chunks])
def test_no_token_sees_a_later_one(form: Rule) -> None:
    made = inputs(CHUNK + 9)
    cut = CHUNK - 3
    torch.testing.assert_close(form(*made)[:, :, :cut], form(*(tensor[:, :, :cut] for tensor in made)))


def test_bfloat16_is_computed_in_float32() -> None:
    made = inputs(CHUNK + 1, torch.bfloat16)
    found = gated_delta_chunks(*made)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, gated_delta_chunks(*(tensor.float() for tensor in made)).bfloat16())
