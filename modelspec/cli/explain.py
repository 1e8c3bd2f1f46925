"""explain: what a key or a diagnostic code means."""

import json
import re
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import TYPE_CHECKING

import click

from modelspec.cli.options import output_format

if TYPE_CHECKING:
    from modelspec.explain import Code, Key


@click.command(name="explain")
@click.argument("what", metavar="KEY_OR_CODE")
@output_format("text", "json")
def command(what: str, output: str) -> None:
    """Say what a key means, like model.ffn.moe.router.scale, or a code, like MS304.

    Where a spec has a name of its author's choice any name will do; * stands for any key. Exits 1 for what does not
    exist; as JSON that is a code without a meaning, or no keys and the nearest that there are.
    """
    from modelspec.explain import explain_code, explain_key, nearest_keys

    if re.fullmatch("(?i)ms[0-9]+", what, re.ASCII):
        code = explain_code(what)
        if code is None:
            if output == "json":
                click.echo(json.dumps({"code": what.upper(), "meaning": None}))
            click.echo(f"error: no diagnostic has the code {what}\n  help: docs/diagnostics.md lists them", err=True)
            raise click.exceptions.Exit(1)
        click.echo(json.dumps(code.as_json()) if output == "json" else _code(code))
        return
    keys = explain_key(what)
    if not keys:
        near = nearest_keys(what)
        if output == "json":
            click.echo(json.dumps({"keys": [], "nearest": near}, indent=2, ensure_ascii=False))
        help = f"\n  help: did you mean {' or '.join(near)}?" if near else ""
        click.echo(f"error: the language has no key {what}{help}", err=True)
        raise click.exceptions.Exit(1)
    if output == "json":
        click.echo(json.dumps({"keys": [key.as_json() for key in keys]}, indent=2, ensure_ascii=False))
    else:
        click.echo("\n\n".join("\n".join(_text(key)) for key in keys))


def _text(key: "Key") -> Iterator[str]:
    yield f"{key.path}  (of {key.owner})"
    yield f"  {key.meaning}"
    yield f"  value     {key.legal}{f', in {key.unit}' if key.unit and key.unit != 'no unit' else ''}"
    yield f"  default   {'none: it is required' if key.default is None else key.default}"
    if key.examples:
        yield f"  example   {', '.join(key.examples)}"
    for number, (value, specs) in enumerate(_by_value(key.specs)):
        yield f"  {'' if number else 'specs':8}  {value}: {', '.join(specs)}"
    for number, code in enumerate(key.checks):
        yield f"  {'' if number else 'checks':8}  {_code(code)}"


def _by_value(specs: Mapping[str, tuple[str, ...]]) -> list[tuple[str, list[str]]]:
    """Values that specs have, each with the names of those specs; the commonest first."""
    pairs = sorted((value, name) for name, values in specs.items() for value in values)
    groups = [(value, [name for _, name in group]) for value, group in groupby(pairs, key=lambda pair: pair[0])]
    return sorted(groups, key=lambda group: -len(group[1]))


def _code(code: "Code") -> str:
    return f"{code.code}: {code.meaning}"
