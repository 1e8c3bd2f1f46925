"""What a step takes at least: a bound that costs microseconds where the simulation of a pipeline costs milliseconds.

A rank begins when the first microbatch has come down to it, and then has its own work to do for every microbatch. In
schedules whose backward passes are whole, it ends early enough for the last gradient to go back up from it. The slowest
rank by this count is a bound of every schedule; for equal stages under 1f1b it is the time itself.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from modelspec import layout as arithmetic
from modelspec.plan.ideal import Ideal, Layers, Passes, transfer_seconds
from modelspec.plan.layouts import Layout, applied
from modelspec.plan.schedules import refusal
from modelspec.plan.stages import rank_parameters, runs_of_stages
from modelspec.plan.step import Speed, once
from modelspec.plan.traffic import boundary_traffic
from modelspec.schema import LayerRun, ModelSpec
from modelspec.schema.hardware import Hardware
from modelspec.schema.parallelism import PipelineSchedule

# Less than this share of a bound is rounding.
_ROUNDING = 1e-9
# The last thing that a rank does is a whole backward pass of its first stage.
_WHOLE = ("gpipe", "1f1b", "interleaved_1f1b")


class Seconds(NamedTuple):
    """A microbatch on some layers: its forward pass, the halves of its backward pass, the exchange with experts in all
    of them.
    """

    forward: float = 0.0
    input: float = 0.0
    weight: float = 0.0
    exchange: float = 0.0

    @property
    def total(self) -> float:
        """All three passes."""
        return self.forward + self.input + self.weight

    def plus(self, other: "Seconds", times: int = 1) -> "Seconds":
        """These and so many times the others."""
        return Seconds(*(mine + times * its for mine, its in zip(self, other, strict=True)))


class _Parts(NamedTuple):
    """Layers by kind, and what the last stage has beside its own."""

    layers: tuple[Seconds, ...]
    end: Seconds


class Floors:
    """Bounds of the steps of many layouts of one spec, which is that of the stage of training that is meant."""

    def __init__(
        self, spec: ModelSpec, sequence_length: int, hardware: Hardware, speed: Speed, imbalance: float = 1.0
    ) -> None:
        self.spec, self.length, self.hardware = spec, sequence_length, hardware
        self.speed, self.imbalance = speed, imbalance
        (runs,) = runs_of_stages(spec.model, 1)
        self._kinds = tuple(dict.fromkeys(map(_alike, runs)))
        self._parts: dict[tuple[object, ...], _Parts] = {}
        self._stages: dict[int, tuple[tuple[tuple[int, int], ...], ...]] = {}
        self._parameters: dict[tuple[object, ...], tuple[float, float]] = {}

    def running(self, layout: Layout, batch_size: int) -> float:
        """Seconds of all microbatches of a step at least; ZeRO changes nothing here."""
        spec = applied(self.spec, layout)
        at = arithmetic.mesh(spec.parallelism)
        count = max(batch_size // (at.data * layout.microbatch_size), 1)
        stages = self._seconds(layout, spec, at.stages)
        if at.stages == 1:
            return count * stages[0].total * (1 - _ROUNDING)
        schedule = layout.schedule
        if schedule == "dualpipev" and refusal(schedule, at.pipeline, at.stages_per_rank, count):
            schedule = "zbv"
        sent = boundary_traffic(spec, self._tokens(layout), self.hardware.fast_domain)
        hop = sum((transfer_seconds(each, self.hardware) for each in sent), 0.0)
        return max(_ranks(schedule, at, count, stages, hop)) * (1 - _ROUNDING)

    def once(self, layout: Layout, batch_size: int) -> float:
        """Seconds of what a step does once, which is no bound but what they are; recomputation changes nothing here."""
        spec = applied(self.spec, layout)
        at = arithmetic.mesh(spec.parallelism)
        count = max(batch_size // (at.data * layout.microbatch_size), 1)
        folded = layout.schedule in ("zbv", "dualpipev")
        key = layout.tensor, layout.expert, at.pipeline, at.stages_per_rank, folded
        if key not in self._parameters:
            self._parameters[key] = max(rank_parameters(spec), key=sum)
        return self.speed.total(once(spec, self.hardware, self._parameters[key], count))

    def _tokens(self, layout: Layout) -> float:
        return layout.microbatch_size * self.length / layout.context

    def _seconds(self, layout: Layout, spec: ModelSpec, stages: int) -> list[Seconds]:
        """Each stage."""
        parts = self._parts_of(layout, spec)
        if stages not in self._stages:
            kinds = {kind: index for index, kind in enumerate(self._kinds)}
            self._stages[stages] = tuple(
                tuple((kinds[_alike(run)], run.repeat) for run in stage)
                for stage in runs_of_stages(self.spec.model, stages)
            )
        seen: dict[tuple[tuple[int, int], ...], Seconds] = {}
        for stage in self._stages[stages]:
            if stage not in seen:
                total = Seconds()
                for kind, times in stage:
                    total = total.plus(parts.layers[kind], times)
                seen[stage] = total
        found = [seen[stage] for stage in self._stages[stages]]
        found[-1] = found[-1].plus(parts.end)
        return found

    def _parts_of(self, layout: Layout, spec: ModelSpec) -> _Parts:
        key = layout.tensor, layout.expert, layout.context, layout.microbatch_size, layout.recompute
        if key not in self._parts:
            layers = Layers(spec, self._tokens(layout), self.length, self.hardware, self.imbalance)
            end, mtp = layers.head, spec.model.mtp
            if mtp is not None:
                block = layers.passes(spec.model.mtp_layer())
                end += (layers.mtp_projection + block + layers.head) * mtp.depth
            each = tuple(self._of(layers.passes(kind)) for kind in self._kinds)
            self._parts[key] = _Parts(each, self._of(end))
        return self._parts[key]

    def _of(self, passes: Passes) -> Seconds:
        total = self.speed.total
        return Seconds(total(passes.forward), total(passes.input), total(passes.weight), self._exchange(passes.all))

    def _exchange(self, ideal: Ideal) -> float:
        seconds = self.speed.seconds(ideal)
        return seconds["node"] + seconds["network"]


def _ranks(
    schedule: PipelineSchedule, at: arithmetic.Mesh, count: int, stages: Sequence[Seconds], hop: float
) -> Iterator[float]:
    """The bound that each rank gives."""
    down = list(accumulate((stage.forward + hop for stage in stages), initial=0.0))
    back = list(accumulate((stage.input + stage.weight + hop for stage in stages), initial=0.0))
    for rank, held in enumerate(arithmetic.stages_of(schedule, at.pipeline, at.stages_per_rank)):
        work = count * sum(stages[stage].total for stage in held)
        if schedule == "dualpipev":
            work -= _hidden(rank, at.pipeline, count, *(stages[stage] for stage in held))
        yield down[held[0]] + work + (back[held[0]] if schedule in _WHOLE else 0.0)


def _hidden(rank: int, ranks: int, count: int, near: Seconds, far: Seconds) -> float:
    """Seconds that a rank saves under dualpipev by its pairs: forward on one stage, backward on the other.

    In a pair the shorter of exchange and all else is hidden; a forward and a backward pass exchange as much.
    """
    below = ranks - 1 - rank
    turns = count - 2 * ranks + rank + 1
    exchange = (near.exchange + far.exchange) / 2
    first = near.forward + far.input + far.weight
    second = far.forward + near.input + near.weight
    # The last rank takes its first pair apart.
    saved = (turns - (below == 0)) * min(exchange, first - exchange)
    return saved + (turns + below) * min(exchange, second - exchange)


def _alike(run: LayerRun) -> LayerRun:
    return run.model_copy(update={"repeat": 1})
