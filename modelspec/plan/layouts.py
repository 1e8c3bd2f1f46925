"""The layouts that a search walks: every combination of a few degrees and policies, and the spec that each makes.

A layout is `parallelism` without what it is not about. Its first half, the shape, says which rank holds what and how
long a microbatch is, and decides whether the layout is legal; the second, the policy, what is sharded and what is
computed again. So a shape is checked once for all of its policies.
"""

from collections.abc import Mapping
from itertools import product
from math import prod
from typing import Any, NamedTuple

from modelspec.checks import ADVICE, CHECKS
from modelspec.checks.finding import Finding, divisors
from modelspec.checks.reads import reads
from modelspec.schema import MLA, ModelSpec, MoE, Parallelism
from modelspec.schema.hardware import Hardware
from modelspec.schema.parallelism import PipelineSchedule, Recompute

# Longer pipelines, shorter shares of a sequence and larger microbatches than these are not walked.
MAX_PIPELINE, MIN_TOKENS, MICROBATCHES = 64, 2048, (1, 2, 4, 8)
# More shapes than this take minutes.
MAX_SHAPES = 100_000
# Without gpipe: 1f1b takes as long with less memory.
SCHEDULES: tuple[tuple[PipelineSchedule, int | None], ...] = (
    ("1f1b", None),
    ("interleaved_1f1b", 2),
    ("interleaved_1f1b", 4),
    ("interleaved_1f1b", 8),
    ("interleaved_zero_bubble", 2),
    ("interleaved_zero_bubble", 4),
    ("zbv", None),
    ("dualpipev", None),
)


class Layout(NamedTuple):
    """One way to spread a spec over its devices; all but the last two are its shape.

    `stages_per_rank` is None where the schedule leaves no choice.
    """

    pipeline: int
    schedule: PipelineSchedule
    stages_per_rank: int | None
    tensor: int
    context: int
    expert: int
    microbatch_size: int
    zero: int = 0
    recompute: tuple[Recompute, ...] = ()

    def applied(self, base: Parallelism) -> Parallelism:
        """The parallelism of this layout; what no layout says stays as it is in `base`."""
        data = base.data.model_copy(update={"zero": self.zero})
        cut = {"size": self.pipeline, "schedule": self.schedule, "stages_per_rank": self.stages_per_rank}
        return base.model_copy(
            update={
                "pipeline": base.pipeline.model_copy(update=cut),
                "tensor": self.tensor,
                "context": self.context,
                "expert": self.expert,
                "microbatch_size": self.microbatch_size,
                "data": data,
                "recompute": self.recompute,
            }
        )


# Where each part of a layout is written below `parallelism`.
KEYS: Mapping[str, tuple[str, ...]] = {
    "pipeline": ("pipeline", "size"),
    "schedule": ("pipeline", "schedule"),
    "stages_per_rank": ("pipeline", "stages_per_rank"),
    "tensor": ("tensor",),
    "context": ("context",),
    "expert": ("expert",),
    "microbatch_size": ("microbatch_size",),
    "zero": ("data", "zero"),
    "recompute": ("recompute",),
}


def of(parallelism: Parallelism, microbatch_size: int) -> Layout:
    """The layout that a spec has."""
    pipeline = parallelism.pipeline
    return Layout(
        pipeline.size,
        pipeline.schedule,
        pipeline.stages_per_rank,
        parallelism.tensor,
        parallelism.context,
        parallelism.expert,
        microbatch_size,
        parallelism.data.zero,
        parallelism.recompute,
    )


class Space(NamedTuple):
    """Everything that is walked: `shapes` of so many ways each, with each of the policies."""

    shapes: tuple[Layout, ...]
    zero: tuple[int, ...]
    recompute: tuple[tuple[Recompute, ...], ...]

    def __len__(self) -> int:
        return len(self.shapes) * len(self.zero) * len(self.recompute)


def space(spec: ModelSpec, hardware: Hardware, sequence_length: int, fixed: Mapping[str, Any]) -> Space:
    """The layouts of a spec on its world of devices; a part of `Layout` in `fixed` has that value only.

    Raises ValueError for more than MAX_SHAPES shapes.
    """
    model, world = spec.model, spec.parallelism.world_size
    experts = [ffn.num_experts for ffn in model.ffn.values() if isinstance(ffn, MoE)]
    axes: dict[str, list[Any]] = {
        "pipeline": divisors(world, min(MAX_PIPELINE, model.num_layers)),
        "tensor": divisors(world, hardware.fast_domain),
        "context": divisors(world, max(sequence_length // MIN_TOKENS, 1)),
        "expert": divisors(world, max(experts, default=1)),
        "microbatch_size": list(MICROBATCHES),
        "zero": [0, 1, 2, 3],
        "recompute": _recompute(spec),
    }
    axes |= {part: [value] for part, value in fixed.items() if part in axes}
    shapes = (
        Layout(pipeline, schedule, each, *rest)
        for pipeline in axes["pipeline"]
        for schedule, each in _schedules(pipeline, fixed)
        for rest in product(axes["tensor"], axes["context"], axes["expert"], axes["microbatch_size"])
    )
    count = prod(map(len, axes.values())) // (len(axes["zero"]) * len(axes["recompute"])) * len(SCHEDULES)
    if count > MAX_SHAPES:
        raise ValueError(
            f"{world:,} devices can be divided in more than {MAX_SHAPES:,} ways: fix a degree, like "
            "--set parallelism.tensor=8"
        )
    return Space(tuple(shapes), tuple(axes["zero"]), tuple(axes["recompute"]))


def _schedules(pipeline: int, fixed: Mapping[str, Any]) -> list[tuple[PipelineSchedule, int | None]]:
    """Schedules with the stages on a rank. On one rank they are all the same."""
    names: list[PipelineSchedule] = [fixed["schedule"]] if "schedule" in fixed else list(dict(SCHEDULES))
    pairs: list[tuple[PipelineSchedule, int | None]] = []
    for name in names:
        usual = [each for known, each in SCHEDULES if known == name] or [None]
        for each in [fixed["stages_per_rank"]] if "stages_per_rank" in fixed else usual:
            pairs.append((name, each))
    return pairs if pipeline > 1 else pairs[:1]


def _recompute(spec: ModelSpec) -> list[tuple[Recompute, ...]]:
    """From nothing over what costs little to everything; each keeps less than the one before."""
    latent = any(isinstance(variant, MLA) for variant in spec.model.attention.values())
    little: list[tuple[Recompute, ...]] = [(), ("norm",), ("norm", "swiglu")]
    if latent:
        little.append(("norm", "mla_up_projection", "swiglu"))
    return [*little, ("layer",)]


def applied(spec: ModelSpec, layout: Layout) -> ModelSpec:
    """The spec with this layout; what no layout says stays as it is."""
    return spec.model_copy(update={"parallelism": layout.applied(spec.parallelism)})


class Legality:
    """The checks of `validate` that read a layout, asked about many layouts of one spec.

    A check that reads nothing of the layout before it decides says the same of all layouts, so it is left out; and one
    that only advises refuses none. ZeRO and recomputation are read by none.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        doors = {("ModelSpec", "parallelism"), ("Stage", "parallelism")}
        judging = CHECKS.keys() - ADVICE
        self.checks = [(code, CHECKS[code]) for code, read in reads(spec).items() if read & doors and code in judging]

    def fault(self, shape: Layout) -> tuple[str, Finding] | None:
        """The first error of a shape with the code of its check, None where it is legal."""
        there = applied(self.spec, shape)
        for code, check in self.checks:
            for finding in check(there):
                if finding.severity == "error":
                    return code, finding
        return None
