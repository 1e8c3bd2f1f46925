"""What each rank of a pipeline does, in which order: the schedules.

A batch is cut into microbatches and the model into stages. A microbatch goes forward through all stages and its
gradient back through all of them; a schedule says for each rank which of these pieces of work follows which. A backward
pass has two halves: `input` makes the gradient that the stage before waits for, `weight` the gradient of the weights,
for which nobody waits. The older schedules do both at once (`backward`); zero-bubble schedules put `weight` off to
where a rank would idle.

gpipe                    all forward, then all backward (arXiv 1811.06965)
1f1b                     as many forward as it takes for the first gradient to come back, then one forward for each
                         backward: PipeDream-flush (arXiv 2006.09503)
interleaved_1f1b         the same over several stages of a rank, in rounds of microbatches (arXiv 2104.04473)
interleaved_zero_bubble  the same with half of the warm-up and `weight` late: ZB1P (arXiv 2401.10241)
zbv                      two stages of a rank, laid out as a V: no bubble in the middle (arXiv 2401.10241, section 6)
dualpipev                the V fed so that forward and backward of different microbatches overlap: one half of
                         DualPipe (arXiv 2412.19437), as DeepSeek published it later

Within a rank, the microbatches of a stage pass in order in every schedule. So a schedule is written as a sequence of
kinds and local stages, and counting gives the microbatches.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple, assert_never

from modelspec.layout import stages_of
from modelspec.schema.parallelism import PipelineSchedule

Kind = Literal["forward", "backward", "input", "weight"]


class Action(NamedTuple):
    """One piece of work of a rank: on which stage (of all, from 0), for which microbatch.

    `overlaps_next`: this forward pass and the backward pass that follows it are interleaved in time (dualpipev).
    """

    kind: Kind
    stage: int
    microbatch: int
    overlaps_next: bool = False


Order = tuple[tuple[Action, ...], ...]


class _Step(NamedTuple):
    """A piece of work before microbatches are counted; `local` is the stage as its rank counts them."""

    kind: Kind
    local: int
    overlaps_next: bool = False


def order(schedule: PipelineSchedule, ranks: int, stages_per_rank: int, microbatches: int) -> Order:
    """What each rank does, one sequence per rank.

    On one rank with one stage every schedule is the same: forward and backward of each microbatch.
    Raises ValueError for counts with which the schedule does not work.
    """
    reason = refusal(schedule, ranks, stages_per_rank, microbatches)
    if reason is not None:
        raise ValueError(reason)
    return tuple(
        tuple(_counted(_steps(schedule, rank, ranks, stages_per_rank, microbatches), held, microbatches))
        for rank, held in enumerate(stages_of(schedule, ranks, stages_per_rank))
    )


def refusal(schedule: PipelineSchedule, ranks: int, stages_per_rank: int, microbatches: int) -> str | None:
    """Why a schedule does not work with such counts; None where it does."""
    if min(ranks, stages_per_rank, microbatches) < 1:
        return f"{ranks} ranks, {stages_per_rank} stages on each, {microbatches} microbatches: each must be at least 1"
    if ranks == stages_per_rank == 1:
        return None
    match schedule:
        case "gpipe" | "1f1b":
            if stages_per_rank != 1:
                return f"{schedule} puts 1 stage on each rank, not {stages_per_rank}"
        case "interleaved_1f1b" | "interleaved_zero_bubble":
            if microbatches % _round(ranks, microbatches):
                rounds = microbatches // ranks
                return f"{microbatches} microbatches are not cut into {rounds} equal rounds of {schedule}"
        case "zbv" | "dualpipev":
            if stages_per_rank != 2:
                return f"{schedule} puts 2 stages on each rank, not {stages_per_rank}"
            if schedule == "dualpipev" and microbatches < 2 * ranks:
                return f"dualpipev needs at least as many microbatches as stages: {2 * ranks}, not {microbatches}"
        case other:
            assert_never(other)
    return None


def in_flight(
    schedule: PipelineSchedule, ranks: int, stages_per_rank: int, microbatches: int
) -> tuple[tuple[int, ...], ...]:
    """Per rank and local stage, the most microbatches whose activations it holds at once.

    They are held from the forward pass until the gradient of the weights is done. The stages of a rank need not be at
    their most at the same time: see `held_together`.
    Raises ValueError as `order` does.
    """
    together = held_together(schedule, ranks, stages_per_rank, microbatches)
    return tuple(tuple(max(counts) for counts in zip(*each, strict=True)) for each in together)


def held_together(
    schedule: PipelineSchedule, ranks: int, stages_per_rank: int, microbatches: int
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Per rank, how many microbatches its stages hold at the same time: combinations that no other one exceeds.

    The peak of a rank is the largest of sum(count x bytes of a microbatch on that stage) over its combinations.
    Raises ValueError as `order` does.
    """
    if schedule == "gpipe" and stages_per_rank == 1 < ranks:
        return (((microbatches,),),) * ranks
    # Within three rounds a schedule has warmed up and begun to repeat.
    few = shortened(schedule, ranks, microbatches, 4)
    held = stages_of(schedule, ranks, stages_per_rank)
    each_rank = order(schedule, ranks, stages_per_rank, few)
    return tuple(_held(actions, stages) for actions, stages in zip(each_rank, held, strict=True))


def shortened(schedule: PipelineSchedule, ranks: int, microbatches: int, rounds: int) -> int:
    """As many microbatches with the middle cut out: about so many rounds, at the end the same; all of them if fewer.

    In the middle every schedule but gpipe repeats itself with each round, which is one microbatch for each rank and in
    interleaved schedules what a stage takes at a time.
    """
    each = _round(ranks, microbatches) if schedule.startswith("interleaved") else ranks
    return min(microbatches, rounds * each + microbatches % each)


def _held(actions: tuple[Action, ...], stages: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    counts = dict.fromkeys(stages, 0)
    seen: set[tuple[int, ...]] = set()
    for action in actions:
        if action.kind == "forward":
            counts[action.stage] += 1
            seen.add(tuple(counts.values()))
        elif action.kind != "input":
            counts[action.stage] -= 1
    return tuple(
        sorted(
            one
            for one in seen
            if not any(one != other and all(a <= b for a, b in zip(one, other, strict=True)) for other in seen)
        )
    )


def _steps(
    schedule: PipelineSchedule, rank: int, ranks: int, stages_per_rank: int, microbatches: int
) -> Iterator[_Step]:
    """The sequence of one rank; zbv's may run past the last microbatch."""
    if ranks == stages_per_rank == 1:
        schedule = "1f1b"
    match schedule:
        case "gpipe":
            yield from (_Step("forward", 0),) * microbatches
            yield from (_Step("backward", 0),) * microbatches
        case "1f1b":
            # The first gradient is back after a forward pass on each rank below.
            yield from _one_forward_one_backward(ranks - 1 - rank, 1, microbatches, microbatches)
        case "interleaved_1f1b":
            each = _round(ranks, microbatches)
            ahead = (stages_per_rank - 1) * each + 2 * (ranks - 1 - rank)
            yield from _one_forward_one_backward(ahead, stages_per_rank, each, microbatches)
        case "interleaved_zero_bubble":
            each = _round(ranks, microbatches)
            ahead = (stages_per_rank - 1) * each + (ranks - 1 - rank)
            yield from _one_forward_one_backward(ahead, stages_per_rank, each, microbatches, weights_behind=rank)
        case "zbv":
            yield from _zbv(rank, ranks, max(microbatches, 2 * ranks - 1))
        case "dualpipev":
            yield from _dualpipev(rank, ranks, microbatches)
        case other:
            assert_never(other)


def _round(ranks: int, microbatches: int) -> int:
    """Microbatches that a stage of an interleaved schedule takes at a time: one for each rank, or more to be even."""
    return microbatches // max(1, microbatches // ranks)


def _one_forward_one_backward(
    ahead: int, stages_per_rank: int, each: int, microbatches: int, weights_behind: int | None = None
) -> Iterator[_Step]:
    """Forward passes run `ahead` of backward ones. Stages take turns, `each` microbatches at a time.

    With `weights_behind`, `weight` trails `input` by so many; without, a backward pass does both.
    """
    rounds = microbatches // each
    forward = [_Step("forward", local) for local in range(stages_per_rank) for _ in range(each)] * rounds
    kind: Kind = "backward" if weights_behind is None else "input"
    backward = [_Step(kind, local) for local in reversed(range(stages_per_rank)) for _ in range(each)] * rounds
    ahead = min(ahead, len(forward))
    yield from forward[:ahead]
    for done, step in enumerate(backward):
        yield from forward[ahead + done : ahead + done + 1]
        yield step
        if weights_behind is not None and done >= weights_behind:
            yield _Step("weight", backward[done - weights_behind].local)
    if weights_behind:
        yield from (_Step("weight", step.local) for step in backward[-weights_behind:])


def _zbv(rank: int, ranks: int, microbatches: int) -> Iterator[_Step]:
    """Local stage 0 lies on the way down the V, 1 on the way up. Takes 2 * ranks - 1 microbatches at least."""
    below = ranks - 1 - rank
    down, up = _Step("forward", 0), _Step("forward", 1)
    input_down, weight_down, input_up, weight_up = (
        _Step(kind, local) for local in (0, 1) for kind in ("input", "weight")
    )
    yield from (down,) * (2 * below + 1)
    yield from (up, down) * rank
    yield from (up, input_up, weight_up) * (below + 1)
    back = (input_down, weight_down, up, input_up, weight_up)
    yield from (down, *back) * (microbatches - 2 * ranks + rank + 1)
    yield from back * below
    # `weight` waits only here, where gradients still come in.
    yield from (input_down, input_up) * rank
    yield from (input_down, weight_down) * (below + 1)
    yield from (weight_up,) * rank
    yield from (weight_down,) * rank


def _dualpipev(rank: int, ranks: int, microbatches: int) -> Iterator[_Step]:
    """Local stage 0 lies on the way down the V, 1 on the way up. Takes 2 * ranks microbatches at least."""
    below = ranks - 1 - rank
    down, up = _Step("forward", 0), _Step("forward", 1)
    back_down, back_up = _Step("backward", 0), _Step("backward", 1)
    yield from (down,) * (2 * below)
    yield from (down, up) * (rank + 1)
    yield from (_Step("input", 1), _Step("weight", 1), up) * below
    down_with_back_up = (down._replace(overlaps_next=True), back_up)
    up_with_back_down = (up._replace(overlaps_next=True), back_down)
    for turn in range(microbatches - 2 * ranks + rank + 1):
        # The last rank has the gradient of its first microbatch at once: overlap would only delay it.
        yield from (down, back_up) if turn == below == 0 else down_with_back_up
        yield from up_with_back_down
    yield from (back_up, *up_with_back_down) * below
    # rank + 1 gradients are due on either side; the earlier half is done whole, the later leaves its weights for last.
    due = (back_up, back_down) * (rank + 1)
    late = [step.local for step in due[rank + 1 :]]
    yield from due[: rank + 1]
    yield from (_Step("input", local) for local in late)
    late += [0] * below
    for local in late[:below]:
        yield from (_Step("weight", local), _Step("input", 0))
    yield from (_Step("weight", local) for local in late[below:])


def _counted(steps: Iterable[_Step], held: tuple[int, ...], microbatches: int) -> Iterator[Action]:
    """Gives every step the next microbatch of its stage, and leaves out what lies past the last one."""
    forward, back = [0] * len(held), [0] * len(held)
    weights: list[deque[int]] = [deque() for _ in held]
    for kind, local, overlaps_next in steps:
        if kind == "forward":
            microbatch = forward[local]
            forward[local] += 1
        elif kind == "weight":
            microbatch = weights[local].popleft()
        else:
            microbatch = back[local]
            back[local] += 1
            if kind == "input":
                weights[local].append(microbatch)
        if microbatch < microbatches:
            yield Action(kind, held[local], microbatch, overlaps_next)
