"""Quantising the tokens of experts along tokens: kernels give the reference's bits, and no block mixes experts."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modelspec.kernels.op import use
from modelspec.kernels.quantize import dequantize, quantize, quantize_transposed
from modelspec.kernels.quantize_grouped import (
    padded_rows,
    padded_starts,
    quantize_grouped_both,
    quantize_grouped_transposed,
)

# Rows of each expert, and after the last one.
GROUPS = {
    "one expert": ([130], 0),
    "empty experts": ([0, 3, 0, 0, 129, 0], 0),
    "all tokens to one": ([0, 0, 200], 0),
    "whole blocks": ([128, 0, 256], 0),
    "rows after the last": ([5, 128, 1], 131),
    "no rows in experts": ([0, 0], 3),
    "no rows": ([0, 0, 0], 0),
}


def sorted_rows(sizes: list[int], rest: int, columns: int = 130) -> tuple[Tensor, Tensor]:
    x = torch.randn(sum(sizes) + rest, columns) * torch.randn(sum(sizes) + rest, 1).exp()
    return x, torch.tensor(sizes).cumsum(0).to(torch.int32)


def assert_same_bits(ours: Any, theirs: Any) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.shape, mine.stride(), mine.dtype) == (other.shape, other.stride(), other.dtype)
        torch.testing.assert_close(mine.float(), other.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("dtype", "ue8m0"), [(torch.bfloat16, False), (torch.float32, True)], ids=str)
@pytest.mark.parametrize("groups", GROUPS.values(), ids=list(GROUPS))
def test_kernels_give_the_bits_of_the_reference(groups: Any, dtype: torch.dtype, ue8m0: bool) -> None:
    x, ends = sorted_rows(*groups)
    x = x.to(dtype)
    with use("triton"):
        both = quantize_grouped_both(x, ends, ue8m0)
        transposed = quantize_grouped_transposed(x, ends, ue8m0)
    assert_same_bits(both, quantize_grouped_both.reference(x, ends, ue8m0))
    assert_same_bits(transposed, both[2:])
    assert_same_bits(both[:2], quantize(x, ue8m0))


@pytest.mark.parametrize("form", ["reference", "triton"])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=list(GROUPS))
def test_each_expert_is_quantised_as_it_is_alone_and_all_else_is_zero(groups: Any, form: Any) -> None:
    x, ends = sorted_rows(*groups)
    with use(form):
        qt, scales_t, starts = quantize_grouped_transposed(x, ends, False)
    untouched = torch.ones(qt.shape[1], dtype=torch.bool)
    for expert, (begin, end) in enumerate(pairwise([0, *ends.tolist()])):
        start, size = int(starts[expert]), end - begin
        assert start % 128 == 0
        assert starts[expert + 1] == start + math.ceil(size / 128) * 128
        columns, these = slice(start, start + size), slice(start // 128, start // 128 + math.ceil(size / 128))
        q, scales = quantize_transposed(x[begin:end], False)
        assert torch.equal(qt[:, columns].float(), q.float())
        assert torch.equal(scales_t[:, these], scales)
        untouched[columns] = False
    assert (qt.float()[:, untouched] == 0).all()
    assert scales_t.isfinite().all()


@given(st.lists(st.integers(0, 300), min_size=1, max_size=9), st.integers(0, 300))
def test_there_is_room_for_any_sizes(sizes: list[int], rest: int) -> None:
    blocks = sum(math.ceil(size / 128) for size in [*sizes, rest])
    padded = padded_rows(sum(sizes) + rest, len(sizes))
    assert blocks * 128 <= padded < sum(sizes) + rest + 128 * (len(sizes) + 2)
    starts = padded_starts(torch.tensor(sizes).cumsum(0).to(torch.int32))
    assert starts.dtype == torch.int32
    assert starts.tolist() == [sum(math.ceil(s / 128) * 128 for s in sizes[:n]) for n in range(len(sizes) + 1)]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("form", ["reference", "triton"])
def test_nan_of_one_expert_reaches_no_other(form: Any) -> None:
    x, ends = sorted_rows([3, 4], 5)
    x[2], x[9] = math.nan, math.inf
    with use(form):
        qt, scales_t, _ = quantize_grouped_transposed(x, ends, False)
    assert scales_t.isnan().any(0).tolist() == [True, False, False]
    assert dequantize(qt, scales_t, torch.float32)[:, 128:].isfinite().all()


@pytest.mark.parametrize("form", ["reference", "triton"])
def test_they_are_proper_operators(form: Any) -> None:
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = (*sorted_rows([3, 0, 4], 1), True)
    with use(form):
        torch.library.opcheck(quantize_grouped_transposed.registered, arguments, test_utils=checks)
        torch.library.opcheck(quantize_grouped_both.registered, arguments, test_utils=checks)


def test_they_compile_in_one_graph() -> None:
    def transposed(x: Tensor, ends: Tensor) -> Tensor:
        return dequantize(*quantize_grouped_both(x, ends, False)[2:4], torch.float32)

    arguments = sorted_rows([3, 0, 4], 1)
    compiled = torch.compile(transposed, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), transposed(*arguments))
