"""Kernels whose offsets overflow beyond 2^31 elements, and one whose do not: what `offsets.py` must tell apart."""

from collections.abc import Iterator

from modelspec.kernels.triton_language import tl, triton
from modelspec.kernels.variant import Arch, Config, Variant


@triton.jit
def right_kernel(x, y, rows, columns, R: tl.constexpr):
    row = tl.program_id(0) * R + tl.arange(0, R)
    at = row.to(tl.int64)[:, None] * columns + tl.arange(0, R)[None, :]
    tl.store(y + at, tl.load(x + at, mask=(row < rows)[:, None]), mask=(row < rows)[:, None])


@triton.jit
def narrow_kernel(x, y, rows, columns, R: tl.constexpr):
    row = tl.program_id(0) * R + tl.arange(0, R)
    at = row[:, None] * columns + tl.arange(0, R)[None, :]
    tl.store(y + at, tl.load(x + at, mask=(row < rows)[:, None]), mask=(row < rows)[:, None])


@triton.jit
def widened_late_kernel(x, y, rows, columns, R: tl.constexpr):
    row = tl.program_id(0) * R + tl.arange(0, R)
    at = (row[:, None] * columns).to(tl.int64) + tl.arange(0, R)[None, :]
    tl.store(y + at, tl.load(x + at, mask=(row < rows)[:, None]), mask=(row < rows)[:, None])


@triton.jit
def looping_kernel(x, y, rows, columns, R: tl.constexpr):
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        tile = x + row * columns
        for left in range(0, columns, R):
            tl.store(y + tl.cast(row, tl.int64) * columns + left + tl.arange(0, R), tl.load(tile + tl.arange(0, R)))
            tile += R


def variants(arch: Arch) -> Iterator[Variant]:
    """Each kernel once."""
    signature = {"x": "*bf16", "y": "*bf16", "rows": "i32", "columns": "i32"}
    config = Config({"R": 32}, num_warps=4)
    for kernel in (right_kernel, narrow_kernel, widened_late_kernel, looping_kernel):
        yield Variant(kernel.__name__.removesuffix("_kernel"), kernel, signature, {}, config, ("x", "y"))
