"""What a plan says that a run can be held against: tokens per second and memory; and how to make it say what came."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modelspec.plan.step import Speed, Steps
from modelspec.schema import ModelSpec
from modelspec.schema.hardware import Hardware


@dataclass(frozen=True, slots=True)
class Planned:
    """Tokens per second of all devices together, by stage of training, and bytes of the heaviest rank.

    `margin` is the part of `memory` that is not tensors: fragments and libraries.
    """

    hardware: str
    tokens_per_second: tuple[float, ...]
    memory: int
    margin: int

    @classmethod
    def of(cls, plan: Mapping[str, Any]) -> "Planned":
        """What the JSON of a plan says. Raises KeyError, TypeError or IndexError where it is none."""
        training, memory = plan["training"], plan["memory"]
        world = training["world_size"]
        heaviest = memory["ranks"][memory["heaviest"]]
        # The ranks are those of the first stage of training; a later one may hold more.
        more = max((stage["total"] - heaviest["total"] for stage in memory["stages"]), default=0)
        return cls(
            hardware=str(plan["hardware"]),
            tokens_per_second=tuple(stage["tokens_per_second_per_gpu"] * world for stage in training["stages"]),
            memory=heaviest["total"] + max(more, 0),
            margin=heaviest["margin"],
        )

    def memory_on(self, device_type: str) -> int:
        """Bytes to compare with what is measured: on a CPU the whole process, on a GPU the tensors alone."""
        return self.memory if device_type == "cpu" else self.memory - self.margin


def error(planned: float, measured: float) -> float:
    """By how much of what was measured the plan is too high: 0.1 where it says 11 and 10 came."""
    return planned / measured - 1


# Computation is never taken to be faster than this share of what the rates say: less is none at all. Nor slower than so
# many times: a hardware file says no more.
LEAST_SLOWDOWN, MOST_SLOWDOWN = 1e-2, 1e4


def slowdown(
    spec: ModelSpec, sequence_length: int, batch_size: int, hardware: Hardware, speed: Speed, seconds: float
) -> float:
    """The `slowdown` of a hardware with which a step of a spec, as it stands in one stage, takes so many seconds.

    Only computation scales by it: launches and exchange take what they take. Where these alone take longer than
    `seconds`, it is LEAST_SLOWDOWN, and never more than MOST_SLOWDOWN.
    """

    def planned(device: float) -> float:
        at = Speed(speed.rates, speed.stack, speed.slowdown, speed.experts, device)
        return Steps(spec, sequence_length, hardware, at).step(batch_size).seconds

    # Without a pipeline a step is linear in it.
    once = planned(2.0) - planned(1.0)
    fixed = planned(1.0) - once
    return min(max((seconds - fixed) / once, LEAST_SLOWDOWN), MOST_SLOWDOWN)
