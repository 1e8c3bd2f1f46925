"""diff: what changes between two specs, by what each change does to a checkpoint and to training."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from modelspec.cli.costs import cost_lines, tensor_count, tensor_lines
from modelspec.cli.options import allow_outside, diagnostics_json, hardware, output_file, output_format, write

if TYPE_CHECKING:
    from modelspec.cli.revision import Earlier
    from modelspec.diagnostics import Diagnostic, SpecError
    from modelspec.diff import Change, Class, Summary
    from modelspec.schema import ModelSpec

GIT = "git:"
_WIDTH = 60
_WORD = re.compile("[-+]?[0-9][0-9.e+-]*|[A-Za-z][A-Za-z0-9]*")
# With too many layers, or layers that name no variant, a spec describes no model that could be compared.
_NO_MODEL = {"MS301", "MS302"}


@click.command(name="diff")
@click.argument("old")
@click.argument("new", required=False)
@click.option("--against", metavar="git:REF", help="Compare with the same file at a git revision, as the old side.")
@hardware("h800")
@output_format("text", "json", "markdown", "html")
@output_file
@click.option("--breaking", is_flag=True, help="Exit 1 for a checkpoint-breaking change without a waiver.")
@allow_outside
def command(
    old: str,
    new: str | None,
    against: str | None,
    hardware: str,
    output: str,
    file: Path | None,
    breaking: bool,
    allow_outside: bool,
) -> None:
    """Compare two specs as models: every change with its class.

    OLD and NEW are specs, runs and checkpoints, or Hugging Face folders or config.json files. With --against only
    one is given, and it is the new one. html is a page with both models as a picture.
    """
    from modelspec.diagnostics import SpecError
    from modelspec.diff import diff, summarize, waived
    from modelspec.hardware import load

    if (new is None) == (against is None):
        raise click.UsageError("give OLD and NEW, or one spec and --against git:REF")
    try:
        device = load(hardware)
        before, after = _sides(old, new, against, allow_outside)
    except (SpecError, click.UsageError) as error:
        if output != "json":
            raise
        click.echo(diagnostics_json(False, _diagnostics(error)))
        raise click.exceptions.Exit(error.exit_code) from error
    changes, summary = diff(before, after), summarize(before, after, device)
    match output:
        case "json":
            plain = {
                "changes": [change.as_json() | _waiver(waived(change, after)) for change in changes],
                "summary": summary.as_json(),
            }
            text = json.dumps(plain, indent=2, ensure_ascii=False) + "\n"
        case "html":
            from modelspec.picture import comparison

            text = comparison(before, after, device)
        case "markdown":
            text = "".join(f"{line}\n" for line in _markdown(before, after, changes, summary))
        case _:
            text = "".join(f"{line}\n" for line in _text(before, after, changes, summary))
    write(text, file)
    if breaking and any(
        change.change_class == "checkpoint-breaking" and waived(change, after) is None for change in changes
    ):
        raise click.exceptions.Exit(1)


class _NoSide(click.UsageError):
    """An argument that leads to no spec; `where` is what it says, or which one it is."""

    def __init__(self, where: str, message: str) -> None:
        super().__init__(message)
        self.where = where


def _sides(old: str, new: str | None, against: str | None, allow_outside: bool) -> "tuple[ModelSpec, ModelSpec]":
    """Both specs. Raises SpecError with all that is wrong with either, and UsageError where there is none."""
    from modelspec.cli.revision import at_revision

    for role, where in (("OLD", old), ("NEW", new)):
        if where == "":
            role = role if against is None else "SPEC"
            raise _NoSide(
                role, f"{role} is empty; name a spec, a run or a checkpoint, or a Hugging Face folder or config.json"
            )
    if new is not None:
        return _both(lambda: _read(old, allow_outside), lambda: _read(new, allow_outside))
    assert against is not None
    revision = against.removeprefix(GIT)
    if revision == against or revision.startswith("-"):
        raise click.UsageError(f"--against {against}: must be git:REF, such as git:main")
    with at_revision(old, revision) as earlier:
        if not os.path.exists(earlier.path):
            raise _NoSide(old, f"{old}: does not exist at {revision}")
        return _both(lambda: _read_earlier(earlier), lambda: _read(old, allow_outside))


def _both(old: "Callable[[], ModelSpec]", new: "Callable[[], ModelSpec]") -> "tuple[ModelSpec, ModelSpec]":
    from modelspec.diagnostics import SpecError

    specs: list[ModelSpec] = []
    failed: list[SpecError] = []
    for read in (old, new):
        try:
            specs.append(read())
        except SpecError as error:
            failed.append(error)
    if failed:
        # A file may be on both sides, or be extended by both.
        found = dict.fromkeys(each for error in failed for each in error.diagnostics)
        sources = {file: text for error in failed for file, text in error.sources.items()}
        raise SpecError(found, sources, max(error.exit_code for error in failed))
    before, after = specs
    return before, after


def _read_earlier(earlier: "Earlier") -> "ModelSpec":
    """The spec as it was; errors speak of the repository, not of the folder that stands for it."""
    from modelspec.diagnostics import SpecError

    try:
        return _read(earlier.path)
    except SpecError as error:
        raise earlier.told(error) from None
    except _NoSide as error:
        named = earlier.named(error.where)
        raise _NoSide(named, error.message.replace(error.where, named)) from None


def _read(where: str, allow_outside: bool = False) -> "ModelSpec":
    """The spec at a path, in the form that its files have. It must describe a model, not pass every check."""
    from modelspec.diagnostics import SpecError
    from modelspec.resolve import resolve
    from modelspec.validate import check

    path = Path(where)
    if os.path.isdir(path):
        ours = [path / "spec.yaml", path / "config.json"]
        found = next((file for file in ours if os.path.exists(file)), None)
        if found is None:
            raise _NoSide(where, f"{where}: a folder with neither spec.yaml nor config.json")
        path = found
    if path.suffix.lower() == ".json":
        return _read_config(path)
    resolved = resolve(where if where.startswith("modelspec:") else str(path), allow_outside=allow_outside)
    spec, diagnostics = check(resolved)
    if [(each.code, each.place.file) for each in diagnostics] == [("MS017", str(path))]:
        # A config.json by another name.
        return _read_config(path)
    errors = [each for each in diagnostics if each.severity == "error"]
    if spec is None or any(each.code in _NO_MODEL for each in errors):
        raise SpecError(errors, resolved.documents)
    return spec


def _read_config(path: Path) -> "ModelSpec":
    """The spec of a config.json of Hugging Face."""
    from modelspec.diagnostics import SpecError
    from modelspec.hf_config import HFError, spec_from_file

    try:
        return spec_from_file(path, "config")
    except HFError as error:
        told = _whole_file("MS017", str(path), str(error).removeprefix(f"{path}: "))
        raise SpecError([told], exit_code=error.exit_code) from None


def _diagnostics(error: "SpecError | click.UsageError") -> "Iterable[Diagnostic]":
    """What is wrong, in the form of `validate`."""
    if isinstance(error, click.UsageError):
        where = error.where if isinstance(error, _NoSide) else "--against"
        return [_whole_file("MS001", where, error.message)]
    return error.diagnostics


def _whole_file(code: str, file: str, message: str) -> "Diagnostic":
    from modelspec.diagnostics import Diagnostic, Place

    return Diagnostic(code, "error", Place(file, 1, 1), "", message)


def _text(old: "ModelSpec", new: "ModelSpec", changes: "list[Change]", summary: "Summary") -> Iterator[str]:
    from modelspec.diff import waived

    yield f"{old.name} -> {new.name}"
    for change_class, group in _by_class(changes):
        yield f"\n{change_class}"
        width = min(max(len(change.path) for change in group), _WIDTH)
        for change in group:
            yield f"  {_sign(change)} {change.path:{width}}  {_told(change)}"
            if (reason := waived(change, new)) is not None:
                yield f"      waived: {reason}"
    yield ""
    yield from _numbers(summary)
    tensors = list(tensor_lines(summary.tensors))
    width = min(max((len(name) for name, _ in tensors), default=0), _WIDTH)
    for name, told in tensors:
        yield f"  {name:{width}}  {told}" if name else f"  {told}"


def _markdown(old: "ModelSpec", new: "ModelSpec", changes: "list[Change]", summary: "Summary") -> Iterator[str]:
    from modelspec.diff.words import value as said

    yield f"### {old.name} → {new.name}\n"
    for change_class, group in _by_class(changes):
        yield f"**{change_class}**\n\n| | key | before | after |\n|---|---|---|---|"
        for change in group:
            cells = (_cell(said(value)) for value in (change.before, change.after))
            yield f"| {_sign(change)} | `{change.path}` | {' | '.join(cells)} |"
        yield ""
    for line in _numbers(summary):
        yield f"- {line}"
    for name, told in tensor_lines(summary.tensors):
        yield f"  - `{name}` {told}" if name else f"  - {told}"


def _cell(text: str) -> str:
    """A text in a cell of a table: a number or a word as it is, all else as code, where no mark and no name acts."""
    if _WORD.fullmatch(text):
        return text
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if "`" in (text[0], text[-1]) else ""
    return f"{fence}{pad}{text}{pad}{fence}".replace("|", r"\|")


def _by_class(changes: "list[Change]") -> "Iterator[tuple[Class, list[Change]]]":
    from modelspec.diff import CLASSES

    for change_class in CLASSES:
        if group := [change for change in changes if change.change_class == change_class]:
            yield change_class, group


def _waiver(reason: str | None) -> dict[str, str]:
    return {} if reason is None else {"waived": reason}


def _sign(change: "Change") -> str:
    return "+" if change.before is None else "-" if change.after is None else "~"


def _told(change: "Change") -> str:
    from modelspec.diff.words import value as said

    return " -> ".join(said(value) for value in (change.before, change.after) if value is not None)


def _numbers(summary: "Summary") -> Iterator[str]:
    if not any(summary.classes.values()):
        yield "no change"
        return
    yield ", ".join(f"{number} {change_class}" for change_class, number in summary.classes.items() if number)
    for key, (before, after) in summary.parameters.items():
        if before != after:
            yield f"{key} parameters: {before:,} -> {after:,} ({after - before:+,})"
    yield from cost_lines(summary)
    yield tensor_count(summary.tensors)
