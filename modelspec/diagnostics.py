"""What is wrong with a spec, as values: where it stands, what it is, and what to do about it.

A `Diagnostic` is one finding with a stable code. It is made where the fault is found, collected, sorted, and only at
the very end turned into text (`render`) or into JSON (`Diagnostic.as_json`). `SpecError` carries a batch of them out
of a function that could not return its value, together with the source texts that `render` quotes.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal
from unicodedata import east_asian_width

Severity = Literal["error", "warning", "info"]

# A code never changes its meaning and is never reused. The first digit says which step speaks.
CODES: Final[Mapping[str, str]] = MappingProxyType(
    {
        # Reading a file
        "MS001": "the file cannot be read: it is missing, forbidden, a directory or a device",
        "MS002": "the text is larger than any spec needs to be",
        "MS003": "the file is not UTF-8 text",
        "MS004": "the text holds a character that is not allowed in YAML",
        "MS005": "the text is not YAML 1.2",
        "MS006": "the file holds no document",
        "MS007": "the file holds more than one document",
        "MS008": "the document is not a map",
        "MS009": "maps and lists are nested too deeply",
        "MS010": "there are too many values, counted with every alias written out",
        "MS011": "a YAML tag; specs are plain data",
        "MS012": "a key stands twice in the same map",
        "MS013": "a key is not plain text",
        "MS014": "a merge key `<<`; `extends` and `like` take its place",
        "MS015": "an alias to an anchor that does not exist or is not finished",
        "MS016": "a number that is not finite or does not fit 64 bits",
        "MS017": "a config.json of Hugging Face where a spec is wanted, or one that cannot be read as a spec",
        "MS018": "a plan.json that cannot be read as a plan",
        "MS019": "the spec is not the one that was planned",
        # Composing: extends, --set, like
        "MS101": "`extends` is neither a path nor a list of paths",
        "MS102": "a spec named by `extends` cannot be read",
        "MS103": "a file outside of the project: the spec, or one that it extends; or `extends` names no file",
        "MS104": "specs extend one another in a circle",
        "MS105": "specs extend one another too deeply, or too many are involved",
        "MS111": "`--set` is not of the form KEY=VALUE",
        "MS112": "`--set` names a place that the spec does not have",
        "MS121": "`like` names no sibling",
        "MS122": "variants are `like` one another in a circle",
        "MS123": "`like` names a sibling of another type",
        # Shape: each value by itself
        "MS201": "a key that the language does not know at this place",
        "MS202": "a required key is missing",
        "MS203": "a value of the wrong type",
        "MS204": "a number out of range",
        "MS205": "a value that is none of the legal ones",
        "MS206": "a `type` that does not exist at this place",
        "MS207": "text of the wrong form",
        "MS208": "a list or map of the wrong length",
        "MS209": "more faults of shape than are shown",
        "MS210": "the path of a waiver is none that a change can have",
        # Relations between values have the codes from MS301 to MS5xx, which the checks explain.
        # An organisation's policy
        "MS601": "the policy is no JSON Schema that can be applied",
        "MS602": "a rule of the policy does not hold",
        "MS603": "the policy takes more steps or time than any policy needs, or refers to itself without end",
        # A hardware file
        "MS701": "a narrower format multiplies no slower than a wider one",
        "MS702": "a fast domain is made of whole nodes",
        "MS703": "memory is no slower than links, and links inside a domain no slower than the network",
        "MS704": "a source speaks of figures that the file has",
        "MS705": "a price and its source stand in one file",
        "MS706": "the software of a hardware file is calibrated",
    }
)


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A position in a text; line and column count from 1. For `--set` the file is "--set", the line its number."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True, slots=True)
class Related:
    """Another place that has to do with a finding; `path` is spelled as in `--set`."""

    path: str
    place: Place
    message: str


@dataclass(frozen=True, slots=True)
class Fix:
    """A misspelt key or word at the place of a finding, and the only one that can have been meant."""

    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One finding: a code of `CODES`, the place and path of the value at fault, what is wrong and what helps."""

    code: str
    severity: Severity
    place: Place
    path: str
    message: str
    help: str | None = None
    related: tuple[Related, ...] = ()
    fix: Fix | None = None

    def as_json(self) -> dict[str, Any]:
        """The finding as plain data with fixed keys."""
        return {
            "code": self.code,
            "severity": self.severity,
            **_place_as_json(self.place),
            "path": self.path,
            "message": self.message,
            "help": self.help,
            "related": [
                {"path": note.path, **_place_as_json(note.place), "message": note.message} for note in self.related
            ],
        }


class SpecError(Exception):
    """A spec that cannot be used, with all reasons found in one pass.

    `exit_code` is 1, or 2 when the input could not be read at all. `sources` maps file names to their texts.
    """

    def __init__(
        self, diagnostics: Iterable[Diagnostic], sources: Mapping[str, str] | None = None, exit_code: int = 1
    ) -> None:
        self.diagnostics = tuple(diagnostics)
        self.sources = dict(sources or {})
        self.exit_code = exit_code
        super().__init__(self.diagnostics, self.sources, exit_code)

    def __str__(self) -> str:
        return "\n".join(render(diagnostic, self.sources.get) for diagnostic in self.diagnostics)


def render(diagnostic: Diagnostic, source: Callable[[str], str | None]) -> str:
    """The finding as text for people: one line that tools can jump from, the source line, a caret, help, notes.

    `source` gives the text of a file by its name, or None where there is none to quote.
    """
    lines = [_printable(f"{diagnostic.place}: {diagnostic.severity}[{diagnostic.code}]: {diagnostic.message}")]
    lines += _excerpt(diagnostic.place, source(diagnostic.place.file))
    if diagnostic.help:
        lines.append(f"  help: {_printable(diagnostic.help)}")
    for note in diagnostic.related:
        lines.append(_printable(f"  note: {note.place}: {note.message}"))
        # The line of the finding itself has been shown.
        if (note.place.file, note.place.line) != (diagnostic.place.file, diagnostic.place.line):
            lines += _excerpt(note.place, source(note.place.file))
    return "\n".join(lines)


def _place_as_json(place: Place) -> dict[str, Any]:
    return {"file": place.file, "line": place.line, "column": place.column}


def _printable(text: str) -> str:
    """The text without anything that would move a terminal's cursor or change its colours."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _excerpt(place: Place, text: str | None) -> list[str]:
    """The source line of a place with its number, and a caret under its word."""
    lines = re.split(r"\r\n|\r|\n", text) if text else []
    if place.line > len(lines) or not lines[place.line - 1].strip():
        return []
    # Long lines are shown as the window around the place.
    start = max(0, place.column - 80)
    line = _printable(lines[place.line - 1].replace("\t", " "))[start : start + 120]
    at = min(place.column - 1 - start, len(line))
    word = re.match(r"[\w.+-]{1,60}", line[at:])
    margin = " " * len(str(place.line))
    indent = "".join("  " if east_asian_width(character) in "WF" else " " for character in line[:at])
    carets = "^" * (len(word.group()) if word else 1)
    return [f"  {place.line} | {line.rstrip()}", f"  {margin} | {indent}{carets}"]
