"""The gradients of experts' activation, and of the weights that scale its rows, in one pass.

    a = silu(gate) * up        given is the gradient of a * weight of the row, [M, F]

    swiglu_backward(grad, gate_up, weights) -> grad_gate_up [M, 2 F] in gate_up's dtype, grad_weights [M] in FP32

gate_up is [M, 2 F], gate columns first; other shapes are refused (ValueError). Everything is computed in FP32 and
rounded once. One program owns a row, so that the sum over it, which a weight's gradient is, has one order.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from modelspec.kernels.swiglu import swiglu_gradients
from modelspec.kernels.swiglu_quantize import check_gate_up
from modelspec.kernels.triton_language import tl, triton
from modelspec.kernels.triton_op import TritonOp
from modelspec.kernels.variant import Arch, Config, Variant

ROW = Config({"BLOCK": 1024}, num_warps=4)


@triton.jit
def swiglu_backward_kernel(grad, gate_up, weights, grad_gate_up, grad_weights, width, BLOCK: tl.constexpr):
    """One program: a row."""
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row)
    grad += row * width
    gate_up += row * 2 * width
    grad_gate_up += row * 2 * width
    total = tl.zeros((BLOCK,), tl.float32)
    for left in range(0, width, BLOCK):
        column = left + tl.arange(0, BLOCK)
        inside = column < width
        gate = tl.load(gate_up + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + width + column, mask=inside, other=0.0).to(tl.float32)
        own = tl.load(grad + column, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        total = tl.fma(own, gate * sigmoid * up, total)
        scaled = own * weight
        to_gate = scaled * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        tl.store(grad_gate_up + column, to_gate.to(grad_gate_up.dtype.element_ty), mask=inside)
        to_up = scaled * gate * sigmoid
        tl.store(grad_gate_up + width + column, to_up.to(grad_gate_up.dtype.element_ty), mask=inside)
    tl.store(grad_weights + row, tl.sum(total, 0))


def _check(grad: Tensor, gate_up: Tensor, weights: Tensor) -> None:
    check_gate_up(gate_up, weights)
    expected = [gate_up.shape[0], gate_up.shape[1] // 2]
    if list(grad.shape) != expected:
        raise ValueError(f"grad {list(grad.shape)} must be {expected}, as the activation of gate_up")


def _reference(grad: Tensor, gate_up: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = gate_up.to(torch.float32).contiguous().chunk(2, dim=-1)
    grad = grad.to(torch.float32).contiguous()
    parts = swiglu_gradients(grad * weights[:, None], gate, up)
    return torch.cat(parts, dim=-1).to(gate_up.dtype), torch.linalg.vecdot(grad, F.silu(gate) * up)


def _launch(grad: Tensor, gate_up: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    results = _fake(grad, gate_up, weights)
    (rows, width), operands = grad.shape, (grad.contiguous(), gate_up.contiguous(), weights.contiguous())
    if rows and width:
        swiglu_backward_kernel[(rows,)](*operands, *results, width, **ROW.options())
        return results
    return results[0], results[1].zero_()


def _fake(grad: Tensor, gate_up: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return gate_up.new_empty(gate_up.shape), gate_up.new_empty(gate_up.shape[0], dtype=torch.float32)


swiglu_backward = TritonOp("swiglu_backward", _reference, _launch, _fake, check=_check)


def variants(arch: Arch) -> Iterator[Variant]:
    """The compilations that the launcher asks for, the same for every architecture."""
    for dtype in ("bf16", "fp32"):
        wide = dict.fromkeys(("grad", "gate_up"), f"*{dtype}") | {"weights": "*fp32"}
        signature = {**wide, "grad_gate_up": f"*{dtype}", "grad_weights": "*fp32", "width": "i32"}
        promises = {"spills": 0, "registers": 128, "shared": 8_192}
        yield Variant(
            f"swiglu_backward-{dtype}", swiglu_backward_kernel, signature, {}, ROW, tuple(signature), promises
        )
