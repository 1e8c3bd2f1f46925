"""plan: what a spec costs, by arithmetic over the schema. No torch, no GPU, nothing allocated.

What is counted is exact: integers, and fractions where a mean over positions is none. Memory, time and cost are
estimates for a device: each says its assumptions.
"""

from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from modelspec.hardware import load
from modelspec.hardware.calibration import calibration
from modelspec.plan.cache import cache
from modelspec.plan.flops import Flops, assumptions, default_sequence_length, flops, number
from modelspec.plan.memory import Lever, Memory, training_memory
from modelspec.plan.modules import Module, modules
from modelspec.plan.parameters import Parameters, parameters
from modelspec.plan.ranks import RankMemory
from modelspec.plan.step import speed
from modelspec.plan.storage import CheckpointBytes, checkpoint_bytes
from modelspec.plan.traffic import Transfer, rank_traffic
from modelspec.plan.training import Training, stages_of_training, training
from modelspec.schema import ModelSpec
from modelspec.schema.hardware import Hardware

__all__ = [
    "CheckpointBytes",
    "Flops",
    "Lever",
    "Memory",
    "Module",
    "Parameters",
    "Plan",
    "RankMemory",
    "Training",
    "Transfer",
    "default_sequence_length",
    "parameters",
    "plan",
]


# The device of a plan that names none: what DeepSeek-V3 was trained on.
DEFAULT_HARDWARE = "h800"


@dataclass(frozen=True, slots=True)
class Plan:
    """The costs of one spec: FLOPs and cache of sequences of `sequence_length` tokens, and how FLOPs were counted.

    The cache of a sequence is `kv_cache_bytes_per_token` for each of its tokens and `state_bytes_per_sequence` beside
    them, which is full windows and the memories of recurrences. `training`, `traffic` and `memory` are estimates for a
    device; traffic is of one step of the first stage of training, in bytes that the rank that sends most sends, and
    memory of that stage's largest batch.
    """

    name: str
    parameters: Parameters
    sequence_length: int
    flops_per_token: Flops
    kv_cache_bytes_per_token: int
    state_bytes_per_sequence: int
    checkpoint_bytes: CheckpointBytes
    modules: tuple[Module, ...]
    assumptions: tuple[str, ...]
    hardware: str
    stack: str
    traffic: tuple[Transfer, ...]
    training: Training
    memory: Memory

    def as_json(self) -> dict[str, Any]:
        """The plan as plain data; a fraction becomes the nearest float."""
        return asdict(self, dict_factory=_plain)


def plan(
    spec: ModelSpec,
    *,
    sequence_length: int | None = None,
    hardware: Hardware | None = None,
    stack: str | None = None,
    tokens: int | None = None,
    price: float | None = None,
    imbalance: float | None = None,
) -> Plan:
    """The costs of a valid spec, FLOPs at the sequence length of its first training stage, else its longest position.

    `hardware`: the device, H800 if left out. `stack`: the software whose speed is assumed, else the device's. `tokens`
    replaces the first stage's length; `price` is of a device, in US dollars an hour; `imbalance` is the load of the
    busiest expert rank over the mean.

    Raises ValueError for a sequence length that the model is not meant for, and for an unknown stack.
    """
    length = default_sequence_length(spec) if sequence_length is None else sequence_length
    if not 1 <= length <= spec.model.max_position:
        raise ValueError(
            f"a sequence of {length:,} tokens: it must be at least 1 and at most model.max_position, "
            f"{spec.model.max_position:,}"
        )
    kept = cache(spec)
    device = load(DEFAULT_HARDWARE) if hardware is None else hardware
    pace = speed(calibration(), device, stack)
    trained = training(spec, device, pace, tokens=tokens, price=price, imbalance=imbalance or 1.0)
    first_spec, first = next(stages_of_training(spec, tokens))
    batch = trained.stages[0].step.batch_size
    return Plan(
        name=spec.name,
        parameters=parameters(spec),
        sequence_length=length,
        flops_per_token=flops(spec, length),
        kv_cache_bytes_per_token=kept.per_token,
        state_bytes_per_sequence=kept.per_sequence,
        checkpoint_bytes=checkpoint_bytes(spec),
        modules=tuple(modules(spec, length)),
        assumptions=assumptions(spec),
        hardware=device.name,
        stack=pace.stack,
        traffic=rank_traffic(first_spec, batch, first.sequence_length, device.fast_domain),
        training=trained,
        memory=training_memory(spec, device, sequence_length=sequence_length, imbalance=imbalance),
    )


def _plain(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: number(value) if isinstance(value, Fraction) else value for key, value in pairs}
