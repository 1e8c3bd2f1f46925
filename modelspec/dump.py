"""A spec back to text: block style, short values in one line, and a comment behind each line if wanted.

The text reads back to the same spec. Only scalars that YAML 1.2 would take for something else are quoted.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from modelspec.schema import ModelSpec

Path = tuple[str | int, ...]

# A list item is written in one line if it fits here.
ITEM_WIDTH = 90

# Text that needs no quotes: starts with a letter and holds nothing that YAML reads as structure or as another type.
_PLAIN = re.compile(r"[A-Za-z_/.][A-Za-z0-9_/.+*-]*( [A-Za-z0-9_/.+*()-]+)*")
# Line ends of YAML that are none of JSON's.
_LINE_ENDS = str.maketrans({"\x85": r"\N", "\u2028": r"\L", "\u2029": r"\P"})
_RESERVED = re.compile(r"null|true|false|~|\.inf|\.nan|[-+.]?[0-9].*", re.IGNORECASE)


def dump(spec: ModelSpec) -> str:
    """The whole spec as YAML, every default written out."""
    return "".join(f"{line}\n" for line, _ in lines(as_data(spec)))


def digest(text: str) -> str:
    """The SHA-256 of a spec's text, as `dump` writes it: by this runs and plans know their spec."""
    return hashlib.sha256(text.encode()).hexdigest()


def as_data(spec: ModelSpec) -> dict[str, Any]:
    """The spec as plain data, without what is left out."""
    return spec.model_dump(mode="json", exclude_none=True)


def lines(data: dict[str, Any], comment: Callable[[Path], str] = lambda _: "") -> Iterator[tuple[str, str]]:
    """Each line of the YAML text with the comment of the value that it shows."""
    yield from _map((), data, "", comment)


def _map(path: Path, data: dict[str, Any], indent: str, comment: Callable[[Path], str]) -> Iterator[tuple[str, str]]:
    for key, value in data.items():
        at = (*path, key)
        if isinstance(value, dict) and value:
            yield f"{indent}{_scalar(key)}:", ""
            yield from _map(at, value, indent + "  ", comment)
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            yield f"{indent}{_scalar(key)}:", ""
            for index, item in enumerate(value):
                yield from _item((*at, index), item, indent + "  ", comment)
        else:
            yield f"{indent}{_scalar(key)}: {flow(value)}", comment(at)


def _item(path: Path, item: Any, indent: str, comment: Callable[[Path], str]) -> Iterator[tuple[str, str]]:
    """A list item: in one line if it is short, else as a block behind a dash."""
    line = flow(item)
    if not isinstance(item, dict) or len(indent) + len(line) <= ITEM_WIDTH:
        yield f"{indent}- {line}", comment(path)
        return
    dash = "- "
    for line, note in _map(path, item, indent + "  ", comment):
        yield (indent + dash + line[len(indent) + 2 :] if dash else line), note
        dash = ""


def flow(value: Any) -> str:
    """A value in one line, as YAML writes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_scalar(key)}: {flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(flow, value)) + "]"
    return _scalar(value)


def _scalar(value: Any) -> str:
    if isinstance(value, str) and _PLAIN.fullmatch(value) and not _RESERVED.fullmatch(value):
        return value
    return json.dumps(value, ensure_ascii=False).translate(_LINE_ENDS)
