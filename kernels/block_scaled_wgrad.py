"""The gradient of a weight in block-scaled FP8: a sum over tokens (arXiv 2412.19437, 3.3).

    grad_weight = a @ b^T          a = grad_y^T [N, T], b = x^T [K, T], a scale for each 1 x 128 block of both

Both are quantised along tokens. The kernel is that of `block_scaled_mm`, with a vector of scales for b as well: this
costs a multiplication before each FMA. The gradient is FP32, new or added to one that stands; every element of it has
one owner and one order of sums, so that it is the same each time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from modelspec.kernels.block_scaled_mm import checked, product, run, variant
from modelspec.kernels.configs import BLOCK_SCALED_WGRAD, POINTERS, architecture, block_scaled_wgrad_config
from modelspec.kernels.triton_op import TritonOp
from modelspec.kernels.variant import Arch, Variant


def _reference(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Tensor:
    return product(a, a_scales, b, b_scales, 1)


def _launch(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Tensor:
    checked(a, a_scales, b, b_scales, 1)
    out = a.new_empty(a.shape[0], b.shape[0], dtype=torch.float32)
    if not out.numel() or not a.shape[1]:
        return out.zero_()
    run(block_scaled_wgrad_config(architecture(a.device)), (a, a_scales, b, b_scales), out, 1)
    return out


def _fake(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=torch.float32)


# block_scaled_wgrad(a [N, T] E4M3, a_scales [N, ceil(T / 128)], b [K, T] E4M3, b_scales [K, ceil(T / 128)])
#     -> [N, K] FP32. Raises ValueError if shapes do not fit.
block_scaled_wgrad: TritonOp[..., Tensor] = TritonOp(
    "block_scaled_wgrad", reference=_reference, launch=_launch, fake=_fake
)


def _reference_add(out: Tensor, a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> None:
    _checked_out(out, a, b)
    out.add_(product(a, a_scales, b, b_scales, 1))


def _launch_add(out: Tensor, a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> None:
    _checked_out(out, a, b)
    checked(a, a_scales, b, b_scales, 1)
    if not out.numel() or not a.shape[1]:
        return
    run(block_scaled_wgrad_config(architecture(a.device)), (a, a_scales, b, b_scales), out, 1, accumulate=True)


def _fake_add(out: Tensor, a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> None:
    pass


def _checked_out(out: Tensor, a: Tensor, b: Tensor) -> None:
    expected = (a.shape[0], b.shape[0])
    if tuple(out.shape) != expected or out.dtype != torch.float32 or not out.is_contiguous():
        found = f"{list(out.shape)} in {out.dtype}" + (" with gaps or turned" if not out.is_contiguous() else "")
        raise ValueError(f"the gradient to add to is {found}: it must be {list(expected)} in FP32, row-major")


# block_scaled_wgrad_add(out [N, K] FP32, a, a_scales, b, b_scales): adds the gradient to `out`, which it changes.
block_scaled_wgrad_add: TritonOp[..., None] = TritonOp(
    "block_scaled_wgrad_add", reference=_reference_add, launch=_launch_add, fake=_fake_add, mutates=("out",)
)


def variants(arch: Arch) -> Iterator[Variant]:
    """What the launchers may compile for an architecture, and the candidates that it may be compared with."""
    for name, config in BLOCK_SCALED_WGRAD[arch].items():
        yield variant(f"block_scaled_wgrad_{name}", arch, config, 1, "*fp32", False)
    large = BLOCK_SCALED_WGRAD[arch]["large"]
    yield variant("block_scaled_wgrad_large_add", arch, large, 1, "*fp32", True)
    if large.constants["LOADS"] == POINTERS:
        yield variant("block_scaled_wgrad_large_ragged", arch, large, 1, "*fp32", False, whole_k=False)
