"""An organisation's own rules, as JSON Schema over the resolved spec.

A policy says what the language leaves open: "at most 512 ranks", "no experts without bias balancing". It is a YAML or
JSON file that holds one JSON Schema, read by the rules of a spec, so that rules have places too. It sees what `show
--format json` prints as the spec: every default written out, what is left out absent. A rule that does not hold is
told by its `title`, with its `description` as the help, at the line of the spec that says the value.

Nothing is fetched: a `$ref` names a place in the same file. Work is counted and timed, so that no policy runs for ever.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import FrameType
from typing import Any

from jsonschema import validators
from jsonschema.exceptions import ValidationError
from referencing import Registry

from modelspec.diagnostics import Diagnostic, Place, Related, SpecError
from modelspec.document import Mapping, Node, Scalar
from modelspec.dump import as_data, flow
from modelspec.merge import Steps, error, spelled
from modelspec.policy_keys import as_schema, below, dialect_of, pointed, problems
from modelspec.resolve import Resolved, read_inside
from modelspec.schema import ModelSpec

# Keywords applied to one spec. A policy of a hundred rules takes a few thousand.
MAX_STEPS = 200_000
# Seconds of computing for one spec, which only a `pattern` that tries every way to split a text can need.
MAX_SECONDS = 5.0
# Nobody reads more.
MAX_TOLD = 100
_WIDTH = 120
# What a reader of specs says of a text that is none, said of a policy.
_AS_POLICY = {
    "MS006": ("the policy is empty", "write {} for one that asks for nothing"),
    "MS007": ("a second document begins here", "keep one policy per file"),
    "MS008": ("a policy is a map of keywords to values", "for example: properties: {name: {pattern: '^team-'}}"),
}
_BOUNDS = {
    "const": "be",
    "enum": "be one of",
    "type": "be of type",
    "maximum": "be at most",
    "minimum": "be at least",
    "exclusiveMaximum": "be below",
    "exclusiveMinimum": "be above",
    "multipleOf": "be a multiple of",
    "pattern": "match",
}


@dataclass(frozen=True, slots=True)
class Policy:
    """One policy: its file, its text, its tree with places, the schema that it holds, and what checks that."""

    file: str
    text: str
    root: Mapping
    schema: dict[str, Any]
    dialect: Any


def read_policy(path: str | os.PathLike[str], *, allow_outside: bool = False) -> Policy:
    """The policy in a file, which is no link out of its project, except with `allow_outside`.

    Raises SpecError with exit code 2: a policy that cannot be applied, or names what specs do not have, is misuse.
    """
    try:
        document = read_inside(os.fspath(path), allow_outside)
        found = _problems(document.root)
        if found:
            raise SpecError(found, {document.file: document.text})
    except SpecError as failed:
        raise SpecError(map(_of_policy, failed.diagnostics), failed.sources, exit_code=2) from None
    schema = as_schema(document.root)
    # With the one, every `$ref` to the root would choose its class anew, and the steps would not be counted there; the
    # other moves the base of references, and they all stay in the file.
    for keyword in ("$schema", "$id", "id"):
        schema.pop(keyword, None)
    return Policy(document.file, document.text, document.root, schema, dialect_of(document.root))


def violations(policy: Policy, spec: ModelSpec, resolved: Resolved) -> list[Diagnostic]:
    """The rules that a spec does not keep, as MS602. Raises SpecError, with exit code 2, if the policy itself fails."""
    work = _Work()
    checker = validators.extend(policy.dialect, work.counted(policy.dialect.VALIDATORS))
    try:
        with _timed():
            # An empty registry, since the default one fetches.
            broken = list(checker(policy.schema, registry=Registry()).iter_errors(as_data(spec)))
    except RecursionError:
        message = "the policy takes too many steps or too long, or refers to itself without end"
        help = f"it was at {work.last[0]}: {_short(work.last[1])}"
        told = error("MS603", policy.root.place, (), message, help)
        raise SpecError([told], {policy.file: policy.text}, exit_code=2) from None
    found = list(dict.fromkeys(_violation(policy, each, resolved) for each in broken[:MAX_TOLD]))
    if len(broken) > MAX_TOLD:
        found.append(error("MS602", resolved.root.place, (), f"{len(broken) - MAX_TOLD} more faults are not shown"))
    return found


def _problems(root: Mapping) -> list[Diagnostic]:
    try:
        with _timed():
            return problems(root)
    except RecursionError:
        return [error("MS603", root.place, (), "the patterns of the policy take too long")]


class _Work:
    """Counts the keywords that are applied, and knows the last one."""

    def __init__(self) -> None:
        self.steps = 0
        self.last: tuple[str, Any] = ("", None)

    def counted(self, rules: Any) -> Any:
        """The functions of the keywords, which together give up after so many steps."""
        return {keyword: partial(self.count, keyword, rule) for keyword, rule in rules.items()}

    def count(self, keyword: str, rule: Callable[..., Any], validator: Any, value: Any, *arguments: Any) -> Any:
        self.steps += 1
        self.last = (keyword, value)
        if self.steps > MAX_STEPS:
            raise RecursionError
        return rule(validator, value, *arguments)


@contextmanager
def _timed() -> Iterator[None]:
    """Ends the block with RecursionError when it has computed for too long, where there is such a timer.

    Time in which the machine does other things does not count. Only the main thread hears of the timer.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise RecursionError

    before = signal.signal(signal.SIGVTALRM, stop)
    # Again and again: what is raised inside a destructor is lost.
    signal.setitimer(signal.ITIMER_VIRTUAL, MAX_SECONDS, 0.1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before or signal.SIG_DFL)


def _of_policy(found: Diagnostic) -> Diagnostic:
    """A finding of the reader's, in the words of policies."""
    message, help = _AS_POLICY.get(found.code, (found.message, found.help))
    return replace(found, message=message, help=help)


def _violation(policy: Policy, broken: ValidationError, resolved: Resolved) -> Diagnostic:
    path: Steps = tuple(broken.absolute_path)
    way = tuple(broken.absolute_schema_path)
    trail = list(_trail(policy.root, way))
    rule = next((node for node, _ in reversed(trail) if isinstance(node, Mapping) and _name(node)), policy.root)
    title, description = _text(rule, "title"), _text(rule, "description")
    name, place = _name(rule), resolved.marked(path)
    if "propertyNames" in way:
        # Of the names in a map jsonschema tells the map.
        path = (*path, str(broken.instance))
        place = resolved.key_place(path)
    detail = _detail(broken, path, way)
    return Diagnostic(
        "MS602",
        "error",
        place,
        spelled(path),
        f"{name} ({detail})" if name else detail,
        description if title else None,
        (Related(spelled(path), trail[-1][1], "the rule"), *resolved.origin(path, place)),
    )


def _detail(broken: ValidationError, path: Steps, way: Steps) -> str:
    """What is wrong: of a single value what it is and must be, of a map or a list the keyword alone.

    `way` is the one through the policy to the keyword that does not hold.
    """
    where, wanted = spelled(path) or "the spec", broken.validator_value
    if "propertyNames" in way:
        where = f"the key {where}"
    if broken.validator == "not" and wanted == {}:
        if way[-2:-1] in (("then",), ("else",)):
            return f"{where} must not be as it is"
        return f"{where} must not {f'have {way[-2]!r}' if 'dependentSchemas' in way[-3:-2] else 'be there'}"
    if broken.validator == "required":
        return f"{where}: {broken.message}"
    if isinstance(broken.instance, dict | list) or len(str(wanted)) > _WIDTH:
        return f"{where} does not satisfy {broken.validator!r}"
    keyword = str(broken.validator)
    # In the fourth draft a bound is exclusive by a second keyword.
    exclusive = f"exclusive{keyword.capitalize()}"
    excluded = isinstance(broken.schema, dict) and broken.schema.get(exclusive) is True
    bound = _BOUNDS.get(exclusive if excluded else keyword)
    must = f"must {bound} {flow(wanted)}" if bound else f"does not satisfy {broken.validator!r}: {flow(wanted)}"
    return f"{where} is {_short(broken.instance)}, {must}"


def _short(value: Any) -> str:
    text = flow(value)
    return text if len(text) <= _WIDTH else f"{text[:_WIDTH]}..."


def _name(rule: Mapping) -> str | None:
    return _text(rule, "title") or _text(rule, "description")


def _text(rule: Mapping, key: str) -> str | None:
    node = rule.entries[key].node if key in rule.entries else None
    return node.value if isinstance(node, Scalar) and isinstance(node.value, str) else None


def _trail(root: Mapping, steps: Steps) -> Iterator[tuple[Node, Place]]:
    """What jsonschema's way to a keyword leads through. It leaves references out, so they are followed here."""
    node: Node = root
    place = root.place
    yield node, place
    for step in steps:
        found = below(node, step)
        if found is None:
            node = _referred(root, node)
            yield node, place
            found = below(node, step)
        if found is None:
            return
        node, place = found
        yield node, place


def _referred(root: Mapping, node: Node) -> Node:
    """What a schema refers to, over several references; the schema itself where it refers to nothing by pointer."""
    # So many in a row are a circle, which jsonschema never comes out of.
    for _ in range(MAX_TOLD):
        reference = _text(node, "$ref") if isinstance(node, Mapping) else None
        if reference is None or (target := pointed(root, reference)) is None:
            break
        node = target
    return node
