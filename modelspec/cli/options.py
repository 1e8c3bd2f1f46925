"""Options that several commands share, and how they read a spec."""

import errno
import json
import os
from collections.abc import Callable, Iterable
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelspec.amount import amount as amount

if TYPE_CHECKING:
    from rich.table import Table

    from modelspec.diagnostics import Diagnostic
    from modelspec.plan import Parameters
    from modelspec.resolve import Resolved
    from modelspec.schema import ModelSpec

# What files of this program have near their beginning and hardly any others.
HTML_SIGN, SVG_SIGN, PNG_SIGN = "Content-Security-Policy", "schedules-title", "modelspec"

overrides = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a value of the spec, like model.layers.1.repeat=4 or precision.fp8=null. May be given several times.",
)
allow_outside = click.option("--allow-outside", is_flag=True, help="Specs may extend files outside of their project.")


def hardware(default: str | None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`--hardware`, a name or a file for `modelspec.hardware.load`; its help names what ships."""
    from modelspec.hardware import names

    return click.option(
        "--hardware",
        default=default,
        show_default=True,
        metavar="NAME|FILE",
        help=f"Device that it runs on: {', '.join(names())}, or a file like ./mine.yaml.",
    )


def output_format(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`--format`, with the first name as the default."""
    return click.option(
        "--format", "output", type=click.Choice(names), default=names[0], show_default=True, help="Form of the output."
    )


def read(
    spec: str, overrides: Iterable[str], as_json: bool = False, *, allow_outside: bool = False
) -> "tuple[ModelSpec, Resolved]":
    """The valid spec and its resolved document.

    Ends the command with all diagnostics where there are errors: as JSON on stdout if that was asked for, else on
    stderr, by raising SpecError.
    """
    from modelspec.diagnostics import SpecError
    from modelspec.resolve import resolve
    from modelspec.validate import check

    try:
        resolved = resolve(spec, tuple(overrides), allow_outside=allow_outside)
        model, diagnostics = check(resolved)
        errors = [diagnostic for diagnostic in diagnostics if diagnostic.severity == "error"]
        if model is None or errors:
            raise SpecError(errors, resolved.documents)
    except SpecError as error:
        if not as_json:
            raise
        click.echo(diagnostics_json(False, error.diagnostics))
        raise click.exceptions.Exit(error.exit_code) from error
    return model, resolved


def diagnostics_json(valid: bool, diagnostics: "Iterable[Diagnostic]") -> str:
    """The JSON document of `validate`."""
    from modelspec.report import legible

    found = [diagnostic.as_json() for diagnostic in diagnostics]
    return legible(json.dumps({"valid": valid, "diagnostics": found}, indent=2, ensure_ascii=False))


def table(title: str, first: str, *numbers: str) -> "Table":
    """A table whose first column is text and whose others are numbers."""
    from rich.table import Table

    shown = Table(title=title, title_justify="left", box=None, pad_edge=False)
    shown.add_column(first)
    for heading in numbers:
        shown.add_column(heading, justify="right")
    return shown


def print_table(table: "Table") -> None:
    """Prints a rich table, never cut: a terminal breaks lines that are too long for it, and a file has no width."""
    from rich.console import Console
    from rich.measure import Measurement

    for column in table.columns:
        column.no_wrap = True
    console = Console(highlight=False)
    wide = console.options.update(width=10_000)
    least = 0 if console.is_terminal else 200
    width = max(least, console.width, Measurement.get(console, wide, table).maximum)
    Console(highlight=False, width=width).print(table, soft_wrap=True)


def size(counts: "Parameters") -> str:
    """How large a model is, as `plan` counts it."""
    mtp = f" + {amount(counts.mtp)} MTP" if counts.mtp else ""
    return f"{amount(counts.total)} parameters{mtp}"


output_file = click.option(
    "-o", "file", type=click.Path(dir_okay=False, path_type=Path), help="File to write to. [default: stdout]"
)


def require_finite(context: click.Context) -> None:
    """Raises BadParameter for a number of an option that is none or has no end, which every range lets pass."""
    for option in context.command.params:
        value = context.params.get(option.name or "")
        if isinstance(value, float) and not isfinite(value):
            raise click.BadParameter(f"{value:g} is not a finite number", context, option)


def may_write(file: Path | None, sign: str | None, *suffixes: str) -> Path | None:
    """The file that an option is to write: new, or one that the same command wrote, with `sign` near its beginning.

    Raises BadParameter for any other; without a sign for every file that is there.
    """
    wanted = f"must end in {' or '.join(suffixes)}"
    if file == Path():
        raise click.BadParameter(f"names no file{'; it ' + wanted if suffixes else ''}")
    if file is not None and suffixes and file.suffix not in suffixes:
        raise click.BadParameter(f"{file}: {wanted}")
    if file is not None and os.path.isfile(file) and not _is_ours(file, sign):
        written = "exists, and this command did not write it" if sign else "exists"
        raise click.BadParameter(f"{file}: {written}; remove it or name another file")
    return file


def _is_ours(file: Path, sign: str | None) -> bool:
    """Whether a file has a sign near its beginning, or nothing at all."""
    try:
        with file.open("rb") as stream:
            start = stream.read(2048)
    except OSError:
        return False
    return not start or (sign is not None and sign.encode() in start)


def write(content: str | bytes, file: Path | None, option: str = "-o") -> None:
    """Prints the content, or makes a file hold it; the file is then whole or as it was."""
    from modelspec.files import write_whole
    from modelspec.report import legible

    if isinstance(content, str):
        content = legible(content)
    if file is None:
        click.echo(content, nl=False)
        return
    # Not by methods of Path, which raise for a name that is too long.
    if os.path.exists(file) and not os.path.isfile(file):
        raise click.UsageError(f"{option} {file}: must be a file")
    try:
        write_whole(file, content)
    except OSError as error:
        # What the disk refuses is the environment's failure; a path that leads nowhere is the user's.
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
            raise
        hint = "" if error.errno == errno.ENAMETOOLONG else "; it must be in a folder that exists"
        raise click.UsageError(f"{option} {file}: {error.strerror}{hint}") from error
