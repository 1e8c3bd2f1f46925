"""Devices and machines as data: the files beside this one, and any that a user writes.

A hardware file is read, composed and checked by the machinery of specs: it may `extends` another file, or a shipped one
as `modelspec:hardware/NAME`, and whatever is wrong is a diagnostic with file, line and column.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

from pydantic import ValidationError

from modelspec.checks.finding import did_you_mean
from modelspec.diagnostics import Diagnostic, Place, Related, SpecError
from modelspec.grammar import Grammar
from modelspec.hardware.relations import relations
from modelspec.merge import spelled
from modelspec.resolve import Resolved, resolve
from modelspec.schema.hardware import Hardware
from modelspec.shape import told

__all__ = ["Hardware", "load", "names"]

_FOLDER = Path(__file__).parent
_EXAMPLE = "for example: extends: modelspec:hardware/h100, and a name"
_AS_HARDWARE = {
    "MS006": ("the file is empty", _EXAMPLE),
    "MS007": ("a second document begins here", "keep one device per file"),
    "MS008": ("a hardware file is a map of keys to values", _EXAMPLE),
}


def names() -> tuple[str, ...]:
    """The hardware that comes with modelspec."""
    return tuple(sorted(file.stem for file in _FOLDER.glob("*.yaml")))


def load(name_or_path: str | os.PathLike[str]) -> Hardware:
    """The hardware of a shipped name, or in a file: what has a separator or the suffix of YAML in it.

    Raises SpecError with everything that is wrong, with exit code 2 where there is no such name or file.
    """
    try:
        resolved = resolve(_file(os.fspath(name_or_path)))
    except SpecError as error:
        raise SpecError(map(_of_hardware, error.diagnostics), error.sources, error.exit_code) from None
    data = resolved.data()
    if resolved.extended:
        data.setdefault("summary", f"Extends {' and '.join(Path(file).stem for file in resolved.extended)}.")
    try:
        hardware = Hardware.model_validate(data)
    except ValidationError as error:
        found = told(error.errors(include_url=False), resolved, _grammar())
        raise SpecError(_in_order(found, resolved), resolved.documents) from None
    if wrong := [*_placed(hardware, resolved), *_borrowed(resolved)]:
        raise SpecError(_in_order(wrong, resolved), resolved.documents)
    return hardware


def _of_hardware(fault: Diagnostic) -> Diagnostic:
    """What a reader of specs says of a text that is none, said of a hardware file."""
    message, help = _AS_HARDWARE.get(fault.code, (fault.message, fault.help))
    return replace(fault, message=message, help=help)


def _file(name: str) -> str:
    if not name:
        message, hint = "the name of the hardware is empty", f"name a file or one of {', '.join(names())}"
        raise SpecError([Diagnostic("MS001", "error", Place("--hardware", 1, 1), "", message, hint)], exit_code=2)
    if os.sep in name or name.endswith((".yaml", ".yml")):
        return name
    if name not in names():
        message = f"no hardware of the name {name!r} comes with modelspec"
        hint = f"{did_you_mean(name, names())}; a file of your own is named by its path, like ./{name}.yaml"
        raise SpecError([Diagnostic("MS001", "error", Place(name, 1, 1), "", message, hint)], exit_code=2)
    return str(_FOLDER / f"{name}.yaml")


@cache
def _grammar() -> Grammar:
    return Grammar(Hardware.model_json_schema())


def _placed(hardware: Hardware, resolved: Resolved) -> Iterator[Diagnostic]:
    for finding in relations(hardware):
        place = resolved.marked(finding.path)
        origin = resolved.origin(finding.path, place)
        yield Diagnostic(
            finding.code, "error", place, spelled(finding.path), finding.message, finding.help, related=origin
        )


def _borrowed(resolved: Resolved) -> Iterator[Diagnostic]:
    """A price of one's own under the source of the file that is extended."""
    price, source = (resolved.place(("price", key)) for key in ("usd_per_hour", "source"))
    if price.file != source.file:
        related = (Related("price.source", source, "the source of the price that is overridden"),)
        message, help = "the price is another than its source asks", "write usd_per_hour, source and date together"
        yield Diagnostic("MS705", "error", price, "price.usd_per_hour", message, help, related)


def _in_order(diagnostics: list[Diagnostic], resolved: Resolved) -> list[Diagnostic]:
    files = list(resolved.documents)
    return sorted(diagnostics, key=lambda each: (files.index(each.place.file), each.place, each.code))
