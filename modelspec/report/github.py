"""GitHub's workflow commands: a line on stdout per finding becomes an annotation at its line of the pull request.

Source: GitHub's documentation, "Workflow commands for GitHub Actions". A step shows at most ten annotations of each
kind; SARIF has no such limit.
"""

from modelspec.report import Result, each_once, legible

_COMMANDS = {"error": "error", "warning": "warning", "info": "notice"}


def render(results: list[Result]) -> str:
    """One command per finding."""
    lines = []
    for shown in each_once(results):
        place, diagnostic = shown.place, shown.diagnostic
        properties = {
            "file": place.file,
            "line": str(place.line),
            "col": str(place.column),
            "title": f"modelspec {diagnostic.code}",
        }
        told = [shown.message]
        if diagnostic.help:
            told.append(f"help: {diagnostic.help}")
        told += [f"note: {note.place}: {note.message}" for note in diagnostic.related]
        listed = ",".join(f"{name}={_escaped(value, ':,')}" for name, value in properties.items())
        message = _escaped("\n".join(told))
        lines.append(f"::{_COMMANDS[diagnostic.severity]} {listed}::{message}")
    return legible("\n".join(lines))


def _escaped(text: str, also: str = "") -> str:
    """Text in which nothing ends the value that it is written into; `%` first, since the others write it."""
    return "".join(f"%{ord(character):02X}" if character in f"%\r\n{also}" else character for character in text)
