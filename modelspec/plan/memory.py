"""Whether a training step fits a device: the heaviest rank, the verdict, and what would take memory off it.

The bytes of each rank are counted in plan/ranks.py; this is what follows from them for the one who pays.
"""

from dataclasses import dataclass, replace
from typing import Literal

from modelspec import layout
from modelspec.plan.levers import changes
from modelspec.plan.ranks import FRAGMENTS, IMBALANCE, Batch, RankMemory, libraries, rank_memory
from modelspec.plan.training import stages_of_training
from modelspec.schema import BatchConstant, BatchRamp, ModelSpec, Stage
from modelspec.schema.hardware import Hardware

Verdict = Literal["FITS", "TIGHT", "OOM"]
# A step that fills more of the device than this has no room for what a plan does not know of.
COMFORT = 0.9


@dataclass(frozen=True, slots=True)
class Lever:
    """A change that takes `saves` bytes off the heaviest rank, which then holds `total`.

    `set` are texts for --set. `flops` is by how much more a step computes, as a share; `cost` what else it costs.
    """

    set: tuple[str, ...]
    saves: int
    total: int
    verdict: Verdict
    flops: float
    cost: str


@dataclass(frozen=True, slots=True)
class StageMemory:
    """The heaviest rank in one stage of training; bytes."""

    name: str
    sequence_length: int
    total: int
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of a training step on every pipeline rank of a layout; bytes.

    `heaviest` is the rank with the largest total; the verdict is about it and `device_bytes`. Levers come by what they
    save, the largest first. `stages` are all stages of training where there are several.
    """

    sequence_length: int
    microbatch_size: int
    microbatches: int
    ranks: tuple[RankMemory, ...]
    heaviest: int
    device: str
    device_bytes: int
    verdict: Verdict
    levers: tuple[Lever, ...]
    stages: tuple[StageMemory, ...]
    assumptions: tuple[str, ...]


def memory(
    spec: ModelSpec, *, sequence_length: int, batch_size: int, hardware: Hardware, imbalance: float = IMBALANCE
) -> Memory:
    """Memory of a spec as it stands during one stage of training: see timeline.stage_spec. The spec is valid."""
    batch = Batch(sequence_length, batch_size, imbalance)
    ranks = rank_memory(spec, batch, hardware)
    heaviest = max(ranks, key=lambda rank: rank.total)
    return Memory(
        sequence_length=sequence_length,
        microbatch_size=layout.microbatch_size(spec.parallelism, batch_size),
        microbatches=max(layout.microbatches(spec.parallelism, batch_size), 1),
        ranks=ranks,
        heaviest=heaviest.rank,
        device=hardware.name,
        device_bytes=hardware.memory,
        verdict=verdict(heaviest.total, hardware.memory),
        levers=_levers(spec, batch, hardware, heaviest.total),
        stages=(),
        assumptions=tuple(assumptions(spec, hardware, imbalance)),
    )


def training_memory(
    spec: ModelSpec, hardware: Hardware, *, sequence_length: int | None = None, imbalance: float | None = None
) -> Memory:
    """Memory of the first stage of training at its largest batch, and the heaviest rank of every stage.

    Of a spec without training it is that of an assumed stage, at `sequence_length` if that is given.
    """
    each, busiest = list(stages_of_training(spec)), IMBALANCE if imbalance is None else imbalance
    (first, stage), *later = each
    assumed = spec.training is None
    length = sequence_length if assumed and sequence_length is not None else stage.sequence_length
    batch = largest_batch(stage)
    found = memory(first, sequence_length=length, batch_size=batch, hardware=hardware, imbalance=busiest)
    told = (f"The spec has no training: memory is of a step of {batch:,} x {length:,} tokens.",) if assumed else ()
    stages = tuple(stage_memory(there, stage, hardware, busiest) for there, stage in each) if later else ()
    return replace(found, stages=stages, assumptions=(*told, *found.assumptions))


def verdict(total: int, device_bytes: int) -> Verdict:
    """Whether so many bytes fit a device."""
    if total <= COMFORT * device_bytes:
        return "FITS"
    return "TIGHT" if total <= device_bytes else "OOM"


def largest_batch(stage: Stage) -> int:
    """The most sequences that a step of a stage has."""
    if isinstance(stage.batch_size, int):
        return stage.batch_size
    return max(_most(phase) for phase in stage.batch_size)


def assumptions(spec: ModelSpec, hardware: Hardware, imbalance: float) -> list[str]:
    """What the bytes rest on, in sentences."""
    parallelism, fp8 = spec.parallelism, spec.precision.fp8
    on_cpu = hardware.kind == "cpu"
    kernels = (
        "the kernels of a CPU"
        if on_cpu
        else "kernels that keep their inputs, attention its output and one number per row and head"
    )
    told = [
        "Memory: weights, gradients, master weights and moments are exact; activations are what autograd keeps with "
        f"{kernels}.",
        "A loss keeps the gradients of its input and of the head in place of logits, which exist for 512 rows at once.",
        f"The margin is {FRAGMENTS:.0%} of the rest for fragments in the allocator, and "
        f"{libraries(hardware) / 1e9:g} GB for {'Python' if on_cpu else 'communicators'} and libraries.",
    ]
    if fp8 is not None:
        kept = "in FP8 with their scales" if "wgrad" in fp8.gemms else f"in {spec.precision.compute}"
        told.append(
            f"FP8: inputs of products are kept {kept}; a weight has a copy in each orientation that a product reads, "
            "and one in another format only where the forward pass or the input's gradient is computed in that."
        )
    if parallelism.expert > 1:
        told.append(
            f"In its busiest microbatch a rank of experts has {imbalance:g} times the mean of rows; rows that others "
            "sent are kept, since they cannot be computed again."
        )
    if parallelism.tensor > 1:
        told.append(
            "Tensor ranks cut heads, widths, experts' tokens, embedding and head; norms, router and the projections to "
            "latents stand whole on each, and activations between are cut along the sequence."
        )
    if parallelism.context > 1:
        told.append("Context ranks divide each sequence; keys and values of the whole one pass by layer by layer.")
    if parallelism.pipeline.size > 1 and spec.model.mtp is not None:
        told.append("Multi-token prediction stands on the last stage and reads a copy of the embedding there.")
    return told


def _most(phase: BatchConstant | BatchRamp) -> int:
    return phase.value if isinstance(phase, BatchConstant) else max(phase.ramp)


def _levers(spec: ModelSpec, batch: Batch, hardware: Hardware, total: int) -> tuple[Lever, ...]:
    found = []
    for change in changes(spec, hardware, batch.sequence_length, batch.batch_size):
        after = max(rank.total for rank in rank_memory(change.spec, batch, hardware))
        # What saves less than a hundredth is not worth its cost.
        if after <= 0.99 * total:
            found.append(
                Lever(change.set, total - after, after, verdict(after, hardware.memory), change.flops, change.cost)
            )
    return tuple(sorted(found, key=lambda lever: -lever.saves))


def stage_memory(spec: ModelSpec, stage: Stage, hardware: Hardware, imbalance: float = IMBALANCE) -> StageMemory:
    """The heaviest rank of a spec as it stands during one stage, at that stage's largest batch."""
    batch = Batch(stage.sequence_length, largest_batch(stage), imbalance)
    total = max(rank.total for rank in rank_memory(spec, batch, hardware))
    return StageMemory(stage.name, stage.sequence_length, total, verdict(total, hardware.memory))
