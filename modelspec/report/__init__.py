"""What validate found in several specs, for programs that show it: one module per format, each one function.

A renderer takes results and gives text. Formats for code hosts speak of files in the repository that they run in, by
their path from its root, which is where they run; what stands elsewhere, in `--set` or in a shipped spec, is shown
where the spec brings it in. Every report is UTF-8, whatever the names of files are.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from modelspec.diagnostics import Diagnostic, Place, SpecError
from modelspec.resolve import shipped


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


def legible(text: str) -> str:
    """The text as UTF-8 can hold it: a byte of a file's name that is no text becomes the replacement character."""
    return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)


def shown_at(result: Result, diagnostic: Diagnostic) -> Place:
    """The place in the repository at which a finding is shown: its own, else a related one, else the spec's.

    The file of the place is a path from the working directory, with slashes; a full path where it is not below that.
    """
    origins = [note.place for note in diagnostic.related if note.message.startswith(("inherited from", "set by"))]
    for place in (diagnostic.place, *origins):
        inside = repository_path(place.file)
        if inside is not None:
            return Place(inside, place.line, place.column)
    spec = _file(result.spec)
    mine = next((place for place in (diagnostic.place, *origins) if place.file == spec), Place(spec, 1, 1))
    return Place(_shown(spec), mine.line, mine.column)


def repository_path(file: str) -> str | None:
    """The path of a file from the working directory, None if it is not below it or no file.

    A link is what it leads to, where that is below, too: code hosts know no files behind links.
    """
    for path in (Path(os.path.realpath(file)), Path(os.path.abspath(file))):
        if path.is_relative_to(Path.cwd()) and os.path.isfile(path):
            return path.relative_to(Path.cwd()).as_posix()
    return None


def _shown(file: str) -> str:
    """The path from the working directory, else the full path; of a file that does not exist its name."""
    inside = repository_path(file)
    if inside is not None:
        return inside
    return Path(os.path.abspath(file)).as_posix() if os.path.isfile(file) else PurePath(file).as_posix()


def _file(spec: str) -> str:
    """The file of a spec by the name that it was given."""
    try:
        return shipped(spec) or spec
    except SpecError:
        return spec


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
            there = Place(_shown(found.file), found.line, found.column)
            message = diagnostic.message if place == there else f"{found}: {diagnostic.message}"
            key = (diagnostic.code, message, place, diagnostic.path)
            if key not in seen:
                seen.add(key)
                yield Shown(place, message, diagnostic)
