"""show: the spec as it resolves, where every value was said, and the model as a picture."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from modelspec.cli.options import allow_outside, output_file, output_format, overrides, read, write

if TYPE_CHECKING:
    from modelspec.diagnostics import Place
    from modelspec.resolve import Resolved
    from modelspec.schema import ModelSpec

Keys = tuple[str | int, ...]


@click.command(name="show")
@click.argument("spec")
@overrides
@allow_outside
@output_format("text", "yaml", "json", "html", "svg")
@output_file
def command(spec: str, overrides: tuple[str, ...], allow_outside: bool, output: str, file: Path | None) -> None:
    """Print the resolved SPEC and where each value comes from, or draw its model.

    Every default is written out. text puts the place behind each line; yaml is the spec alone and reads back; json
    holds the spec, and the place of every value by its path. html is a page with the model as a picture, svg a picture
    for papers.
    """
    model, resolved = read(spec, overrides, as_json=output == "json", allow_outside=allow_outside)
    write(_rendered(model, resolved, output), file)


def _rendered(model: "ModelSpec", resolved: "Resolved", output: str) -> str:
    """The text of one format, ending in a newline."""
    from modelspec import dump, picture

    data = dump.as_data(model)
    match output:
        case "html":
            return picture.page(model)
        case "svg":
            return picture.figure(model)
        case "yaml":
            return dump.dump(model)
        case "json":
            places = {".".join(map(str, path)): _place(resolved, path) for path in _leaves((), data)}
            return json.dumps({"spec": data, "provenance": places}, indent=2, ensure_ascii=False) + "\n"
        case _:
            rows = list(dump.lines(data, lambda path: _comment(resolved, path)))
            width = min(max(len(line) for line, _ in rows), 72)
            return "".join(f"{line:<{width}}  # {note}\n" if note else f"{line}\n" for line, note in rows)


def _leaves(path: Keys, data: object) -> Iterator[Keys]:
    """The path of every scalar."""
    if isinstance(data, dict | list):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from _leaves((*path, key), value)
    else:
        yield path


def _stated(resolved: "Resolved", path: Keys) -> "Place | None":
    """Where the value is written; None for a default."""
    node = resolved.node(path)
    return None if node is None else node.place


def _place(resolved: "Resolved", path: Keys) -> dict[str, str | int] | None:
    place = _stated(resolved, path)
    return None if place is None else {"file": place.file, "line": place.line, "column": place.column}


def _comment(resolved: "Resolved", path: Keys) -> str:
    place = _stated(resolved, path)
    return "default" if place is None else f"{place.file}:{place.line}"
