"""Plain data as YAML that readers of YAML 1.1 and 1.2 take for the same: text is quoted unless it is plainly a word."""

import json
import re
from collections.abc import Iterator
from typing import Any

# Letters that no reader takes for a number, a truth value or structure.
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*")
_TRUTH = re.compile(r"y|yes|n|no|true|false|on|off|null|inf|nan", re.IGNORECASE)


def document(content: dict[str, Any]) -> str:
    """The text of a map: maps and lists in block style, long text as literal lines."""
    return "".join(f"{line}\n" for line in _map(content, ""))


def _map(content: dict[str, Any], indent: str) -> Iterator[str]:
    for key, value in content.items():
        yield from _entry(f"{indent}{_text(key)}:", value, indent + "  ")


def _list(content: list[Any], indent: str) -> Iterator[str]:
    for item in content:
        if isinstance(item, dict) and item:
            first, *rest = _map(item, indent + "  ")
            yield f"{indent}- {first[len(indent) + 2 :]}"
            yield from rest
        else:
            yield from _entry(f"{indent}-", item, indent + "  ")


def _entry(head: str, value: Any, indent: str) -> Iterator[str]:
    match value:
        case dict() if value:
            yield head
            yield from _map(value, indent)
        case list() if value:
            yield head
            yield from _list(value, indent)
        case str() if _is_literal(value):
            yield f"{head} |"
            yield from (f"{indent}{line}" if line else "" for line in value.removesuffix("\n").split("\n"))
        case str():
            yield f"{head} {_text(value)}"
        case _:
            yield f"{head} {json.dumps(value)}"


def _is_literal(text: str) -> bool:
    """Whether a text of several lines reads back from a literal block."""
    *lines, end = text.split("\n")
    whole = all(line == line.rstrip() and line.replace("\t", "").isprintable() for line in lines)
    return len(lines) > 1 and not end and whole and lines[-1] != "" and lines[0] == lines[0].lstrip() != ""


def _text(text: str) -> str:
    if _WORD.fullmatch(text) and not _TRUTH.fullmatch(text):
        return text
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if character.isascii() and character.isprintable():
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
