"""A layout as a spec of its own: an overlay that extends the searched spec and says how it is spread over devices."""

from collections.abc import Sequence
from typing import Any

from modelspec.dump import Path, lines
from modelspec.schema import Parallelism, Strict

_COLUMN = 44
_WIDTH = 120


def overlay(schema_file: str, head: Sequence[str], data: dict[str, Any]) -> str:
    """The text of an overlay: its data, `extends` first, with a comment behind each key of the layout.

    `schema_file` is the path of the authoring schema from beside the file, `head` are sentences for people.
    """
    text = [f"# yaml-language-server: $schema={schema_file}", *(f"# {line}" for line in head)]
    for line, comment in lines(data, _meaning):
        if line[0] != " " and line.endswith(":"):
            text.append("")
        beside = f"{line:<{_COLUMN}}  # {comment}"
        if not comment:
            text.append(line)
        elif len(beside) <= _WIDTH:
            text.append(beside)
        else:
            text += [f"{' ' * (len(line) - len(line.lstrip(' ')))}# {comment}", line]
    return "\n".join(text) + "\n"


def _meaning(path: Path) -> str:
    """What a key below `parallelism` means."""
    if path[0] != "parallelism":
        return ""
    at: type[Strict] = Parallelism
    for step in path[1:-1]:
        annotation = at.model_fields[str(step)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, Strict)):
            return ""
        at = annotation
    field = at.model_fields.get(str(path[-1]))
    return "" if field is None else (field.description or "").partition(". ")[0]
