"""Operands in any layout are read as they are, those of another shape or format are refused by every form alike, and
indices that lie outside neither reach other memory nor pass.
"""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from modelspec.kernels import block_scale
from modelspec.kernels.block_scaled_mm import block_scaled_mm
from modelspec.kernels.block_scaled_wgrad import block_scaled_wgrad
from modelspec.kernels.configs import BLOCK_SCALED_MM
from modelspec.kernels.grouped_scaled_mm import grouped_scaled_mm, run
from modelspec.kernels.grouped_scaled_wgrad import grouped_scaled_wgrad
from modelspec.kernels.op import use
from modelspec.kernels.permute import pair_dots, permute, permute_scales, unpermute
from modelspec.kernels.quantize import dequantize, e5m6, quantize, quantize_both, quantize_transposed
from modelspec.kernels.quantize_grouped import quantize_grouped_both, quantize_grouped_transposed
from modelspec.kernels.quantize_weight import quantize_weight
from modelspec.kernels.rms_norm_quantize import rms_norm_quantize
from modelspec.kernels.sort_by_expert import sort_by_expert
from modelspec.kernels.swiglu_backward import swiglu_backward
from modelspec.kernels.swiglu_quantize import swiglu_quantize, swiglu_quantize_both, swiglu_quantize_grouped_transposed
from modelspec.kernels.triton_op import TritonOp

ENDS = torch.tensor([3, 3, 9], dtype=torch.int32)
STARTS = torch.tensor([0, 128, 128, 256], dtype=torch.int32)
ROWS, BLOCKS = (1, 128), (128, 128)


def codes(*shape: int, block: block_scale.Block = ROWS) -> tuple[Tensor, Tensor]:
    return block_scale.quantize(torch.randn(shape), block)


def product() -> tuple[Tensor, ...]:
    return *codes(12, 160), *codes(3, 24, 160, block=BLOCKS), ENDS


CASES: dict[str, tuple[TritonOp[..., Any], tuple[Any, ...]]] = {
    "rows": (quantize, (torch.randn(12, 40), True)),
    "transposed": (quantize_transposed, (torch.randn(12, 40), True)),
    "both": (quantize_both, (torch.randn(12, 40), True)),
    "E5M6": (e5m6, (torch.randn(12, 40),)),
    "values of rows": (dequantize, (*codes(12, 160), torch.bfloat16)),
    "values of a weight": (dequantize, (*codes(160, 160, block=BLOCKS), torch.bfloat16)),
    "weight": (quantize_weight, (torch.randn(24, 40), True)),
    "weights of experts": (quantize_weight, (torch.randn(3, 24, 40), True)),
    "product": (block_scaled_mm, (*codes(12, 160), *codes(24, 160, block=BLOCKS))),
    "gradient of a weight": (block_scaled_wgrad, (*codes(12, 160), *codes(24, 160))),
    "gradients of experts": (grouped_scaled_wgrad, (*codes(12, 256), *codes(24, 256), STARTS)),
    "grouped product": (grouped_scaled_mm, product()),
    "groups, both": (quantize_grouped_both, (torch.randn(12, 40), ENDS, True)),
    "groups, transposed": (quantize_grouped_transposed, (torch.randn(12, 40), ENDS, True)),
    "SwiGLU": (swiglu_quantize, (torch.randn(12, 80), torch.rand(12), True)),
    "SwiGLU, both": (swiglu_quantize_both, (torch.randn(12, 80), torch.rand(12), True)),
    "SwiGLU of groups": (swiglu_quantize_grouped_transposed, (torch.randn(12, 80), torch.rand(12), ENDS, True)),
    "gradient of SwiGLU": (swiglu_backward, (torch.randn(12, 40), torch.randn(12, 80), torch.rand(12))),
    "dots": (pair_dots, (torch.randn(6, 8), torch.randn(12, 8), torch.randperm(12).int().view(6, 2))),
    "scales": (permute_scales, (torch.rand(6, 2), torch.randint(6, (12,)).int())),
    "norm": (rms_norm_quantize, (torch.randn(12, 40), torch.rand(40), 1e-6, True)),
}


def with_gaps(tensor: Tensor) -> Tensor:
    """The same values, every other element of memory."""
    return torch.stack([tensor, tensor.flip(0)], -1)[..., 0]


def turned(tensor: Tensor) -> Tensor:
    """The same values, matrices column after column."""
    return tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor


@pytest.mark.parametrize("form", ["reference", "triton"])
@pytest.mark.parametrize("layout", [with_gaps, turned])
@pytest.mark.parametrize(("op", "arguments"), CASES.values(), ids=list(CASES))
def test_operands_of_any_layout_are_read_as_they_are(
    op: TritonOp[..., Any], arguments: Any, layout: Callable[[Tensor], Tensor], form: Any
) -> None:
    apart = [layout(each) if isinstance(each, Tensor) else each for each in arguments]
    with use(form):
        expected, found = op(*arguments), op(*apart)
        torch.library.opcheck(op.registered, tuple(apart), test_utils="test_faketensor")
    # torch 2.11 adds up a reference's product in another order where memory lies otherwise.
    older = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
    bound = 1e-4 if older and form == "reference" else 0.0
    for mine, other in zip(*((x if isinstance(x, tuple) else (x,)) for x in (found, expected)), strict=True):
        torch.testing.assert_close(mine.float(), other.float(), rtol=bound, atol=bound)


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
@pytest.mark.parametrize("case", ["grouped product", "groups, both", "groups, transposed", "SwiGLU of groups"])
def test_ends_of_another_type_are_refused(case: str, form: Any) -> None:
    op, arguments = CASES[case]
    with use(form), pytest.raises(ValueError, match="must be int32"):
        op(*(each.long() if each is ENDS else each for each in arguments))


# One for each way in which an operand may be another than the operation's.
REFUSED: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    **{
        f"{case}, three dims": (case, lambda each: each[None] if each.ndim == 2 else each, told)
        for case, told in (
            ("rows", "x [1, 12, 40] must be a matrix [rows, columns]: x.flatten(0, -2) is one"),
            ("transposed", "x [1, 12, 40] must be a matrix"),
            ("both", "x [1, 12, 40] must be a matrix"),
            ("E5M6", "x [1, 12, 40] must be a matrix"),
            ("values of rows", "q [1, 12, 160] must be a matrix"),
            ("product", "a [1, 12, 160] must be a matrix"),
            ("gradient of a weight", "a [1, 12, 160] must be a matrix"),
            ("gradients of experts", "a [1, 12, 256] must be a matrix"),
            ("grouped product", "a [1, 12, 160] must be a matrix"),
            ("groups, both", "x [1, 12, 40] must be a matrix"),
            ("groups, transposed", "x [1, 12, 40] must be a matrix"),
            ("SwiGLU", "gate_up [1, 12, 80] must be a matrix"),
            ("SwiGLU, both", "gate_up [1, 12, 80] must be a matrix"),
            ("SwiGLU of groups", "gate_up [1, 12, 80] must be a matrix"),
            ("gradient of SwiGLU", "gate_up [1, 12, 80] must be a matrix"),
            ("norm", "x [1, 12, 40] must be a matrix"),
        )
    },
    **{
        f"{case}, BF16": (case, lambda each: each.bfloat16() if each.dtype == block_scale.E4M3 else each, told)
        for case, told in (
            ("values of rows", "q [12, 160] is torch.bfloat16: it must be in E4M3; quantise it first"),
            ("product", "a [12, 160] is torch.bfloat16: it must be in E4M3"),
            ("gradient of a weight", "a [12, 160] is torch.bfloat16: it must be in E4M3"),
            ("gradients of experts", "a [12, 256] is torch.bfloat16: it must be in E4M3"),
            ("grouped product", "a [12, 160] is torch.bfloat16: it must be in E4M3"),
        )
    },
    "weight, a vector": ("weight", lambda w: w[0], "w [40] must be a matrix [N, K], or one for each expert [E, N, K]"),
    "rows, a vector": ("rows", lambda x: x[0], "x [40] must be a matrix [rows, columns]: x[None] is one of a single"),
    "SwiGLU, half a gate": ("SwiGLU", lambda each: each[..., 1:], "gate_up [12, 79] must have as many columns of gate"),
    "SwiGLU, columns of weights": (
        "SwiGLU",
        lambda each: each if each.ndim == 2 else each[:, None],
        "weights [12, 1] must be [12], one for each row of gate_up",
    ),
    "gradient of SwiGLU, too wide": (
        "gradient of SwiGLU",
        lambda each: each.repeat(1, 2) if each.shape == (12, 40) else each,
        "grad [12, 80] must be [12, 40], as the activation of gate_up",
    ),
    "norm, a short weight": (
        "norm",
        lambda each: each if each.ndim == 2 else each[1:],
        "weight [39] must be [40], one for each column of x",
    ),
}


@pytest.mark.parametrize("form", ["reference", "triton"])
@pytest.mark.parametrize(("case", "changed", "told"), REFUSED.values(), ids=list(REFUSED))
def test_operands_of_another_shape_or_format_are_refused_by_every_form_alike(
    case: str, changed: Callable[[Any], Any], told: str, form: Any
) -> None:
    op, arguments = CASES[case]
    given = [changed(each) if isinstance(each, Tensor) else each for each in arguments]
    with use(form), pytest.raises(ValueError, match=re.escape(told)):
        op(*given)


@pytest.mark.parametrize("case", [case for case in REFUSED if "product" not in case and "gradient" not in case])
def test_shapes_are_refused_without_values_too(case: str) -> None:
    name, changed, told = REFUSED[case]
    op, arguments = CASES[name]
    given = [changed(each).to("meta") if isinstance(each, Tensor) else each for each in arguments]
    with pytest.raises(ValueError, match=re.escape(told)):
        op(*given)


def test_experts_that_are_not_there_count_as_the_nearest_and_the_reference_refuses_them() -> None:
    wrong = torch.tensor([[0, 700], [-3, 2**31 - 1]])
    with use("triton"):
        found = sort_by_expert(wrong, 3)
    expected = sort_by_expert(torch.tensor([[0, 2], [0, 2]]), 3)
    assert all(torch.equal(mine, other) for mine, other in zip(found, expected, strict=True))
    told = r"experts \[-3, 700, 2147483647\] are not there: they must lie between 0 and 2"
    with use("reference"), pytest.raises(ValueError, match=told):
        sort_by_expert(wrong, 3)


def test_an_expert_beyond_32_bits_counts_as_one_that_is_there() -> None:
    with use("triton"):
        found = sort_by_expert(torch.tensor([[2**33 + 7, 2**31], [-(2**40), 1]]), 3)
    assert found.row.flatten().sort()[0].tolist() == list(range(4)) and found.ends[-1] == 4


def test_rows_and_tokens_that_are_not_there_count_as_the_nearest() -> None:
    row, near = torch.tensor([[0, 9**9], [-5, 1]], dtype=torch.int32), torch.tensor([[0, 3], [0, 1]], dtype=torch.int32)
    x, rows, scales = torch.randn(2, 8), torch.randn(4, 8), torch.rand(2, 1)
    with use("triton"):
        assert torch.equal(unpermute(rows, row), unpermute(rows, near))
        assert torch.equal(pair_dots(x, rows, row), pair_dots(x, rows, near))
        assert torch.equal(permute(x, row)[[1, 3]], x[[1, 0]])
        token = torch.tensor([1, 9**9, -1], dtype=torch.int32)
        assert torch.equal(permute_scales(scales, token), scales[[1, 1, 0]])
