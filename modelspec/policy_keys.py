"""What is wrong with a policy before it meets a spec: a rule that could never speak is an error, not silence.

JSON Schema ignores keywords that it does not know and properties that never come. In a policy both are typing errors,
and the rule would hold for every spec. So keywords are compared with those of JSON Schema, and the keys under
`properties` with those that a spec may have at that place.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any, Final, cast

from jsonschema import validators
from jsonschema.exceptions import SchemaError

from modelspec.diagnostics import Diagnostic
from modelspec.document import Entry, Mapping, Node, Scalar, Sequence
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
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
# Under these a schema speaks of the same value as the one around it.
_SAME = ("not", "if", "then", "else", "allOf", "anyOf", "oneOf", "dependentSchemas")


def problems(root: Mapping) -> list[Diagnostic]:
    """Everything for which a policy is refused, as MS601."""
    schema = {key: plain(entry.node) for key, entry in root.entries.items()}
    # Without a default of its own jsonschema takes an unknown draft for the newest. Its stubs know no None.
    dialect = validators.validator_for(schema, default=cast("Any", None)) if "$schema" in schema else _default()
    if dialect is None:
        entry = root.entries["$schema"]
        return [error("MS601", entry.node.place, ("$schema",), "$schema names no known draft", f"write {DIALECT}")]
    try:
        dialect.check_schema(schema)
    except SchemaError as wrong:
        entry_place = _place_of(root, tuple(wrong.absolute_path))
        message = wrong.message if len(wrong.message) <= 200 else f"{wrong.validator!r} of JSON Schema does not hold"
        return [error("MS601", entry_place, tuple(wrong.absolute_path), f"not a JSON Schema: {message}")]
    return list(_Rules((*dialect.VALIDATORS, *_SILENT)).problems(root, (), ()))


class _Rules:
    """Walks a policy; `at` is the place in a spec that a schema speaks of, None where it cannot be told."""

    def __init__(self, keywords: tuple[str, ...]) -> None:
        self.keywords = keywords

    def problems(self, schema: Node, path: Steps, at: Steps | None) -> Iterator[Diagnostic]:
        if not isinstance(schema, Mapping):
            return
        for keyword, entry in schema.entries.items():
            here = (*path, keyword)
            if keyword not in self.keywords:
                message = f"JSON Schema has no keyword {keyword!r}"
                yield error("MS601", entry.key_place, here, message, suggestion(keyword, self.keywords))
            elif keyword == "$schema" and path:
                yield error("MS601", entry.key_place, here, "$schema stands at the top of the policy only")
            elif keyword in _REFERENCES and not str(plain(entry.node)).startswith("#"):
                help = "copy what it names into `$defs`, and write `$ref: '#/$defs/NAME'`"
                yield error("MS601", entry.node.place, here, "a policy refers to nothing outside of its file", help)
            for step, child in _schemas(keyword, entry.node):
                if keyword == "properties" and at is not None:
                    yield from self.unknown(entry.node, step, (*here, step), at)
                yield from self.problems(child, (*here, step) if step != "" else here, _below(keyword, step, at))

    def unknown(self, properties: Node, key: str | int, path: Steps, at: Steps) -> Iterator[Diagnostic]:
        """A key that no spec has at this place."""
        around = _grammar().at(at)
        known = keys(around)
        free = any("patternProperties" in each or isinstance(each.get("additionalProperties"), dict) for each in around)
        if key not in known and not free and isinstance(properties, Mapping):
            where = f"in {spelled(at)}" if at else "at the top level"
            help = suggestion(str(key), known) or (f"the keys there are {', '.join(known)}" if known else None)
            place = properties.entries[str(key)].key_place
            yield error("MS601", place, path, f"no spec has a key {key!r} {where}", help)


def _schemas(keyword: str, node: Node) -> Iterator[tuple[str | int, Node]]:
    """The schemas under a keyword, with the step that leads to each, '' for the value itself."""
    if keyword in _MAPS and isinstance(node, Mapping):
        yield from ((name, entry.node) for name, entry in node.entries.items())
    elif keyword in _LISTS and isinstance(node, Sequence):
        yield from enumerate(node.items)
    elif keyword in _ONE:
        yield "", node


def _below(keyword: str, step: str | int, at: Steps | None) -> Steps | None:
    """The place that a schema under a keyword speaks of."""
    if at is None or keyword in _SAME:
        return at
    if keyword == "properties":
        return (*at, step)
    if keyword in ("items", "contains", "prefixItems"):
        return (*at, 0)
    if keyword in ("additionalProperties", "patternProperties"):
        # Any key: only in a map with free names do all values follow one grammar.
        return (*at, NAME) if not keys(_grammar().at(at)) else None
    return None


def _place_of(root: Mapping, path: Steps) -> Any:
    node: Node = root
    place = root.place
    for step in path:
        match node:
            case Mapping(entries) if step in entries:
                entry: Entry = entries[str(step)]
                node, place = entry.node, entry.key_place
            case Sequence(items):
                node = items[int(step)]
                place = node.place
    return node.place if isinstance(node, Scalar) else place


@cache
def _grammar() -> Grammar:
    return Grammar(ModelSpec.model_json_schema())


def _default() -> Any:
    return validators.validator_for({"$schema": DIALECT})
