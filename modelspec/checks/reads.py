"""Which keys a check reads, found by watching it: no list that could go stale.

A spec is copied into classes that note each field as it is read, and the checks run over the copy. What a check reads
is known as far as that spec leads it.
"""

from collections.abc import Mapping
from typing import Any

from modelspec.checks import BOUNDS, CHECKS
from modelspec.schema import ModelSpec, Strict

# A class of the schema and a field of it.
Read = tuple[str, str]


def reads(spec: ModelSpec) -> Mapping[str, frozenset[Read]]:
    """Of each check's code, the fields that it reads in a spec."""
    notes: set[Read] = set()
    watched = _Watcher(notes).copy(spec)
    found = {}
    for code, function in {**BOUNDS, **CHECKS}.items():
        notes.clear()
        for _ in function(watched):
            pass
        found[code] = frozenset(notes)
    return found


class _Watcher:
    """Copies values of a spec; what is then read of a copy joins `notes`."""

    def __init__(self, notes: set[Read]) -> None:
        self.notes = notes
        self.classes: dict[type[Strict], type[Strict]] = {}

    def copy(self, value: Any) -> Any:
        if isinstance(value, Strict):
            fields = {name: self.copy(getattr(value, name)) for name in type(value).model_fields}
            return self._watching(type(value)).model_construct(set(value.model_fields_set), **fields)
        if isinstance(value, tuple):
            return tuple(map(self.copy, value))
        if isinstance(value, dict):
            return {key: self.copy(item) for key, item in value.items()}
        return value

    def _watching(self, cls: type[Strict]) -> type[Strict]:
        """A class like `cls` whose fields are noted when they are read."""
        if cls not in self.classes:
            notes, name, fields = self.notes, cls.__name__, frozenset(cls.model_fields)

            def noting(instance: Any, attribute: str) -> Any:
                if attribute in fields:
                    notes.add((name, attribute))
                return cls.__getattribute__(instance, attribute)

            body = {"__getattribute__": noting, "__module__": cls.__module__}
            self.classes[cls] = type(name, (cls,), body)
        return self.classes[cls]
