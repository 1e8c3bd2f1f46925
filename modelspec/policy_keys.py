"""What is wrong with a policy before it meets a spec: a rule that could never speak is an error, not silence.

JSON Schema ignores keywords that it does not know, properties that never come, and values of another type than a
keyword is about. In a policy all three are mistakes, and the rule would hold for every spec. So keywords are compared
with those of the policy's draft and with what a spec may have at that place, the keys that a rule names with the keys
there, and references with the schemas of the file.
"""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any, Final
from urllib.parse import unquote

from jsonschema import (
    Draft4Validator,
    Draft6Validator,
    Draft7Validator,
    Draft201909Validator,
    Draft202012Validator,
)
from jsonschema.exceptions import SchemaError

from modelspec.diagnostics import Diagnostic, Place
from modelspec.document import Mapping, Node, Scalar, Sequence
from modelspec.grammar import NAME, Grammar, Schema, described, keys
from modelspec.merge import Steps, error, spelled, suggestion
from modelspec.resolve import plain
from modelspec.schema import ModelSpec

# The drafts that policies are written in; without `$schema` the first. Before the fourth a type could be a schema.
_DRAFTS: Final = {
    "https://json-schema.org/draft/2020-12/schema": Draft202012Validator,
    "https://json-schema.org/draft/2019-09/schema": Draft201909Validator,
    "http://json-schema.org/draft-07/schema": Draft7Validator,
    "http://json-schema.org/draft-06/schema": Draft6Validator,
    "http://json-schema.org/draft-04/schema": Draft4Validator,
}
# Keywords that by definition check nothing.
_SILENT = (
    *("$schema", "$id", "$anchor", "$dynamicAnchor", "$recursiveAnchor", "$vocabulary", "$comment", "$defs"),
    *("definitions", "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"),
    *("contentEncoding", "contentMediaType", "contentSchema"),
)
# What these say counts only beside one of others.
_BESIDE = {
    "then": ("if",),
    "else": ("if",),
    "if": ("then", "else"),
    "minContains": ("contains",),
    "maxContains": ("contains",),
    "additionalItems": ("items",),
}
# What keywords are about, as JSON Schema names it and as people do. All else holds whatever they say.
_ABOUT = {
    ("array", "lists"): (
        *("items", "prefixItems", "additionalItems", "unevaluatedItems", "contains", "minItems", "maxItems"),
        "uniqueItems",
    ),
    ("object", "maps"): (
        *("properties", "patternProperties", "additionalProperties", "unevaluatedProperties", "propertyNames"),
        *("required", "minProperties", "maxProperties", "dependentRequired", "dependentSchemas", "dependencies"),
    ),
    ("string", "text"): ("pattern", "minLength", "maxLength"),
    ("number", "numbers"): ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
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
    schema = plain(root)
    dialect = dialect_of(root)
    if dialect is None:
        place, help = root.entries["$schema"].node.place, f"write one of {', '.join(_DRAFTS)}"
        return [error("MS601", place, ("$schema",), "$schema names no draft that is read", help)]
    try:
        dialect.check_schema(schema)
    except SchemaError as wrong:
        entry_place = _place_of(root, tuple(wrong.absolute_path))
        message = wrong.message if len(wrong.message) <= 200 else f"{wrong.validator!r} of JSON Schema does not hold"
        return [error("MS601", entry_place, tuple(wrong.absolute_path), f"not a JSON Schema: {message}")]
    rules = _Rules(root, dialect)
    return sorted([*rules.problems(root, (), ((),)), *rules.dangling()], key=lambda each: each.place)


def dialect_of(root: Mapping) -> Any:
    """jsonschema's class for the draft that a policy is written in, None if it names none that is read."""
    named = plain(root.entries["$schema"].node) if "$schema" in root.entries else next(iter(_DRAFTS))
    return _DRAFTS.get(named.removesuffix("#")) if isinstance(named, str) else None


def as_schema(node: Node) -> Any:
    """The schema in a node as plain data, with `not: {}` for each schema in it that is `false`.

    Both allow nothing, but of `false` jsonschema does not tell where it stands and which value it forbids.
    """
    if isinstance(node, Scalar) and node.value is False:
        return {"not": {}}
    schema = plain(node)
    if isinstance(node, Mapping):
        for keyword, entry in node.entries.items():
            for step, child in _schemas(keyword, entry.node):
                if step is None:
                    schema[keyword] = as_schema(child)
                else:
                    schema[keyword][step] = as_schema(child)
    return schema


class _Rules:
    """Walks a policy; `at` are the places in a spec that a schema speaks of, none where that cannot be told."""

    def __init__(self, root: Mapping, dialect: Any) -> None:
        self.root = root
        self.draft = next(uri for uri, each in _DRAFTS.items() if each is dialect).split("/")[-2]
        self.checking = frozenset(dialect.VALIDATORS)
        self.moving = ("$schema", "id" if dialect is Draft4Validator else "$id")
        # Drafts from 2019 on know these.
        since_2019 = "dependentRequired" in self.checking
        self.keywords = (
            *dialect.VALIDATORS,
            *_SILENT,
            *(("then", "else") if "if" in self.checking else ()),
            *(("minContains", "maxContains") if since_2019 else ()),
            *(("id", "exclusiveMinimum", "exclusiveMaximum") if dialect is Draft4Validator else ()),
        )
        self.anchoring = ("$anchor", "$dynamicAnchor")[: since_2019 + ("$dynamicRef" in self.checking)]
        self.heeds_beside_ref = since_2019
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
                message = f"JSON Schema {self.draft} has no keyword {keyword!r}"
                yield error("MS601", entry.key_place, here, message, suggestion(keyword, self.keywords))
            elif keyword in self.moving and path:
                yield error("MS601", entry.key_place, here, f"{keyword} stands at the top of the policy only")
            elif keyword in self.anchoring:
                self.anchors.add(f"#{plain(entry.node)}")
            elif keyword in _REFERENCES and not str(plain(entry.node)).startswith("#"):
                help = "copy what it names into `$defs`, and write `$ref: '#/$defs/NAME'`"
                yield error("MS601", entry.node.place, here, "a policy refers to nothing outside of its file", help)
            elif keyword in _REFERENCES:
                self.references.append((entry.node, here))
            if silent := self.silent(keyword, schema, at):
                yield error("MS601", entry.key_place, here, *silent)
            else:
                yield from self.unknown(keyword, entry.node, here, at)
            for step, child in _schemas(keyword, entry.node):
                yield from self.problems(child, here if step is None else (*here, step), _under(keyword, step, at))

    def silent(self, keyword: str, schema: Mapping, at: tuple[Steps, ...]) -> tuple[str, str | None] | None:
        """Why a keyword could never speak in a schema at these places, and what helps."""
        if keyword == "format":
            return "formats are not checked", "write a `pattern`"
        others = _BESIDE.get(keyword, ())
        if others and not any(other in schema.entries for other in others):
            return f"{keyword!r} says nothing without {' or '.join(map(repr, others))}", None
        if not self.heeds_beside_ref and "$ref" in schema.entries and keyword in self.checking - {"$ref"}:
            return f"in {self.draft} nothing beside `$ref` is checked", "write both under `allOf`"
        kind = next((kind for kind, keywords in _ABOUT.items() if keyword in keywords), None)
        there = [each for place in at for each in _grammar().at(place)]
        if kind is None or not there or any(_type(each) in (kind[0], None) for each in there):
            return None
        where = " or ".join(spelled(place) or "the spec" for place in at)
        return f"{keyword!r} is about {kind[1]}, and {where} is {described(there)}", None

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
        case Sequence(items), _ if re.fullmatch("[0-9]{1,6}", str(step)) and int(step) < len(items):
            return items[int(step)], items[int(step)].place
    return None


def _schemas(keyword: str, node: Node) -> Iterator[tuple[str | int | None, Node]]:
    """The schemas under a keyword, with the step that leads to each, None for the value itself."""
    if keyword in _MAPS and isinstance(node, Mapping):
        # Of `dependencies` some are lists of keys.
        yield from ((name, e.node) for name, e in node.entries.items() if not isinstance(e.node, Sequence))
    elif keyword in _LISTS and isinstance(node, Sequence):
        yield from enumerate(node.items)
    elif keyword in _ONE:
        yield None, node


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


def _under(keyword: str, step: str | int | None, at: tuple[Steps, ...]) -> tuple[Steps, ...]:
    """The places that a schema under a keyword speaks of, of those that the one around it speaks of."""
    if keyword in _SAME:
        return at
    if keyword == "properties":
        return tuple((*place, str(step)) for place in at)
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


def _type(alternative: Schema) -> str | None:
    """The type of values that follow an alternative of the grammar, numbers of either kind as one."""
    kind = alternative.get("type")
    return "number" if kind == "integer" else kind


@cache
def _grammar() -> Grammar:
    return Grammar(ModelSpec.model_json_schema())
