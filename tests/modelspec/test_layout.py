"""Stages, axes and microbatches, against what V3's report says and against small cases by hand."""

from pathlib import Path

import pytest

from modelspec import layout, schema
from modelspec.schema.parallelism import PipelineSchedule
from modelspec.validate import load

V3 = Path(__file__).parents[2] / "specs" / "deepseek-v3.yaml"


def test_v3_stands_on_2048_ranks_as_reported() -> None:
    mesh = layout.mesh(load(V3).parallelism)
    assert (mesh.pipeline, mesh.data, mesh.expert, mesh.expert_data, mesh.stages) == (16, 128, 64, 2, 32)


@pytest.mark.parametrize(
    ("layers", "stages", "expected"),
    [(61, 32, (2,) * 29 + (1,) * 3), (4, 2, (2, 2)), (5, 2, (3, 2)), (7, 4, (2, 2, 2, 1))],
)
def test_layers_are_split_evenly_with_the_surplus_early(layers: int, stages: int, expected: tuple[int, ...]) -> None:
    split = layout.layers_of_stages(layers, stages)
    assert split == expected
    assert sum(split) == layers


@pytest.mark.parametrize(
    ("schedule", "stages", "expected"),
    [("1f1b", None, 1), ("gpipe", None, 1), ("interleaved_1f1b", None, 2), ("interleaved_1f1b", 3, 3), ("zbv", None, 2),
     ("dualpipev", None, 2)],
)  # fmt: skip
def test_stages_per_rank_follow_the_schedule(schedule: PipelineSchedule, stages: int | None, expected: int) -> None:
    assert layout.stages_per_rank(schema.Pipeline(size=2, schedule=schedule, stages_per_rank=stages)) == expected


def test_microbatches_are_the_local_batch_without_a_pipeline_and_single_sequences_with_one() -> None:
    plain = schema.Parallelism(world_size=4)
    assert (layout.microbatch_size(plain, 32), layout.microbatches(plain, 32)) == (8, 1)
    pipelined = schema.Parallelism(world_size=4, pipeline=schema.Pipeline(size=2))
    assert (layout.microbatch_size(pipelined, 32), layout.microbatches(pipelined, 32)) == (1, 16)
