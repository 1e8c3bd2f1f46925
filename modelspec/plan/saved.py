"""A plan on disk: its numbers, the spec that they are of, and what they were asked with.

The spec stands in it as text, resolved, with the SHA-256 by which a run knows it. So `train --plan` can tell whether it
is about to train what was planned, and if not, what changed.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from modelspec.diagnostics import Diagnostic, Place, SpecError
from modelspec.diff import Change, diff
from modelspec.diff.words import value
from modelspec.document import parse
from modelspec.dump import digest, dump
from modelspec.plan import Plan
from modelspec.plan.planned import Planned
from modelspec.resolve import Resolved, resolve
from modelspec.schema import ModelSpec

VERSION = 1
_KEYS = {"plan_version": int, "spec_sha256": str, "spec": str, "arguments": dict, "plan": dict}


@dataclass(frozen=True, slots=True)
class SavedPlan:
    """A plan that was read: of which spec, and what it says of a run."""

    path: str
    sha256: str
    spec: ModelSpec
    planned: Planned

    def drift(self, spec: ModelSpec) -> list[Change]:
        """What changed from the spec that was planned to this one; nothing where they describe the same."""
        return [] if digest(dump(spec)) == self.sha256 else diff(self.spec, spec)

    def require(self, spec: ModelSpec, resolved: Resolved) -> None:
        """Raises SpecError with every change, where the spec is not the one that was planned."""
        help = f"plan it again: modelspec plan SPEC --out {self.path}"
        changed = [
            Diagnostic("MS019", "error", resolved.marked(_steps(change.path)), change.path, _told(change), help)
            for change in self.drift(spec)
        ]
        if changed:
            raise SpecError(changed, resolved.documents)


def plan_text(spec: ModelSpec, plan: Plan, arguments: dict[str, Any]) -> str:
    """The text of plan.json; `arguments` are those of `plan`, as plain data."""
    text = dump(spec)
    content = {
        "plan_version": VERSION,
        "spec_sha256": digest(text),
        "spec": text,
        "arguments": arguments,
        "plan": plan.as_json(),
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_plan(path: Path) -> SavedPlan:
    """A plan that `plan_text` wrote. Raises SpecError, with exit code 2, where the file is none."""
    where = str(path)
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise _fault("MS001", Place(where, 1, 1), "", f"{where}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise _fault("MS003", Place(where, 1, 1), "", f"{where} is not UTF-8 text") from None
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise _no_plan(Place(where, error.lineno, error.colno), "", f"not JSON: {error.msg}") from None
    except RecursionError:
        raise _no_plan(Place(where, 1, 1), "", "nested too deeply") from None
    if not isinstance(content, dict):
        raise _no_plan(Place(where, 1, 1), "", "not an object")
    for key, kind in _KEYS.items():
        if key not in content:
            raise _no_plan(Place(where, 1, 1), key, f"the key {key!r} is missing")
        if not isinstance(content[key], kind) or isinstance(content[key], bool):
            raise _no_plan(_place(where, text, key), key, f"{key!r} must be {_WORDS[kind]}")
    if content["plan_version"] != VERSION:
        message = f"it is of version {content['plan_version']}, and this is version {VERSION}"
        raise _no_plan(_place(where, text, "plan_version"), "plan_version", message)
    if digest(content["spec"]) != content["spec_sha256"]:
        message = "not the SHA-256 of 'spec': one of the two was edited"
        raise _no_plan(_place(where, text, "spec_sha256"), "spec_sha256", message)
    return SavedPlan(where, content["spec_sha256"], _spec(where, text, content["spec"]), _planned(where, text, content))


def _told(change: Change) -> str:
    was, now = (value(side) for side in (change.before, change.after))
    return f"{change.path} was {was} when this was planned, and is {now} now ({change.change_class})"


def _steps(path: str) -> tuple[str | int, ...]:
    return tuple(int(step) if step.isdecimal() else step for step in path.split("."))


def _spec(where: str, text: str, dumped: str) -> ModelSpec:
    try:
        return ModelSpec.model_validate(resolve(parse(dumped, where)).data())
    except (SpecError, ValidationError):
        raise _no_plan(_place(where, text, "spec"), "spec", "no spec of this version of the language") from None


def _planned(where: str, text: str, content: dict[str, Any]) -> Planned:
    try:
        planned = Planned.of(content["plan"])
        assert planned.memory > 0 and planned.tokens_per_second and min(planned.tokens_per_second) > 0
    except (KeyError, TypeError, IndexError, AssertionError):
        raise _no_plan(_place(where, text, "plan"), "plan", "memory or training lacks what a plan has") from None
    return planned


_WORDS = {int: "a whole number", str: "text", dict: "an object"}


def _place(where: str, text: str, key: str) -> Place:
    """Where a key of the outermost object stands."""
    found = re.search(rf'^\s*{{?\s*("{key}")\s*:', text, re.MULTILINE)
    if found is None:
        return Place(where, 1, 1)
    before = text[: found.start(1)]
    return Place(where, before.count("\n") + 1, found.start(1) - before.rfind("\n"))


def _no_plan(place: Place, path: str, message: str) -> SpecError:
    return _fault("MS018", place, path, message, "`modelspec plan SPEC --out FILE` writes one")


def _fault(code: str, place: Place, path: str, message: str, help: str = "") -> SpecError:
    return SpecError([Diagnostic(code, "error", place, path, message, help)], exit_code=2)
