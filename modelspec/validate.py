"""A resolved tree to a `ModelSpec`, or to everything that is wrong with it, in one pass.

First each value by itself: the schema classes say what is legal, `shape` says what is not. Then, if every value is
legal, the relations between values: `checks`. Both speak of paths; the places where the values were written are found
here.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from modelspec.checks import check as find
from modelspec.checks.finding import Finding
from modelspec.diagnostics import Diagnostic, Fix, Related, SpecError
from modelspec.document import SET, Node, Scalar
from modelspec.grammar import INDEX, NAME, Grammar, keys
from modelspec.merge import correction, spelled, suggestion
from modelspec.resolve import Resolved, resolve
from modelspec.schema import ModelSpec
from modelspec.shape import told

# Each costs a search through the language.
MAX_WAIVERS = 50


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
        diagnostics += _idle_waivers(spec, resolved) if spec else []
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


def _idle_waivers(spec: ModelSpec, resolved: Resolved) -> Iterator[Diagnostic]:
    """A waiver whose path is none of the language's waives nothing, and would go unnoticed."""
    for index, waiver in enumerate(spec.waivers[:MAX_WAIVERS]):
        like = waiver.path.split(".")
        known = _paths(like)
        if not any(fnmatchcase(each, waiver.path) for each in (*known, *_paths(like, from_end=True))):
            path = ("waivers", index, "path")
            message = f"no change can have the path {waiver.path!r}, so this waives nothing"
            help = suggestion(waiver.path, known) or "write the path that diff tells, or model.ffn.* for all below"
            place = resolved.marked(path)
            origin = resolved.origin(path, place)
            yield Diagnostic("MS210", "warning", place, spelled(path), message, help, origin)


def _paths(like: Sequence[str], *, from_end: bool = False) -> list[str]:
    """Every path that a change may have, with names and indices where a path to be found among them has them.

    Its steps are counted from either end: a wildcard may stand for several.
    """
    found: dict[str, None] = {}
    for way in _grammar().ways:
        # A diff tells layers as a whole.
        if way[:2] != ("model", "layers") or len(way) == 2:
            shift = len(like) - len(way) if from_end else 0
            found[".".join(_step(step, like, at + shift) for at, step in enumerate(way))] = None
    return list(found)


def _step(step: str | int, like: Sequence[str], at: int) -> str:
    written = like[at] if 0 <= at < len(like) else ""
    if step == NAME:
        return written or "name"
    if step == INDEX:
        return written if written.isdecimal() or "*" in written else "0"
    return str(step)


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
    path, fix = spelled(finding.path), _fix(resolved.node(finding.path), finding.choices)
    return Diagnostic(finding.code, severity, place, path, finding.message, finding.help, related + origin, fix)


def _fix(node: Node | None, names: tuple[str, ...]) -> Fix | None:
    """The name that a misspelt one can only mean.

    Names are the user's: with another letter, one may be that of a variant which is still to be written.
    """
    fix = correction(node.text, names) if isinstance(node, Scalar) else None
    unsure = fix is not None and len(fix.old) == len(fix.new) and sorted(fix.old) != sorted(fix.new)
    return None if unsure else fix
