"""SwiGLU and the FP8 of its output, which never goes to memory in a wider format.

    a = silu(gate) * up * weight of the row         in FP32, from the first product's output [gate up]

    swiglu_quantize(gate_up, weights, ue8m0)        -> q [M, F], scales [M, ceil(F / 128)]
    swiglu_quantize_both(gate_up, weights, ue8m0)   -> these, qT [F, M], scalesT [F, ceil(M / 128)]
    swiglu_quantize_grouped_transposed(gate_up, weights, ends, ue8m0)
                                                    -> qT [F, P], scalesT [F, P / 128], starts [E + 1]

gate_up is [M, 2 F] in BF16 or FP32, gate columns first; weights [M] in FP32 are the routing weights of experts' rows,
or None; other shapes are refused (ValueError). The first serves the second product forward, the last the gradient of
experts' weights, where `a` is computed again from the gate_up that was kept (`quantize_grouped.py` tells its layout).

Kernel and reference agree in `a` up to FP32's rounding (their exponentials differ in the last bits), and not in every
bit of what is quantised from it: a scale may differ in its last bit, and a value beside the middle of two codes may get
either.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from modelspec.kernels.operands import require_int32, require_matrix
from modelspec.kernels.quantize import (
    QUANTISES,
    TILE,
    blocks,
    codes_and_scales,
    constants,
    format_of,
    quantized_columns,
    quantized_rows,
)
from modelspec.kernels.quantize_grouped import (
    group_of,
    grouped_memory,
    padded_reference,
)
from modelspec.kernels.quantize_tile import B, store_columns, store_rows
from modelspec.kernels.triton_language import tl, triton
from modelspec.kernels.triton_op import TritonOp
from modelspec.kernels.variant import Arch, Config, Variant

# Two tiles are read for one that is written.
ROWS = Config({"R": 16}, num_warps=4)


@triton.jit
def activated(gate_up, weights, row, row_mask, column, width, WEIGHTED: tl.constexpr):
    """Rows and columns of the activation [rows, width] in FP32, zeros outside."""
    mask = row_mask[:, None] & (column < width)[None, :]
    at = gate_up + row.to(tl.int64)[:, None] * (2 * width) + column[None, :]
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=mask, other=0.0).to(tl.float32)
    a = gate / (1.0 + tl.exp(-gate)) * up
    if WEIGHTED:
        a = a * tl.load(weights + row, mask=row_mask, other=0.0)[:, None]
    return a


@triton.jit
def swiglu_rows_kernel(
    gate_up,
    weights,
    q,
    scales,
    rows,
    width,
    LARGEST: tl.constexpr,
    UE8M0: tl.constexpr,
    WEIGHTED: tl.constexpr,
    R: tl.constexpr,
):
    """One program: R rows of one column block."""
    across = tl.cdiv(width, B)
    block = tl.program_id(0) % across
    row = tl.program_id(0) // across * R + tl.arange(0, R)
    a = activated(gate_up, weights, row, row < rows, block * B + tl.arange(0, B), width, WEIGHTED)
    store_rows(a, q, scales, row, row < rows, rows, block, width, LARGEST, UE8M0)


@triton.jit
def swiglu_tile_kernel(
    gate_up,
    weights,
    q,
    scales,
    qt,
    scales_t,
    rows,
    width,
    LARGEST: tl.constexpr,
    UE8M0: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """One program: a tile of 128 x 128 to both orientations."""
    across = tl.cdiv(width, B)
    block = tl.program_id(0) % across
    down = tl.program_id(0) // across
    row = down * B + tl.arange(0, B)
    column = block * B + tl.arange(0, B)
    a = activated(gate_up, weights, row, row < rows, column, width, WEIGHTED)
    store_rows(a, q, scales, row, row < rows, rows, block, width, LARGEST, UE8M0)
    a = activated(gate_up, weights, row, row < rows, column, width, WEIGHTED)
    store_columns(a, qt, scales_t, down, rows, column, width, LARGEST, UE8M0)


@triton.jit
def swiglu_grouped_kernel(
    gate_up,
    weights,
    ends,
    qt,
    scales_t,
    starts,
    rows,
    width,
    padded,
    experts,
    LARGEST: tl.constexpr,
    UE8M0: tl.constexpr,
    WEIGHTED: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """One program: 128 padded rows of one column block, to the transpose."""
    across = tl.cdiv(width, B)
    block = tl.program_id(0) % across
    down = tl.program_id(0) // across
    first, _, last = group_of(down, ends, starts, rows, experts, EXPERTS)
    row = first + tl.arange(0, B)
    column = block * B + tl.arange(0, B)
    a = activated(gate_up, weights, row, row < last, column, width, WEIGHTED)
    store_columns(a, qt, scales_t, down, padded, column, width, LARGEST, UE8M0)


def check_gate_up(gate_up: Tensor, weights: Tensor | None) -> None:
    """Raises ValueError unless gate_up is [M, 2 F] and weights, if there are any, are [M]."""
    require_matrix("gate_up", gate_up)
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up {list(gate_up.shape)} must have as many columns of gate as of up")
    if weights is not None and tuple(weights.shape) != (gate_up.shape[0],):
        raise ValueError(f"weights {list(weights.shape)} must be [{gate_up.shape[0]}], one for each row of gate_up")


def _check(gate_up: Tensor, weights: Tensor | None, ue8m0: bool) -> None:
    check_gate_up(gate_up, weights)


def _grouped_check(gate_up: Tensor, weights: Tensor | None, ends: Tensor, ue8m0: bool) -> None:
    check_gate_up(gate_up, weights)
    require_int32("ends", ends)


def _activation(gate_up: Tensor, weights: Tensor | None) -> Tensor:
    gate, up = gate_up.to(torch.float32).chunk(2, dim=-1)
    a = F.silu(gate) * up
    return a if weights is None else a * weights[:, None]


def _dense(weights: Tensor | None) -> Tensor | None:
    return None if weights is None else weights.contiguous()


def _known(q: Tensor, weights: Tensor | None, ue8m0: bool) -> dict[str, Any]:
    return {**constants(q, ue8m0), "WEIGHTED": weights is not None}


def _rows_reference(gate_up: Tensor, weights: Tensor | None, ue8m0: bool) -> tuple[Tensor, Tensor]:
    return quantized_rows(_activation(gate_up, weights), ue8m0)


def _rows_launch(gate_up: Tensor, weights: Tensor | None, ue8m0: bool) -> tuple[Tensor, Tensor]:
    gate_up, rows, width = gate_up.contiguous(), gate_up.shape[0], gate_up.shape[1] // 2
    q, scales = codes_and_scales(gate_up, rows, width)
    if q.numel():
        grid = (triton.cdiv(rows, ROWS.constants["R"]) * blocks(width),)
        options = {**_known(q, weights, ue8m0), **ROWS.options()}
        swiglu_rows_kernel[grid](gate_up, _dense(weights), q, scales, rows, width, **options)
    return q, scales


def _rows_fake(gate_up: Tensor, weights: Tensor | None, ue8m0: bool) -> tuple[Tensor, Tensor]:
    return codes_and_scales(gate_up, gate_up.shape[0], gate_up.shape[1] // 2)


def _both_reference(gate_up: Tensor, weights: Tensor | None, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a = _activation(gate_up, weights)
    return *quantized_rows(a, ue8m0), *quantized_columns(a, ue8m0)


def _both_launch(gate_up: Tensor, weights: Tensor | None, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gate_up, rows, width = gate_up.contiguous(), gate_up.shape[0], gate_up.shape[1] // 2
    results = _both_fake(gate_up, weights, ue8m0)
    if results[0].numel():
        options = {**_known(results[0], weights, ue8m0), **TILE.options()}
        grid = (blocks(rows) * blocks(width),)
        swiglu_tile_kernel[grid](gate_up, _dense(weights), *results, rows, width, **options)
    return results


def _both_fake(gate_up: Tensor, weights: Tensor | None, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    return *codes_and_scales(gate_up, rows, width), *codes_and_scales(gate_up, width, rows)


def _grouped_reference(
    gate_up: Tensor, weights: Tensor | None, ends: Tensor, ue8m0: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return padded_reference(_activation(gate_up, weights), ends, ue8m0)


def _grouped_launch(
    gate_up: Tensor, weights: Tensor | None, ends: Tensor, ue8m0: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if gate_up.numel() == 0:
        return _grouped_reference(gate_up, weights, ends, ue8m0)
    gate_up, rows, width = gate_up.contiguous(), gate_up.shape[0], gate_up.shape[1] // 2
    results = grouped_memory(gate_up, rows, width, ends)
    padded, experts = results[0].shape[1], ends.shape[0]
    grid = (blocks(padded) * blocks(width),)
    size = triton.next_power_of_2(experts + 1)
    options = {**_known(results[0], weights, ue8m0), "EXPERTS": size, **TILE.options()}
    given = gate_up, _dense(weights), ends.contiguous()
    swiglu_grouped_kernel[grid](*given, *results, rows, width, padded, experts, **options)
    return results


def _grouped_fake(gate_up: Tensor, weights: Tensor | None, ends: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor]:
    return grouped_memory(gate_up, gate_up.shape[0], gate_up.shape[1] // 2, ends)


swiglu_quantize = TritonOp("swiglu_quantize", _rows_reference, _rows_launch, _rows_fake, check=_check)
swiglu_quantize_both = TritonOp("swiglu_quantize_both", _both_reference, _both_launch, _both_fake, check=_check)
swiglu_quantize_grouped_transposed = TritonOp(
    "swiglu_quantize_grouped_transposed", _grouped_reference, _grouped_launch, _grouped_fake, check=_grouped_check
)


def variants(arch: Arch) -> Iterator[Variant]:
    """The compilations that the launchers ask for, with the experts of DeepSeek-V3."""
    codes, largest = format_of(arch)
    read = {"gate_up": "*bf16", "weights": "*fp32"}
    own, other = {"q": codes, "scales": "*fp32"}, {"qt": codes, "scales_t": "*fp32"}
    sizes = {"rows": "i32", "width": "i32"}
    grouped = {"ends": "*i32", **other, "starts": "*i32", **sizes, "padded": "i32", "experts": "i32"}
    known = {"LARGEST": largest, "UE8M0": False, "WEIGHTED": True}
    for name, kernel, arguments, more, config in (
        ("swiglu_quantize", swiglu_rows_kernel, {**own, **sizes}, {}, ROWS),
        ("swiglu_quantize_both", swiglu_tile_kernel, {**own, **other, **sizes}, {}, TILE),
        ("swiglu_quantize_grouped_transposed", swiglu_grouped_kernel, grouped, {"EXPERTS": 512}, TILE),
    ):
        signature = {**read, **arguments}
        aligned = tuple(each for each in signature if each != "experts")
        # With more than 128 no second program of eight warps fits on an SM.
        promises = {**QUANTISES, "registers": 128 if arch == "sm_90" else 160}
        yield Variant(name, kernel, signature, {**known, **more}, config, aligned, promises)
