"""What validate found in several specs, for programs that show it: one module per format, each one function.

A renderer takes results and gives text. Formats for code hosts speak of files in the repository that they run in, by
their path from its root, which is where they run; what stands elsewhere, in `--set` or in a shipped spec, is shown
where the spec brings it in.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from modelspec.diagnostics import Diagnostic, Place, SpecError


@dataclass(frozen=True, slots=True)
class Result:
    """One spec, by the name that it was given: what was found, and the texts to quote.

    `exit_code` is 0 if it passed, 1 if it is not valid, 2 if it could not be read; `summary` is a line that says so.
    `whole` is false where reading ended early, so that `sources` may lack a file.
    """

    spec: str
    diagnostics: tuple[Diagnostic, ...]
    exit_code: int
    summary: str
    sources: dict[str, str] = field(default_factory=dict)
    whole: bool = True

    @classmethod
    def unreadable(cls, spec: str, error: SpecError) -> "Result":
        """The result for a spec that could not be read or merged."""
        number = len(error.diagnostics)
        return cls(spec, error.diagnostics, error.exit_code, errors(number), error.sources, whole=False)


def errors(number: int) -> str:
    """How many errors there are, as a phrase."""
    return f"{number} error{'s' * (number != 1)}"


def shown_at(result: Result, diagnostic: Diagnostic) -> Place:
    """The place in the repository at which a finding is shown: its own, else a related one, else the spec's start.

    The file of the place is a path from the working directory, with slashes.
    """
    origins = [note.place for note in diagnostic.related if note.message.startswith(("inherited from", "set by"))]
    for place in (diagnostic.place, *origins):
        inside = repository_path(place.file)
        if inside is not None:
            return Place(inside, place.line, place.column)
    return Place(repository_path(result.spec) or PurePath(result.spec).as_posix(), 1, 1)


def repository_path(file: str) -> str | None:
    """The path of a file from the working directory, None if it is not below it or no file."""
    path = Path(os.path.abspath(file))
    if not path.is_relative_to(Path.cwd()) or not path.is_file():
        return None
    return path.relative_to(Path.cwd()).as_posix()


@dataclass(frozen=True, slots=True)
class Shown:
    """A finding as a code host shows it: where, and what it says if that is not where it was found."""

    place: Place
    message: str
    diagnostic: Diagnostic


def each_once(results: list[Result]) -> Iterator[Shown]:
    """Every finding of every spec; what several specs inherit from one file comes once."""
    seen: set[tuple[str, str, Place, str]] = set()
    for result in results:
        for diagnostic in result.diagnostics:
            place, found = shown_at(result, diagnostic), diagnostic.place
            there = Place(repository_path(found.file) or found.file, found.line, found.column)
            message = diagnostic.message if place == there else f"{found}: {diagnostic.message}"
            key = (diagnostic.code, message, place, diagnostic.path)
            if key not in seen:
                seen.add(key)
                yield Shown(place, message, diagnostic)
