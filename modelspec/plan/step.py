"""The time of one optimizer step.

Every pipeline stage takes some time for a microbatch: ideal seconds of each kind of work, times the rates of device and
software. The schedule puts these times together, idle time included; gradients and weights are exchanged once after it,
and the optimizer runs over what a rank keeps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from modelspec.layout import mesh, microbatch_size, microbatches, stages_of
from modelspec.plan.ideal import Ideal, Passes, stage_passes, transfer_seconds
from modelspec.plan.pipeline import Durations, Pair, Total, step
from modelspec.plan.schedules import refusal
from modelspec.plan.stages import rank_parameters
from modelspec.plan.storage import ITEM_BYTES
from modelspec.plan.traffic import boundary_traffic, step_traffic
from modelspec.schema import ModelSpec
from modelspec.schema.calibration import Calibration, Rates
from modelspec.schema.hardware import Hardware
from modelspec.schema.parallelism import PipelineSchedule

# Kinds of work that a device does by itself: how far it stays behind its peaks differs from device to device.
COMPUTATION = (
    *("fp8_products", "products", "expert_rows", "attention"),
    *("residual", "heads", "experts", "quantize", "optimizer"),
)
# Kinds of work that only layers with experts have.
OF_EXPERTS = ("expert_rows", "experts", "moe_layer", "node", "network")


@dataclass(frozen=True, slots=True)
class Speed:
    """A software on a device: times longer than ideal."""

    rates: Rates
    stack: str
    slowdown: float
    experts: float
    device: float

    def seconds(self, ideal: Ideal) -> dict[str, float]:
        """Seconds by kind of work."""
        return {kind: seconds * self.factor(kind) for kind, seconds in ideal.seconds(self.rates).items()}

    def factor(self, kind: str) -> float:
        """Times longer than the reference rate of a kind says."""
        device = self.device if kind in COMPUTATION else 1.0
        return self.slowdown * device * (self.experts if kind in OF_EXPERTS else 1.0)

    def total(self, ideal: Ideal) -> float:
        """Seconds of all kinds together."""
        return sum(self.seconds(ideal).values())


def speed(calibration: Calibration, hardware: Hardware, stack: str | None = None) -> Speed:
    """The speed of a stack on a device; of the device's own where none is named, else of the one with the most rows.

    Raises ValueError for a stack that is not known.
    """
    stacks = calibration.stacks
    name = stack or hardware.stack or max(stacks, key=lambda each: stacks[each].rows)
    if name not in calibration.stacks:
        raise ValueError(f"no stack {name!r}; there are {', '.join(calibration.stacks)}")
    device = hardware.slowdown or calibration.devices.get(hardware.name, 1.0)
    found = calibration.stacks[name]
    return Speed(calibration.rates, name, found.slowdown, found.experts, device)


@dataclass(frozen=True, slots=True)
class StepTime:
    """One optimizer step of `batch_size` sequences: seconds in all, and where they go.

    `kinds` are the seconds of the busiest rank by kind of work. Some of its exchange is `hidden` under computation, and
    for the rest of the step it is `waiting` for other ranks: `seconds` is the sum of `kinds` less `hidden` plus
    `waiting`. `exposed` is the share of the step that exchange takes, and `bubble` the share of the pipeline's time in
    which ranks idle.
    """

    batch_size: int
    microbatches: int
    schedule: PipelineSchedule
    seconds: float
    bubble: float
    exposed: float
    hidden: float
    waiting: float
    kinds: Mapping[str, float]


class Pieces(NamedTuple):
    """What a microbatch takes in the pipeline: what `simulate` asks for beside the order, in seconds."""

    durations: tuple[Durations, ...]
    transfer: float
    pair: Pair


class Steps:
    """What the steps of one stage of training have in common, whatever their batch size."""

    def __init__(
        self, spec: ModelSpec, sequence_length: int, hardware: Hardware, speed: Speed, imbalance: float = 1.0
    ) -> None:
        self.spec, self.sequence_length, self.hardware = spec, sequence_length, hardware
        self.speed, self.imbalance = speed, imbalance
        self.axes = mesh(spec.parallelism)

    def step(self, batch_size: int) -> StepTime:
        """The time of a step with so many sequences."""
        axes, parallelism = self.axes, self.spec.parallelism
        count = max(microbatches(parallelism, batch_size), 1)
        schedule = self.schedule(count)
        stages = self._stages(microbatch_size(parallelism, batch_size))
        pair = self._pair(stages) if schedule == "dualpipev" else None
        running, once = self._running(schedule, count, stages, pair), self._once(count)
        held = stages_of(schedule, axes.pipeline, axes.stages_per_rank)
        work = [sum((stages[stage].all for stage in rank), Passes().all) * count for rank in held]
        busiest = max(range(len(held)), key=running.busy.__getitem__)
        hidden = max(self.speed.total(work[busiest]) - running.busy[busiest], 0.0)
        kinds = self.speed.seconds(work[busiest] + once)
        seconds = running.makespan + self.speed.total(once)
        exchange = sum(kinds[kind] for kind in ("node", "network", "tensor", "data"))
        return StepTime(
            batch_size=batch_size,
            microbatches=count,
            schedule=schedule,
            seconds=seconds,
            bubble=running.bubble,
            exposed=(exchange - hidden) / seconds,
            hidden=hidden,
            waiting=running.makespan - running.busy[busiest],
            kinds=kinds,
        )

    def pieces(self, batch_size: int) -> Pieces:
        """Seconds of every stage and of a transfer, and what an overlapped pair can hide."""
        microbatch = microbatch_size(self.spec.parallelism, batch_size)
        stages = self._stages(microbatch)
        pair = self._pair(stages) if self.spec.parallelism.pipeline.schedule == "dualpipev" else None
        return Pieces(self._durations(stages), self._transfer(self._tokens(microbatch)), pair)

    def _durations(self, stages: Sequence[Passes]) -> tuple[Durations, ...]:
        seconds = self.speed.total
        return tuple(Durations(seconds(each.forward), seconds(each.input), seconds(each.weight)) for each in stages)

    def _tokens(self, microbatch: int) -> float:
        """Tokens that a device has of a microbatch."""
        return microbatch * self.sequence_length / self.axes.context

    def _stages(self, microbatch: int) -> tuple[Passes, ...]:
        return stage_passes(self.spec, self._tokens(microbatch), self.sequence_length, self.hardware, self.imbalance)

    def _running(self, schedule: PipelineSchedule, count: int, stages: Sequence[Passes], pair: Pair) -> Total:
        """Seconds of all microbatches, and those in which each rank works."""
        ranks, each = self.axes.pipeline, self.axes.stages_per_rank
        if self.axes.stages == 1:
            seconds = count * self.speed.total(stages[0].all)
            return Total(seconds, (seconds,))
        microbatch = microbatch_size(self.spec.parallelism, count * self.axes.data)
        transfer, durations = self._transfer(self._tokens(microbatch)), self._durations(stages)
        # Interleaved stages take turns in equal rounds; where a growing batch has no such count, the next lower one
        # gives the time of a microbatch.
        legal = next(less for less in range(count, 0, -1) if refusal(schedule, ranks, each, less) is None)
        whole = step(schedule, ranks, each, legal, durations, transfer, pair)
        return Total(whole.makespan * count / legal, tuple(busy * count / legal for busy in whole.busy))

    def schedule(self, count: int) -> PipelineSchedule:
        """The spec's schedule; zbv where a batch has too few microbatches for it."""
        pipeline, axes = self.spec.parallelism.pipeline, self.axes
        if pipeline.schedule == "dualpipev" and refusal("dualpipev", axes.pipeline, axes.stages_per_rank, count):
            return "zbv"
        return pipeline.schedule

    def _pair(self, stages: Sequence[Passes]) -> Pair:
        """The exchange with experts in each stage, which overlapping passes do under each other's computation."""
        seconds = self._exchange
        found = tuple(Durations(seconds(each.forward), seconds(each.input), seconds(each.weight)) for each in stages)
        return found if any(map(any, found)) else None

    def _exchange(self, ideal: Ideal) -> float:
        seconds = self.speed.seconds(ideal)
        return seconds["node"] + seconds["network"]

    def _transfer(self, tokens: float) -> float:
        """Seconds from stage to stage."""
        sent = boundary_traffic(self.spec, tokens, self.hardware.fast_domain)
        return sum((transfer_seconds(each, self.hardware) for each in sent), 0.0)

    def _once(self, count: int) -> Ideal:
        return once(self.spec, self.hardware, max(rank_parameters(self.spec), key=sum), count)


def once(spec: ModelSpec, hardware: Hardware, parameters: tuple[float, float], count: int) -> Ideal:
    """Exchange and update after `count` microbatches, of a rank with so many parameters: all but experts, experts."""
    dense, experts = parameters
    sent = step_traffic(spec, dense, experts, count, hardware.fast_domain)
    zero, precision, axes = spec.parallelism.data.zero, spec.precision, mesh(spec.parallelism)
    kept = sum(
        each / (ranks if zero else 1)
        for each, ranks in ((dense, axes.data * axes.context), (experts, axes.expert_data))
    )
    # Read and written: master weights and two moments; read: gradients; written: the copy for computing.
    touched = 2 * ITEM_BYTES[precision.master_weights] + 4 * ITEM_BYTES[precision.optimizer_states]
    touched += ITEM_BYTES[precision.gradients] + ITEM_BYTES[precision.compute]
    return Ideal(
        data=sum((transfer_seconds(each, hardware) for each in sent), 0.0),
        optimizer=kept * touched / hardware.memory_bandwidth,
    )
