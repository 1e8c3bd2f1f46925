"""How a change is said, in every form of a diff."""

from typing import Any

from modelspec.dump import flow


def value(said: Any) -> str:
    """A value as a spec would say it, layers as runs; None where a side has none."""
    if isinstance(said, tuple) and said and all(isinstance(item, dict) and "repeat" in item for item in said):
        return ", ".join(f"{run['repeat']} x {run['attention']}/{run['ffn']}" for run in said)
    return "nothing" if said is None else flow(_stated(said))


def _stated(said: Any) -> Any:
    """A value without what is left out."""
    if isinstance(said, dict):
        return {key: _stated(item) for key, item in said.items() if item is not None}
    return [_stated(item) for item in said] if isinstance(said, list | tuple) else said
