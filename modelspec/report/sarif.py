"""SARIF 2.1.0, the format of code scanning: a run, the rules by which it judged, and a result per finding.

Source: OASIS, "Static Analysis Results Interchange Format (SARIF) Version 2.1.0". Files are named from the root of the
repository, `%SRCROOT%`, which is where the command runs; those elsewhere by a file URI.
"""

import hashlib
import json
import os
from pathlib import PurePath
from typing import Any
from urllib.parse import quote

from modelspec.diagnostics import Place, Related
from modelspec.explain import explain_code
from modelspec.report import Result, each_once, legible, repository_path

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_LEVELS = {"error": "error", "warning": "warning", "info": "note"}


def render(results: list[Result], version: str) -> str:
    """The whole document; `version` is modelspec's."""
    found = list(each_once(results))
    codes = sorted({shown.diagnostic.code for shown in found})
    written = []
    for shown in found:
        place, diagnostic, told = shown.place, shown.diagnostic, shown.message
        # Without the line, so that a finding stays the same one when the text above it grows.
        identity = "\0".join((place.file, diagnostic.code, diagnostic.path, diagnostic.message))
        written.append(
            {
                "ruleId": diagnostic.code,
                "ruleIndex": codes.index(diagnostic.code),
                "level": _LEVELS[diagnostic.severity],
                "message": {"text": f"{told}\n{diagnostic.help}" if diagnostic.help else told},
                "locations": [_location(place, diagnostic.path)],
                "relatedLocations": [_related(number, note) for number, note in enumerate(diagnostic.related)],
                "partialFingerprints": {"modelspec/v1": hashlib.sha256(identity.encode(errors="replace")).hexdigest()},
            }
        )
    driver = {"name": "modelspec", "semanticVersion": version, "rules": [_rule(code) for code in codes]}
    run = {
        "tool": {"driver": driver},
        "columnKind": "unicodeCodePoints",
        "invocations": [{"executionSuccessful": all(result.exit_code < 2 for result in results)}],
        "results": written,
    }
    return legible(json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2, ensure_ascii=False))


def _rule(code: str) -> dict[str, Any]:
    known = explain_code(code)
    return {"id": code, "shortDescription": {"text": known.meaning if known else code}}


def _location(place: Place, path: str) -> dict[str, Any]:
    location: dict[str, Any] = {
        "physicalLocation": {
            "artifactLocation": _artifact(place.file),
            "region": {"startLine": place.line, "startColumn": place.column},
        }
    }
    if path:
        location["logicalLocations"] = [{"fullyQualifiedName": path}]
    return location


def _artifact(file: str) -> dict[str, str]:
    if os.path.isabs(file):
        return {"uri": PurePath(file).as_uri()}
    return {"uri": quote(os.fsencode(file)), "uriBaseId": "%SRCROOT%"}


def _related(number: int, note: Related) -> dict[str, Any]:
    """A related place; one that is no file of the repository is told in words alone."""
    inside = repository_path(note.place.file)
    if inside is None:
        return {"id": number, "message": {"text": f"{note.place}: {note.message}"}}
    place = Place(inside, note.place.line, note.place.column)
    return {"id": number, "message": {"text": note.message}, **_location(place, note.path)}
