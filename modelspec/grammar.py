"""Questions about the language itself: which keys are legal where, what a value must be, where a key belongs.

The answers are read off the JSON Schema that pydantic derives from the schema classes, so there is no second grammar.
An *alternative* is one schema that a value may follow: a map of one class, a list, a number, a word. A place where the
language offers a choice, such as attention's `type`, has several.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

Schema = dict[str, Any]
Loc = tuple[str | int, ...]

NAME = "NAME"
INDEX = "N"


@dataclass(frozen=True, slots=True)
class Position:
    """Where an error of pydantic's stands: its path in the spec, without the tags of unions that `loc` mentions.

    `value` holds the alternatives of the value there, `around` those of the map or list around it, only that of its
    `type` where there is one.
    """

    path: Loc
    value: tuple[Schema, ...]
    around: tuple[Schema, ...]


class Grammar:
    """The language as a JSON Schema. `maps` holds every map of it and the way there: NAME is any name, N any index."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.maps = tuple(self.maps_below(schema))

    def position(self, loc: Loc) -> Position:
        """The place that pydantic's `loc` speaks of."""
        path: Loc = ()
        here, value, around = [self.schema], [self.schema], [self.schema]
        for part in loc:
            tagged = [choice for node in here for choice in self._choices(node) if "oneOf" in choice]
            if tagged:
                # In a tagged union `loc` names the branch taken; only unions by `type` say which schema that is.
                here = [branch for union in tagged for branch in self._branches(union, part)]
            elif part == "[key]":
                break
            else:
                around = here
                value = here = [child for node in here for child in self._children(node, part)]
                path = (*path, part)
        return Position(path, tuple(self.alternatives(value)), tuple(self.alternatives(around)))

    def alternatives(self, nodes: Iterable[Schema]) -> Iterator[Schema]:
        """The nodes with every choice among schemas written out; null, which is never written, left out."""
        for node in nodes:
            for choice in self._choices(node):
                if "oneOf" in choice:
                    yield from self.alternatives(choice["oneOf"])
                elif choice.get("type") != "null":
                    yield choice

    def at(self, path: Loc) -> tuple[Schema, ...]:
        """The alternatives of the value at a path of a spec."""
        here = [self.schema]
        for step in path:
            here = [child for node in self.alternatives(here) for child in self._children(node, step)]
        return tuple(self.alternatives(here))

    def maps_below(self, node: Schema, path: Loc = ()) -> Iterator[tuple[Loc, Schema]]:
        """The maps that a value may hold, itself included, and the way to each."""
        for alternative in self.alternatives([node]):
            properties = alternative.get("properties", {})
            if properties:
                yield path, alternative
            below = list(properties.items()) + [(NAME, child) for child in _of_any_name(alternative)]
            if isinstance(alternative.get("items"), dict):
                below.append((INDEX, alternative["items"]))
            for step, child in below:
                yield from self.maps_below(child, (*path, step))

    @cached_property
    def ways(self) -> tuple[Loc, ...]:
        """The way to every key, every named variant and every item of a list, each once."""
        found: dict[Loc, None] = {}
        for way, schema in self.maps:
            for key, child in schema["properties"].items():
                found[*way, key] = None
                if any(choice.get("type") == "array" for choice in self.alternatives([child])):
                    found[*way, key, INDEX] = None
            if way:
                found[way] = None
        return tuple(found)

    def _choices(self, node: Schema) -> list[Schema]:
        """The node behind its reference, or the members of its plain union."""
        if "$ref" in node:
            return self._choices(self.schema["$defs"][node["$ref"].rpartition("/")[2]])
        if "anyOf" in node:
            return [choice for member in node["anyOf"] for choice in self._choices(member)]
        return [node]

    def _branches(self, union: Schema, tag: str | int) -> list[Schema]:
        mapping = union.get("discriminator", {}).get("mapping", {})
        return [{"$ref": mapping[tag]}] if tag in mapping else list(union["oneOf"])

    def _children(self, node: Schema, part: str | int) -> Iterator[Schema]:
        for choice in self._choices(node):
            if isinstance(part, int):
                if part < len(choice.get("prefixItems", ())):
                    yield choice["prefixItems"][part]
                elif isinstance(choice.get("items"), dict):
                    yield choice["items"]
            elif part in choice.get("properties", {}):
                yield choice["properties"][part]
            else:
                yield from _of_any_name(choice)


def _of_any_name(schema: Schema) -> list[Schema]:
    """What the values of a map with free names follow."""
    additional = schema.get("additionalProperties")
    return [*schema.get("patternProperties", {}).values(), *([additional] if isinstance(additional, dict) else [])]


def keys(alternatives: Iterable[Schema]) -> list[str]:
    """Every key that one of the maps knows, in order."""
    return list(dict.fromkeys(key for alternative in alternatives for key in alternative.get("properties", {})))


def words(alternatives: Iterable[Schema]) -> list[Any]:
    """The values that are listed one by one."""
    return [word for node in alternatives for word in ([node["const"]] if "const" in node else node.get("enum", []))]


def described(alternatives: Iterable[Schema]) -> str:
    """What a value must be, as a phrase: "an integer from 1 to 64", "a map or 'none'"."""
    alternatives = list(alternatives)
    kinds = dict.fromkeys(_described(node) for node in alternatives if not words([node]))
    listed = [repr(word) for word in words(alternatives)]
    if len(listed) > 1 and not kinds:
        return f"one of {', '.join(listed)}"
    return " or ".join([*kinds, *listed])


def _described(node: Schema) -> str:
    match node.get("type"):
        case "integer":
            return f"an integer{_range(node)}"
        case "number":
            return f"a number{_range(node)}"
        case "string":
            return f"text of the form {node['pattern']}" if "pattern" in node else f"text{_length(node)}"
        case "boolean":
            return "true or false"
        case "array":
            return "a list" + (f" of {node['maxItems']}" if node.get("maxItems") == node.get("minItems", -1) else "")
        case "object":
            return "a map"
        case _:
            return "something else"


def _length(node: Schema) -> str:
    least, most = node.get("minLength", 0), node.get("maxLength")
    if most is not None:
        return f" of {least} to {most} characters" if least else f" of at most {most} characters"
    return f" of at least {least} character{'s' * (least > 1)}" if least else ""


def bounds(node: Schema) -> tuple[float | None, float | None]:
    """The least and the greatest legal number, where there are such."""
    # Pydantic writes `ge` for `minimum` where a validator runs before the bound is checked.
    return node.get("minimum", node.get("ge")), node.get("maximum", node.get("le"))


def _range(node: Schema) -> str:
    (low, high), above, below = bounds(node), node.get("exclusiveMinimum"), node.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f" from {low} to {high}"
    lower = f" of at least {low}" if low is not None else f" above {above}" if above is not None else ""
    upper = f" of at most {high}" if high is not None else f" below {below}" if below is not None else ""
    return f"{lower} and{upper.removeprefix(' of')}" if lower and upper else lower or upper
