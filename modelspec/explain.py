"""explain: what a key or a diagnostic code means, read off the schema, the checks and the shipped specs.

A key is named by its path. Where a spec has a name of the author's choice, such as a variant's, any name will do, and a
number where it has a list; `*` stands for any key. One path may mean several keys: those of each `type` that a map may
have. A path may also end at such a name or number: then it means the whole map there. `extends` and `like` are keys of
files only: a resolved spec no longer has them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from modelspec.checks import BOUNDS, CHECKS
from modelspec.checks.reads import Read, reads
from modelspec.diagnostics import CODES
from modelspec.document import read
from modelspec.dump import flow
from modelspec.grammar import INDEX, NAME, Grammar, Schema, described, words
from modelspec.merge import Steps
from modelspec.resolve import plain, resolve
from modelspec.schema import ModelSpec
from modelspec.schema.base import unit_of

SHIPPED = Path(__file__).parent / "specs"
_EXTENDS: Steps = ("extends",)
_LIKE: tuple[Steps, ...] = tuple(("model", section, NAME, "like") for section in ("attention", "ffn"))


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
    it, or the map's own where the path ends at a name or an index. `default` is None where the key is required.
    `specs` has the shipped specs that set it, and to what.
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
    """Every key that a path may mean, in the order of the schema; none for one that does not exist.

    `like` alone means that of every place.
    """
    pattern = ("model", "*", "*", "like") if path == "like" else tuple(path.split("."))
    if not any(_fits(steps, pattern) for steps in _known()):
        return []
    return list(_explainer().keys(pattern))


def nearest_keys(path: str) -> list[str]:
    """Paths that exist and look like this one: the same last key elsewhere, or else similar spellings."""
    known = sorted({".".join(map(str, steps)) for steps in _known()})
    last = path.rpartition(".")[2]
    same = [each for each in known if each.rpartition(".")[2] == last]
    return (same or get_close_matches(path, known, n=3))[:5]


@cache
def _known() -> tuple[Steps, ...]:
    """The way to everything that can be explained."""
    maps = _grammar().maps
    keys = [(*steps, key) for steps, schema in maps for key in schema["properties"]]
    return (_EXTENDS, *keys, *(steps for steps, _ in maps if _is_item(steps)), *_LIKE)


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
        paths = sorted(SHIPPED.glob("*.yaml"))
        self.files = {path.stem: plain(read(path).root) for path in paths}
        self.specs = {path.stem: resolve(str(path)).data() for path in paths}
        watched = [reads(ModelSpec.model_validate(data)) for data in self.specs.values()]
        self.reads: dict[str, set[Read]] = {
            code: {each for one in watched for each in one[code]} for code in (*BOUNDS, *CHECKS)
        }

    def keys(self, pattern: tuple[str, ...]) -> Iterator[Key]:
        if _fits(_EXTENDS, pattern):
            yield self._extends()
        for steps, schema in self.grammar.maps:
            if _is_item(steps) and _fits(steps, pattern):
                yield self._item(steps, schema)
            for key in schema["properties"]:
                if _fits((*steps, key), pattern):
                    yield self._key(steps, schema, key)
        for steps in _LIKE:
            if _fits(steps, pattern):
                yield self._like(steps)

    def _key(self, steps: Steps, owner: Schema, key: str) -> Key:
        node = owner["properties"][key]
        meaning = node.get("description", "")
        return Key(
            path=".".join(map(str, (*steps, key))),
            owner=owner["title"],
            meaning=meaning,
            unit=unit_of(meaning),
            legal=described(self.grammar.alternatives([node])),
            default=None if key in owner.get("required", ()) else _told(node.get("default")),
            examples=tuple(flow(example) for example in node.get("examples", ())),
            specs=_said(self.specs, lambda data: (at[key] for at in _maps(data, steps, owner) if key in at)),
            checks=tuple(
                found
                for code, fields in self.reads.items()
                if (owner["title"], key) in fields and (found := explain_code(code)) is not None
            ),
        )

    def _item(self, steps: Steps, schema: Schema) -> Key:
        """What a list, or a map with names of the author's choice, holds."""
        needed = schema.get("required", [])
        further = [key for key in schema["properties"] if key not in needed]
        legal = "a map with " + ", ".join(needed) if needed else "a map"
        return Key(
            path=".".join(map(str, steps)),
            owner=schema["title"],
            meaning=" ".join(schema.get("description", "").split()),
            unit=None,
            legal=legal + (f"; it may have {', '.join(further)}" if further else ""),
            default="absent",
            examples=(),
            specs=_said(self.specs, lambda data: _maps(data, steps, schema)),
            checks=(),
        )

    def _extends(self) -> Key:
        return Key(
            path="extends",
            owner="spec file",
            meaning="specs that this one builds on: a path relative to this file, or modelspec:NAME for a shipped one. "
            "Parents merge from left to right, then this file onto them: maps merge, lists and single values replace, "
            "null removes, and a map of another `type` replaces. name, summary and waivers are not inherited.",
            unit=None,
            legal="text, or a list of texts",
            default="absent",
            examples=("modelspec:deepseek-v3", "[base.yaml, long-context.yaml]"),
            specs=_said(self.files, lambda data: (data[key] for key in data if key == "extends")),
            checks=_codes("MS10"),
        )

    def _like(self, steps: Steps) -> Key:
        kinds = [schema["title"] for at, schema in self.grammar.maps if at == steps[:-1]]
        difference = "{like: moe, num_experts: 128}" if steps[1] == "ffn" else "{like: full, sliding_window: 128}"
        return Key(
            path=".".join(map(str, steps)),
            owner=" | ".join(kinds),
            meaning="a sibling, under the same map and of the same `type`, that this variant differs from. What else "
            "stands here merges onto the sibling as files merge by `extends`, after --set.",
            unit=None,
            legal="the name of a sibling",
            default="absent",
            examples=(difference,),
            specs=_said(self.files, lambda data: (at["like"] for at in _maps(data, steps[:-1], None) if "like" in at)),
            checks=_codes("MS12"),
        )


def _is_item(steps: Steps) -> bool:
    return bool(steps) and steps[-1] in (NAME, INDEX)


def _codes(start: str) -> tuple[Code, ...]:
    return tuple(Code(code, meaning) for code, meaning in CODES.items() if code.startswith(start))


def _fits(steps: Steps, pattern: tuple[str, ...]) -> bool:
    """Whether a way through the grammar is one that the pattern names."""
    return len(steps) == len(pattern) and all(
        (step == NAME and part) or fnmatchcase(str(step), part) or (step == INDEX and part.isascii() and part.isdigit())
        for step, part in zip(steps, pattern, strict=True)
    )


def _told(default: Any) -> str:
    if default is None:
        return "absent"
    if isinstance(default, dict):
        default = {key: value for key, value in default.items() if value is not None}
    return flow(default)


def _said(
    specs: Mapping[str, dict[str, Any]], found: Callable[[dict[str, Any]], Iterable[Any]]
) -> dict[str, tuple[str, ...]]:
    """The specs in which something is found, and what, each once and cut to a length that can be read."""
    texts = {name: [flow(value) for value in found(data)] for name, data in specs.items()}
    return {
        name: tuple(dict.fromkeys(text if len(text) <= 60 else f"{text[:57]}..." for text in each))
        for name, each in texts.items()
        if each
    }


def _maps(data: dict[str, Any], steps: Steps, owner: Schema | None) -> Iterator[dict[str, Any]]:
    """The maps that the steps lead to: those of the owner's class, or all."""

    def walk(node: Any, rest: Steps) -> Iterator[dict[str, Any]]:
        if not rest:
            if isinstance(node, dict) and (owner is None or _is_of(node, owner)):
                yield node
        elif isinstance(node, dict):
            for key in node if rest[0] == NAME else [rest[0]]:
                if key in node:
                    yield from walk(node[key], rest[1:])
        elif isinstance(node, list) and rest[0] == INDEX:
            for item in node:
                yield from walk(item, rest[1:])

    return walk(data, steps)


def _is_of(node: dict[str, Any], owner: Schema) -> bool:
    """Whether a map of a valid spec is of a class: it has the class's keys and its `type`."""
    kinds = words([owner["properties"].get("type", {})])
    return set(owner.get("required", ())) <= node.keys() <= owner["properties"].keys() and (
        not kinds or node.get("type", kinds[0]) in kinds
    )
