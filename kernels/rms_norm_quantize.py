"""RMSNorm and the FP8 of its output, from one read of x.

    rms_norm_quantize(x, weight, eps, ue8m0) -> y [M, K], q [M, K], scales [M, ceil(K / 128)], rstd [M]
    rstd = 1 / sqrt(mean(x^2) + eps)         y = x * rstd * weight         (q, scales) = quantize(y)

In FP32 until y, which is rounded to x's dtype, once; q is quantised from that y, so that whoever quantises y again,
along tokens for the gradient of a weight, starts from the same numbers. rstd in FP32 serves the backward pass. x is
[M, K] in BF16 or FP32, other shapes are refused (ValueError); a row is one program's, in tiles up to 16,384 wide.

Kernel and reference add a row's squares in different orders, so that rstd agrees up to FP32's rounding; an element of y
may then be rounded to the neighbouring number, and so may its code. q and scales are the kernel's own y's, bit for bit.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from modelspec.kernels.block_scale import BLOCK
from modelspec.kernels.operands import require_matrix
from modelspec.kernels.quantize import QUANTISES, blocks, codes_and_scales, constants, format_of, quantized_rows
from modelspec.kernels.quantize_tile import B, largest, scale_of
from modelspec.kernels.triton_language import tl, triton
from modelspec.kernels.triton_op import TritonOp
from modelspec.kernels.variant import Arch, Config, Variant

# By the most blocks of 128 in a row: 32 values a thread of 32 lanes a warp.
CONFIGS = {
    16: Config({"BLOCKS": 16}, num_warps=2),
    32: Config({"BLOCKS": 32}, num_warps=4),
    64: Config({"BLOCKS": 64}, num_warps=8),
    128: Config({"BLOCKS": 128}, num_warps=16),
}
WIDEST = max(CONFIGS) * BLOCK


@triton.jit
def rms_norm_kernel(
    x,
    weight,
    y,
    q,
    scales,
    rstd,
    rows,
    columns,
    eps,
    LARGEST: tl.constexpr,
    UE8M0: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program: one row, as a tile [BLOCKS, 128]."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    column = block[:, None] * B + tl.arange(0, B)[None, :]
    mask = column < columns
    wide = tl.load(x + row * columns + column, mask=mask, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(tl.sum(wide * wide, 1), 0) / columns + eps)
    tl.store(rstd + row, r)
    normed = wide * r * tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    rounded = normed.to(y.dtype.element_ty)
    tl.store(y + row * columns + column, rounded, mask=mask)
    kept = rounded.to(tl.float32)
    scale, inverse = scale_of(largest(kept, 1), LARGEST, UE8M0)
    tl.store(q + row * columns + column, (kept * inverse[:, None]).to(q.dtype.element_ty), mask=mask)
    tl.store(scales + block.to(tl.int64) * rows + row, scale, mask=block * B < columns)


def _check(x: Tensor, weight: Tensor, eps: float, ue8m0: bool) -> None:
    require_matrix("x", x)
    if tuple(weight.shape) != (x.shape[1],):
        raise ValueError(f"weight {list(weight.shape)} must be [{x.shape[1]}], one for each column of x")


def _reference(x: Tensor, weight: Tensor, eps: float, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = x.to(torch.float32).contiguous()
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    y = (wide * rstd[:, None] * weight.to(torch.float32)).to(x.dtype).contiguous()
    return y, *quantized_rows(y, ue8m0), rstd


def _launch(x: Tensor, weight: Tensor, eps: float, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns = x.shape
    if x.numel() == 0 or columns > WIDEST:
        return _reference(x, weight, eps, ue8m0)
    x, weight = x.contiguous(), weight.contiguous()
    y, q, scales, rstd = _fake(x, weight, eps, ue8m0)
    config = next(config for most, config in CONFIGS.items() if blocks(columns) <= most)
    options = {**constants(q, ue8m0), **config.options()}
    rms_norm_kernel[(rows,)](x, weight, y, q, scales, rstd, rows, columns, eps, **options)
    return y, q, scales, rstd


def _fake(x: Tensor, weight: Tensor, eps: float, ue8m0: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns = x.shape
    return x.new_empty(x.shape), *codes_and_scales(x, rows, columns), x.new_empty(rows, dtype=torch.float32)


rms_norm_quantize = TritonOp("rms_norm_quantize", _reference, _launch, _fake, check=_check)


def variants(arch: Arch) -> Iterator[Variant]:
    """The compilations that the launcher asks for, with a norm's weight in FP32."""
    codes, top = format_of(arch)
    signature = {
        **{"x": "*bf16", "weight": "*fp32", "y": "*bf16", "q": codes, "scales": "*fp32", "rstd": "*fp32"},
        **{"rows": "i32", "columns": "i32", "eps": "fp32"},
    }
    aligned = tuple(name for name in signature if name != "eps")
    for most, config in CONFIGS.items():
        name, known = f"rms_norm_quantize-{most * BLOCK}", {"LARGEST": top, "UE8M0": False}
        yield Variant(name, rms_norm_kernel, signature, known, config, aligned, QUANTISES)
