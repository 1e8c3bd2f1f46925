"""A walk over the layouts of a spec, each judged in the order of what a judgement costs.

Checks throw out what is illegal. The memory of the rest is counted to the byte (plan/footprint.py), and what is more
than the device has falls out. Then each gets a bound of its time (plan/floors.py), and only where the bound is better
than all that is known at no more memory its pipeline is simulated. A layout that is passed over so is dominated for
certain: the front is that of the whole space.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic import ValidationError

from modelspec.checks.finding import Finding
from modelspec.plan.floors import Floors
from modelspec.plan.footprint import Footprints
from modelspec.plan.layouts import Layout, Legality, applied, space
from modelspec.plan.memory import largest_batch
from modelspec.plan.ranks import IMBALANCE
from modelspec.plan.step import Speed, Steps, StepTime
from modelspec.plan.training import stages_of_training
from modelspec.schema import ModelSpec
from modelspec.schema.hardware import Hardware
from modelspec.timeline import steps_by_batch_size

# A layout that is legal whatever the spec has.
_NOWHERE = Layout(1, "1f1b", None, 1, 1, 1, 1)


class Sized(NamedTuple):
    """A layout and what its heaviest rank needs; bytes."""

    bytes: int
    layout: Layout


class Illegal(NamedTuple):
    """How many layouts a check refuses, and what it says of the first."""

    code: str
    finding: Finding
    layouts: int
    example: Layout


@dataclass(frozen=True, slots=True)
class Judged:
    """All layouts: refused, too big, and the front of those that fit, by time. `smallest` is of all that are legal.

    `bounds` are seconds of a token, at least where no pipeline was simulated, and bytes of what fits, without layouts
    that another ZeRO stage beats.
    """

    examined: int
    illegal: tuple[Illegal, ...]
    too_big: int
    smallest_too_big: Sized | None
    smallest: Sized | None
    fitting: int
    simulated: int
    front: tuple[Sized, ...]
    bounds: tuple[tuple[float, int], ...]


class _Waiting(NamedTuple):
    """A layout that fits and whose time is not known: seconds of a token at least, bytes, its turn."""

    floor: float
    bytes: int
    turn: int
    layout: Layout


class Walk:
    """The layouts of one spec on its world of devices, in the first stage of training.

    The spec's own layout may be illegal. Parts of `Layout` in `fixed` keep their value. `imbalance` is the load of the
    busiest expert rank over the mean, `tokens` replaces the length of the stage.
    """

    def __init__(
        self,
        spec: ModelSpec,
        hardware: Hardware,
        speed: Speed,
        *,
        fixed: Mapping[str, Any] | None = None,
        tokens: int | None = None,
        imbalance: float | None = None,
    ) -> None:
        self.spec, self.hardware, self.speed = spec, hardware, speed
        self.fixed: Mapping[str, Any] = {} if fixed is None else fixed
        self.first, self.stage = next(stages_of_training(applied(spec, _NOWHERE), tokens))
        self.length = self.stage.sequence_length
        self.space = space(spec, hardware, self.length, self.fixed)
        self.legality = Legality(spec)
        self._imbalance = 1.0 if imbalance is None else imbalance
        self._footprints = Footprints(self.first, self.length, hardware, IMBALANCE if imbalance is None else imbalance)
        self._floors = Floors(self.first, self.length, hardware, speed, self._imbalance)
        # Seconds of the pipeline, which all ZeRO stages share.
        self._running: dict[Layout, float] = {}
        self._assumed: dict[Layout, int] = {}
        runs = steps_by_batch_size(self.stage)
        self._most = max(runs, key=lambda run: run[0] * run[1])[0]

    def judged(self) -> Judged:
        """Every layout of the space."""
        illegal: dict[str, Illegal] = {}
        waiting: list[_Waiting] = []
        smallest: Sized | None = None
        smallest_too_big: Sized | None = None
        policies = [(zero, items) for zero in self.space.zero for items in self.space.recompute]
        too_big = fitting = 0
        for shape in self.space.shapes:
            fault = self._fault(shape)
            if fault is not None:
                code, finding = fault
                known = illegal.get(code, Illegal(code, finding, 0, shape))
                illegal[code] = known._replace(layouts=known.layouts + len(policies))
                continue
            rows = self._footprints.heaviest(shape, self.largest(shape), self.space.zero, self.space.recompute)
            fits = []
            for (zero, items), size in zip(policies, (size for row in rows for size in row), strict=True):
                layout = shape._replace(zero=zero, recompute=items)
                if smallest is None or size < smallest.bytes:
                    smallest = Sized(size, layout)
                if size <= self.hardware.memory:
                    fits.append(Sized(size, layout))
                    continue
                too_big += 1
                if smallest_too_big is None or size < smallest_too_big.bytes:
                    smallest_too_big = Sized(size, layout)
            fitting += len(fits)
            waiting += self._bounded(shape, fits, len(waiting))
        front = self._front(waiting)
        return Judged(
            len(self.space),
            tuple(illegal.values()),
            too_big,
            smallest_too_big,
            smallest,
            fitting,
            len(self._running),
            front,
            tuple((self._known(each), each.bytes) for each in waiting),
        )

    def smallest(self) -> int | None:
        """What the layout needs that needs least memory, None where no layout is legal; bytes."""
        legal = (shape for shape in self.space.shapes if self._fault(shape) is None)
        zero, recompute = self.space.zero, self.space.recompute
        rows = (self._footprints.heaviest(shape, self.largest(shape), zero, recompute) for shape in legal)
        return min((size for row in rows for sizes in row for size in sizes), default=None)

    def size(self, layout: Layout) -> int:
        """Bytes of the heaviest rank of a legal layout."""
        ((size,),) = self._footprints.heaviest(layout, self.largest(layout), (layout.zero,), (layout.recompute,))
        return size

    def step(self, layout: Layout) -> StepTime:
        """A step of a legal layout, at the batch size that most of the stage's tokens have."""
        there = applied(self.first, layout)
        return Steps(there, self.length, self.hardware, self.speed, self._imbalance).step(self.usual(layout))

    def usual(self, layout: Layout) -> int:
        """The batch size that most of the stage's tokens have; sequences."""
        return self._most if self.spec.training is not None else self._assumed_batch(layout)

    def largest(self, layout: Layout) -> int:
        """The largest batch size of the stage; sequences."""
        return largest_batch(self.stage) if self.spec.training is not None else self._assumed_batch(layout)

    def _fault(self, shape: Layout) -> tuple[str, Finding] | None:
        """What makes a shape illegal; without training also a batch that is larger than a spec may say."""
        fault = self.legality.fault(shape)
        if fault is not None or self.spec.training is not None:
            return fault
        try:
            self._assumed_batch(shape)
        except ValidationError:
            message = "without training.stages, a step would have more sequences than a spec may say"
            return "MS202", Finding(("training",), message, "write training.stages")
        return None

    def _assumed_batch(self, layout: Layout) -> int:
        """Without training a batch is what suits the layout."""
        key = layout._replace(expert=1, zero=0, recompute=())
        if key not in self._assumed:
            _, stage = next(stages_of_training(applied(self.spec, key)))
            self._assumed[key] = largest_batch(stage)
        return self._assumed[key]

    def _bounded(self, shape: Layout, fits: list[Sized], turn: int) -> list[_Waiting]:
        """The layouts of one shape with a bound of their time, without those that another one is sure to beat."""
        batch = self.usual(shape)
        tokens = batch * self.length
        running = {items: 0.0 for items in dict.fromkeys(each.layout.recompute for each in fits)}
        for items in running:
            running[items] = self._floors.running(shape._replace(recompute=items), batch)
        once = {zero: 0.0 for zero in dict.fromkeys(each.layout.zero for each in fits)}
        for zero in once:
            once[zero] = self._floors.once(shape._replace(zero=zero), batch)
        found: list[_Waiting] = []
        for items, pipeline in running.items():
            # The pipeline takes the same under every ZeRO stage, so that these compare without knowing it.
            alike = sorted(
                (once[each.layout.zero], each.bytes, each.layout) for each in fits if each.layout.recompute == items
            )
            least: int | None = None
            for seconds, size, layout in alike:
                if least is None or size < least:
                    least = size
                    found.append(_Waiting((pipeline + seconds) / tokens, size, turn + len(found), layout))
        return found

    def _front(self, waiting: Iterable[_Waiting]) -> tuple[Sized, ...]:
        """The layouts that no other one beats in time and memory, the fastest first."""
        # By bytes; what needs more takes less time.
        sizes: list[int] = []
        paces: list[float] = []
        layouts: list[Layout] = []
        for floor, size, _, layout in sorted(waiting):
            at = bisect_right(sizes, size)
            if at and paces[at - 1] <= floor:
                continue
            pace = self._seconds(layout) / (self.usual(layout) * self.length)
            if at and paces[at - 1] <= pace:
                continue
            # Those that this one beats stand behind it, or need exactly as much.
            start = at - 1 if at and sizes[at - 1] == size else at
            end = next((index for index in range(start, len(paces)) if paces[index] < pace), len(paces))
            sizes[start:end], paces[start:end], layouts[start:end] = [size], [pace], [layout]
        return tuple(Sized(*each) for each in zip(reversed(sizes), reversed(layouts), strict=True))

    def _known(self, each: _Waiting) -> float:
        """Seconds of a token: what they are where that is known, else what they are at least."""
        layout = each.layout
        if layout._replace(zero=0) not in self._running:
            return each.floor
        return self._seconds(layout) / (self.usual(layout) * self.length)

    def _seconds(self, layout: Layout) -> float:
        """A step, simulated once for all ZeRO stages."""
        batch = self.usual(layout)
        once, key = self._floors.once(layout, batch), layout._replace(zero=0)
        if key not in self._running:
            self._running[key] = self.step(layout).seconds - once
        return self._running[key] + once
