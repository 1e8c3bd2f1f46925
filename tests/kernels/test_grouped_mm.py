"""The grouped product: its definition in every corner, its gradients, and what compilers ask of an op."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from modelspec.kernels.grouped_mm import grouped_mm, grouped_mm_reference

COUNTS = {
    "even": [4, 4, 4],
    "uneven": [1, 7, 4],
    "first-empty": [0, 5, 7],
    "middle-empty": [6, 0, 6],
    "last-empty": [5, 7, 0],
    "all-to-one": [0, 12, 0],
    "no-rows": [0, 0, 0],
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def operands(
    counts: list[int], dtype: torch.dtype, inputs: int = 8, outputs: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and ends for groups of so many rows."""
    x = torch.randn(sum(counts), inputs, dtype=dtype, requires_grad=True)
    weight = torch.randn(len(counts), outputs, inputs, dtype=dtype, requires_grad=True)
    return x, weight, torch.tensor(counts).cumsum(0).to(torch.int32)


def by_hand(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Row by row: each times the transpose of its group's weight."""
    group = [g for g, (a, b) in enumerate(pairwise([0, *ends.tolist()])) for _ in range(a, b)]
    return torch.stack([weight[g] @ row for g, row in zip(group, x, strict=True)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(8, 16), (7, 5), (6, 16)], ids=["aligned", "odd", "half-aligned"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_output_and_gradients_equal_the_definition(
    counts: list[int], sizes: tuple[int, int], dtype: torch.dtype
) -> None:
    x, weight, ends = operands(counts, dtype, *sizes)
    output = grouped_mm(x, weight, ends)
    assert output.shape == (sum(counts), sizes[1])
    cotangent = torch.randn_like(output)
    found = torch.autograd.grad(output, (x, weight), cotangent)
    assert [g.shape for g in found] == [x.shape, weight.shape]
    assert (found[1][torch.tensor(counts) == 0] == 0).all()
    if not sum(counts):
        return
    # The definition in float64: BF16 products may be summed in any order and precision.
    wide_x, wide_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    expected = by_hand(wide_x, wide_weight, ends)
    wanted = torch.autograd.grad(expected, (wide_x, wide_weight), cotangent.double())
    for mine, theirs in zip((output, *found), (expected, *wanted), strict=True):
        tolerance = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
        assert (mine - theirs).norm() <= tolerance * theirs.norm()
    torch.testing.assert_close(grouped_mm_reference(x, weight, ends), output, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_gradcheck(counts: list[int]) -> None:
    x, weight, ends = operands(counts, torch.float64, 3, 2)
    if sum(counts):
        assert torch.autograd.gradcheck(grouped_mm, (x, weight, ends))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_that_are_not_contiguous_are_taken(dtype: torch.dtype) -> None:
    x, weight, ends = operands([5, 0, 7], dtype)
    cotangent = torch.randn(16, 12, dtype=dtype).T
    assert not cotangent.is_contiguous()
    found = torch.autograd.grad(grouped_mm(x, weight, ends), (x, weight), cotangent)
    wanted = torch.autograd.grad(by_hand(x, weight, ends), (x, weight), cotangent)
    expanded = torch.autograd.grad(grouped_mm(x, weight, ends).sum(), x)[0]
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(expanded, torch.autograd.grad(by_hand(x, weight, ends).sum(), x)[0])


def test_weights_may_be_a_view() -> None:
    x, weight, ends = operands([5, 0, 7], torch.float32)
    turned = weight.detach().mT.contiguous().mT.requires_grad_()
    torch.testing.assert_close(grouped_mm(x, turned, ends), by_hand(x, weight, ends))
    torch.testing.assert_close(
        torch.autograd.grad(grouped_mm(x, turned, ends).square().sum(), turned),
        torch.autograd.grad(by_hand(x, weight, ends).square().sum(), weight),
    )


@pytest.mark.parametrize("view", ["columns", "transposed", "offset"])
def test_rows_may_be_a_view(view: str) -> None:
    _, weight, ends = operands([5, 0, 7], torch.float32)
    x = {
        "columns": torch.randn(12, 11)[:, :8],
        "transposed": torch.randn(8, 12).T,
        "offset": torch.randn(12 * 8 + 1)[1:].view(12, 8),
    }[view].requires_grad_()
    torch.testing.assert_close(grouped_mm(x, weight, ends), by_hand(x, weight, ends))
    torch.testing.assert_close(
        torch.autograd.grad(grouped_mm(x, weight, ends).square().sum(), x),
        torch.autograd.grad(by_hand(x, weight, ends).square().sum(), x),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_meta_and_fake_tensors_give_shapes_and_dtypes_with_gradients(dtype: torch.dtype) -> None:
    x, weight, ends = (t.detach().to("meta") for t in operands([5, 0, 7], dtype))
    for make in (lambda t: t, FakeTensorMode(allow_non_fake_inputs=True).from_tensor):
        inputs = [make(t).clone().requires_grad_() for t in (x, weight)]
        output = grouped_mm(*inputs, make(ends))
        assert (output.shape, output.dtype) == ((12, 16), dtype)
        grads = torch.autograd.grad(output.sum(), inputs)
        assert [(g.shape, g.dtype) for g in grads] == [(t.shape, dtype) for t in inputs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_op_keeps_what_it_promises_to_torch(dtype: torch.dtype) -> None:
    torch.library.opcheck(
        grouped_mm,
        operands([5, 0, 7], dtype),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_compiles_in_one_graph_with_the_same_gradients() -> None:
    x, weight, ends = operands([5, 0, 7], torch.float32)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return grouped_mm(x, weight, ends).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x, weight), (x, weight)), torch.autograd.grad(loss(x, weight), (x, weight))
    )
