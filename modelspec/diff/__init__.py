"""diff: what changes from one spec to another, and what each change does.

Specs are compared as they resolve, not as text. A change has one of five classes, the gravest that applies:

- checkpoint-breaking: the tables of tensors differ, so a checkpoint of the old model does not load in the new one
- convergence: the same tensors, but training goes another way
- precision: the same mathematics in other number formats
- execution: the same numbers, computed or saved in another way
- cosmetic: names and descriptions
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from modelspec.schema import ModelSpec

Class = Literal["checkpoint-breaking", "convergence", "precision", "execution", "cosmetic"]

__all__ = ["Change", "Class", "diff"]


@dataclass(frozen=True, slots=True)
class Change:
    """One value that differs; None where a side has none."""

    path: str
    before: Any
    after: Any
    change_class: Class


def diff(old: ModelSpec, new: ModelSpec) -> list[Change]:
    """Every value that differs, in the order of the schema."""
    breaking = old.tensors() != new.tensors()
    return [
        Change(path, before, after, _class(path, breaking))
        for path, before, after in _differences((), old.model_dump(), new.model_dump())
    ]


def _differences(path: tuple[str, ...], old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    if old == new:
        return
    if isinstance(old, tuple) and isinstance(new, tuple) and len(old) == len(new):
        old, new = (dict(zip(map(str, range(len(side))), side, strict=True)) for side in (old, new))
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _differences((*path, key), old.get(key), new.get(key))
    else:
        yield ".".join(path), old, new


def _class(path: str, breaking: bool) -> Class:
    match path.split("."):
        case ["name" | "summary" | "spec_version", *_]:
            return "cosmetic"
        case ["model", *_]:
            return "checkpoint-breaking" if breaking else "convergence"
        case ["precision", "fp8", "emulate"]:
            return "execution"
        case ["precision", *_]:
            return "precision"
        case ["parallelism", *_] | ["training", "checkpoint" | "evaluation" | "deterministic", *_]:
            return "execution"
        case ["training", "stages", _, "parallelism", *_]:
            return "execution"
        case _:
            return "convergence"
