"""doctor: the environment against a spec, one line for each thing that training needs."""

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from modelspec.cli.options import allow_outside, diagnostics_json, output_format, overrides, read

if TYPE_CHECKING:
    from modelspec.doctor import Line
    from modelspec.schema import ModelSpec

_MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}


@click.command(name="doctor")
@click.argument("spec")
@overrides
@allow_outside
@click.option("--device", help="Like cpu or cuda:0. [default: a GPU if there is one]")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run. [default: runs/NAME]")
@click.option("--head", metavar="HOST:PORT", help="Also meet the other machines of a job at the first one.")
@click.option("--nodes", type=click.IntRange(min=1), default=1, help="Machines of the job.", show_default=True)
@click.option("--node", type=click.IntRange(min=0), default=0, help="Number of this machine.", show_default=True)
@click.option("--patience", type=click.IntRange(min=1), default=60, help="Seconds to wait there.", show_default=True)
@output_format("text", "json")
def command(
    spec: str,
    overrides: tuple[str, ...],
    allow_outside: bool,
    device: str | None,
    out: Path | None,
    head: str | None,
    nodes: int,
    node: int,
    patience: int,
    output: str,
) -> None:
    """Compare this environment with SPEC: versions, device, memory, disk, tokenizer, world.

    SPEC may also be a folder of ours or of Hugging Face, or a config.json, which says nothing of training.

    Exits 0 if nothing fails, 3 if the environment lacks something, 1 if only the spec does not fit it. Memory and disk
    are estimates.
    """
    from modelspec import doctor
    from modelspec.environment import environment

    meeting = None if head is None else _meeting(head, nodes, node)
    where = _file(spec)
    if Path(where).name == "config.json":
        if overrides:
            raise click.UsageError(f"--set changes specs; `modelspec init --from {spec}` makes one of this config")
        model = _from_config(Path(where), as_json=output == "json")
    else:
        model, _ = read(where, overrides, as_json=output == "json", allow_outside=allow_outside)
    lines = doctor.examine(model, environment(model, device, out or Path("runs", model.name)))
    if meeting is not None and doctor.exit_code(lines) == 0:
        lines = (*lines, _met(*meeting, nodes, node, patience))
    code = doctor.exit_code(lines)
    if output == "json":
        click.echo(json.dumps({"ok": code == 0, "lines": [line.as_json() for line in lines]}, indent=2))
    else:
        for line in lines:
            click.echo(f"{_MARKS[line.status]}  {line.subject:10} {line.message}")
            if line.remedy and line.status != "ok":
                click.echo(f"      {'':10} help: {line.remedy}")
    raise click.exceptions.Exit(code)


def _meeting(head: str, nodes: int, node: int) -> tuple[str, int]:
    """Where the machines of a job meet: host and port."""
    host, _, port = head.rpartition(":")
    if not host or not re.fullmatch(r"[1-9]\d{0,4}", port) or int(port) >= 2**16:
        raise click.BadParameter(f"{head!r} is not like node-0:29500", param_hint="--head")
    if node >= nodes:
        raise click.BadParameter(f"{node}; machines are numbered from 0 to {nodes - 1}", param_hint="--node")
    return host.strip("[]"), int(port)


def _met(host: str, port: int, nodes: int, node: int, patience: int) -> "Line":
    """Whether the machines of a job meet; only a machine that is fit keeps the others waiting."""
    from modelspec.doctor import Line
    from modelspec.launch.reach import reach

    if problem := reach(host, port, nodes, node, patience):
        return Line("network", "fail", problem, "open the port between the machines, or see why one is missing", 3)
    return Line("network", "ok", f"all {nodes} machines reach {host}" if nodes > 1 else f"{host} is this machine alone")


def _file(spec: str) -> str:
    """The file that speaks for a folder: of ours or of Hugging Face."""
    if not os.path.isdir(spec):
        return spec
    return next(
        (file for name in ("spec.yaml", "config.json") if os.path.exists(file := os.path.join(spec, name))), spec
    )


def _from_config(config: Path, as_json: bool) -> "ModelSpec":
    from modelspec.diagnostics import Diagnostic, Place
    from modelspec.hf_config import HFError, spec_from_file

    try:
        return spec_from_file(config, "config")
    except HFError as error:
        if not as_json:
            raise
        message = str(error).removeprefix(f"{config}: ")
        click.echo(diagnostics_json(False, [Diagnostic("MS017", "error", Place(str(config), 1, 1), "", message)]))
        raise click.exceptions.Exit(error.exit_code) from error
