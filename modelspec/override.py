"""`--set`: each override is one more layer on the tree, parsed by the rules of a file and placed by its number.

A key names its way from the top, list items by their index. Maps on the way are made where there are none; a list is
never made longer.
"""

import re
from dataclasses import replace

from modelspec.diagnostics import Diagnostic, Place, SpecError
from modelspec.document import MAX_DEPTH, SET, Entry, Mapping, Node, Sequence, parse_value
from modelspec.merge import Steps, error, is_null, merge, merge_maps, spelled

# One spelling for each item of a list: no sign, no leading zero.
_INDEX = re.compile(r"0|[1-9][0-9]{0,8}")


def override(root: Mapping, lines: list[str]) -> Mapping:
    """The tree with `KEY=VALUE` lines as further layers, in order. Raises SpecError with all that is wrong in them."""
    problems: list[Diagnostic] = []
    for number, line in enumerate(lines, start=1):
        try:
            root = _patched_map(root, (), _target(line, number), _value(line, number))
        except SpecError as failed:
            problems += failed.diagnostics
    if problems:
        raise SpecError(problems)
    return root


def _target(line: str, number: int) -> list[tuple[str, Place]]:
    """The keys that an override names, each with its place."""
    key, equals, value = line.partition("=")
    place = Place(SET, number, 1)
    keys = key.strip().split(".")
    if not equals or not all(keys):
        hint = "for example: --set model.layers.1.repeat=4"
        raise SpecError([error("MS111", place, (), f"{line!r} is not of the form KEY=VALUE", hint)])
    if not value.strip():
        raise SpecError([error("MS111", place, tuple(keys), f"{key} is given no value", "write null to remove it")])
    if len(keys) > MAX_DEPTH:
        raise SpecError([error("MS111", place, (), f"a key has at most {MAX_DEPTH} parts")])
    if keys[0] == "extends":
        raise SpecError([error("MS112", place, ("extends",), "what a spec extends cannot be set", "write a file")])
    start = len(key) - len(key.lstrip()) + 1
    columns = [start + len(".".join([*keys[:index], ""])) for index in range(len(keys))]
    return [(step, Place(SET, number, column)) for step, column in zip(keys, columns, strict=True)]


def _value(line: str, number: int) -> Node:
    key, _, value = line.partition("=")
    return parse_value(" " * (len(key) + 1) + value, number)


def _patched(node: Node | None, path: Steps, target: list[tuple[str, Place]], value: Node) -> Node:
    """The node with the value as a patch at the target below it. Maps on the way are made where they are absent."""
    if not target:
        return merge(node, value)
    step, place = target[0]
    if isinstance(node, Mapping):
        return _patched_map(node, path, target, value)
    if isinstance(node, Sequence):
        index = int(step) if _INDEX.fullmatch(step) else len(node.items)
        if index >= len(node.items):
            message = f"{spelled(path)} is a list of {len(node.items)} and has no item {step!r}"
            hint = f"items count from 0 to {len(node.items) - 1}, without leading zeros" if node.items else None
            raise SpecError([error("MS112", place, (*path, step), message, hint)])
        item = _patched(node.items[index], (*path, index), target[1:], value)
        return Sequence((*node.items[:index], item, *node.items[index + 1 :]), node.place)
    if node is None or is_null(node):
        return _patched_map(Mapping({}, place), path, target, value)
    raise SpecError([error("MS112", place, (*path, step), f"{spelled(path)} is {node.text!r} and has no keys")])


def _patched_map(mapping: Mapping, path: Steps, target: list[tuple[str, Place]], value: Node) -> Mapping:
    (step, place), *rest = target
    if not rest:
        return merge_maps(mapping, Mapping({step: Entry(place, value)}, mapping.place))
    below = mapping.entries.get(step)
    node = _patched(below.node if below else None, (*path, step), rest, value)
    if below is None or is_null(below.node):
        return merge_maps(mapping, Mapping({step: Entry(place, node)}, mapping.place))
    # Only passed on the way: the key still stands where it was written.
    return Mapping(mapping.entries | {step: replace(below, node=node)}, mapping.place)
