"""Operands in any layout are read as they are, and indices that lie outside neither reach other memory nor pass."""

from typing import Any

import pytest
import torch
from torch import Tensor

from modelspec.kernels.block_scale import quantize
from modelspec.kernels.configs import BLOCK_SCALED_MM
from modelspec.kernels.grouped_scaled_mm import grouped_scaled_mm, run
from modelspec.kernels.op import use
from modelspec.kernels.permute import pair_dots, permute, permute_scales, unpermute
from modelspec.kernels.quantize_grouped import quantize_grouped_both, quantize_grouped_transposed
from modelspec.kernels.rms_norm_quantize import rms_norm_quantize
from modelspec.kernels.sort_by_expert import sort_by_expert
from modelspec.kernels.swiglu_quantize import swiglu_quantize, swiglu_quantize_both, swiglu_quantize_grouped_transposed
from modelspec.kernels.triton_op import TritonOp

ENDS = torch.tensor([3, 3, 9], dtype=torch.int32)


def product() -> tuple[Tensor, ...]:
    (a, a_scales), (b, b_scales) = quantize(torch.randn(12, 40), (1, 128)), quantize(torch.randn(3, 24, 40), (128, 128))
    return a, a_scales, b, b_scales, ENDS


CASES: dict[str, tuple[TritonOp[..., Any], tuple[Any, ...]]] = {
    "grouped product": (grouped_scaled_mm, product()),
    "groups, both": (quantize_grouped_both, (torch.randn(12, 40), ENDS, True)),
    "groups, transposed": (quantize_grouped_transposed, (torch.randn(12, 40), ENDS, True)),
    "SwiGLU": (swiglu_quantize, (torch.randn(12, 80), torch.rand(12), True)),
    "SwiGLU, both": (swiglu_quantize_both, (torch.randn(12, 80), torch.rand(12), True)),
    "SwiGLU of groups": (swiglu_quantize_grouped_transposed, (torch.randn(12, 80), torch.rand(12), ENDS, True)),
    "dots": (pair_dots, (torch.randn(6, 8), torch.randn(12, 8), torch.randperm(12).int().view(6, 2))),
    "scales": (permute_scales, (torch.rand(6, 2), torch.randint(6, (12,)).int())),
    "norm": (rms_norm_quantize, (torch.randn(12, 40), torch.rand(40), 1e-6, True)),
}


def with_gaps(tensor: Tensor) -> Tensor:
    """The same values, every other element of memory."""
    return torch.stack([tensor, tensor.flip(0)], -1)[..., 0]


@pytest.mark.parametrize("form", ["reference", "triton"])
@pytest.mark.parametrize(("op", "arguments"), CASES.values(), ids=list(CASES))
def test_operands_with_gaps_are_read_as_they_are(op: TritonOp[..., Any], arguments: Any, form: Any) -> None:
    apart = [with_gaps(each) if isinstance(each, Tensor) else each for each in arguments]
    with use(form):
        expected, found = op(*arguments), op(*apart)
        torch.library.opcheck(op.registered, tuple(apart), test_utils="test_faketensor")
    for mine, other in zip(*((x if isinstance(x, tuple) else (x,)) for x in (found, expected)), strict=True):
        torch.testing.assert_close(mine.float(), other.float(), rtol=0, atol=0)


@pytest.mark.parametrize("form", ["reference", "triton"])
def test_a_turned_input_of_the_norm_has_the_layout_that_torch_is_told(form: Any) -> None:
    with use(form):
        given = torch.randn(40, 12).T, torch.rand(40), 1e-6, True
        torch.library.opcheck(rms_norm_quantize.registered, given, test_utils="test_faketensor")


@pytest.mark.parametrize("ends", [[3, 3, 900], [9, 3, 12], [-7, 3, 12]], ids=str)
def test_ends_outside_write_nothing_outside_and_references_refuse_them(ends: list[int]) -> None:
    given, wrong = product(), torch.tensor(ends, dtype=torch.int32)
    memory = torch.full((2048, 24), 5.0)
    run(BLOCK_SCALED_MM["sm_90"]["small"], given[:4], wrong, memory[1000:1012])  # type: ignore[arg-type]
    assert (memory[:1000] == 5).all() and (memory[1012:] == 5).all()
    refusing: list[tuple[TritonOp[..., Any], tuple[Tensor, ...]]] = [
        (grouped_scaled_mm, given[:4]),
        (quantize_grouped_both, (torch.randn(12, 40),)),
    ]
    for op, arguments in refusing:
        with pytest.raises(ValueError, match="must ascend and lie between 0 and 12"):
            op.reference(*arguments, wrong, torch.float32 if op is grouped_scaled_mm else True)


@pytest.mark.parametrize("form", ["reference", "triton"])
def test_ends_of_another_type_are_refused(form: Any) -> None:
    with use(form):
        for op, arguments in list(CASES.values())[:3]:
            given = [each.long() if each is ENDS else each for each in arguments]
            with pytest.raises(ValueError, match="must be int32"):
                op(*given)


def test_experts_that_are_not_there_count_as_the_nearest() -> None:
    with use("triton"):
        found = sort_by_expert(torch.tensor([[0, 700], [-3, 2**33]]), 3)
    expected = sort_by_expert(torch.tensor([[0, 2], [0, 2]]), 3)
    assert all(torch.equal(mine, other) for mine, other in zip(found, expected, strict=True))


def test_rows_and_tokens_that_are_not_there_count_as_the_nearest() -> None:
    row, near = torch.tensor([[0, 9**9], [-5, 1]], dtype=torch.int32), torch.tensor([[0, 3], [0, 1]], dtype=torch.int32)
    x, rows, scales = torch.randn(2, 8), torch.randn(4, 8), torch.rand(2, 1)
    with use("triton"):
        assert torch.equal(unpermute(rows, row), unpermute(rows, near))
        assert torch.equal(pair_dots(x, rows, row), pair_dots(x, rows, near))
        assert torch.equal(permute(x, row)[[1, 3]], x[[1, 0]])
        token = torch.tensor([1, 9**9, -1], dtype=torch.int32)
        assert torch.equal(permute_scales(scales, token), scales[[1, 1, 0]])
