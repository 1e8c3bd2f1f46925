"""Rotary tables: the geometry that they promise, YaRN's frequencies, and accuracy far out."""

from math import cos, isclose, sin
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from modelspec.builders.rope import frequencies, rotary_tables, softmax_factor
from modelspec.schema import Rope

V3_YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def rope(layout: str = "interleaved", theta: float = 10000.0, **scaling: Any) -> Rope:
    """A rope; any keyword turns YaRN on, laid over V3's."""
    parts = {"theta": theta, "layout": layout} | ({"scaling": V3_YARN | scaling} if scaling else {})
    return Rope.model_validate(parts)


def rotated(spec: Rope, x: Tensor, positions: Tensor) -> Tensor:
    """x [sequence, dim] turned at the given positions."""
    return rotary_tables(spec, x.shape[-1], positions, x.dtype).rotate(x)


@pytest.mark.parametrize("layout", ["interleaved", "half_split"])
def test_each_pair_turns_by_position_times_frequency(layout: str) -> None:
    dim, position = 8, 5
    x = torch.randn(1, dim, dtype=torch.float64)
    turned = rotated(rope(layout), x, torch.tensor([position]))[0]
    for pair in range(dim // 2):
        i, j = (2 * pair, 2 * pair + 1) if layout == "interleaved" else (pair, pair + dim // 2)
        angle = position * 10000 ** (-2 * pair / dim)
        a, b = x[0, i].item(), x[0, j].item()
        assert isclose(turned[i].item(), a * cos(angle) - b * sin(angle), abs_tol=1e-12)
        assert isclose(turned[j].item(), b * cos(angle) + a * sin(angle), abs_tol=1e-12)


@pytest.mark.parametrize("layout", ["interleaved", "half_split"])
def test_scores_depend_on_distance_alone(layout: str) -> None:
    q, k = torch.randn(2, 1, 16, dtype=torch.float64)
    near, far = (
        rotated(rope(layout), q, torch.tensor([start + 9])) @ rotated(rope(layout), k, torch.tensor([start])).T
        for start in (0, 70_000)
    )
    torch.testing.assert_close(near, far)


def test_layouts_are_one_rotation_of_differently_ordered_elements() -> None:
    x, positions = torch.randn(6, 8), torch.arange(6)
    halves = torch.cat((x[:, 0::2], x[:, 1::2]), dim=-1)
    turned = rotated(rope(), x, positions)
    torch.testing.assert_close(
        rotated(rope("half_split"), halves, positions), torch.cat((turned[:, 0::2], turned[:, 1::2]), dim=-1)
    )
    assert (rotated(rope("half_split"), x, positions) - turned).abs().amax() > 0.1


@pytest.mark.parametrize("position", [0, 1, 4095, 163_839, 2**24 + 1])
def test_float32_tables_are_exact_at_far_positions(position: int) -> None:
    tables = rotary_tables(rope(theta=50_000.0), 64, torch.tensor([position]), torch.float32)
    for pair in range(32):
        angle = position * 50_000.0 ** (-2 * pair / 64)
        assert isclose(tables.cos[0, pair].item(), cos(angle), abs_tol=1e-6)
        assert isclose(tables.sin[0, pair].item(), sin(angle), abs_tol=1e-6)


YARNS: dict[str, dict[str, Any]] = {
    "v3": {"factor": 40},
    "v2-lite": {"mscale": 0.707, "mscale_all_dim": 0.707},
    "unequal-mscales": {"mscale": 1.3, "mscale_all_dim": 0.4},
    "not-truncated": {"truncate": False},
    "equal-betas": {"beta_fast": 1},
    "short-original": {"original_max_position": 8},
    "factor-one": {"factor": 1},
}


@pytest.mark.parametrize("theta", [10_000.0, 50_000.0])
@pytest.mark.parametrize("scaling", YARNS.values(), ids=YARNS.keys())
def test_yarn_is_that_of_transformers(scaling: dict[str, Any], theta: float) -> None:
    spec = rope(theta=theta, **scaling)
    assert spec.scaling is not None
    parameters = spec.scaling.model_dump(exclude={"type", "original_max_position"}) | {
        "rope_type": "yarn",
        "rope_theta": theta,
        "original_max_position_embeddings": spec.scaling.original_max_position,
    }
    config = DeepseekV3Config(rope_parameters=parameters, qk_rope_head_dim=64)
    wanted, factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    torch.testing.assert_close(frequencies(spec, 64), wanted.double(), rtol=1e-5, atol=0)
    tables = rotary_tables(spec, 64, torch.tensor([0]), torch.float64)
    torch.testing.assert_close(tables.cos, torch.full((1, 32), factor, dtype=torch.float64))


def test_softmax_scale_of_v3_is_the_published_one() -> None:
    assert isclose(softmax_factor(rope(factor=40)) / 192**0.5, 0.1352338, rel_tol=1e-6)
    assert softmax_factor(rope(mscale_all_dim=0.0)) == softmax_factor(rope()) == softmax_factor("none") == 1.0


def test_v3_keeps_ten_fast_pairs_and_divides_nine_slow_ones() -> None:
    ratio = frequencies(rope(), 64) / frequencies(rope(factor=40), 64)
    assert (ratio == 1).sum() == 11  # The ramp starts at pair 10.
    assert (ratio - 40 < -1e-9).sum() == 23
    torch.testing.assert_close(ratio[23:], torch.full((9,), 40.0, dtype=torch.float64))
