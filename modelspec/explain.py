"""explain: what a key or a diagnostic code means, read off the schema, the checks and the shipped specs.

A key is named by its path. Where a spec has a name of the author's choice, such as a variant's, any name will do, and a
number where it has a list; `*` stands for any key. One path may mean several keys: those of each `type` that a map may
have.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from modelspec.checks import BOUNDS, CHECKS
from modelspec.checks.reads import Read, reads
from modelspec.diagnostics import CODES
from modelspec.dump import flow
from modelspec.grammar import INDEX, NAME, Grammar, Schema, described, words
from modelspec.merge import Steps
from modelspec.resolve import Resolved, resolve
from modelspec.schema import ModelSpec
from modelspec.schema.base import unit_of

SHIPPED = Path(__file__).parent / "specs"


@dataclass(frozen=True, slots=True)
class Code:
    """A diagnostic's code and what it means; of a check, what must hold."""

    code: str
    meaning: str

    def as_json(self) -> dict[str, Any]:
        """The code as plain data."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Key:
    """A key of the language.

    `path` has NAME for a name of the author's choice and N for an index; `owner` is the class of the map that holds
    it. `default` is None where the key is required. `specs` has the shipped specs that set it, and to what.
    """

    path: str
    owner: str
    meaning: str
    unit: str | None
    legal: str
    default: str | None
    examples: tuple[str, ...]
    specs: Mapping[str, tuple[str, ...]]
    checks: tuple[Code, ...]

    def as_json(self) -> dict[str, Any]:
        """The key as plain data."""
        return asdict(self)


def explain_code(code: str) -> Code | None:
    """The meaning of a code, None for one that does not exist."""
    checks = {each: (function.__doc__ or "").strip() for each, function in {**BOUNDS, **CHECKS}.items()}
    meaning = {**CODES, **checks}.get(code.upper())
    return None if meaning is None else Code(code.upper(), meaning)


def explain_key(path: str) -> list[Key]:
    """Every key that a path may mean, in the order of the schema; none for one that does not exist."""
    pattern = tuple(path.split("."))
    if not any(len(steps) == len(pattern) - 1 and _fits(steps, pattern[:-1]) for steps, _ in _grammar().maps):
        return []
    return list(_explainer().keys(pattern))


def nearest_keys(path: str) -> list[str]:
    """Paths that exist and look like this one: the same last key elsewhere, or else similar spellings."""
    known = sorted(
        {".".join(map(str, (*steps, key))) for steps, schema in _grammar().maps for key in schema["properties"]}
    )
    last = path.rpartition(".")[2]
    same = [each for each in known if each.rpartition(".")[2] == last]
    return (same or get_close_matches(path, known, n=3))[:5]


@cache
def _grammar() -> Grammar:
    return Grammar(ModelSpec.model_json_schema())


@cache
def _explainer() -> "_Explainer":
    return _Explainer()


class _Explainer:
    """The grammar, the shipped specs and what the checks read, loaded once for all keys of a path."""

    def __init__(self) -> None:
        self.grammar = _grammar()
        self.specs = {path.stem: resolve(str(path)) for path in sorted(SHIPPED.glob("*.yaml"))}
        read = [reads(ModelSpec.model_validate(resolved.data())) for resolved in self.specs.values()]
        self.reads: dict[str, set[Read]] = {
            code: {each for one in read for each in one[code]} for code in (*BOUNDS, *CHECKS)
        }

    def keys(self, pattern: tuple[str, ...]) -> Iterator[Key]:
        for steps, schema in self.grammar.maps:
            if len(steps) == len(pattern) - 1 and _fits(steps, pattern[:-1]):
                for key in schema["properties"]:
                    if fnmatchcase(key, pattern[-1]):
                        yield self._key(steps, schema, key)

    def _key(self, steps: Steps, owner: Schema, key: str) -> Key:
        node = owner["properties"][key]
        meaning = node.get("description", "")
        kind = next((str(word) for word in words([owner["properties"].get("type", {})])), None)
        return Key(
            path=".".join(map(str, (*steps, key))),
            owner=owner["title"],
            meaning=meaning,
            unit=unit_of(meaning),
            legal=described(self.grammar.alternatives([node])),
            default=None if key in owner.get("required", ()) else _told(node.get("default")),
            examples=tuple(flow(example) for example in node.get("examples", ())),
            specs={
                name: values
                for name, resolved in self.specs.items()
                if (values := tuple(dict.fromkeys(_values(resolved, (*steps, key), kind))))
            },
            checks=tuple(
                found
                for code, fields in self.reads.items()
                if (owner["title"], key) in fields and (found := explain_code(code)) is not None
            ),
        )


def _fits(steps: Steps, pattern: tuple[str, ...]) -> bool:
    """Whether a way through the grammar is one that the pattern names."""
    return all(
        step == NAME or fnmatchcase(str(step), part) or (step == INDEX and part.isdigit())
        for step, part in zip(steps, pattern, strict=True)
    )


def _told(default: Any) -> str:
    if default is None:
        return "absent"
    if isinstance(default, dict):
        default = {key: value for key, value in default.items() if value is not None}
    return flow(default)


def _values(resolved: Resolved, steps: Steps, kind: str | None) -> Iterator[str]:
    """What a spec says at every place that the steps lead to, in maps of the right `type`."""
    data = resolved.data()

    def walk(node: Any, rest: Steps) -> Iterator[Any]:
        if not rest:
            yield node
        elif isinstance(node, dict):
            if len(rest) == 1 and kind is not None and node.get("type") != kind:
                return
            for key in node if rest[0] == NAME else [rest[0]]:
                if key in node:
                    yield from walk(node[key], rest[1:])
        elif isinstance(node, list) and rest[0] == INDEX:
            for item in node:
                yield from walk(item, rest[1:])

    for value in walk(data, steps):
        text = flow(value)
        yield text if len(text) <= 60 else f"{text[:57]}..."
