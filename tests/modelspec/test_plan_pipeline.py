"""Schedules against torch's, and their times against closed forms."""

import time
from collections.abc import Iterator
from itertools import product
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.pipelining import schedules

from modelspec.layout import stages_of
from modelspec.plan.pipeline import Durations, Order, in_flight, order, refusal, simulate, step, step_time
from modelspec.plan.schedules import Action, held_together
from modelspec.schema.parallelism import PipelineSchedule

INTERLEAVED: tuple[PipelineSchedule, ...] = ("interleaved_1f1b", "interleaved_zero_bubble")
V_SHAPED: tuple[PipelineSchedule, ...] = ("zbv", "dualpipev")
ALL: tuple[PipelineSchedule, ...] = ("gpipe", "1f1b", *INTERLEAVED, *V_SHAPED)
TORCH: dict[str, Any] = {
    "gpipe": schedules.ScheduleGPipe,
    "1f1b": schedules.Schedule1F1B,
    "interleaved_1f1b": schedules.ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": schedules.ScheduleInterleavedZeroBubble,
    "zbv": schedules.ScheduleZBVZeroBubble,
    "dualpipev": schedules.ScheduleDualPipeV,
}
KINDS = {"FORWARD": "forward", "FULL_BACKWARD": "backward", "BACKWARD_INPUT": "input", "BACKWARD_WEIGHT": "weight"}


def stage(index: int, stages: int, ranks: int, rank: int = 0) -> Any:
    """What torch's schedules ask of a stage to make their order."""
    return SimpleNamespace(
        stage_index=index,
        num_stages=stages,
        group_size=ranks,
        group_rank=rank,
        is_first=index == 0,
        is_last=index == stages - 1,
        has_backward=True,
        submod=None,
    )


def torch_schedule(schedule: PipelineSchedule, ranks: int, stages_per_rank: int, microbatches: int) -> Any:
    """Torch's schedule object of rank 0; it knows the order of all ranks."""
    stages = ranks * stages_per_rank
    if schedule in ("gpipe", "1f1b"):
        return TORCH[schedule](stage(0, stages, ranks), microbatches)
    return TORCH[schedule]([stage(each * ranks, stages, ranks) for each in range(stages_per_rank)], microbatches)


def torch_order(schedule: PipelineSchedule, ranks: int, stages_per_rank: int, microbatches: int) -> Order:
    """Torch's order without its waiting slots and its reductions over replicas."""
    made = torch_schedule(schedule, ranks, stages_per_rank, microbatches)
    by_rank = made._get_pipeline_order() if schedule == "gpipe" else made.pipeline_order

    def plain(actions: list[Any]) -> Iterator[Action]:
        for action in actions:
            if action is None or action.computation_type.name == "REDUCE_GRAD":
                continue
            for place, each in enumerate(action.sub_actions or (action,)):
                kind: Any = KINDS[each.computation_type.name]
                yield Action(kind, each.stage_index, each.microbatch_index, bool(action.sub_actions) and place == 0)

    return tuple(tuple(plain(by_rank[rank])) for rank in range(ranks))


def legal(
    names: tuple[PipelineSchedule, ...], ranks: tuple[int, ...], microbatches: tuple[int, ...]
) -> list[tuple[PipelineSchedule, int, int, int]]:
    """Every combination that works, with up to 4 stages on a rank."""
    return [
        (name, size, each, count)
        for name, size, each, count in product(names, ranks, (1, 2, 3, 4), microbatches)
        if refusal(name, size, each, count) is None
    ]


def equal(schedule: PipelineSchedule, ranks: int, forward: int, inputs: int, weight: int) -> list[Durations]:
    """Durations of as many equal stages as the schedule has with 2 on a rank, where it can."""
    each = 1 if schedule in ("gpipe", "1f1b") else 2
    return [Durations(forward, inputs, weight)] * (ranks * each)


@pytest.mark.parametrize("schedule", [name for name in ALL if name != "1f1b"])
def test_orders_are_those_of_torch(schedule: PipelineSchedule) -> None:
    grid = legal((schedule,), (1, 2, 3, 4, 6), (1, 2, 3, 4, 5, 6, 8, 10, 12, 13, 18, 24))
    assert len(grid) > 20
    for name, ranks, each, count in grid:
        if ranks == each == 1:
            continue
        assert order(name, ranks, each, count) == torch_order(name, ranks, each, count), (ranks, each, count)


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 3), (2, 2), (4, 4), (4, 9), (7, 20)])
def test_1f1b_is_what_torch_executes(ranks: int, microbatches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # The order that torch draws of its 1F1B counts the last rank's microbatches from 1, so its execution is recorded.
    expected = order("1f1b", ranks, 1, microbatches)
    for rank in range(ranks):
        done: list[Action] = []
        fake = stage(rank, ranks, ranks, rank)
        fake.forward_one_chunk = lambda at, *_, done=done, rank=rank, **__: done.append(Action("forward", rank, at))
        fake.backward_one_chunk = lambda at, done=done, rank=rank, **_: done.append(Action("backward", rank, at))
        for name in ("get_fwd_recv_ops", "get_fwd_send_ops", "get_bwd_recv_ops", "get_bwd_send_ops"):
            setattr(fake, name, lambda _: [])
        fake.perform_reduce_grad = lambda _: None
        made = schedules.Schedule1F1B(fake, microbatches)
        monkeypatch.setattr(made, "_initialize_stage", lambda *_: None)
        made._step_microbatches()
        assert tuple(done) == expected[rank]


def test_1f1b_of_fewer_microbatches_than_ranks_warms_up_with_all_of_them() -> None:
    # Torch refuses this; the schedule itself has no such need.
    kinds = [[(action.kind, action.microbatch) for action in actions] for actions in order("1f1b", 4, 1, 2)]
    assert kinds[0] == [("forward", 0), ("forward", 1), ("backward", 0), ("backward", 1)]
    assert kinds[3] == [("forward", 0), ("backward", 0), ("forward", 1), ("backward", 1)]


def test_what_torch_refuses_is_refused() -> None:
    for name, ranks, each, count in product(ALL[2:], (1, 2, 3, 4), (1, 2, 3), range(1, 20)):
        if ranks == each == 1:
            continue
        try:
            torch_schedule(name, ranks, each, count)
        except ValueError:
            with pytest.raises(ValueError):
                order(name, ranks, each, count)
        else:
            assert refusal(name, ranks, each, count) is None


@pytest.mark.parametrize("schedule", ALL)
def test_one_rank_with_one_stage_does_each_microbatch_to_its_end(schedule: PipelineSchedule) -> None:
    assert order(schedule, 1, 1, 2) == (
        (Action("forward", 0, 0), Action("backward", 0, 0), Action("forward", 0, 1), Action("backward", 0, 1)),
    )


def test_stages_stand_where_torch_puts_them() -> None:
    for name, ranks, each, count in legal(ALL[2:], (2, 3, 5), (12,)):
        torchs = torch_schedule(name, ranks, each, count).stage_index_to_group_rank
        placed = {index: rank for rank, held in enumerate(stages_of(name, ranks, each)) for index in held}
        assert placed == torchs, (name, ranks, each)
    assert stages_of("dualpipev", 3, 2) == ((0, 5), (1, 4), (2, 3))
    assert stages_of("interleaved_1f1b", 2, 3) == ((0, 2, 4), (1, 3, 5))


@pytest.mark.parametrize(
    ("ranks", "microbatches", "bubbles"),
    [
        (4, 32, ("8.57%", "8.57%", "4.48%", "1.54%", "1.54%", "3.03%")),
        (16, 32, ("31.91%", "31.91%", "18.99%", "7.25%", "7.25%", "13.51%")),
        (16, 64, ("18.99%", "18.99%", "10.49%", "3.76%", "3.76%", "7.25%")),
        (16, 120, ("11.11%", "11.11%", None, None, "2.04%", "4.00%")),
    ],
)
def test_bubbles_are_those_of_a_simulation_of_torchs_orders(
    ranks: int, microbatches: int, bubbles: tuple[str | None, ...]
) -> None:
    for name, expected in zip(ALL, bubbles, strict=True):
        if expected is not None:
            durations = equal(name, ranks, 1, 1, 1)
            made = simulate(order(name, ranks, len(durations) // ranks, microbatches), durations)
            assert f"{made.bubble:.2%}" == expected, name


@pytest.mark.parametrize(("forward", "inputs", "weight"), [(1, 1, 1), (10, 12, 7), (5, 9, 1)])
@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 4), (2, 8), (4, 12), (8, 48)])
def test_idle_time_of_equal_stages_is_the_closed_form(
    ranks: int, microbatches: int, forward: int, inputs: int, weight: int
) -> None:
    backward = inputs + weight
    for name in ("gpipe", "1f1b", *INTERLEAVED[:1]):
        durations = equal(name, ranks, forward, inputs, weight)
        made = simulate(order(name, ranks, len(durations) // ranks, microbatches), durations)
        assert set(made.idle) == {(ranks - 1) * (forward + backward)}, name
    for stages_per_rank in (2, 3, 4):
        durations = [Durations(forward, inputs, weight)] * (ranks * stages_per_rank)
        made = simulate(order("interleaved_1f1b", ranks, stages_per_rank, microbatches), durations)
        assert set(made.idle) == {(ranks - 1) * (forward + backward)}, stages_per_rank
        if ranks > 1:
            made = simulate(order("interleaved_zero_bubble", ranks, stages_per_rank, microbatches), durations)
            assert set(made.idle) == {(ranks - 1) * (forward + backward - 2 * weight)}, stages_per_rank
    if forward == inputs == weight:
        made = simulate(order("zbv", ranks, 2, microbatches), durations[: 2 * ranks])
        assert set(made.idle) == {(ranks - 1) * (forward + backward - 2 * weight)}


def test_the_last_rank_of_dualpipev_idles_as_deepseek_states() -> None:
    # (PP/2 - 1)(F&B + B - 3W), PP stages: half of them ranks.
    for ranks, microbatches in ((2, 6), (4, 8), (4, 40), (8, 17)):
        for pair in (1, 0.875, 0.75):
            made = simulate(order("dualpipev", ranks, 2, microbatches), equal("dualpipev", ranks, 4, 4, 4), 0, pair)
            assert made.idle[-1] == (ranks - 1) * (12 * pair + 8 - 12)


@pytest.mark.parametrize(("schedule", "ranks"), [("1f1b", 32), ("interleaved_zero_bubble", 16), ("zbv", 16)])
def test_32_stages_and_960_microbatches_take_less_than_half_a_second(schedule: PipelineSchedule, ranks: int) -> None:
    def seconds() -> float:
        start = time.process_time()
        simulate(order(schedule, ranks, 32 // ranks, 960), [Durations(1, 1, 1)] * 32)
        return time.process_time() - start

    # Once is enough; a busy machine gets a second and a third chance.
    assert any(seconds() < 0.5 for _ in range(3))


@pytest.mark.parametrize("schedule", ALL)
def test_the_step_time_of_equal_stages_is_exact(schedule: PipelineSchedule) -> None:
    for pieces in ((1, 1, 1), (10, 12, 7)):
        for name, ranks, each, count in legal((schedule,), (1, 3, 8), (5, 28, 63, 64)):
            durations = [Durations(*pieces)] * (ranks * each)
            expected = simulate(order(name, ranks, each, count), durations)
            assert step_time(name, ranks, each, count, durations) == pytest.approx(expected.makespan, rel=1e-12)
            made = step(name, ranks, each, count, durations)
            assert made.bubble == pytest.approx(expected.bubble, rel=1e-9, abs=1e-12), (ranks, each, count)


@pytest.mark.parametrize("schedule", ALL)
def test_the_step_time_of_unequal_stages_is_right_within_one_percent(schedule: PipelineSchedule) -> None:
    chance = Random(schedule)
    for name, ranks, each, count in legal((schedule,), (2, 8), (120, 121)):
        for _ in range(3):
            durations = [Durations(*(chance.uniform(1, 10) for _ in range(3))) for _ in range(ranks * each)]
            transfer = chance.uniform(0, 5)
            expected = simulate(order(name, ranks, each, count), durations, transfer).makespan
            assert step_time(name, ranks, each, count, durations, transfer) == pytest.approx(expected, rel=0.01)


def test_the_step_time_of_a_billion_microbatches_costs_nothing() -> None:
    # (P - 1)(F + B) + m(F + B)
    assert step_time("1f1b", 16, 1, 10**9, [Durations(1, 1, 1)] * 16) == (15 + 10**9) * 3
    assert in_flight("zbv", 2, 2, 10**9) == in_flight("zbv", 2, 2, 100)


def test_an_order_in_which_ranks_wait_for_each_other_is_refused() -> None:
    first, second = order("1f1b", 2, 1, 2)
    late = (Action("backward", 0, 0), *(action for action in first if action != Action("backward", 0, 0)))
    with pytest.raises(ValueError, match=r"rank 0 for backward of stage 0 microbatch 0, rank 1 for forward of stage 1"):
        simulate((late, second), [Durations(1, 1, 1)] * 2)


def test_durations_are_those_of_the_orders_stages() -> None:
    with pytest.raises(ValueError, match="durations of 3 stages"):
        simulate(order("1f1b", 2, 1, 2), [Durations(1, 1, 1)] * 3)


def test_in_flight_is_the_closed_form() -> None:
    for ranks, microbatches in product((1, 2, 4, 16), (1, 3, 8, 33, 200)):
        assert in_flight("gpipe", ranks, 1, microbatches) == (((microbatches,),) * ranks if ranks > 1 else ((1,),))
        assert in_flight("1f1b", ranks, 1, microbatches) == tuple(
            (min(ranks - rank, microbatches),) for rank in range(ranks)
        )
        if microbatches >= 2 * ranks:
            # PP + 1 of PP stages, whichever the rank.
            assert in_flight("dualpipev", ranks, 2, microbatches) == tuple(
                (2 * ranks - rank, rank + 1) for rank in range(ranks)
            )
            assert [max(map(sum, each)) for each in held_together("zbv", ranks, 2, microbatches)] == [2 * ranks] * ranks
    for ranks, each in product((2, 4, 8), (2, 3, 4)):
        for name, most in zip(INTERLEAVED, (each * ranks + ranks - 1, each * ranks), strict=True):
            held = held_together(name, ranks, each, 6 * ranks)
            assert max(sum(counts) for rank in held for counts in rank) == most


def test_in_flight_of_many_microbatches_is_that_of_all_of_them() -> None:
    for name, ranks, each, count in legal(ALL, (1, 2, 3, 5), (1, 4, 9, 20, 21, 24, 30, 45)):
        peaks: list[tuple[int, ...]] = []
        for rank, held in enumerate(stages_of(name, ranks, each)):
            counts = dict.fromkeys(held, 0)
            most = dict(counts)
            for action in order(name, ranks, each, count)[rank]:
                counts[action.stage] += {"forward": 1, "input": 0, "backward": -1, "weight": -1}[action.kind]
                most[action.stage] = max(most[action.stage], counts[action.stage])
            assert not any(counts.values())
            peaks.append(tuple(most.values()))
        assert in_flight(name, ranks, each, count) == tuple(peaks), (name, ranks, each, count)
