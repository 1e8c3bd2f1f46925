"""The language and hardware files as JSON Schema 2020-12, each in two forms, both derived from the schema classes.

`resolved` is the grammar of a spec as it resolves: strict, with everything required that has no default. `authoring` is
that of a file as people write it, for editors: it may extend others and variants may be `like` a sibling, so nothing is
required and null removes; only lists replace as a whole, and what stands in them is complete.
"""

from collections.abc import Callable
from typing import Any

from modelspec.schema import ModelSpec
from modelspec.schema.base import unit_of
from modelspec.schema.hardware import Hardware

Schema = dict[str, Any]

DIALECT = "https://json-schema.org/draft/2020-12/schema"
# Pydantic's spelling where a validator runs before the bound is checked.
_RESPELLED = {"ge": "minimum", "le": "maximum", "gt": "exclusiveMinimum", "lt": "exclusiveMaximum"}
_EXTENDS: Schema = {
    "description": "specs that this one builds on: files, or modelspec:NAME for a shipped one",
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}],
}
_LIKE: Schema = {"description": "a sibling of the same map and type that this variant differs from", "type": "string"}


def resolved() -> Schema:
    """The schema of a resolved spec. What it cannot express are the relations between keys."""
    return _Writer(ModelSpec.model_json_schema(), partial=False).write("resolved", "A resolved modelspec spec")


def authoring() -> Schema:
    """The schema of a spec file: knows `extends` and `like`, requires nothing outside of lists, lets null remove."""
    schema = _Writer(ModelSpec.model_json_schema(), partial=True).write("authoring", "A modelspec spec file")
    schema["properties"] = {"extends": _EXTENDS} | schema["properties"]
    return schema


def hardware(*, resolved: bool = False) -> Schema:
    """The schema of a hardware file, which may extend another; or `resolved`, where everything required stands."""
    schema = _Writer(Hardware.model_json_schema(), partial=not resolved).write(
        "hardware-resolved" if resolved else "hardware", "A modelspec hardware file"
    )
    if not resolved:
        described = "what this one builds on: files, or modelspec:hardware/NAME for what ships"
        schema["properties"] = {"extends": _EXTENDS | {"description": described}} | schema["properties"]
    return schema


class _Writer:
    """Rewrites pydantic's schema node by node; a class is written once in each of the two moods, whole and partial."""

    def __init__(self, source: Schema, *, partial: bool) -> None:
        self.source, self.partial = source, partial
        self.definitions: dict[str, Schema] = {}

    def write(self, form: str, title: str) -> Schema:
        """The whole document."""
        root = {key: value for key, value in self.source.items() if key != "$defs"}
        body = self._node(root, self.partial)
        head = {"$schema": DIALECT, "$id": f"urn:modelspec:schema:1:{form}", "title": title}
        body["type"] = "object"
        return head | body | {"$defs": dict(sorted(self.definitions.items()))}

    def _node(self, node: Schema, partial: bool, variant: bool = False) -> Schema:
        """One node; `partial` where another file may complete it, `variant` where it may be like a sibling."""
        if "$ref" in node:
            return _described(node) | self._reference(node["$ref"].rpartition("/")[2], partial, variant)
        union = node.get("oneOf") or node.get("anyOf")
        if union is not None:
            return _described(node) | self._union(node, union, partial, variant)
        written = {_RESPELLED.get(key, key): value for key, value in node.items() if key not in ("title", "default")}
        written |= _described(node)
        if node.get("type") == "array":
            written |= {_of_arrays(key): written.pop(key) for key in ("minLength", "maxLength") if key in written}
            for key in ("items", "prefixItems"):
                if key in node:
                    # A list replaces as a whole: nothing completes what stands in it.
                    written[key] = self._each(node[key], lambda item: self._node(item, partial=False))
        if "properties" in node:
            written["properties"] = {
                key: self._optional(key, child, node, partial) for key, child in node["properties"].items()
            }
            if variant:
                written["properties"]["like"] = _LIKE
            if partial:
                written.pop("required", None)
        if "patternProperties" in node:
            # The named variants of the model.
            written["patternProperties"] = {
                pattern: self._nullable(self._node(child, partial, variant=partial), partial)
                for pattern, child in node["patternProperties"].items()
            }
            written["additionalProperties"] = False
            if partial:
                written.pop("minProperties", None)
        return written

    def _optional(self, key: str, child: Schema, parent: Schema, partial: bool) -> Schema:
        """The value of a key: null where another file's value may be removed, or where it means absent."""
        needed = key in parent.get("required", ())
        return self._nullable(self._node(child, partial), partial and not (needed and key == "type"))

    def _nullable(self, node: Schema, may_be_null: bool) -> Schema:
        if not may_be_null or _takes_null(node):
            return node
        if isinstance(node.get("type"), str) and "const" not in node and "enum" not in node:
            return node | {"type": [node["type"], "null"]}
        kept = {key: node[key] for key in ("description", "default", "unit", "examples") if key in node}
        inner = {key: value for key, value in node.items() if key not in kept}
        return kept | {"anyOf": [*(inner["anyOf"] if inner.keys() == {"anyOf"} else [inner]), {"type": "null"}]}

    def _reference(self, name: str, partial: bool, variant: bool) -> Schema:
        mood = f"{name}.variant" if variant else f"{name}.part" if partial else name
        if mood not in self.definitions:
            self.definitions[mood] = {}
            self.definitions[mood] = self._node(self.source["$defs"][name], partial, variant)
        return {"$ref": f"#/$defs/{mood}"}

    def _union(self, node: Schema, union: list[Schema], partial: bool, variant: bool) -> Schema:
        members = [member for member in union if member.get("type") != "null"]
        null: list[Schema] = [{"type": "null"}] if len(members) < len(union) else []
        if len(members) == 1:
            only = self._node(members[0], partial, variant)
            return self._nullable(only, bool(null))
        choices = [self._node(member, partial, variant) for member in members]
        if partial and "discriminator" in node:
            # Without its `type`, which a file may inherit, a map may be of any of the classes.
            strict = {
                "properties": {"type": {"enum": list(node["discriminator"]["mapping"])}},
                "oneOf": _typed(choices),
            }
            return {"if": {"required": ["type"]}, "then": strict, "else": {"anyOf": choices}}
        return {"anyOf": [*choices, *null]}

    @staticmethod
    def _each(value: Any, write: Callable[[Schema], Schema]) -> Any:
        return [write(item) for item in value] if isinstance(value, list) else write(value)


def _typed(choices: list[Schema]) -> list[Schema]:
    return [{"allOf": [choice, {"required": ["type"]}]} for choice in choices]


def _of_arrays(key: str) -> str:
    return key.replace("Length", "Items")


def _takes_null(node: Schema) -> bool:
    kinds = node.get("type")
    return (isinstance(kinds, list) and "null" in kinds) or any(
        choice.get("type") == "null" for choice in node.get("anyOf", ())
    )


def _described(node: Schema) -> Schema:
    """What a reader is told: meaning, unit, default, examples."""
    told: Schema = {key: node[key] for key in ("description", "examples") if key in node}
    if node.get("default") is not None:
        told["default"] = node["default"]
    if unit := unit_of(node.get("description", "")):
        told["unit"] = unit
    return told
