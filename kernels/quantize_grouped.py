"""Activations of experts in FP8, for the gradients of their weights: rows sorted by expert, blocks along tokens.

    quantize_grouped_transposed(x, ends, ue8m0) -> qT [K, P], scalesT [K, P / 128], starts [E + 1]
    quantize_grouped_both(x, ends, ue8m0)       -> q [M, K], scales [M, ceil(K / 128)], and these three

The gradient of an expert's weight sums over that expert's tokens, 128 at a time. So in qT each expert's tokens start at
a multiple of 128, with zeros behind them:

    rows of x            0 0 0 1 1 1 1 1 2
    columns of qT        0 0 0 . 1 1 1 1 1 . . . 2 . . . . . . .       as if blocks were of 4
                         ^       ^               ^       ^             starts

How many rows each expert has is known on the device alone: P is the most that they could need (`padded_rows`), and what
lies behind the last expert is zeros too. Rows after the last expert, if there are any, count as one more expert whose
columns are zeros; in q they are as any other row.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from modelspec.kernels.block_scale import BLOCK
from modelspec.kernels.operands import require_ascending, require_int32, require_matrix
from modelspec.kernels.quantize import (
    ALIGNED,
    QUANTISES,
    TILE,
    blocks,
    codes_and_scales,
    constants,
    format_of,
    quantized_columns,
    quantized_rows,
)
from modelspec.kernels.quantize_tile import B, load_tile, store_columns, store_rows
from modelspec.kernels.triton_language import tl, triton
from modelspec.kernels.triton_op import TritonOp
from modelspec.kernels.variant import Arch, Variant


def padded_rows(rows: int, experts: int) -> int:
    """Columns of qT, a multiple of 128: enough for `rows` in experts + 1 groups, each padded to 128."""
    return (rows // BLOCK + experts + 1) * BLOCK


def padded_starts(ends: Tensor) -> Tensor:
    """Where each expert's columns start in qT, and after the last one: ends [E] int32 -> int32 [E + 1]."""
    sizes = ends.diff(prepend=ends.new_zeros(1))
    after = (((sizes + BLOCK - 1) // BLOCK) * BLOCK).cumsum(0, dtype=torch.int32)
    return torch.cat([ends.new_zeros(1), after])


@triton.jit
def group_of(down, ends, starts, rows, experts, EXPERTS: tl.constexpr):
    """The first row of padded block `down`, the row after its expert's last, and the same of those that are kept, which
    rows after the last expert are not. The first program stores the starts.
    """
    # Experts, and the rows after them as one more.
    expert = tl.arange(0, EXPERTS)
    end = tl.load(ends + expert, mask=expert < experts, other=rows)
    begin = tl.load(ends + expert - 1, mask=(expert > 0) & (expert <= experts), other=0)
    begin = tl.where(expert <= experts, begin, rows)
    begin = tl.minimum(tl.maximum(begin, 0), rows)
    end = tl.minimum(tl.maximum(end, 0), rows)
    height = tl.cdiv(tl.maximum(end - begin, 0), B)
    after = tl.cumsum(height, 0)
    before = after - height
    if tl.program_id(0) == 0:
        tl.store(starts + expert, before * B, mask=expert <= experts)
    mine = (before <= down) & (down < after)
    first = tl.sum(tl.where(mine, begin + (down - before) * B, 0), 0)
    last = tl.sum(tl.where(mine, end, 0), 0)
    last_kept = tl.sum(tl.where(mine & (expert < experts), end, 0), 0)
    return first, last, last_kept


@triton.jit
def grouped_tile_kernel(
    x,
    ends,
    q,
    scales,
    qt,
    scales_t,
    starts,
    rows,
    columns,
    padded,
    experts,
    LARGEST: tl.constexpr,
    UE8M0: tl.constexpr,
    BOTH: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """One program: 128 padded rows of one column block; they are one expert's. As `tile_kernel` apart from that."""
    across = tl.cdiv(columns, B)
    block = tl.program_id(0) % across
    down = tl.program_id(0) // across

    first, last, last_kept = group_of(down, ends, starts, rows, experts, EXPERTS)
    row = first + tl.arange(0, B)
    column = block * B + tl.arange(0, B)
    if BOTH:
        tile = load_tile(x, row, row < last, column, columns)
        store_rows(tile, q, scales, row, row < last, rows, block, columns, LARGEST, UE8M0)
    tile = load_tile(x, row, row < last_kept, column, columns)
    store_columns(tile, qt, scales_t, down, padded, column, columns, LARGEST, UE8M0)


def _check(x: Tensor, ends: Tensor, ue8m0: bool) -> None:
    require_matrix("x", x)
    require_int32("ends", ends)


def padded_reference(x: Tensor, ends: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of what is transposed."""
    require_ascending("ends", ends, x.shape[0])
    ends = ends.contiguous()
    starts = padded_starts(ends)
    row = torch.arange(x.shape[0], device=x.device)
    expert = torch.bucketize(row, ends, right=True)
    begins = torch.cat([ends.new_zeros(1), ends])
    padded = x.new_zeros(padded_rows(x.shape[0], ends.shape[0]), x.shape[1])
    padded[starts[expert] + row - begins[expert]] = torch.where((expert < ends.shape[0])[:, None], x, 0.0)
    return *quantized_columns(padded, ue8m0), starts


def _transposed_reference(x: Tensor, ends: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor]:
    return padded_reference(x, ends, ue8m0)


def _both_reference(x: Tensor, ends: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return *quantized_rows(x, ue8m0), *padded_reference(x, ends, ue8m0)


def grouped_memory(like: Tensor, rows: int, columns: int, ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for qT, scalesT and starts of a matrix [rows, columns], on the device of `like`."""
    experts = ends.shape[0]
    codes, scales = codes_and_scales(like, columns, padded_rows(rows, experts))
    return codes, scales, ends.new_empty(experts + 1)


_Sides = tuple[Tensor, Tensor]
_Grouped = tuple[Tensor, Tensor, Tensor]


def _run(x: Tensor, ends: Tensor, own: _Sides, other: _Grouped, **known: object) -> None:
    (rows, columns), (padded, experts) = x.shape, (other[0].shape[1], ends.shape[0])
    grid = (blocks(padded) * blocks(columns),)
    size = triton.next_power_of_2(experts + 1)
    options = {**known, "EXPERTS": size, **TILE.options()}
    grouped_tile_kernel[grid](x, ends.contiguous(), *own, *other, rows, columns, padded, experts, **options)


def _transposed_launch(x: Tensor, ends: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor]:
    if x.numel() == 0:
        return _transposed_reference(x, ends, ue8m0)
    x, results = x.contiguous(), grouped_memory(x, x.shape[0], x.shape[1], ends)
    _run(x, ends, results[:2], results, BOTH=False, **constants(results[0], ue8m0))
    return results


def _both_launch(x: Tensor, ends: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if x.numel() == 0:
        return _both_reference(x, ends, ue8m0)
    x, own, other = x.contiguous(), codes_and_scales(x, *x.shape), grouped_memory(x, x.shape[0], x.shape[1], ends)
    _run(x, ends, own, other, BOTH=True, **constants(own[0], ue8m0))
    return *own, *other


def _transposed_fake(x: Tensor, ends: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor]:
    return grouped_memory(x, x.shape[0], x.shape[1], ends)


def _both_fake(x: Tensor, ends: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return *codes_and_scales(x, x.shape[0], x.shape[1]), *grouped_memory(x, x.shape[0], x.shape[1], ends)


quantize_grouped_transposed = TritonOp(
    "quantize_grouped_transposed", _transposed_reference, _transposed_launch, _transposed_fake, check=_check
)
quantize_grouped_both = TritonOp("quantize_grouped_both", _both_reference, _both_launch, _both_fake, check=_check)


def variants(arch: Arch) -> Iterator[Variant]:
    """The compilations that the launchers ask for, with the experts of DeepSeek-V3."""
    codes, largest = format_of(arch)
    signature = {
        "x": "*bf16",
        "ends": "*i32",
        "q": codes,
        "scales": "*fp32",
        "qt": codes,
        "scales_t": "*fp32",
        "starts": "*i32",
        **dict.fromkeys(("rows", "columns", "padded", "experts"), "i32"),
    }
    known = {"LARGEST": largest, "EXPERTS": 512}
    aligned = (*ALIGNED, "ends", "qt", "scales_t", "starts", "padded")
    for op, both, ue8m0 in (("both", True, False), ("transposed", False, False), ("transposed", False, True)):
        name = f"quantize_grouped_{op}-{'ue8m0' if ue8m0 else 'fp32'}"
        given = {**known, "BOTH": both, "UE8M0": ue8m0}
        yield Variant(name, grouped_tile_kernel, signature, given, TILE, aligned, QUANTISES)
