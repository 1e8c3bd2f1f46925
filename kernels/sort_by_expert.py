"""Where each token's copies stand when they are sorted by expert: a stable counting sort on the device.

    pairs = sort_by_expert(choice, num)         # choice [tokens, k]: a (token, expert) pair for each of its elements

A pair's row is the number of pairs of lower experts, plus those of its own expert in the blocks of pairs before its
own, plus those before it in its block. How many pairs of an expert a block has is known to the last of them there,
which alone writes it: so there are no atomics. The scan over blocks is torch's.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from modelspec.kernels.operands import require_below
from modelspec.kernels.triton_language import tl, triton
from modelspec.kernels.triton_op import TritonOp
from modelspec.kernels.variant import Arch, Config, Variant

# Pairs of a block, all compared with each other by one program.
PAIRS = Config({"BLOCK": 128}, num_warps=8)


class Pairs(NamedTuple):
    """Where (token, expert) pairs stand, sorted by expert and those of an expert by token."""

    # Of each pair its row, int32 [tokens, k]; and of each row its token, int32 [tokens * k].
    row: Tensor
    token: Tensor
    # The row after each expert's last, int32 [experts].
    ends: Tensor


@triton.jit
def _ranks(experts, pairs, num, BLOCK: tl.constexpr):
    """Of each pair of a block: its place, its expert, and how many of the same expert are before and after it there."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # Narrow before they are compared, for 64 bits take half as many registers again: an expert that 32 bits do not hold
    # becomes some expert that is there.
    expert = tl.load(experts + at, mask=at < pairs, other=0).to(tl.int32)
    expert = tl.minimum(tl.maximum(expert, 0), num - 1)
    # The same once more, along the other dim.
    across = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    other = tl.load(experts + across, mask=across < pairs, other=0).to(tl.int32)
    other = tl.minimum(tl.maximum(other, 0), num - 1)
    # Pairs past the end are of no expert.
    same = (expert[:, None] == other[None, :]) & (across < pairs)[None, :]
    before = tl.sum((same & (across[None, :] < at[:, None])).to(tl.int32), 1)
    after = tl.sum((same & (across[None, :] > at[:, None])).to(tl.int32), 1)
    return at, expert, before, after


@triton.jit
def count_kernel(experts, counts, pairs, num, BLOCK: tl.constexpr):
    """experts [pairs] -> counts [blocks, num], whose zeros are there already."""
    at, expert, before, after = _ranks(experts, pairs, num, BLOCK)
    block = counts + tl.program_id(0).to(tl.int64) * num
    tl.store(block + expert, before + 1, mask=(at < pairs) & (after == 0))


@triton.jit
def place_kernel(experts, sums, ends, row, token, pairs, num, k, BLOCK: tl.constexpr):
    """sums [blocks, num], pairs of an expert up to and with a block -> row [pairs], token [pairs]."""
    at, expert, before, _ = _ranks(experts, pairs, num, BLOCK)
    inside = at < pairs
    lower = tl.load(ends + expert - 1, mask=inside & (expert > 0), other=0)
    earlier = tl.load(sums + (at // BLOCK - 1).to(tl.int64) * num + expert, mask=inside & (at >= BLOCK), other=0)
    place = lower + earlier + before
    tl.store(row + at, place, mask=inside)
    tl.store(token + place, at // k, mask=inside)


def _sort_reference(choice: Tensor, num: int) -> tuple[Tensor, Tensor, Tensor]:
    require_below("experts", choice, num)
    order = choice.flatten().argsort(stable=True)
    row = torch.empty_like(order)
    row[order] = torch.arange(len(order), device=order.device)
    ends = torch.searchsorted(choice.flatten()[order], torch.arange(num, device=order.device), right=True)
    token = order // choice.shape[1]
    return row.view_as(choice).to(torch.int32), token.to(torch.int32), ends.to(torch.int32)


def _sort_launch(choice: Tensor, num: int) -> tuple[Tensor, Tensor, Tensor]:
    row, token, ends = _sort_fake(choice, num)
    pairs = choice.numel()
    if not pairs:
        return row, token, ends.zero_()
    choice = choice.contiguous()
    grid = (triton.cdiv(pairs, PAIRS.constants["BLOCK"]),)
    counts = choice.new_zeros(grid[0], num, dtype=torch.int32)
    count_kernel[grid](choice, counts, pairs, num, **PAIRS.options())
    sums = counts.cumsum(0, dtype=torch.int32)
    torch.cumsum(sums[-1], 0, dtype=torch.int32, out=ends)
    place_kernel[grid](choice, sums, ends, row, token, pairs, num, choice.shape[1], **PAIRS.options())
    return row, token, ends


def _sort_fake(choice: Tensor, num: int) -> tuple[Tensor, Tensor, Tensor]:
    row = choice.new_empty(choice.shape, dtype=torch.int32)
    return row, choice.new_empty(choice.numel(), dtype=torch.int32), choice.new_empty(num, dtype=torch.int32)


_sort: TritonOp[[Tensor, int], tuple[Tensor, Tensor, Tensor]] = TritonOp(
    "sort_by_expert", reference=_sort_reference, launch=_sort_launch, fake=_sort_fake
)


def sort_by_expert(choice: Tensor, num: int) -> Pairs:
    """Sorts (token, expert) pairs by expert: choice [tokens, k], integers in [0, num).

    tokens * k must be below 2^31. The reference raises ValueError if an expert is not in [0, num); the kernel does not
    wait for the values, and takes one that is not there for one that is.
    """
    return Pairs(*_sort(choice, num))


def variants(arch: Arch) -> Iterator[Variant]:
    """What the launcher may compile, the same for every architecture."""
    counts = {"experts": "*i64", "counts": "*i32", "pairs": "i32", "num": "i32"}
    pointers = ("experts", "sums", "ends", "row", "token")
    places = {"experts": "*i64", **dict.fromkeys(pointers[1:], "*i32"), **dict.fromkeys(("pairs", "num", "k"), "i32")}
    promises = {"spills": 0, "registers": 255, "shared": 49_152}
    yield Variant("sort_by_expert_count", count_kernel, counts, {}, PAIRS, ("experts", "counts"), promises)
    yield Variant("sort_by_expert_place", place_kernel, places, {}, PAIRS, pointers, promises)
