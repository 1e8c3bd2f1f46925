"""Which changes of an architecture break a checkpoint: found by making them, not by a list of keys.

Each change is made to the old model alone, and taken back from the new model alone. It breaks if either gives another
table of tensors, so that it breaks in both directions or in neither. A change that cannot stand alone, such as a new
variant and the layers that name it, is made together with all others that cannot.

A change inside a variant is made to the layers that use it alone: no tensor of others depends on it, and a model may
have a variant for each of its layers.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from pydantic import ValidationError

from modelspec.diff.canonical import KINDS
from modelspec.diff.tensors import same_tensors
from modelspec.schema import Model

Path = tuple[str, ...]


def breaking(old: Mapping[str, Any], new: Mapping[str, Any], changed: Sequence[tuple[Path, Any, Any]]) -> set[Path]:
    """The paths of the changes that break, of two models in canonical form and all that differs between them."""
    before, after = _Side(old), _Side(new)
    if same_tensors(before.table, after.table):
        return set()
    there = {path: now for path, _, now in changed}
    back = {path: was for path, was, _ in changed}
    moved = {path: (before.moves({path: there[path]}), after.moves({path: back[path]})) for path in there}
    bound = [path for path, found in moved.items() if None in found]
    together = (before.moves({path: there[path] for path in bound}), after.moves({path: back[path] for path in bound}))
    bound_break = together != (False, False)
    return {path for path, found in moved.items() if True in found or (None in found and bound_break)}


class _Side:
    """A model in canonical form, and its table."""

    def __init__(self, plain: Mapping[str, Any]) -> None:
        self.plain = plain
        self.table = _model(plain).tensors()
        block = (plain.get("mtp") or {}).get("layer")
        # Of each variant, a layer for each of the norms that it stands beside.
        self.layers: dict[tuple[str, str], dict[str, Any]] = {}
        for layer in [*plain["layers"], *([block] if block else [])]:
            for kind in KINDS:
                self.layers.setdefault((kind, layer[kind]), {}).setdefault(str(layer.get("norm")), layer)

    def moves(self, values: Mapping[Path, Any]) -> bool | None:
        """Whether the model has other tensors with these values; None where it would be no model."""
        plain, table = self.plain, self.table
        if len(values) == 1 and next(iter(values))[0] in KINDS:
            kind, name, *_ = next(iter(values))
            if (kind, name) not in self.layers:
                return False
            plain = self._around(kind, name)
            table = _model(plain).tensors()
        changed = deepcopy(dict(plain))
        for path, value in values.items():
            inner: Any = changed
            for step in path[:-1]:
                inner = inner[int(step)] if isinstance(inner, list | tuple) else inner[step]
            inner[path[-1]] = value
        try:
            return not same_tensors(_model(changed).tensors(), table)
        except (ValidationError, KeyError):
            return None

    def _around(self, kind: str, name: str) -> dict[str, Any]:
        """The model of the layers that stand for those with a variant, and of what they use."""
        layers = tuple({**layer, "repeat": 1} for layer in self.layers[kind, name].values())
        used = {each: {layer[each]: self.plain[each][layer[each]] for layer in layers} for each in KINDS}
        return {**self.plain, "layers": layers, "mtp": None, **used}


def _model(plain: Mapping[str, Any]) -> Model:
    """The model of a canonical map, in which a variant that only the other side has is None."""
    kinds = {kind: {name: each for name, each in plain[kind].items() if each is not None} for kind in KINDS}
    return Model.model_validate({**plain, **kinds})
