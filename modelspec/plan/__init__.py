"""plan: what a spec costs, by arithmetic over the schema. No torch, no GPU, nothing allocated.

Numbers are exact: integers, and fractions where a mean over positions is none.
"""

from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from modelspec.plan.cache import cache
from modelspec.plan.flops import Flops, assumptions, default_sequence_length, flops, number
from modelspec.plan.modules import Module, modules
from modelspec.plan.parameters import Parameters, parameters
from modelspec.plan.storage import CheckpointBytes, checkpoint_bytes
from modelspec.schema import ModelSpec

__all__ = [
    "CheckpointBytes",
    "Flops",
    "Module",
    "Parameters",
    "Plan",
    "default_sequence_length",
    "parameters",
    "plan",
]


@dataclass(frozen=True, slots=True)
class Plan:
    """The costs of one spec: FLOPs and cache of sequences of `sequence_length` tokens, and how FLOPs were counted.

    The cache of a sequence is `kv_cache_bytes_per_token` for each of its tokens and `state_bytes_per_sequence` beside
    them, which is full windows and the memories of recurrences.
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

    def as_json(self) -> dict[str, Any]:
        """The plan as plain data; a fraction becomes the nearest float."""
        return asdict(self, dict_factory=_plain)


def plan(spec: ModelSpec, *, sequence_length: int | None = None) -> Plan:
    """The costs of a valid spec, at the sequence length of its first training stage, else its longest position.

    Raises ValueError for a sequence length that the model is not meant for.
    """
    length = default_sequence_length(spec) if sequence_length is None else sequence_length
    if not 1 <= length <= spec.model.max_position:
        raise ValueError(
            f"a sequence of {length:,} tokens: it must be at least 1 and at most model.max_position, "
            f"{spec.model.max_position:,}"
        )
    kept = cache(spec)
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
    )


def _plain(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: number(value) if isinstance(value, Fraction) else value for key, value in pairs}
