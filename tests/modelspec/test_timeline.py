"""Schedules mean the same to everyone: values at marks, ramps and ends, against closed forms."""

from itertools import groupby, islice
from math import cos, pi
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelspec import schema
from modelspec.timeline import Step, stage_spec, steps_by_batch_size, timeline
from modelspec.validate import load

SPECS = Path(__file__).parents[2] / "specs"
NANO = str(SPECS / "deepseek-v3-nano.yaml")


def steps(*overrides: str) -> list[Step]:
    training = load(NANO, overrides).training
    assert training is not None
    return list(timeline(training))


def test_a_learning_rate_ramp_counts_steps_from_one() -> None:
    rates = [
        step.learning_rate
        for step in steps("training.stages.0.learning_rate=[{until_steps: 4, ramp: [0, 8]}, {value: 8}]")
    ]
    assert rates[:6] == [2, 4, 6, 8, 8, 8]


def test_a_cosine_runs_from_its_first_value_to_its_last() -> None:
    rates = [
        step.learning_rate
        for step in steps(
            "training.stages.0.learning_rate=[{until_steps: 100, value: 3}, {until_steps: 500, cosine: [3, 1]}]",
            "training.stages.0.steps=500",
        )
    ]
    assert rates[99] == 3
    for step in (100, 250, 499):
        assert rates[step] == pytest.approx(1 + (1 + cos(pi * (step - 100) / 400)))


def test_marks_in_tokens_are_read_at_the_start_of_a_step() -> None:
    # A step of nano has 8 x 256 = 2,048 tokens.
    values = [step.mtp_weight for step in steps("training.losses.mtp=[{until_tokens: 4096, value: 0.5}, {value: 0.1}]")]
    assert values[:4] == [0.5, 0.5, 0.1, 0.1]


def test_a_batch_ramp_moves_in_whole_granules_rounded_down() -> None:
    found = steps("training.stages.0.batch_size=[{until_tokens: 40960, ramp: [4, 16], multiple_of: 4}, {value: 16}]")
    sizes = [step.batch_size for step in found]
    assert set(sizes) == {4, 8, 12, 16}
    assert sizes == sorted(sizes)
    for step in found[:20]:
        exact = 4 + 12 * min(step.tokens, 40960) / 40960
        assert step.batch_size == exact // 4 * 4


def test_a_stage_in_tokens_ends_with_the_first_step_that_reaches_them() -> None:
    found = steps("training.stages.0.steps=null", "training.stages.0.tokens=5000")
    assert [step.tokens for step in found] == [0, 2048, 4096]


def test_marks_inside_a_stage_count_from_its_start_and_others_from_the_runs() -> None:
    stages = ", ".join(
        f"{{name: {name}, steps: 10, sequence_length: 16, batch_size: 1, "
        "learning_rate: [{until_steps: 5, value: 1}, {value: 2}]}"
        for name in ("a", "b")
    )
    found = steps(
        f"training.stages=[{stages}]",
        "training.losses.mtp=[{until_steps: 15, value: 1}, {value: 2}]",
        "training.router_bias_update_speed=0.001",
    )
    assert [step.learning_rate for step in found] == ([1] * 5 + [2] * 5) * 2
    assert [step.mtp_weight for step in found] == [1] * 15 + [2] * 5
    assert [(step.stage, step.stage_step) for step in found[9:11]] == [(0, 9), (1, 0)]
    assert [step.tokens for step in found] == [16 * index for index in range(20)]


def test_the_timeline_of_v3_agrees_with_its_report() -> None:
    training = load(SPECS / "deepseek-v3.yaml").training
    assert training is not None
    found = list(timeline(training))
    pretrain = [step for step in found if step.stage == 0]
    assert pretrain[0].batch_size == 3072
    assert pretrain[0].learning_rate == pytest.approx(2.2e-4 / 2000)
    assert pretrain[1999].learning_rate == pytest.approx(2.2e-4)
    assert all(step.batch_size % 128 == 0 for step in pretrain[:10_000:97])
    assert pretrain[-1].learning_rate == 7.3e-6
    assert pretrain[-1].bias_update_speed == 0.0
    assert pretrain[-1].mtp_weight == 0.1
    assert 14.8e12 <= found[len(pretrain)].tokens < 14.8e12 + 15360 * 4096
    assert [len(pretrain), len(found) - len(pretrain)] == [242_940, 2_000]


def test_reading_on_after_a_skip_gives_the_same_steps() -> None:
    training = load(NANO).training
    assert training is not None
    assert list(islice(timeline(training), 300, None)) == list(timeline(training))[300:]


def test_a_stage_may_change_rope_scaling_and_parallelism_alone() -> None:
    spec = load(SPECS / "deepseek-v3.yaml")
    pretrain, context = stage_spec(spec, 0), stage_spec(spec, 1)
    for stage, scaled, context_ranks in ((pretrain, False, 1), (context, True, 8)):
        rope = stage.model.attention["mla"].rope
        assert isinstance(rope, schema.Rope)
        assert (rope.scaling is not None) is scaled
        assert stage.parallelism.context == context_ranks
        assert stage.parallelism.pipeline == spec.parallelism.pipeline
        assert stage.tensors() == spec.tensors()


@st.composite
def stages(draw: st.DrawFn) -> schema.Stage:
    """Stages of a few hundred steps with every kind of batch phase."""
    phases: list[dict[str, Any]] = []
    for mark in sorted(draw(st.sets(st.integers(1, 300), max_size=3))):
        until = {"until_steps": mark} if draw(st.booleans()) else {"until_tokens": mark * 40}
        first, last = sorted(draw(st.tuples(st.integers(1, 40), st.integers(1, 40))))
        ramp = {"ramp": [first, last], "multiple_of": draw(st.integers(1, 5))}
        phases.append({**until, **(ramp if draw(st.booleans()) else {"value": first})})
    phases.append({"value": draw(st.integers(1, 40))})
    length = {"steps": draw(st.integers(1, 400))} if draw(st.booleans()) else {"tokens": draw(st.integers(1, 40000))}
    text = {"name": "s", "sequence_length": 8, "learning_rate": 1.0, "batch_size": phases, **length}
    return schema.Stage.model_validate(text)


@given(stages())
def test_runs_of_equal_batches_are_those_of_the_walk(stage: schema.Stage) -> None:
    training = load(NANO).training
    assert training is not None
    walk = timeline(training.model_copy(update={"stages": (stage,)}))
    runs = [(size, len(list(run))) for size, run in groupby(step.batch_size for step in walk)]
    assert list(steps_by_batch_size(stage)) == runs
