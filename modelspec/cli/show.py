"""show: the spec as it resolves, and where every value was said."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from modelspec.cli.options import output_format, overrides, read

if TYPE_CHECKING:
    from modelspec.diagnostics import Place
    from modelspec.resolve import Resolved

Path = tuple[str | int, ...]


@click.command(name="show")
@click.argument("spec")
@overrides
@output_format("text", "yaml", "json")
def command(spec: str, overrides: tuple[str, ...], output: str) -> None:
    """Print the resolved SPEC and where each value comes from.

    Every default is written out. text puts the place behind each line; yaml is the spec alone and reads back; json
    holds the spec, and the place of every value by its path.
    """
    from modelspec import dump

    model, resolved = read(spec, overrides, as_json=output == "json")
    data = dump.as_data(model)
    if output == "yaml":
        click.echo(dump.dump(model), nl=False)
    elif output == "json":
        places = {".".join(map(str, path)): _place(resolved, path) for path in _leaves((), data)}
        click.echo(json.dumps({"spec": data, "provenance": places}, indent=2, ensure_ascii=False))
    else:
        rows = list(dump.lines(data, lambda path: _comment(resolved, path)))
        width = min(max(len(line) for line, _ in rows), 72)
        for line, note in rows:
            click.echo(f"{line:<{width}}  # {note}" if note else line)


def _leaves(path: Path, data: object) -> Iterator[Path]:
    """The path of every scalar."""
    if isinstance(data, dict | list):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from _leaves((*path, key), value)
    else:
        yield path


def _stated(resolved: "Resolved", path: Path) -> "Place | None":
    """Where the value is written; None for a default."""
    node = resolved.node(path)
    return None if node is None else node.place


def _place(resolved: "Resolved", path: Path) -> dict[str, str | int] | None:
    place = _stated(resolved, path)
    return None if place is None else {"file": place.file, "line": place.line, "column": place.column}


def _comment(resolved: "Resolved", path: Path) -> str:
    place = _stated(resolved, path)
    return "default" if place is None else f"{place.file}:{place.line}"
