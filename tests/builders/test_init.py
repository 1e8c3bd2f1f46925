"""Initial values depend on the seed and on a parameter's own name, and on nothing else."""

from collections.abc import Callable
from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelspec.builders import build
from modelspec.builders.init import initialize
from modelspec.schema import ModelSpec, TensorSpec

Tiny = Callable[..., ModelSpec]


def values(spec: ModelSpec, **options: Any) -> dict[str, Tensor]:
    """Every parameter and persistent buffer of a fresh model."""
    return build(spec, **options).state_dict()


def test_a_rebuild_gives_the_same_values_whatever_the_global_generator_does(tiny: Tiny) -> None:
    first = values(tiny())
    torch.manual_seed(1)
    torch.randn(3)
    state = torch.get_rng_state()
    second = values(tiny())
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert torch.equal(state, torch.get_rng_state()), "building must not move the global generator"


def test_seeds_differ(tiny: Tiny) -> None:
    first, second = values(tiny()), values(tiny(), seed=1)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]) == (tensor.ndim == 1), name


CHANGES: dict[str, dict[str, Any]] = {
    "more-layers": {
        "model": {"layers": [{"attention": "mla", "ffn": "dense"}] + [{"attention": "mla", "ffn": "moe"}] * 5}
    },
    "no-mtp": {"model": {"mtp": None}},
    "queries-not-compressed": {"mla": {"q_lora_rank": None}},
    "no-shared-experts": {"moe": {"shared_experts": None}},
    "other-parallelism": {"parallelism": {"world_size": 4, "tensor": 2}},
    "tied": {"model": {"tie_embeddings": True}},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_value_does_not_depend_on_what_else_is_built(change: dict[str, Any], tiny: Tiny) -> None:
    first, second = values(tiny()), values(tiny(**change))
    common = {name for name in first.keys() & second.keys() if first[name].shape == second[name].shape}
    assert len(common) > 20
    for name in common:
        assert torch.equal(first[name], second[name]), name


def test_an_expert_does_not_depend_on_how_many_there_are(tiny: Tiny) -> None:
    few, many = (values(tiny(moe={"num_experts": n})) for n in (10, 15))
    for name in ("layers.1.ffn.experts.gate_up_proj", "mtp.0.block.ffn.experts.down_proj"):
        assert torch.equal(few[name], many[name][:10])
        assert not torch.equal(few[name][0], few[name][1])


def test_matrices_have_the_deviation_asked_for_and_no_mean(tiny: Tiny) -> None:
    for name, tensor in values(tiny(model={"init": {"std": 0.006}, "vocab_size": 500})).items():
        if tensor.ndim > 1:
            tolerance = 5 / sqrt(tensor.numel())
            assert tensor.std() == pytest.approx(0.006, rel=tolerance), name
            assert abs(tensor.mean()) < 0.006 * tolerance, name


def test_norms_start_at_one_and_selection_biases_at_zero(tiny: Tiny) -> None:
    vectors = {name: tensor for name, tensor in values(tiny()).items() if tensor.ndim == 1}
    assert len(vectors) > 10
    for name, tensor in vectors.items():
        assert (tensor == (0 if "bias" in name else 1)).all(), name


def test_other_dtypes_are_the_float32_draw_cast(tiny: Tiny) -> None:
    wide = values(tiny())
    for dtype in (torch.bfloat16, torch.float64):
        for name, tensor in values(tiny(), dtype=dtype).items():
            assert torch.equal(tensor, wide[name].to(tensor.dtype)), name


def test_no_two_parameters_start_alike(tiny: Tiny) -> None:
    rows = [tensor.flatten()[:20] for tensor in values(tiny()).values() if tensor.ndim > 1]
    assert len({tuple(row.tolist()) for row in rows}) == len(rows)


def test_decay_rates_begin_between_a_hundredth_and_sixteen_each_drawn_by_its_own_name() -> None:
    model = nn.Module()
    table = {name: TensorSpec((2000,), initial="log_of_uniform") for name in ("first", "second")}
    for name, tensor in table.items():
        model.register_parameter(name, nn.Parameter(torch.empty(tensor.shape)))
    initialize(model, table, std=0.1, seed=0)
    first, second = (model.get_parameter(name).detach().exp() for name in table)
    assert not torch.equal(first, second)
    for rates in (first, second):
        assert rates.min() >= 0.00999 and rates.max() <= 16.001
        # Of numbers drawn evenly, each quarter of the range gets a quarter.
        assert torch.histc(rates, 4, 0.01, 16.0) == pytest.approx(torch.full((4,), 500.0), abs=100)
