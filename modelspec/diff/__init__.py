"""diff: what changes from one spec to another, and what each change does.

Specs are compared as they resolve, not as text, and architectures as the models that they describe: other names of
variants, two names for the same content, another cut of the layers into runs and variants that no layer uses are no
change. A change has one of five classes, the gravest that applies:

- checkpoint-breaking: the tables of tensors differ, so a checkpoint of the old model does not load in the new one
- convergence: the same tensors, but training goes another way
- precision: the same mathematics in other number formats
- execution: the same numbers, computed or saved in another way
- cosmetic: names and descriptions
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from modelspec.diff.breaking import Path, breaking
from modelspec.diff.canonical import canonical
from modelspec.diff.costs import planned_both
from modelspec.diff.tensors import TensorChanges, TensorGroup, tensor_changes
from modelspec.hardware import load
from modelspec.plan import DEFAULT_HARDWARE, parameters
from modelspec.plan.cache import cache
from modelspec.plan.flops import default_sequence_length, flops, number
from modelspec.plan.memory import Verdict
from modelspec.plan.storage import checkpoint_bytes
from modelspec.schema import ModelSpec
from modelspec.schema.hardware import Hardware

Class = Literal["checkpoint-breaking", "convergence", "precision", "execution", "cosmetic"]
CLASSES: tuple[Class, ...] = get_args(Class)

__all__ = [
    "CLASSES",
    "Change",
    "Class",
    "Summary",
    "TensorChanges",
    "TensorGroup",
    "diff",
    "summarize",
    "tensor_changes",
    "waived",
]


@dataclass(frozen=True, slots=True)
class Change:
    """One value that differs; None where a side has none."""

    path: str
    before: Any
    after: Any
    change_class: Class

    def as_json(self) -> dict[str, Any]:
        """The change as plain data."""
        return {"path": self.path, "before": self.before, "after": self.after, "class": self.change_class}


@dataclass(frozen=True, slots=True)
class Summary:
    """What the changes come to: how many of each class, what `plan` counts before and after, and tensors.

    FLOPs of both sides are those of sequences of `sequence_length` tokens, the shorter of the lengths that `plan` would
    take, so that they differ by what the model computes alone. What training takes is estimated for `hardware`: bytes
    of the heaviest rank in the stage of training that needs most, which stage that is and whether it fits, GPU hours
    and US dollars; None where one side has no training, or no plan can be made of it.
    """

    classes: dict[Class, int]
    parameters: dict[str, tuple[int, int]]
    sequence_length: int
    flops_per_token: dict[str, tuple[int | float, int | float]]
    kv_cache_bytes_per_token: tuple[int, int]
    state_bytes_per_sequence: tuple[int, int]
    checkpoint_bytes: dict[str, tuple[int | None, int | None]]
    hardware: str
    memory_bytes: tuple[int, int] | None
    memory_stages: tuple[str, str] | None
    memory_verdicts: tuple[Verdict, Verdict] | None
    gpu_hours: tuple[float, float] | None
    cost_usd: tuple[float, float] | None
    tensors: TensorChanges

    @property
    def most_inclusive(self) -> tuple[str, str]:
        """The largest count of training FLOPs that differs from smaller ones on a side: its key, and what it is."""
        counts = self.flops_per_token
        if counts["training_with_recompute"] != counts["training_with_mtp"]:
            return "training_with_recompute", "training with what is recomputed"
        if counts["training_with_mtp"] != counts["training"]:
            return "training_with_mtp", "training with multi-token prediction"
        return "training", "training"

    def as_json(self) -> dict[str, Any]:
        """The summary as plain data."""
        return asdict(self) | {"tensors": self.tensors.as_json()}


def diff(old: ModelSpec, new: ModelSpec) -> list[Change]:
    """Every value that differs, in the order of the schema."""
    before, after = old.model_dump(), new.model_dump()
    before["model"], after["model"] = canonical(old.model, new.model)
    changed = list(_differences((), before, after))
    architecture = [(path[1:], was, now) for path, was, now in changed if path[0] == "model"]
    breaks = {("model", *path) for path in breaking(before["model"], after["model"], architecture)}
    return [Change(".".join(path), was, now, _class(path, path in breaks)) for path, was, now in changed]


def waived(change: Change, spec: ModelSpec) -> str | None:
    """The reason for which a spec waives a change to it; None where it does not."""
    for waiver in spec.waivers:
        if waiver.rule == change.change_class and fnmatchcase(change.path, waiver.path):
            return waiver.reason
    return None


def summarize(old: ModelSpec, new: ModelSpec, hardware: Hardware | None = None) -> Summary:
    """The sum of what `diff` lists, training for a device: H800 if left out."""
    changes = diff(old, new)
    device = load(DEFAULT_HARDWARE) if hardware is None else hardware
    both = planned_both(old, new, device)
    before, after = parameters(old), parameters(new)
    length = min(default_sequence_length(old), default_sequence_length(new))
    kept_before, kept_after = cache(old), cache(new)
    return Summary(
        classes={each: sum(change.change_class == each for change in changes) for each in CLASSES},
        parameters={key: (getattr(before, key), getattr(after, key)) for key in ("total", "active", "mtp")},
        sequence_length=length,
        flops_per_token=_pairs(_flops(old, length), _flops(new, length)),
        kv_cache_bytes_per_token=(kept_before.per_token, kept_after.per_token),
        state_bytes_per_sequence=(kept_before.per_sequence, kept_after.per_sequence),
        checkpoint_bytes=_pairs(asdict(checkpoint_bytes(old)), asdict(checkpoint_bytes(new))),
        hardware=device.name,
        memory_bytes=(both[0].memory.total, both[1].memory.total) if both else None,
        memory_stages=(both[0].memory.name, both[1].memory.name) if both else None,
        memory_verdicts=(both[0].memory.verdict, both[1].memory.verdict) if both else None,
        gpu_hours=(both[0].gpu_hours, both[1].gpu_hours) if both else None,
        cost_usd=(both[0].usd, both[1].usd) if both and both[0].usd is not None and both[1].usd is not None else None,
        tensors=tensor_changes(old.model, new.model),
    )


def _flops(spec: ModelSpec, sequence_length: int) -> dict[str, int | float]:
    return {key: number(value) for key, value in asdict(flops(spec, sequence_length)).items()}


def _pairs(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {key: (old[key], new[key]) for key in old}


def _differences(path: Path, old: Any, new: Any) -> Iterator[tuple[Path, Any, Any]]:
    if old == new:
        return
    if isinstance(old, tuple) and isinstance(new, tuple) and len(old) == len(new) and path != ("model", "layers"):
        old, new = (dict(zip(map(str, range(len(side))), side, strict=True)) for side in (old, new))
    if isinstance(old, dict) and isinstance(new, dict) and old.get("type") == new.get("type"):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _differences((*path, key), old.get(key), new.get(key))
    else:
        yield path, old, new


def _class(path: Path, breaks: bool) -> Class:
    match path:
        case ["name" | "summary" | "spec_version" | "waivers", *_]:
            return "cosmetic"
        case ["model", *_]:
            return "checkpoint-breaking" if breaks else "convergence"
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
