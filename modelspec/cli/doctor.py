"""doctor: the environment against a spec, one line for each thing that training needs."""

import json
from pathlib import Path

import click

from modelspec.cli.options import allow_outside, output_format, overrides, read

_MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}


@click.command(name="doctor")
@click.argument("spec")
@overrides
@allow_outside
@click.option("--device", help="Like cpu or cuda:0. [default: a GPU if there is one]")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run. [default: runs/NAME]")
@output_format("text", "json")
def command(
    spec: str, overrides: tuple[str, ...], allow_outside: bool, device: str | None, out: Path | None, output: str
) -> None:
    """Compare this environment with SPEC: versions, device, memory, disk, tokenizer, world.

    Exits 0 if nothing fails, 3 if the environment lacks something, 1 if only the spec does not fit it. Memory and disk
    are estimates.
    """
    from modelspec import doctor
    from modelspec.environment import environment

    model, _ = read(spec, overrides, as_json=output == "json", allow_outside=allow_outside)
    lines = doctor.examine(model, environment(model, device, out or Path("runs", model.name)))
    code = doctor.exit_code(lines)
    if output == "json":
        click.echo(json.dumps({"ok": code == 0, "lines": [line.as_json() for line in lines]}, indent=2))
    else:
        for line in lines:
            click.echo(f"{_MARKS[line.status]}  {line.subject:10} {line.message}")
            if line.remedy and line.status != "ok":
                click.echo(f"      {'':10} help: {line.remedy}")
    raise click.exceptions.Exit(code)
