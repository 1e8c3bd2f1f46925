"""A resolved tree to a `ModelSpec`, or to everything that is wrong with it, in one pass.

First each value by itself: the schema classes say what is legal, `shape` says what is not. Then, if every value is
legal, the relations between values: `checks`. Both speak of paths; the places where the values were written are found
here.
"""

import os
from collections.abc import Sequence

from pydantic import ValidationError

from modelspec.checks import check as find
from modelspec.checks.finding import Finding
from modelspec.diagnostics import Diagnostic, Place, Related, SpecError
from modelspec.document import SET, Scalar
from modelspec.grammar import Grammar
from modelspec.merge import Steps, spelled
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
    spec: ModelSpec | None = None
    try:
        spec = ModelSpec.model_validate(resolved.data())
    except ValidationError as error:
        diagnostics = told(error, resolved, Grammar(ModelSpec.model_json_schema()))
    else:
        diagnostics = [_placed(finding, resolved) for finding in find(spec)]
    files = list(resolved.documents)

    def order(diagnostic: Diagnostic) -> tuple[int, int, int, str]:
        place = diagnostic.place
        return files.index(place.file), place.line, place.column, diagnostic.code

    return spec, tuple(sorted(dict.fromkeys(diagnostics), key=order))


def _placed(finding: Finding, resolved: Resolved) -> Diagnostic:
    place = _place(finding.path, resolved)
    inherited = place.file not in (resolved.root.place.file, SET)
    severity = finding.inherited_severity if inherited and finding.inherited_severity else finding.severity
    related = tuple(Related(spelled(path), _place(path, resolved), message) for path, message in finding.related)
    return Diagnostic(finding.code, severity, place, spelled(finding.path), finding.message, finding.help, related)


def _place(path: Steps, resolved: Resolved) -> Place:
    """Of a single value the value, of a whole map or list its key."""
    return resolved.place(path) if isinstance(resolved.node(path), Scalar) else resolved.key_place(path)
