"""The pipeline of a spec as timelines: of its own schedule, and of every other that could take its place."""

from typing import get_args

from modelspec import layout
from modelspec.picture.timeline import Timeline, Work, timeline
from modelspec.plan.schedules import refusal
from modelspec.plan.step import Speed, Steps
from modelspec.plan.training import stages_of_training
from modelspec.schema import ModelSpec
from modelspec.schema.hardware import Hardware
from modelspec.schema.parallelism import PipelineSchedule
from modelspec.timeline import steps_by_batch_size


def own_timeline(spec: ModelSpec, hardware: Hardware, speed: Speed, imbalance: float = 1.0) -> Timeline:
    """The first stage of training of a valid spec, at the batch size of most of its tokens.

    `imbalance` is the load of the busiest expert rank over the mean.

    Raises ValueError where there is no pipeline, where its schedule has too few microbatches, and where it is too long
    to be drawn.
    """
    applied, length, batch_size = _first(spec)
    return _timeline(applied, batch_size, Steps(applied, length, hardware, speed, imbalance))


def all_timelines(
    spec: ModelSpec, hardware: Hardware, speed: Speed, imbalance: float = 1.0
) -> tuple[tuple[Timeline, ...], tuple[tuple[PipelineSchedule, str], ...]]:
    """The same for every schedule that works with its ranks and microbatches, and why the others do not.

    Raises ValueError as `own_timeline` does.
    """
    applied, length, batch_size = _first(spec)
    found: list[Timeline] = []
    refused: list[tuple[PipelineSchedule, str]] = []
    schedules: tuple[PipelineSchedule, ...] = get_args(PipelineSchedule)
    for schedule in schedules:
        other = _scheduled(applied, schedule)
        reason = _refusal(other, batch_size)
        if reason is None:
            found.append(_timeline(other, batch_size, Steps(other, length, hardware, speed, imbalance)))
        else:
            refused.append((schedule, reason))
    if not found:
        raise ValueError("; ".join(reason for _, reason in refused))
    return tuple(found), tuple(refused)


def _first(spec: ModelSpec) -> tuple[ModelSpec, int, int]:
    """The spec as it stands in the first stage, the stage's sequence length, and the size of most batches."""
    applied, stage = next(stages_of_training(spec))
    if applied.parallelism.pipeline.size == 1:
        raise ValueError("parallelism.pipeline.size is 1: there is no pipeline to draw")
    batch_size, _ = max(steps_by_batch_size(stage), key=lambda run: run[0] * run[1])
    return applied, stage.sequence_length, batch_size


def _scheduled(spec: ModelSpec, schedule: PipelineSchedule) -> ModelSpec:
    """The spec under another schedule; stages on a rank stay as they are where both leave the choice."""
    pipeline = spec.parallelism.pipeline
    each = pipeline.stages_per_rank if schedule.startswith("interleaved") else None
    changed = pipeline.model_copy(update={"schedule": schedule, "stages_per_rank": each})
    return spec.model_copy(update={"parallelism": spec.parallelism.model_copy(update={"pipeline": changed})})


def _refusal(spec: ModelSpec, batch_size: int) -> str | None:
    axes, count = layout.mesh(spec.parallelism), layout.microbatches(spec.parallelism, batch_size)
    schedule, layers = spec.parallelism.pipeline.schedule, spec.model.num_layers
    if axes.stages > layers:
        return f"{schedule} has {axes.stages} stages, more than {layers} layers"
    return refusal(schedule, axes.pipeline, axes.stages_per_rank, count)


def _timeline(spec: ModelSpec, batch_size: int, steps: Steps) -> Timeline:
    axes, pieces = layout.mesh(spec.parallelism), steps.pieces(batch_size)
    told = (
        f"Times are those of {steps.speed.stack} on {steps.hardware.name} for sequences of {steps.sequence_length:,} "
        "tokens, by rates fitted to published throughput."
    )
    return timeline(
        spec.parallelism.pipeline.schedule,
        axes.pipeline,
        axes.stages_per_rank,
        layout.microbatches(spec.parallelism, batch_size),
        Work(*pieces, told),
    )
