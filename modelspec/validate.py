"""A resolved tree to a `ModelSpec`, or to everything that is wrong with it, in one pass.

First each value by itself: the schema classes say what is legal, `shape` says what is not. Then, if every value is
legal, the relations between values: `checks`. Both speak of paths; the places where the values were written are found
here.
"""

import os
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from modelspec.checks import check as find
from modelspec.checks.finding import Finding
from modelspec.diagnostics import Diagnostic, Related, SpecError
from modelspec.document import SET
from modelspec.grammar import Grammar, keys
from modelspec.merge import spelled
from modelspec.resolve import Resolved, resolve
from modelspec.schema import ModelSpec
from modelspec.shape import told


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> ModelSpec:
    """The spec in a file, or shipped as `modelspec:NAME`, with `KEY=VALUE` overrides applied in order.

    Raises SpecError, which carries every diagnostic, if one of them is an error.
    """
    resolved = resolve(path, overrides)
    spec, diagnostics = check(resolved)
    if spec is None or any(diagnostic.severity == "error" for diagnostic in diagnostics):
        raise SpecError(diagnostics, resolved.documents)
    return spec


def check(resolved: Resolved) -> tuple[ModelSpec | None, tuple[Diagnostic, ...]]:
    """The spec, None if a value by itself is wrong, and all that is to be said about it, in the order of the text."""
    spec, errors = _validated(resolved.data())
    errors += _vain_nulls(resolved)
    if errors:
        diagnostics = told(errors, resolved, _grammar())
    else:
        diagnostics = [_placed(finding, resolved) for finding in find(spec)] if spec else []
    return None if errors else spec, in_order(diagnostics, resolved)


def in_order(diagnostics: Iterable[Diagnostic], resolved: Resolved) -> tuple[Diagnostic, ...]:
    """The findings in one spec, each once, in the order of the text."""
    files = list(resolved.documents)

    def order(diagnostic: Diagnostic) -> tuple[int, int, int, str]:
        place = diagnostic.place
        return files.index(place.file), place.line, place.column, diagnostic.code

    return tuple(sorted(dict.fromkeys(diagnostics), key=order))


def _validated(data: dict[str, Any]) -> tuple[ModelSpec | None, list[ErrorDetails]]:
    try:
        return ModelSpec.model_validate(data), []
    except ValidationError as error:
        return None, error.errors(include_url=False)


def _vain_nulls(resolved: Resolved) -> list[ErrorDetails]:
    """A null under a misspelt key removes nothing, and would go unnoticed."""
    if not resolved.removed:
        return []
    _, errors = _validated(resolved.data_with_nulls())
    vain = [error for error in errors if error["type"] == "extra_forbidden" and error["input"] is None]
    paths = [_grammar().position(error["loc"]).path for error in vain]
    return [error for error, path in zip(vain, paths, strict=True) if path[-1] not in keys(_grammar().at(path[:-1]))]


@cache
def _grammar() -> Grammar:
    return Grammar(ModelSpec.model_json_schema())


def _placed(finding: Finding, resolved: Resolved) -> Diagnostic:
    place = resolved.marked(finding.path)
    inherited = place.file not in (resolved.root.place.file, SET)
    severity = finding.inherited_severity if inherited and finding.inherited_severity else finding.severity
    # A default was written nowhere: there is no place to point at.
    stated = [(path, message) for path, message in finding.related if resolved.is_stated(path)]
    related = tuple(Related(spelled(path), resolved.marked(path), message) for path, message in stated)
    origin = resolved.origin(finding.path, place)
    return Diagnostic(
        finding.code, severity, place, spelled(finding.path), finding.message, finding.help, related + origin
    )
