"""What people usually mean when they write something that the language does not have."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import ceil, floor

from modelspec.diagnostics import Diagnostic
from modelspec.document import Mapping, Node, Scalar
from modelspec.grammar import INDEX, NAME, Grammar, Loc, Schema, bounds, keys, words
from modelspec.merge import error, nearest, spelled
from modelspec.resolve import Resolved

_YES = {
    "yes": "true",
    "on": "true",
    "y": "true",
    "no": "false",
    "off": "false",
    "n": "false",
    "1": "true",
    "0": "false",
}
_LARGEST = 2**63 - 1
_SUFFIXES = {"k": 3, "m": 6, "b": 9, "g": 9, "t": 12}


def another_format(resolved: Resolved) -> Diagnostic | None:
    """What to do with a config.json of Hugging Face, of which every key would be an error; None of anything else."""
    entries = resolved.root.entries
    path = next((key for key in ("model_type", "architectures") if key in entries), None)
    if path is None or "model" in entries:
        return None
    place = entries[path].key_place
    help = (
        f"`modelspec init --from {place.file} --name NAME` writes a spec of it, `modelspec import DIR` takes over the "
        "checkpoint in its folder, and `modelspec diff` compares it with a spec"
    )
    told = error("MS017", place, (path,), "this is a config.json of Hugging Face, not a spec", help)
    return replace(told, related=resolved.origin((path,), place))


def key_hint(key: str, around: Loc, known: list[str], grammar: Grammar, resolved: Resolved) -> str:
    """Where a key that is unknown in the map at `around` would be legal; `known` are those that are legal there."""
    if key == "like":
        return "`like` stands in a variant under model.attention or model.ffn"
    if key == "extends":
        return "`extends` stands at the top level of a file"
    if ":" in key:
        return "write a space after the colon"
    others = [schema for schema in grammar.at(around) if key in keys([schema])]
    if types := [repr(word) for word in _types(others)]:
        return f"{key!r} is a key of the type {' and '.join(types)}"
    if others and isinstance(here := resolved.node(around), Mapping):
        strangers = [name for name in here.entries if name not in keys(others)]
        company = [name for other in others for name in other.get("required", []) if name not in here.entries]
        return (
            f"{key!r} does not go with {strangers[0]!r}" if strangers else f"{key!r} goes with {' and '.join(company)}"
        )
    places = _places(key, around, grammar, resolved)
    if places:
        return f"{key!r} belongs under {' or '.join(places)}; the keys here are {', '.join(known)}"
    everywhere = sorted({name for _, schema in grammar.maps for name in keys([schema])})
    near = nearest(key, everywhere, 0.8)
    if near in known:
        return f"it looks like {near!r}, which stands here already"
    places = _places(near, around, grammar, resolved) if near else []
    if places:
        return f"did you mean {near!r}, which belongs under {' or '.join(places)}?"
    return f"the keys here are {', '.join(known)}"


def _places(key: str, around: Loc, grammar: Grammar, resolved: Resolved) -> list[str]:
    """Where the key is legal, as near to `around` as possible; nothing when that could be anywhere."""
    ways = list(dict.fromkeys(way for way, schema in grammar.maps if key in keys([schema])))
    shared = {way: sum(1 for _ in _common(way, around)) for way in ways}
    best = [way for way in ways if shared[way] == max(shared.values())]
    named = dict.fromkeys(spelled(path) for way in best for path in _concrete(way, key, around, grammar, resolved))
    return list(named) if len(named) <= 3 else []


def _common(way: Loc, around: Loc) -> Iterator[None]:
    for step, actual in zip(way, around, strict=False):
        if step not in (actual, NAME, INDEX):
            return
        yield None


def _concrete(way: Loc, key: str, around: Loc, grammar: Grammar, resolved: Resolved) -> list[Loc]:
    """The way with the names of the spec's own variants, and with the list items around."""
    paths: list[Loc] = [()]
    for index, step in enumerate(way):
        if step == NAME:
            paths = [
                (*path, name)
                for path in paths
                if isinstance(node := resolved.node(path), Mapping)
                for name in node.entries
                if _leads_to(key, way[index + 1 :], (*path, name), grammar, resolved)
            ] or [(*path, NAME) for path in paths]
        elif step == INDEX and len(around) > index and isinstance(around[index], int):
            paths = [(*path, around[index]) for path in paths]
        else:
            paths = [(*path, step) for path in paths]
    return paths


def _leads_to(key: str, rest: Loc, variant: Loc, grammar: Grammar, resolved: Resolved) -> bool:
    """Whether the type of this variant has the key at the end of the rest of the way."""
    kind = resolved.node((*variant, "type"))
    schemas = [schema for schema in grammar.at(variant) if isinstance(kind, Scalar) and kind.value in _types([schema])]
    return any(
        path == rest and key in keys([found]) for schema in schemas for path, found in grammar.maps_below(schema)
    )


def _types(schemas: Iterable[Schema]) -> list[object]:
    return words(schema.get("properties", {}).get("type", {}) for schema in schemas)


def value_hint(node: Node | None, legal: tuple[Schema, ...]) -> str | None:
    """How the given value would be written where one of these schemas is expected."""
    kinds = {str(schema.get("type")) for schema in legal}
    if not isinstance(node, Scalar):
        return None
    text = node.text.strip()
    if kinds & {"integer", "number"} and isinstance(node.value, str):
        return _number_hint(text)
    integers = [schema for schema in legal if schema.get("type") == "integer"]
    if isinstance(node.value, float) and integers and "number" not in kinds:
        return _integer_hint(node.value, integers[0])
    if "boolean" in kinds and text.lower() in _YES:
        return f"write {_YES[text.lower()]}"
    if (
        any(schema.get("type") == "string" and not words([schema]) for schema in legal)
        and not isinstance(node.value, str)
        and text
    ):
        return f"quote it to make it text: '{text}'"
    if "object" in kinds and text in _types(legal):
        return f"write {{type: {text}}}"
    if kinds == {"string"} and isinstance(node.value, str):
        return next((f"for example: {name}" for schema in legal for name in schema.get("examples", [])), None)
    if kinds == {"array"} and text:
        return f"write a list: [{text}]"
    return None


def _integer_hint(value: float, schema: Schema) -> str:
    """The legal integers next to a number."""
    low, high = bounds(schema)
    high = _LARGEST if high is None else high
    if low is not None and value < low:
        return f"write an integer of at least {low}"
    if value > high:
        return f"write an integer of at most {high}"
    return f"write {' or '.join(map(str, sorted({floor(value), ceil(value)})))}: this is counted in integers"


def _number_hint(text: str) -> str | None:
    if re.fullmatch(r"[-+]?[0-9][0-9_]*", text) and "_" in text:
        return f"write {text.replace('_', '')}: numbers have no underscores in YAML 1.2"
    if re.fullmatch(r"[0-9]{1,3}(,[0-9]{3})+", text):
        return f"write {text.replace(',', '')}"
    if re.fullmatch(r"[-+]?[0-9.]+([eE][-+]?[0-9]+)?", text):
        return "remove the quotes"
    if found := re.fullmatch(r"([0-9]{1,6})([kKmMbBgGtT])", text):
        digits, suffix = found.groups()
        binary = f", or {int(digits) * 1024} for {digits} x 1024" if suffix in "kK" else ""
        return f"write {digits}{'0' * _SUFFIXES[suffix.lower()]}{binary}"
    return None
