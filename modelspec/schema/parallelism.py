"""How one model is spread over devices. Every degree is 1 unless said otherwise."""

from typing import Annotated, Literal

from pydantic import Field

from modelspec.schema.base import AsTuple, Count, Strict

PipelineSchedule = Literal["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev"]
Recompute = Literal["norm", "mla_up_projection", "swiglu", "layer"]
WorldSize = Annotated[int, Field(ge=1, le=2**24)]


class Pipeline(Strict):
    """Layers cut into stages, microbatches passed from stage to stage."""

    size: Count = Field(default=1, description="ranks along the pipeline")
    schedule: PipelineSchedule = Field(default="1f1b", description="order of forward and backward work")
    stages_per_rank: Count | None = Field(
        default=None,
        description="stages on one rank; interleaved schedules take 2 if left out, zbv and dualpipev always 2",
    )


class DataParallel(Strict):
    """Batches cut over the data axis, whose length is world_size / (pipeline x tensor x context)."""

    replicate: Count = Field(default=1, description="copies of the sharded model; divides the data axis")
    zero: Annotated[int, Field(ge=0, le=3)] = Field(
        default=0, description="ZeRO stage: 0 shards nothing, 1 optimizer states, 2 also gradients, 3 also weights"
    )


class Parallelism(Strict):
    """Degrees of parallelism and what trades memory for time."""

    world_size: WorldSize = Field(default=1, description="processes in all, one device each")
    gpus_per_node: Count = Field(default=8, description="devices that share a fast link")
    pipeline: Pipeline = Field(default=Pipeline(), description="pipeline parallelism")
    expert: Count = Field(default=1, description="ranks that share one set of experts; divides data x context x tensor")
    tensor: Count = Field(default=1, description="ranks that share one matrix")
    context: Count = Field(default=1, description="ranks that share one sequence")
    data: DataParallel = Field(default=DataParallel(), description="data parallelism")
    microbatch_size: Count | None = Field(
        default=None,
        description="sequences per forward pass of a rank; left out: 1 with a pipeline, else the whole local batch",
    )
    recompute: Annotated[tuple[Recompute, ...], AsTuple] = Field(
        default=(), description="what is computed again in the backward pass instead of kept"
    )
    compile: Literal["layer", "none"] = Field(default="none", description="torch.compile each layer, or nothing")


class PipelineOverride(Strict):
    """The parts of `pipeline` that a stage of training changes."""

    size: Count | None = Field(default=None, description="ranks along the pipeline")
    schedule: PipelineSchedule | None = Field(default=None, description="order of forward and backward work")
    stages_per_rank: Count | None = Field(default=None, description="stages on one rank")


class DataParallelOverride(Strict):
    """The parts of `data` that a stage of training changes."""

    replicate: Count | None = Field(default=None, description="copies of the sharded model")
    zero: Annotated[int, Field(ge=0, le=3)] | None = Field(default=None, description="ZeRO stage, 0 to 3")


class ParallelismOverride(Strict):
    """The parts of `parallelism` that a stage of training changes; the world stays the same."""

    pipeline: PipelineOverride | None = Field(default=None, description="pipeline parallelism")
    expert: Count | None = Field(default=None, description="ranks that share one set of experts")
    tensor: Count | None = Field(default=None, description="ranks that share one matrix")
    context: Count | None = Field(default=None, description="ranks that share one sequence")
    data: DataParallelOverride | None = Field(default=None, description="data parallelism")
    microbatch_size: Count | None = Field(default=None, description="sequences per forward pass of a rank")
    recompute: Annotated[tuple[Recompute, ...], AsTuple] | None = Field(
        default=None, description="what is computed again in the backward pass"
    )
    compile: Literal["layer", "none"] | None = Field(default=None, description="torch.compile each layer, or nothing")

    def applied_to(self, base: Parallelism) -> Parallelism:
        """The parallelism of the stage: `base` with the parts stated here."""

        def merge(under: Strict, over: Strict) -> dict[str, object]:
            stated = {name: getattr(over, name) for name in type(over).model_fields if getattr(over, name) is not None}
            return {
                name: getattr(under, name).model_copy(update=merge(getattr(under, name), value))
                if isinstance(value, Strict)
                else value
                for name, value in stated.items()
            }

        return base.model_copy(update=merge(base, self))
