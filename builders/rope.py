"""Rotary position embedding (arXiv 2104.09864), with the scalings of YaRN (arXiv 2309.00071) and Llama 3.1.

A pair of elements at position p is rotated by the angle p x frequency. `rotary_tables` makes cos and sin once per
forward pass, and `Rotary.rotate` applies them. Both layouts of pairs are kept as they are: nothing is permuted.
"""

from math import ceil, floor, log, pi
from typing import Literal, NamedTuple, assert_never

import torch
from torch import Tensor

from modelspec import schema
from modelspec.kernels.rotate import Layout, rotate


class Rotary(NamedTuple):
    """cos and sin, each [sequence, dim / 2], and which elements form a pair."""

    cos: Tensor
    sin: Tensor
    layout: Layout

    def rotate(self, x: Tensor) -> Tensor:
        """Turns every pair of x [..., sequence, dim] by its position's angle."""
        return rotate(x, self.cos, self.sin, self.layout)


def _mscale(factor: float, m: float) -> float:
    """g(m) = 0.1 m ln(factor) + 1."""
    return 0.1 * m * log(factor) + 1.0


def softmax_factor(rope: schema.Rope | Literal["none"]) -> float:
    """What a scaling multiplies the softmax scale by: both queries and keys carry g(mscale_all_dim)."""
    if rope == "none" or not isinstance(rope.scaling, schema.Yarn):
        return 1.0
    return _mscale(rope.scaling.factor, rope.scaling.mscale_all_dim) ** 2


def frequencies(rope: schema.Rope, dim: int) -> Tensor:
    """Angle per position of each pair, [dim / 2], float64 on CPU."""
    freq = rope.theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
    match rope.scaling:
        case None:
            return freq
        case schema.Yarn():
            slow = _yarn_slowness(rope.scaling, rope.theta, dim)
        case schema.Llama3():
            slow = _llama3_slowness(rope.scaling, freq)
        case _:
            assert_never(rope.scaling)
    return freq * (1 - slow) + freq / rope.scaling.factor * slow


def _yarn_slowness(scaling: schema.Yarn, theta: float, dim: int) -> Tensor:
    """Of each pair, how far it is on the way from kept (0) to divided (1), by the index of the pair."""

    def pair_of(turns: float) -> float:
        """The pair that makes so many turns over the original length."""
        return dim * log(scaling.original_max_position / (turns * 2 * pi)) / (2 * log(theta))

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = floor(low), ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    # Equal ends would divide by zero; a thousandth of a pair makes the ramp a step.
    width = high - low if high != low else 0.001
    return ((torch.arange(dim // 2, dtype=torch.float64, device="cpu") - low) / width).clamp(0, 1)


def _llama3_slowness(scaling: schema.Llama3, freq: Tensor) -> Tensor:
    """Of each pair, how far it is on the way from kept (0) to divided (1), by its turns over the original length."""
    turns = scaling.original_max_position * freq / (2 * pi)
    return ((scaling.high_freq_factor - turns) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)


def rotary_tables(rope: schema.Rope, dim: int, positions: Tensor, dtype: torch.dtype) -> Rotary:
    """Tables for `positions` [sequence]. Angles are float64: at 160,000 tokens FP32 is off by a hundredth of a turn."""
    angles = positions.to(torch.float64).outer(frequencies(rope, dim).to(positions.device))
    scale = 1.0
    if isinstance(rope.scaling, schema.Yarn):
        scale = _mscale(rope.scaling.factor, rope.scaling.mscale) / _mscale(
            rope.scaling.factor, rope.scaling.mscale_all_dim
        )
    return Rotary((angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype), rope.layout)
