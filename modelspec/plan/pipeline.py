"""The time that a pipeline takes, by going through the schedule event by event.

An action begins when its rank is free and what it needs has come: a forward pass needs that of the stage before, a
backward pass that of the stage after, and between two ranks a transfer lies in between, during which both go on with
other work. A full backward pass hands its gradient on when it ends. Nothing else is modelled: durations are the
caller's. With integer durations every number is exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from modelspec.plan.schedules import Action, Order, held_together, in_flight, order, refusal, shortened
from modelspec.schema.parallelism import PipelineSchedule

__all__ = [
    "Action",
    "Durations",
    "Order",
    "Simulation",
    "Span",
    "Total",
    "held_together",
    "in_flight",
    "order",
    "refusal",
    "simulate",
    "step",
    "step_time",
]


class Durations(NamedTuple):
    """Time of the three pieces of one stage's work on a microbatch; a full backward pass is input + weight."""

    forward: float
    input: float
    weight: float


class Span(NamedTuple):
    """When an action ran. The two of an overlapped pair have the same span."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Total:
    """How long a step takes, and how long each rank works in it."""

    makespan: float
    busy: tuple[float, ...]

    @property
    def idle(self) -> tuple[float, ...]:
        """Per rank the time in which it does not work."""
        return tuple(self.makespan - busy for busy in self.busy)

    @property
    def bubble(self) -> float:
        """The share of all ranks' time in which they idle, 0 to 1."""
        return sum(self.idle) / (len(self.busy) * self.makespan)


@dataclass(frozen=True, slots=True)
class Simulation(Total):
    """An order in time, from 0: also when each action of each rank begins and ends."""

    order: Order
    begins: tuple[tuple[float, ...], ...]
    ends: tuple[tuple[float, ...], ...]

    @property
    def spans(self) -> tuple[tuple[Span, ...], ...]:
        """Per rank its actions with their times, in order."""
        return tuple(tuple(map(Span, *rank)) for rank in zip(self.order, self.begins, self.ends, strict=True))


# What overlap gives to a pair of passes: a share of their time that is left, or of each stage's pieces the part that is
# exchange, or None.
Pair = float | tuple[Durations, ...] | None


def simulate(order: Order, durations: Sequence[Durations], transfer: float = 0, pair: Pair = 1) -> Simulation:
    """The order in time, with one `Durations` per stage and `transfer` between ranks.

    The two of an overlapped pair begin together, when both have what they need. With a number they take so many times
    as long as one after the other: 1 is no gain. With the exchange of each stage they take the longer of theirs and of
    all else. None takes the pair apart: each begins when it can.
    Raises ValueError for an order in which ranks wait for each other for ever.
    """
    rank_of = {action.stage: rank for rank, actions in enumerate(order) for action in actions}
    if sorted(rank_of) != list(range(len(durations))):
        raise ValueError(f"durations of {len(durations)} stages for an order over the stages {sorted(rank_of)}")
    last = len(durations) - 1
    hop = [transfer if rank_of[stage] != rank_of[stage + 1] else 0 for stage in range(last)]
    took = _by_kind(durations)
    sent = _by_kind(pair) if isinstance(pair, tuple) else None
    # When a stage has what it needs, by microbatch: activations, a gradient of its output, its own `input` done.
    activations: list[dict[int, float]] = [{} for _ in durations]
    gradients: list[dict[int, float]] = [{} for _ in durations]
    inputs: list[dict[int, float]] = [{} for _ in durations]
    ready = {"forward": activations, "backward": gradients, "input": gradients, "weight": inputs}
    activations[0] = {action.microbatch: 0 for actions in order for action in actions}

    def deliver(action: Action, end: float) -> None:
        kind, stage, microbatch, _ = action
        if kind == "forward":
            if stage == last:
                gradients[stage][microbatch] = end
            else:
                activations[stage + 1][microbatch] = end + hop[stage]
        elif kind != "weight":
            if stage:
                gradients[stage - 1][microbatch] = end + hop[stage - 1]
            inputs[stage][microbatch] = end

    begins: list[list[float]] = [[] for _ in order]
    ends: list[list[float]] = [[] for _ in order]
    busy: list[float] = [0] * len(order)

    def run(rank: int) -> bool:
        """Takes a rank as far as it gets; whether it moved."""
        actions, begun, done = order[rank], begins[rank], ends[rank]
        before, now = len(done), done[-1] if done else 0
        while len(done) < len(actions):
            action = actions[len(done)]
            unit = actions[len(done) : len(done) + 2] if action.overlaps_next and pair is not None else (action,)
            length: float = 0
            for kind, stage, microbatch, _ in unit:
                at = ready[kind][stage].get(microbatch)
                if at is None:
                    return len(done) > before
                now, length = max(now, at), length + took[kind][stage]
            if len(unit) == 2 and isinstance(pair, int | float):
                length *= pair
            elif len(unit) == 2 and sent is not None:
                exchange = sum(sent[kind][stage] for kind, stage, _, _ in unit)
                length = max(exchange, length - exchange)
            busy[rank] += length
            for each in unit:
                begun.append(now)
                done.append(now + length)
                deliver(each, now + length)
            now += length
        return len(done) > before

    # Every rank in turn, until none moves: the order of turns changes nothing.
    while any([run(rank) for rank in range(len(order))]):
        pass
    stuck = [(rank, order[rank][len(done)]) for rank, done in enumerate(ends) if len(done) < len(order[rank])]
    if stuck:
        waiting = ", ".join(
            f"rank {rank} for {action.kind} of stage {action.stage} microbatch {action.microbatch}"
            for rank, action in stuck
        )
        raise ValueError(f"the order cannot go on; what is next and never possible: {waiting}")
    makespan = max(done[-1] for done in ends)
    return Simulation(makespan, tuple(busy), order, tuple(map(tuple, begins)), tuple(map(tuple, ends)))


def _by_kind(durations: Sequence[Durations]) -> dict[str, list[float]]:
    """The time of each stage's actions."""
    return {
        "forward": [each.forward for each in durations],
        "backward": [each.input + each.weight for each in durations],
        "input": [each.input for each in durations],
        "weight": [each.weight for each in durations],
    }


def step(
    schedule: PipelineSchedule,
    ranks: int,
    stages_per_rank: int,
    microbatches: int,
    durations: Sequence[Durations],
    transfer: float = 0,
    pair: Pair = 1,
) -> Total:
    """The times of a schedule, at a cost that does not grow with the microbatches.

    More than about six rounds (six microbatches for each rank) are not simulated. For the rest, a microbatch takes what
    it takes between three rounds and six, and at least the work of the busiest rank. From two rounds on the makespan of
    equal stages without transfers is affine in the microbatches, so that this is exact. Else waiting may go on to grow
    or shrink for longer; the result is then right to 1%.
    Raises ValueError as `order` and `simulate` do.
    """

    def simulated(count: int) -> Simulation:
        return simulate(order(schedule, ranks, stages_per_rank, count), durations, transfer, pair)

    reason = refusal(schedule, ranks, stages_per_rank, microbatches)
    if reason is not None:
        raise ValueError(reason)
    counts = [shortened(schedule, ranks, microbatches, rounds) for rounds in (3, 6)]
    more = simulated(counts[1])
    if counts[1] == microbatches:
        return more
    few, times = simulated(counts[0]), (microbatches - counts[1]) / (counts[1] - counts[0])
    work = [after - before for after, before in zip(more.busy, few.busy, strict=True)]
    return Total(
        more.makespan + times * max(more.makespan - few.makespan, *work),
        tuple(busy + times * each for busy, each in zip(more.busy, work, strict=True)),
    )


def step_time(
    schedule: PipelineSchedule,
    ranks: int,
    stages_per_rank: int,
    microbatches: int,
    durations: Sequence[Durations],
    transfer: float = 0,
    pair: Pair = 1,
) -> float:
    """The makespan of `step`."""
    return step(schedule, ranks, stages_per_rank, microbatches, durations, transfer, pair).makespan
