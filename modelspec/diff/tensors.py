"""What a change of architecture does to a checkpoint: which tensors stay, change their shape, come and go."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from modelspec.schema import Model, Tensors

Shape = tuple[int, ...]

# The number that tells a layer, or a module of multi-token prediction, from its neighbours.
_NUMBERED = re.compile(r"(\w+\.)([0-9]+)(\..*)")


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Tensors that change alike and whose names differ in the layer alone, as `layers.{0-2,5}.ffn.down_proj.weight`.

    `count` says how many they are. A shape is None on the side that does not have them.
    """

    name: str
    count: int
    before: Shape | None
    after: Shape | None


@dataclass(frozen=True, slots=True)
class TensorChanges:
    """Names of tensors by what becomes of them, in the order of the tables.

    `groups` has the same tensors with layers folded: the new ones, then those that are gone, then the reshaped ones.
    `elements` counts what a model that starts from the old one's checkpoint must initialise anew: the new tensors and
    the reshaped ones.
    """

    new: tuple[str, ...]
    gone: tuple[str, ...]
    reshaped: tuple[str, ...]
    groups: tuple[TensorGroup, ...]
    elements: int

    def as_json(self) -> dict[str, Any]:
        """The changes as plain data, the tensors in groups."""
        kinds: dict[str, list[dict[str, Any]]] = {"new": [], "gone": [], "reshaped": []}
        for group in self.groups:
            kinds["new" if group.before is None else "gone" if group.after is None else "reshaped"].append(
                asdict(group)
            )
        return {**kinds, "elements": self.elements}


def tensor_changes(old: Model, new: Model) -> TensorChanges:
    """The difference between the tables of two models."""
    before, after = old.tensors(), new.tensors()
    added = tuple(name for name in after if name not in before)
    gone = tuple(name for name in before if name not in after)
    reshaped = tuple(name for name in after if name in before and _stored(before, name) != _stored(after, name))
    return TensorChanges(
        new=added,
        gone=gone,
        reshaped=reshaped,
        groups=tuple(group for names in (added, gone, reshaped) for group in _folded(names, before, after)),
        elements=sum(after[name].numel for name in (*added, *reshaped)),
    )


def same_tensors(before: Tensors, after: Tensors) -> bool:
    """Whether a checkpoint with one table loads in a model with the other."""
    return before.keys() == after.keys() and all(_stored(before, name) == _stored(after, name) for name in before)


def _stored(table: Tensors, name: str) -> tuple[object, ...]:
    """What a checkpoint must agree with; how many experts a token uses is not stored."""
    tensor = table[name]
    return tensor.shape, tensor.kind, tensor.dtype


def _folded(names: Iterable[str], before: Tensors, after: Tensors) -> Iterator[TensorGroup]:
    """The tensors of these names in groups: those outside of layers, then those of layers."""
    groups: dict[tuple[str, str, Shape | None, Shape | None], list[int]] = {}
    for name in names:
        was, now = (table[name].shape if name in table else None for table in (before, after))
        numbered = _NUMBERED.fullmatch(name)
        if numbered is None:
            yield TensorGroup(name, 1, was, now)
        else:
            groups.setdefault((numbered[1], numbered[3], was, now), []).append(int(numbered[2]))
    for (start, end, was, now), numbers in groups.items():
        yield TensorGroup(f"{start}{_ranges(numbers)}{end}", len(numbers), was, now)


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers as `{0-2,5}`; one alone as itself."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) + "}"
