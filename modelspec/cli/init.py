"""init: a new spec from a shipped one, a file or a Hugging Face config.json, at the same or another size."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from modelspec.schema import ModelSpec


@click.command(name="init")
@click.option("--from", "source", required=True, metavar="SPEC", help="A spec, modelspec:NAME, or a config.json.")
@click.option("--name", required=True, help="Name of the new spec.")
@click.option("--params", metavar="SIZE", help="Another size: 7b in all, or 3b-a500m with 500M active for one token.")
@click.option("-o", "--out", type=click.Path(), help="File to write. [default: NAME.yaml]")
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
def command(source: str, name: str, params: str | None, out: str | None, overwrite: bool) -> None:
    """Write a new spec that starts from another one: whole, valid, with the meaning of each key.

    With --params width, depth and experts are chosen so that the counts come near the wanted ones and the proportions
    stay: sizes of heads, experts per token, the mix of layers, the vocabulary.
    """
    from pydantic import ValidationError

    from modelspec.amount import amount
    from modelspec.cli.options import write
    from modelspec.init import draft, text
    from modelspec.scale import CLOSE, count, scale, wanted

    for option, given in (("--from", source), ("-o", out)):
        if given == "":
            raise click.BadParameter("it is empty; name a file", param_hint=option)
    try:
        size = None if params is None else wanted(params)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--params") from None
    spec, origin = _read(source)
    model = None if size is None else scale(spec.model, size)
    try:
        made = draft(spec, name, model)
    except ValidationError:
        message = f"{name!r}; a name has up to 64 letters, digits and . _ - and begins with a letter or a digit"
        raise click.BadParameter(message, param_hint="--name") from None
    file = _target(Path(f"{name}.yaml" if out is None else out), overwrite)
    write(text(made, origin, schema_seen_from(file), scaled=size is not None), file)
    counts = count(made.model)
    click.echo(f"{file}: {amount(counts.total)} parameters, {amount(counts.active)} active for one token")
    if size is not None:
        near = f"{counts.total / size.total - 1:+.1%} of the {amount(size.total)} asked for"
        if size.active is not None:
            near += f", {counts.active / size.active - 1:+.1%} of the {amount(size.active)} active"
        if size.farness(counts) > CLOSE:
            reached = f"reached {amount(counts.total)} parameters, {amount(counts.active)} active"
            steps = "widths, heads and experts come in steps"
            click.echo(f"warning: {reached}: off by {near}; {steps}", err=True)
        else:
            click.echo(f"off by {near}")
        click.echo(
            f"width {spec.model.hidden_size} -> {made.model.hidden_size}, "
            f"layers {spec.model.num_layers} -> {made.model.num_layers}" + _experts(spec, made)
        )


def _read(source: str) -> "tuple[ModelSpec, str]":
    """The source, and how the new spec names it. A bare name of no file is that of a shipped spec."""
    from modelspec.cli.options import read
    from modelspec.diagnostics import SpecError
    from modelspec.hf_config import spec_from_file

    path = Path(source)
    config = path / "config.json" if os.path.isdir(path) else path
    if config.suffix.lower() == ".json":
        if not os.path.isfile(config):
            raise click.UsageError(f"there is no file {config}")
        return spec_from_file(config, "source"), config.name
    shipped = source if source.startswith("modelspec:") else f"modelspec:{source}"
    where = source if os.path.exists(path) or path.suffix in (".yaml", ".yml") or "/" in source else shipped
    try:
        spec, _ = read(where, ())
    except SpecError as error:
        # A config.json by another name.
        if [(each.code, each.place.file) for each in error.diagnostics] != [("MS017", source)]:
            raise
        return spec_from_file(config, "source"), config.name
    return spec, spec.name


def _target(file: Path, overwrite: bool) -> Path:
    """The file to write, where a file can be written and none is in the way."""
    if not os.path.isdir(file.parent):
        raise click.UsageError(f"there is no folder {file.parent}; make it first")
    if os.path.exists(file) and not os.path.isfile(file):
        raise click.UsageError(f"{file} exists and is no file")
    if os.path.exists(file) and not overwrite:
        raise click.UsageError(f"{file} exists; --overwrite replaces it")
    return file


def schema_seen_from(file: Path) -> str:
    """The schema that comes with the package, by a path that holds wherever the file's project lies."""
    from modelspec.init import SCHEMA
    from modelspec.resolve import project

    schema = Path(__file__).resolve().parents[1] / "spec.schema.json"
    inside = schema.is_relative_to(project(file))
    return Path(os.path.relpath(schema, os.path.dirname(os.path.realpath(file)))).as_posix() if inside else SCHEMA


def _experts(old: "ModelSpec", new: "ModelSpec") -> str:
    from modelspec.schema import MoE

    pairs = [(old.model.ffn[name], ffn) for name, ffn in new.model.ffn.items()]
    numbers = [f"{a.num_experts} -> {b.num_experts}" for a, b in pairs if isinstance(a, MoE) and isinstance(b, MoE)]
    return f", experts {', '.join(dict.fromkeys(numbers))}" if numbers else ""
