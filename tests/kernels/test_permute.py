"""Tokens to their experts and back: the order of rows, what is moved and what is summed, and gradients of both."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from modelspec.kernels.block_scale import dequantize, quantize
from modelspec.kernels.op import Form, use
from modelspec.kernels.permute import pair_dots, permute, permute_scales, unpermute
from modelspec.kernels.sort_by_expert import Pairs, sort_by_expert
from modelspec.kernels.triton_op import TritonOp


def chosen(tokens: int, k: int, num: int) -> Tensor:
    """k different experts of `num` for each token."""
    return torch.rand(tokens, num).argsort(-1)[:, :k]


CHOICES: dict[str, tuple[Callable[[], Tensor], int]] = {
    "few-tokens": (lambda: chosen(7, 2, 4), 4),
    "several-blocks-of-pairs": (lambda: chosen(150, 3, 5), 5),
    "many-experts": (lambda: chosen(70, 8, 256), 256),
    "one-expert-each": (lambda: chosen(130, 1, 3), 3),
    "all-to-the-last": (lambda: torch.full((140, 1), 8), 9),
    "all-to-the-first": (lambda: torch.zeros(140, 1, dtype=torch.int64), 9),
    "every-expert": (lambda: chosen(33, 4, 4), 4),
    "the-same-expert-twice": (lambda: torch.tensor([[1, 1], [0, 1]]), 3),
    "32-bit": (lambda: chosen(7, 2, 4).int(), 4),
    "a-view": (lambda: chosen(2, 7, 9).T, 9),
    "no-tokens": (lambda: chosen(0, 2, 4), 4),
}
# The kernel moves 1024 values at a time.
WIDTHS = [1, 576, 1030]


def in_triton(call: Callable[..., Any], *arguments: Any) -> Any:
    with use("triton"):
        return call(*arguments)


def moved(tokens: int = 9, k: int = 3, num: int = 5, width: int = 40) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [tokens, width], its copies' rows, weights, and something of the copies' shape."""
    row = sort_by_expert(chosen(tokens, k, num), num).row
    return torch.randn(tokens, width), row, torch.randn(tokens, k), torch.randn(tokens * k, width)


@pytest.mark.parametrize("form", ["triton", "reference"])
@pytest.mark.parametrize(("make", "num"), CHOICES.values(), ids=CHOICES.keys())
def test_pairs_are_sorted_by_expert_and_then_by_token(
    make: Callable[[], Tensor], num: int, form: Form, poisoned: None
) -> None:
    choice = make()
    with use(form):
        pairs = sort_by_expert(choice, num)
    order = sorted(range(choice.numel()), key=lambda pair: int(choice.flatten()[pair]))
    assert pairs.token.tolist() == [pair // choice.shape[1] for pair in order]
    assert pairs.row.flatten()[torch.tensor(order, dtype=torch.int64)].tolist() == list(range(len(order)))
    assert pairs.ends.tolist() == [int((choice <= expert).sum()) for expert in range(num)]
    assert {each.dtype for each in pairs} == {torch.int32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_copy_of_a_token_is_the_token(width: int, dtype: torch.dtype, poisoned: None) -> None:
    pairs, x = sort_by_expert(chosen(9, 3, 5), 5), torch.randn(9, width).to(dtype)
    rows = in_triton(permute, x, pairs.row)
    assert torch.equal(rows, x[pairs.token])
    assert torch.equal(permute.reference(x, pairs.row), rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_copies_are_scaled_by_their_weights_and_rounded_once(width: int, dtype: torch.dtype, poisoned: None) -> None:
    pairs, x, weights = sort_by_expert(chosen(9, 3, 5), 5), torch.randn(9, width).to(dtype), torch.randn(9, 3)
    rows = in_triton(permute, x, pairs.row, weights)
    for token in range(9):
        for j in range(3):
            expected = (x[token].double() * weights[token, j].double()).float().to(dtype)
            assert torch.equal(rows[pairs.row[token, j]], expected)
    assert torch.equal(permute.reference(x, pairs.row, weights), rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("weighted", [False, True])
def test_copies_are_summed_in_fp32_in_the_order_of_a_tokens_experts(
    weighted: bool, width: int, dtype: torch.dtype, poisoned: None
) -> None:
    _, row, weights, rows = moved(width=width)
    # Without order, the sum of these would come out as 0 or as 1.
    rows[row[:, 0]], rows[row[:, 1]], rows[row[:, 2]] = 2.0**30, -(2.0**30), 1.0
    given = torch.ones_like(weights) if weighted else None
    rows = rows.to(dtype)
    for out in (in_triton(unpermute, rows, row, given), unpermute.reference(rows, row, given)):
        assert out.dtype == dtype
        assert (out == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_weighted_sum_is_that_of_the_definition(dtype: torch.dtype, poisoned: None) -> None:
    _, row, weights, rows = moved(width=1030)
    rows = rows.to(dtype)
    exact = (rows.double()[row] * weights.double()[..., None]).sum(1)
    rtol = 1e-5 if dtype == torch.float32 else 2**-8
    for out in (in_triton(unpermute, rows, row, weights), unpermute.reference(rows, row, weights)):
        torch.testing.assert_close(out.double(), exact, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_dots_are_those_of_a_token_with_its_rows(width: int, dtype: torch.dtype, poisoned: None) -> None:
    x, row, _, rows = moved(width=width)
    x, rows = x.to(dtype), rows.to(dtype)
    exact = (rows.double()[row] * x.double()[:, None]).sum(-1)
    for out in (in_triton(pair_dots, x, rows, row), pair_dots.reference(x, rows, row)):
        torch.testing.assert_close(out, exact.float(), rtol=1e-4, atol=1e-4)


def test_what_is_quantised_moves_with_its_scales(poisoned: None) -> None:
    x = torch.randn(150, 300) * torch.randn(150, 1).exp()
    q, scales = quantize(x, (1, 128))
    q.view(torch.uint8)[3, 5] = 0x7F
    scales = scales.T.contiguous().T
    row, token, _ = sort_by_expert(chosen(150, 2, 5), 5)
    q_rows, scales_rows = in_triton(permute, q, row), in_triton(permute_scales, scales, token)
    values = dequantize(q, scales, (1, 128), torch.float32)[token]
    found = dequantize(q_rows, scales_rows, (1, 128), torch.float32)
    torch.testing.assert_close(found, values, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(permute.reference(q, row).view(torch.uint8), q_rows.view(torch.uint8))
    assert torch.equal(permute_scales.reference(scales, token), scales_rows)
    # As products read them.
    assert scales_rows.T.is_contiguous()


@pytest.mark.parametrize("form", ["triton", "reference"])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_are_those_of_indexing(weighted: bool, form: Form) -> None:
    x, row, weights, _ = moved()
    token = row.flatten().argsort() // 3

    def there_and_back(x: Tensor, weights: Tensor) -> Tensor:
        rows = permute(x, row, weights if weighted else None)
        return unpermute(rows.sin(), row, weights if weighted else None)

    def by_indexing(x: Tensor, weights: Tensor) -> Tensor:
        used = weights if weighted else torch.ones_like(weights)
        rows = x[token] * used.flatten()[row.flatten().argsort(), None]
        return (rows.sin()[row] * used[..., None]).sum(1)

    leaves = [each.clone().requires_grad_() for each in (x, weights)]
    cotangent = torch.randn_like(x)
    with use(form):
        found = torch.autograd.grad(there_and_back(*leaves), leaves[: 1 + weighted], cotangent)
    expected = torch.autograd.grad(by_indexing(*leaves), leaves[: 1 + weighted], cotangent)
    torch.testing.assert_close(found, expected)


def test_first_and_second_gradients_are_those_of_finite_differences() -> None:
    x, row, weights, rows = moved(4, 2, 3, 3)
    x, weights, rows = (each.double().requires_grad_() for each in (x, weights, rows))
    for call, arguments in (
        (lambda x: permute(x, row), (x,)),
        (lambda x, w: permute(x, row, w), (x, weights)),
        (lambda rows: unpermute(rows, row), (rows,)),
        (lambda rows, w: unpermute(rows, row, w), (rows, weights)),
    ):
        assert torch.autograd.gradcheck(call, arguments)
        assert torch.autograd.gradgradcheck(call, arguments)


def test_what_is_moved_is_kept_for_gradients_of_weights_only() -> None:
    x, row, weights, rows = moved()

    def kept(call: TritonOp[..., Tensor], *arguments: Any) -> list[torch.Size]:
        shapes: list[torch.Size] = []

        def keep(tensor: Tensor) -> Tensor:
            shapes.append(tensor.shape)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
            call(*arguments)
        return shapes

    assert kept(permute, x.requires_grad_(), row) == [row.shape]
    assert kept(unpermute, rows.requires_grad_(), row) == [row.shape]
    assert kept(unpermute, rows, row, weights) == [rows.shape, row.shape, weights.shape]


def test_no_tokens_and_no_experts_of_a_token() -> None:
    for shape in ((0, 2), (3, 0)):
        row = torch.empty(shape, dtype=torch.int32)
        x, rows = torch.randn(shape[0], 8), torch.empty(0, 8)
        for form in ("triton", "reference"):
            with use(form):
                assert permute(x, row).shape == (0, 8)
                assert torch.equal(unpermute(rows, row), torch.zeros(shape[0], 8))
                assert pair_dots(x, rows, row).shape == shape


@pytest.mark.parametrize("weighted", [False, True])
def test_ops_keep_what_they_promise_to_torch(weighted: bool) -> None:
    x, row, weights, rows = moved()
    x, rows = x.requires_grad_(), rows.requires_grad_()
    given = weights.requires_grad_() if weighted else None
    torch.library.opcheck(permute.registered, (x, row, given))
    torch.library.opcheck(unpermute.registered, (rows, row, given))
    torch.library.opcheck(pair_dots.registered, (x, rows, row))
    torch.library.opcheck(permute_scales.registered, (torch.randn(2, 27).T, row.flatten()))


def test_sorting_keeps_what_it_promises_to_torch() -> None:
    torch.library.opcheck(torch.ops.modelspec.sort_by_expert, (chosen(9, 3, 5), 5))


def test_compiles_in_one_graph_and_fake_tensors_know_the_shapes() -> None:
    x, choice, weights = torch.randn(9, 40, requires_grad=True), chosen(9, 3, 5), torch.randn(9, 3, requires_grad=True)

    def there_and_back(x: Tensor, choice: Tensor, weights: Tensor) -> Tensor:
        pairs = sort_by_expert(choice, 5)
        return unpermute(permute(x, pairs.row).sin(), pairs.row, weights)

    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    results = [form(x, choice, weights) for form in (compiled, there_and_back)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), (x, weights)) for out in results))
    mode = FakeTensorMode()
    pairs: Pairs = sort_by_expert(mode.from_tensor(choice), 5)
    assert [each.shape for each in pairs] == [(9, 3), (27,), (5,)]
    assert permute(mode.from_tensor(x), pairs.row).shape == (27, 40)
    assert permute_scales(mode.from_tensor(torch.randn(2, 9).T), pairs.token).stride() == (1, 27)
