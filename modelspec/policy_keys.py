"""What is wrong with a policy before it meets a spec: a rule that could never speak is an error, not silence.

JSON Schema ignores keywords that it does not know and properties that never come. In a policy both are typing errors,
and the rule would hold for every spec. So keywords are compared with those of JSON Schema, the keys that a rule names
with those that a spec may have at that place, and references with the schemas of the file.
"""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any, Final, cast
from urllib.parse import unquote

from jsonschema import Draft3Validator, validators
from jsonschema.exceptions import SchemaError

from modelspec.diagnostics import Diagnostic, Place
from modelspec.document import Mapping, Node, Scalar, Sequence
from modelspec.grammar import NAME, Grammar, keys
from modelspec.merge import Steps, error, spelled, suggestion
from modelspec.resolve import plain
from modelspec.schema import ModelSpec

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
# Keywords that check nothing by themselves.
_SILENT = (
    *("$schema", "$id", "$anchor", "$dynamicAnchor", "$comment", "$defs", "definitions", "title", "description"),
    *("default", "examples", "deprecated", "then", "else", "minContains", "maxContains"),
)
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
# Where schemas stand in a schema: under these keywords themselves, in their lists, in their maps.
_ONE = (
    *("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames"),
    *("unevaluatedItems", "unevaluatedProperties", "additionalItems"),
)
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
# Under these a schema speaks of the same value as the one around it.
_SAME = ("not", "if", "then", "else", "allOf", "anyOf", "oneOf", "dependentSchemas", "dependencies")
# These name keys of a spec: in a list, or as the keys of a map whose values may be such lists.
_NAMING = ("required", "properties", "dependentRequired", "dependentSchemas", "dependencies")


def problems(root: Mapping) -> list[Diagnostic]:
    """Everything for which a policy is refused, as MS601."""
    schema = {key: plain(entry.node) for key, entry in root.entries.items()}
    # Without a default of its own jsonschema takes an unknown draft for the newest. Its stubs know no None.
    dialect = validators.validator_for(schema, default=cast("Any", None)) if "$schema" in schema else _default()
    # In the third draft a type may be a schema.
    if dialect in (None, Draft3Validator):
        entry = root.entries["$schema"]
        return [error("MS601", entry.node.place, ("$schema",), "$schema names no known draft", f"write {DIALECT}")]
    try:
        dialect.check_schema(schema)
    except SchemaError as wrong:
        entry_place = _place_of(root, tuple(wrong.absolute_path))
        message = wrong.message if len(wrong.message) <= 200 else f"{wrong.validator!r} of JSON Schema does not hold"
        return [error("MS601", entry_place, tuple(wrong.absolute_path), f"not a JSON Schema: {message}")]
    rules = _Rules(root, tuple(dialect.VALIDATORS))
    return sorted([*rules.problems(root, (), ((),)), *rules.dangling()], key=lambda each: each.place)


class _Rules:
    """Walks a policy; `at` are the places in a spec that a schema speaks of, none where that cannot be told."""

    def __init__(self, root: Mapping, checking: tuple[str, ...]) -> None:
        self.root = root
        self.keywords = (*checking, *_SILENT)
        # Older drafts know no anchors.
        self.anchoring = tuple(
            keyword
            for keyword, since in (("$anchor", {"$recursiveRef", "$dynamicRef"}), ("$dynamicAnchor", {"$dynamicRef"}))
            if since & set(checking)
        )
        # What the walk has seen: where schemas stand, by the identity of their nodes, and what refers to them.
        self.schemas: set[int] = set()
        self.anchors: set[str] = set()
        self.references: list[tuple[Node, Steps]] = []

    def problems(self, schema: Node, path: Steps, at: tuple[Steps, ...]) -> Iterator[Diagnostic]:
        self.schemas.add(id(schema))
        if not isinstance(schema, Mapping):
            return
        for keyword, entry in schema.entries.items():
            here = (*path, keyword)
            if keyword not in self.keywords:
                message = f"JSON Schema has no keyword {keyword!r}"
                yield error("MS601", entry.key_place, here, message, suggestion(keyword, self.keywords))
            elif keyword in ("$schema", "$id") and path:
                yield error("MS601", entry.key_place, here, f"{keyword} stands at the top of the policy only")
            elif keyword in self.anchoring:
                self.anchors.add(f"#{plain(entry.node)}")
            elif keyword in _REFERENCES and not str(plain(entry.node)).startswith("#"):
                help = "copy what it names into `$defs`, and write `$ref: '#/$defs/NAME'`"
                yield error("MS601", entry.node.place, here, "a policy refers to nothing outside of its file", help)
            elif keyword in _REFERENCES:
                self.references.append((entry.node, here))
            yield from self.unknown(keyword, entry.node, here, at)
            for step, child in _schemas(keyword, entry.node):
                yield from self.problems(child, (*here, step) if step != "" else here, _under(keyword, step, at))

    def unknown(self, keyword: str, node: Node, path: Steps, at: tuple[Steps, ...]) -> Iterator[Diagnostic]:
        """The keys that a keyword names and that no spec has at these places."""
        if not at or any(_is_free(place) for place in at):
            return
        known = _known(at)
        where = f"in {' or '.join(map(spelled, at))}" if any(at) else "at the top level"
        listed = f"the keys there are {', '.join(known)}" if known else None
        if keyword == "patternProperties" and isinstance(node, Mapping):
            for pattern, entry in node.entries.items():
                if not any(re.search(pattern, key) for key in known):
                    message = f"no spec has a key that matches {pattern!r} {where}"
                    yield error("MS601", entry.key_place, (*path, pattern), message, listed)
        elif keyword in _NAMING:
            for name, place, steps in _names(node):
                if name not in known:
                    help = suggestion(name, known) or listed
                    yield error("MS601", place, (*path, *steps), f"no spec has a key {name!r} {where}", help)

    def dangling(self) -> Iterator[Diagnostic]:
        """The references that lead to no schema. To be asked after the walk."""
        for node, path in self.references:
            reference = str(plain(node))
            if reference not in self.anchors and id(pointed(self.root, reference)) not in self.schemas:
                names = [f"#/{group}/{name}" for group in ("$defs", "definitions") for name in self.defined(group)]
                help = suggestion(reference, [*names, *sorted(self.anchors)])
                yield error("MS601", node.place, path, f"{path[-1]} names no schema of the policy: {reference}", help)

    def defined(self, group: str) -> tuple[str, ...]:
        """The names under `$defs` or its older form."""
        found = self.root.entries.get(group)
        return tuple(found.node.entries) if found is not None and isinstance(found.node, Mapping) else ()


def pointed(root: Mapping, reference: str) -> Node | None:
    """The node that a reference like `#/$defs/name` points to, None if there is none."""
    fragment = unquote(reference.removeprefix("#"))
    if fragment and not fragment.startswith("/"):
        return None
    node: Node = root
    for part in fragment.split("/")[1:]:
        found = below(node, part.replace("~1", "/").replace("~0", "~"))
        if found is None:
            return None
        node, _place = found
    return node


def below(node: Node, step: str | int) -> tuple[Node, Place] | None:
    """The node one step below, with the place of its key or of itself in a list; None if there is none."""
    match node, step:
        case Mapping(entries), str() if step in entries:
            return entries[step].node, entries[step].key_place
        case Sequence(items), _ if re.fullmatch(r"\d{1,6}", str(step)) and int(step) < len(items):
            return items[int(step)], items[int(step)].place
    return None


def _schemas(keyword: str, node: Node) -> Iterator[tuple[str | int, Node]]:
    """The schemas under a keyword, with the step that leads to each, '' for the value itself."""
    if keyword in _MAPS and isinstance(node, Mapping):
        # Of `dependencies` some are lists of keys.
        yield from ((name, e.node) for name, e in node.entries.items() if not isinstance(e.node, Sequence))
    elif keyword in _LISTS and isinstance(node, Sequence):
        yield from enumerate(node.items)
    elif keyword in _ONE:
        yield "", node


def _names(node: Node) -> Iterator[tuple[str, Place, Steps]]:
    """The keys named in a list, or by a map and the lists in it, with their places and the steps to them."""
    match node:
        case Sequence(items):
            for index, item in enumerate(items):
                if isinstance(item, Scalar):
                    yield str(item.value), item.place, (index,)
        case Mapping(entries):
            for name, entry in entries.items():
                yield name, entry.key_place, (name,)
                if isinstance(entry.node, Sequence):
                    yield from ((key, place, (name, *steps)) for key, place, steps in _names(entry.node))


def _under(keyword: str, step: str | int, at: tuple[Steps, ...]) -> tuple[Steps, ...]:
    """The places that a schema under a keyword speaks of, of those that the one around it speaks of."""
    if keyword in _SAME:
        return at
    if keyword == "properties":
        return tuple((*place, step) for place in at)
    if keyword in ("items", "contains", "prefixItems"):
        return tuple((*place, 0) for place in at)
    if keyword == "patternProperties":
        named = [(*place, key) for place in at for key in _known((place,)) if re.search(str(step), key)]
        return (*named, *((*place, NAME) for place in at if _is_free(place)))
    if keyword == "additionalProperties":
        # Any other key: only in a map with free names do all values follow one grammar.
        return tuple((*place, NAME) for place in at) if not _known(at) else ()
    return ()


def _known(at: tuple[Steps, ...]) -> list[str]:
    """The keys that a spec may have at one of these places."""
    return keys(schema for place in at for schema in _grammar().at(place))


def _is_free(place: Steps) -> bool:
    """Whether keys of any name may stand at a place."""
    around = _grammar().at(place)
    return any("patternProperties" in each or isinstance(each.get("additionalProperties"), dict) for each in around)


def _place_of(root: Mapping, path: Steps) -> Place:
    """The place of what a path leads to, as far as that goes: of a single value its own, else its key's."""
    node: Node = root
    place = root.place
    for step in path:
        found = below(node, step)
        if found is None:
            break
        node, place = found
    return node.place if isinstance(node, Scalar) else place


@cache
def _grammar() -> Grammar:
    return Grammar(ModelSpec.model_json_schema())


def _default() -> Any:
    return validators.validator_for({"$schema": DIALECT})
