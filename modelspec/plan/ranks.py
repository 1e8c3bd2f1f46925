"""Memory of every rank of a pipeline at the peak of a training step.

A rank holds the state of its parameters all the time (plan/state.py), and of every microbatch whose backward pass is
still to come what that will read (plan/activations.py); the schedule says how many those are. Beside them pass by the
losses' buffers, the exchange of rows between experts' ranks, and what one backward pass works on.

State is exact. Activations are those that autograd keeps in this package's own code, or would with kernels of a GPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

from modelspec import layout
from modelspec.plan import activations, state
from modelspec.plan.kept import Form
from modelspec.plan.schedules import held_together, refusal
from modelspec.plan.stages import runs_of_stages
from modelspec.plan.storage import ITEM_BYTES
from modelspec.schema import LayerRun, ModelSpec, MoE
from modelspec.schema.hardware import Hardware
from modelspec.schema.parallelism import PipelineSchedule

# The busiest expert rank over the mean, in a layer and a microbatch.
IMBALANCE = 1.1
# What the caching allocator loses to fragments and rounding, of everything it holds; and what communicators and
# libraries take for themselves on a device, in bytes.
FRAGMENTS, LIBRARIES = 0.05, 10**9
# Without a GPU the process counts as a whole: Python, torch and its libraries had 0.45 GB after a step of a tiny model.
PROCESS = 450 * 10**6


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes of one pipeline rank at the peak of a step; `total` is their sum.

    `stages` are those that it holds, `stage` the first of them; `in_flight` how many microbatches each of them holds at
    the peak; `counters`, a part of `optimizer`, tell how often each tensor was updated; `activations_by_part` splits
    `activations`. `logits` are the gradients that the losses keep in place of logits. `working` is the larger of what a
    loss works with, logits of a chunk, and what a backward pass does: gradients of activations, what is computed again,
    weights gathered under ZeRO 3, the largest gradient before it is added up.
    """

    stage: int
    rank: int
    stages: tuple[int, ...]
    layers: int
    parameters: int
    in_flight: tuple[int, ...]
    weights: int
    fp8_copies: int
    gradients: int
    master: int
    optimizer: int
    counters: int
    activations: int
    logits: int
    expert_buffers: int
    working: int
    margin: int
    total: int
    activations_by_part: dict[str, int]


class Batch(NamedTuple):
    """What a step computes: `batch_size` sequences of `sequence_length` tokens over all ranks."""

    sequence_length: int
    batch_size: int
    imbalance: float = IMBALANCE


def rank_memory(spec: ModelSpec, batch: Batch, hardware: Hardware | None = None) -> tuple[RankMemory, ...]:
    """One row for every pipeline rank; all ranks beside it in the mesh hold as much.

    The spec is valid and is that of one stage of training. Without hardware the kernels are those of the CPU.
    """
    return tuple(_Plan(spec, batch, hardware).ranks())


def libraries(hardware: Hardware | None) -> int:
    """What a rank's memory holds that is not the model's; nothing without hardware."""
    if hardware is None:
        return 0
    return PROCESS if hardware.kind == "cpu" else LIBRARIES


class _Stage(NamedTuple):
    """One pipeline stage: its layers, and whether embedding or head stand on it."""

    runs: tuple[LayerRun, ...]
    first: bool
    last: bool


class _Plan:
    """The ranks of one layout; stages that are alike are counted once."""

    def __init__(self, spec: ModelSpec, batch: Batch, hardware: Hardware | None) -> None:
        self.spec, self.hardware = spec, hardware
        self.mesh = layout.mesh(spec.parallelism)
        self.microbatches = max(layout.microbatches(spec.parallelism, batch.batch_size), 1)
        self.form = Form(
            spec,
            layout.microbatch_size(spec.parallelism, batch.batch_size),
            -(-batch.sequence_length // spec.parallelism.context),
            "cpu" if hardware is None or hardware.kind == "cpu" else "device",
            batch.imbalance,
        )
        each = runs_of_stages(spec.model, self.mesh.stages)
        self.stages = [_Stage(runs, i == 0, i == len(each) - 1) for i, runs in enumerate(each)]
        self.kept: dict[_Stage, dict[str, int]] = {}
        self.passing: dict[LayerRun, int] = {}

    def ranks(self) -> Iterator[RankMemory]:
        pipeline = self.spec.parallelism.pipeline
        size, each = self.mesh.pipeline, self.mesh.stages_per_rank
        holders = layout.stages_of(pipeline.schedule, size, each)
        together = most_held(pipeline.schedule, size, each, self.microbatches)
        seen: dict[tuple[tuple[_Stage, ...], tuple[tuple[int, ...], ...]], RankMemory] = {}
        for rank, (stages, held) in enumerate(zip(holders, together, strict=True)):
            key = (tuple(self.stages[stage] for stage in stages), held)
            if key not in seen:
                seen[key] = self._rank(rank, stages, held)
            twin = seen[key]
            yield RankMemory(
                stages[0],
                rank,
                stages,
                *(getattr(twin, name) for name in RankMemory.__slots__ if name not in ("stage", "rank", "stages")),
            )

    def _rank(self, rank: int, stages: tuple[int, ...], held: tuple[tuple[int, ...], ...]) -> RankMemory:
        here = [self.stages[stage] for stage in stages]
        kept = [self._kept(stage) for stage in here]
        sizes = [sum(parts.values()) for parts in kept]
        peak = max(held, key=lambda counts: sum(c * size for c, size in zip(counts, sizes, strict=True)))
        parts: dict[str, int] = {}
        for count, found in zip(peak, kept, strict=True):
            for part, size in found.items():
                parts[part] = parts.get(part, 0) + count * size
        logits = parts.pop("loss", 0)
        tensors = list(self._tensors(here))
        total = state.state(self.spec, tensors)
        bytes_of = {
            "weights": total.weights,
            "fp8_copies": total.fp8_copies,
            "gradients": total.gradients,
            "master": total.master,
            "optimizer": total.optimizer,
            "activations": sum(parts.values()),
            "logits": logits,
            "expert_buffers": max(
                (exchange_bytes(self.form, run) for stage in here for run in self._runs(stage)), default=0
            ),
            "working": self._working(here, tensors),
        }
        used = sum(bytes_of.values())
        margin = round(used * FRAGMENTS) + libraries(self.hardware)
        return RankMemory(
            stage=stages[0],
            rank=rank,
            stages=stages,
            layers=sum(run.repeat for stage in here for run in stage.runs),
            parameters=total.parameters,
            in_flight=peak,
            **bytes_of,
            counters=total.counters,
            margin=margin,
            total=used + margin,
            activations_by_part=parts,
        )

    def _kept(self, stage: _Stage) -> dict[str, int]:
        if stage not in self.kept:
            self.kept[stage] = activations.stage_kept(self.form, stage.runs, first=stage.first, last=stage.last)
        return self.kept[stage]

    def _runs(self, stage: _Stage) -> Iterator[LayerRun]:
        """Its runs, and the block of multi-token prediction where that is."""
        yield from stage.runs
        if stage.last and self.spec.model.mtp is not None:
            yield self.spec.model.mtp_layer()

    def _tensors(self, here: list[_Stage]) -> Iterator[state.Held]:
        """What the stages of a rank hold: an embedding that several parts of it read stands there once."""
        first, last = (any(getattr(stage, end) for stage in here) for end in ("first", "last"))
        runs = chain.from_iterable(stage.runs for stage in here)
        yield from state.rank_held(self.spec, runs, first=first, last=last)

    def _working(self, here: list[_Stage], tensors: list[state.Held]) -> int:
        runs = [run for stage in here for run in self._runs(stage)]
        passing = max((self._passing(run) for run in runs), default=0)
        units = [state.layer_held(self.spec, run.model_copy(update={"repeat": 1})) for run in runs for _ in range(2)]
        largest = max((each.elements for each in tensors), default=0) if self.microbatches > 1 else 0
        fresh = largest * ITEM_BYTES[self.spec.precision.gradients]
        backward = passing + state.gathered(self.spec, units) + fresh
        return max(backward, activations.loss_buffers(self.form) if any(stage.last for stage in here) else 0)

    def _passing(self, run: LayerRun) -> int:
        """What the backward pass of one layer works on: what it computes again, gradients, gathered keys and values."""
        alike = run.model_copy(update={"repeat": 1})
        if alike not in self.passing:
            again = activations.again_bytes(self.form, run) + activations.gathered_keys(self.form, run)
            self.passing[alike] = again + activations.backward_bytes(self.form, run)
        return self.passing[alike]


def exchange_bytes(form: Form, run: LayerRun) -> int:
    """Rows sent and received at once between the ranks of experts; of two microbatches where these overlap."""
    ffn, parallelism = form.spec.model.ffn[run.ffn], form.spec.parallelism
    if not isinstance(ffn, MoE) or parallelism.expert == 1:
        return 0
    rows = form.tokens * ffn.num_experts_per_tok + form.expert_rows(ffn)
    both = 2 if parallelism.pipeline.schedule == "dualpipev" and parallelism.pipeline.size > 1 else 1
    return -(-both * rows * form.spec.model.hidden_size * form.item // parallelism.tensor)


@lru_cache(maxsize=64)
def most_held(
    schedule: PipelineSchedule, ranks: int, stages_per_rank: int, microbatches: int
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """As plan/schedules.py has it, which walks through the schedule; that of 1f1b is known without.

    Where a batch is too small for dualpipev, zbv stands in for it.
    """
    if schedule == "dualpipev" and refusal(schedule, ranks, stages_per_rank, microbatches):
        schedule = "zbv"
    if schedule == "1f1b":
        return tuple(((min(ranks - rank, microbatches),),) for rank in range(ranks))
    return held_together(schedule, ranks, stages_per_rank, microbatches)
