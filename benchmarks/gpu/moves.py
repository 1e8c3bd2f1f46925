"""Moving tokens to their experts and back, and quantisers fused with what comes before them, beside torch's own steps.

All of these move bytes. Torch's side does in several passes what ours does in one.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.quantizers import SCALE
from benchmarks.gpu.timing import Case, Place, Side, distance
from modelspec.kernels.permute import permute, unpermute
from modelspec.kernels.quantize import dequantize, quantize
from modelspec.kernels.rms_norm_quantize import rms_norm_quantize
from modelspec.kernels.sort_by_expert import sort_by_expert
from modelspec.kernels.swiglu_quantize import swiglu_quantize, swiglu_quantize_both
from modelspec.kernels.triton_op import TritonOp

# Tokens, channels, experts, experts of a token.
TOKENS = (8192, 7168, 256, 8)
DRY_TOKENS = (70, 144, 8, 2)
# Rows and width of an activation.
GATED, DRY_GATED = (65536, 2048), (70, 144)
NORMED, DRY_NORMED = (32768, 7168), (70, 144)
SAME = 1e-2
Form = Callable[..., Any]


class Moved(NamedTuple):
    """x [tokens, width], where its copies stand, and their routing weights."""

    x: Tensor
    choice: Tensor
    row: Tensor
    token: Tensor
    weights: Tensor
    rows: Tensor


def moves(place: Place) -> Iterator[Case]:
    """Sorting, copying and summing."""
    tokens, width, num, k = shape = DRY_TOKENS if place.dry else TOKENS

    def make(seed: int) -> Moved:
        generator = torch.Generator(place.device).manual_seed(seed)
        scores = torch.rand(tokens, num, generator=generator, device=place.device)
        weights, choice = scores.topk(k)
        row, token, _ = sort_by_expert(choice, num)
        x = place.randn(tokens, width, seed=seed)
        return Moved(x, choice, row, token, weights, permute.reference(x, row))

    named = "x".join(map(str, shape))
    once, copies = 2 * tokens * width, 2 * tokens * width * k

    def case(name: str, truth: Form, bytes: float, ours: Form, theirs: Form) -> Case:
        sides = [
            Side("ours", ours, distance, SAME, bytes),
            Side("torch", theirs, distance, SAME, bytes, format="bf16", ours=False),
        ]
        return Case(name, named, make, truth, sides)

    yield case(
        *("permute", lambda m: permute.reference(m.x, m.row), once + copies),
        *(lambda m: permute.launch(m.x, m.row), lambda m: m.x[m.token]),
    )
    yield case(
        *("unpermute", lambda m: unpermute.reference(m.rows, m.row, m.weights), once + copies),
        lambda m: unpermute.launch(m.rows, m.row, m.weights),
        lambda m: torch.einsum("tkh,tk->th", m.rows[m.row], m.weights.to(m.rows.dtype)),
    )
    yield case(
        *("sort", lambda m: m.token, 12 * tokens * k),
        *(lambda m: sort_by_expert(m.choice, num).token, lambda m: m.choice.flatten().sort(stable=True)[1] // k),
    )


def fused(place: Place) -> Iterator[Case]:
    """SwiGLU and RMSNorm that end in FP8."""
    rows, width = DRY_GATED if place.dry else GATED
    size = rows * width

    def two_steps(x: Tensor) -> tuple[Tensor, ...]:
        gate, up = x.chunk(2, dim=-1)
        return quantize.launch(F.silu(gate) * up, False)

    swiglus: tuple[tuple[TritonOp[..., Any], float], ...] = (
        (swiglu_quantize, 5 + SCALE),
        (swiglu_quantize_both, 6 + 2 * SCALE),
    )
    for op, each in swiglus:

        def run(x: Tensor, op: TritonOp[..., Any] = op) -> tuple[Tensor, ...]:
            return op.launch(x, None, False)

        def define(x: Tensor, op: TritonOp[..., Any] = op) -> tuple[Tensor, ...]:
            return op.reference(x, None, False)

        sides = [
            Side("ours", run, near, SAME, each * size),
            Side("two steps", two_steps, near, SAME, (5 + SCALE) * size, format="bf16", ours=False),
        ]
        yield Case(op.name, f"{rows}x{width}", place.matrices(rows, 2 * width), define, sides)

    rows, width = DRY_NORMED if place.dry else NORMED
    weight = torch.rand(width, device=place.device, dtype=torch.bfloat16)

    def norm(form: Form) -> Form:
        # Codes and scales; the others are y and rstd.
        return lambda x: form(x, weight, 1e-6, False)[1:3]

    def norm_steps(x: Tensor) -> tuple[Tensor, ...]:
        return quantize.launch(F.rms_norm(x, (width,), weight, 1e-6), False)

    least = (5 + SCALE) * rows * width
    sides = [
        Side("ours", norm(rms_norm_quantize.launch), near, SAME, least),
        Side("two steps", norm_steps, near, SAME, least, format="bf16", ours=False),
    ]
    yield Case(
        "rms_norm_quantize",
        f"{rows}x{width}",
        place.matrices(rows, width),
        norm(rms_norm_quantize.reference),
        sides,
    )


def near(result: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    """How far the values of the first orientation are: another exponential changes a code here and there."""
    wide = [dequantize.reference(q, scales, torch.float32) for q, scales in (result[:2], truth[:2])]
    return distance(*wide)


def cases(place: Place) -> Iterator[Case]:
    """Moves, then what is fused."""
    yield from moves(place)
    yield from fused(place)
