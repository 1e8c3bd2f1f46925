"""An organisation's own rules, as JSON Schema over the resolved spec.

A policy says what the language leaves open: "at most 512 ranks", "no experts without bias balancing". It is a YAML or
JSON file that holds one JSON Schema, read by the rules of a spec, so that rules have places too. It sees what `show
--format json` prints as the spec: every default written out, what is left out absent. A rule that does not hold is
told by its `title`, with its `description` as the help, at the line of the spec that says the value.

Nothing is fetched: a `$ref` names a place in the same file. Work is counted, so that no policy runs for ever.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import unquote

from jsonschema import validators
from jsonschema.exceptions import ValidationError
from referencing import Registry
from referencing.exceptions import Unresolvable

from modelspec.diagnostics import Diagnostic, Place, Related, SpecError
from modelspec.document import Mapping, Node, Scalar, Sequence, read
from modelspec.dump import as_data, flow
from modelspec.merge import Steps, error, spelled
from modelspec.policy_keys import problems
from modelspec.resolve import Resolved, plain
from modelspec.schema import ModelSpec

# Keywords applied to one spec. A policy of a hundred rules takes a few thousand.
MAX_STEPS = 200_000
# Nobody reads more.
MAX_TOLD = 100
_WIDTH = 120
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


def read_policy(path: str | os.PathLike[str]) -> Policy:
    """The policy in a file.

    Raises SpecError with exit code 2: a policy that cannot be applied, or names what specs do not have, is misuse.
    """
    try:
        document = read(path)
        found = problems(document.root)
        if found:
            raise SpecError(found, {document.file: document.text})
    except SpecError as failed:
        raise SpecError(failed.diagnostics, failed.sources, exit_code=2) from None
    schema = {key: plain(entry.node) for key, entry in document.root.entries.items()}
    dialect = validators.validator_for(schema)
    # With it, every `$ref` to the root would choose its class anew, and the steps would not be counted there.
    schema.pop("$schema", None)
    return Policy(document.file, document.text, document.root, schema, dialect)


def violations(policy: Policy, spec: ModelSpec, resolved: Resolved) -> list[Diagnostic]:
    """The rules that a spec does not keep, as MS602. Raises SpecError, with exit code 2, if the policy itself fails."""
    checker = validators.extend(policy.dialect, _counted(policy.dialect.VALIDATORS))
    try:
        # An empty registry, since the default one fetches.
        broken = list(checker(policy.schema, registry=Registry()).iter_errors(as_data(spec)))
    except RecursionError:
        raise _unusable(policy, "MS603", "the policy takes too many steps, or refers to itself without end") from None
    except Unresolvable as missing:
        raise _unusable(policy, "MS601", f"$ref names nothing in the policy: {missing.ref}") from None
    found = list(dict.fromkeys(_violation(policy, each, resolved) for each in broken[:MAX_TOLD]))
    if len(broken) > MAX_TOLD:
        found.append(error("MS602", resolved.root.place, (), f"{len(broken) - MAX_TOLD} more faults are not shown"))
    return found


def _counted(rules: Any) -> Any:
    """The functions of the keywords, which together give up after so many steps."""
    steps = 0

    def count(rule: Callable[..., Any], *arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > MAX_STEPS:
            raise RecursionError
        return rule(*arguments)

    return {keyword: partial(count, rule) for keyword, rule in rules.items()}


def _unusable(policy: Policy, code: str, message: str) -> SpecError:
    return SpecError([error(code, policy.root.place, (), message)], {policy.file: policy.text}, exit_code=2)


def _violation(policy: Policy, broken: ValidationError, resolved: Resolved) -> Diagnostic:
    path: Steps = tuple(broken.absolute_path)
    trail = list(_trail(policy.root, tuple(broken.absolute_schema_path)))
    rule = next((node for node, _ in reversed(trail) if isinstance(node, Mapping) and _name(node)), policy.root)
    title, description = _text(rule, "title"), _text(rule, "description")
    detail, place = _detail(broken, path), resolved.marked(path)
    name = _name(rule)
    return Diagnostic(
        "MS602",
        "error",
        place,
        spelled(path),
        f"{name} ({detail})" if name else detail,
        description if title else None,
        (Related(spelled(path), trail[-1][1], "the rule"), *resolved.origin(path, place)),
    )


def _detail(broken: ValidationError, path: Steps) -> str:
    """What is wrong: of a single value what it is and must be, of a map or a list the keyword alone."""
    where, wanted = spelled(path) or "the spec", broken.validator_value
    if broken.validator is None:
        return f"{where} must not be there"
    if broken.validator == "required":
        return f"{where}: {broken.message}"
    if isinstance(broken.instance, dict | list) or len(str(wanted)) > _WIDTH:
        return f"{where} does not satisfy {broken.validator!r}"
    bound = _BOUNDS.get(str(broken.validator))
    must = f"must {bound} {flow(wanted)}" if bound else f"does not satisfy {broken.validator!r}: {flow(wanted)}"
    given = flow(broken.instance)
    return f"{where} is {given if len(given) <= _WIDTH else given[:_WIDTH] + '...'}, {must}"


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
        below = _below(node, step)
        if below is None:
            node = _referred(root, node)
            yield node, place
            below = _below(node, step)
        if below is None:
            return
        node, place = below
        yield node, place


def _referred(root: Mapping, node: Node) -> Node:
    """What a schema refers to, over several references; the schema itself where it refers to nothing by pointer."""
    # So many in a row are a circle, which jsonschema never comes out of.
    for _ in range(MAX_TOLD):
        reference = _text(node, "$ref") if isinstance(node, Mapping) else None
        if reference is None or not reference.startswith("#"):
            break
        node = root
        for part in filter(None, unquote(reference[1:]).split("/")):
            below = _below(node, part.replace("~1", "/").replace("~0", "~"))
            if below is None:
                break
            node, _place = below
    return node


def _below(node: Node, step: str | int) -> tuple[Node, Place] | None:
    match node, step:
        case Mapping(entries), str() if step in entries:
            return entries[step].node, entries[step].key_place
        case Sequence(items), _ if re.fullmatch(r"\d{1,6}", str(step)) and int(step) < len(items):
            return items[int(step)], items[int(step)].place
    return None
