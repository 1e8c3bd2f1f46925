"""plan: what a spec costs, by arithmetic over the schema. No torch, no GPU, nothing allocated."""

from dataclasses import asdict, dataclass
from typing import Any

from modelspec.plan.parameters import Parameters, parameters
from modelspec.schema import ModelSpec

__all__ = ["Parameters", "Plan", "parameters", "plan"]


@dataclass(frozen=True, slots=True)
class Plan:
    """The costs of one spec."""

    name: str
    parameters: Parameters

    def as_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        return asdict(self)


def plan(spec: ModelSpec) -> Plan:
    """The costs of a valid spec."""
    return Plan(spec.name, parameters(spec))
