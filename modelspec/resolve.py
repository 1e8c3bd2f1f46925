"""Many texts to one tree: `extends`, then `--set`, then `like`, then the nulls go.

Parents are merged from left to right, the file onto them, each override onto that; `merge` has the rule. Nulls stay
in the tree until the end, so that one file may remove what another one brings. Files are read under the folder of the
project only, a bounded number of them, each once.
"""

import os
import re
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from modelspec.diagnostics import Diagnostic, Place, SpecError
from modelspec.document import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_NODES,
    SET,
    Document,
    Entry,
    Mapping,
    Node,
    Scalar,
    Sequence,
    parse_value,
    read,
)
from modelspec.merge import (
    MAX_CHAIN,
    Steps,
    error,
    is_null,
    layers,
    merge,
    merge_maps,
    size,
    spelled,
    suggestion,
    with_like,
    without,
    without_nulls,
)

MAX_FILES = 32
SHIPPED = "modelspec:"
# One spelling for each item of a list: no sign, no leading zero.
_INDEX = re.compile(r"0|[1-9][0-9]{0,8}")
_TOO_MANY = f"more than {MAX_CHAIN} specs in a row or {MAX_FILES} in all"


@dataclass(frozen=True, slots=True)
class Resolved:
    """One spec, whole: the merged tree, the texts that it came from, and the nulls that took something away."""

    root: Mapping
    documents: dict[str, str] = field(default_factory=dict)
    removed: dict[Steps, Entry] = field(default_factory=dict)

    def data(self) -> dict[str, Any]:
        """The tree as plain dicts, lists and values."""
        return {key: _plain(entry.node) for key, entry in self.root.entries.items()}

    def data_with_nulls(self) -> dict[str, Any]:
        """The same with the nulls that nothing was written over."""
        data = self.data()
        for *path, key in self.removed:
            node = self.node(tuple(path))
            if isinstance(node, Mapping) and key not in node.entries:
                _at(data, path)[key] = None
        return data

    def node(self, path: Steps) -> Node | None:
        """The node at a path, None where there is none."""
        node: Node = self.root
        for step in path:
            below = _below(node, step)
            if below is None:
                return None
            node = below
        return node

    def place(self, path: Steps) -> Place:
        """Where the value at a path was written; without one, where its nearest present ancestor's key was."""
        node = self.node(path)
        return self.key_place(path) if node is None else node.place

    def key_place(self, path: Steps) -> Place:
        """Where the key of a path was written, or the list item.

        Without one, where a null took it away; else the same of its nearest ancestor.
        """
        while path:
            parent = self.node(path[:-1])
            match parent, path[-1]:
                case Mapping(entries), str(key) if key in entries:
                    return entries[key].key_place
                case Sequence(items), int(index) if index in range(len(items)):
                    return items[index].place
            if path in self.removed:
                return self.removed[path].key_place
            path = path[:-1]
        return self.root.place

    def is_stated(self, path: Steps) -> bool:
        """Whether something was written for a path: a value, or the null that took it or an ancestor away."""
        above = [path[:length] for length in range(1, len(path) + 1)]
        return self.node(path) is not None or any(key in self.removed and self.node(key) is None for key in above)

    def chain(self, path: Steps) -> tuple[Entry, ...]:
        """The entries that were written for a key, the one that holds first, then those that it overrides."""
        parent = self.node(path[:-1])
        entry = parent.entries.get(str(path[-1])) if path and isinstance(parent, Mapping) else None
        return () if entry is None else layers(entry)


def resolve(source: Document | str | os.PathLike[str], overrides: SequenceOf[str] = ()) -> Resolved:
    """The spec in a document, in a file or shipped as `modelspec:NAME`, with its parents and the overrides applied.

    Raises SpecError.
    """
    leaf = source if isinstance(source, Document) else read(_shipped(os.fspath(source)) or source)
    # A line break in an override is as good as a space, and one line each keeps the places right.
    lines = [" ".join(override.splitlines()) for override in ([overrides] if isinstance(overrides, str) else overrides)]
    parents = _Parents(leaf)
    removed: dict[Steps, Entry] = {}
    try:
        root = with_like(_override(parents.merged(), lines))
        if size(root) > MAX_NODES:
            raise SpecError(
                [error("MS010", root.place, (), f"with its parents the spec has over {MAX_NODES:,} values")]
            )
        root = without_nulls(root, removed)
    except SpecError as failed:
        sources = parents.texts | failed.sources | {SET: "\n".join(lines)}
        raise SpecError(failed.diagnostics, sources, failed.exit_code) from None
    return Resolved(root, parents.texts | {SET: "\n".join(lines)}, removed)


def _plain(node: Node) -> Any:
    match node:
        case Mapping(entries):
            return {key: _plain(entry.node) for key, entry in entries.items()}
        case Sequence(items):
            return [_plain(item) for item in items]
        case Scalar(value):
            return value


def _at(data: Any, path: SequenceOf[str | int]) -> Any:
    for step in path:
        data = data[step]
    return data


def _below(node: Node, step: str | int) -> Node | None:
    match node, step:
        case Mapping(entries), str(key) if key in entries:
            return entries[key].node
        case Sequence(items), int(index) if index in range(len(items)):
            return items[index]
    return None


class _Parents:
    """The files that a spec extends, each read and merged once however often it is named.

    What is wrong with one parent is kept in `problems`, and the others are looked at all the same.
    """

    def __init__(self, leaf: Document) -> None:
        self.leaf = leaf
        self.texts = {leaf.file: leaf.text}
        self.done: dict[str, Mapping] = {}
        self.problems: list[Diagnostic] = []

    def merged(self) -> Mapping:
        """The leaf merged onto its parents. Raises SpecError with all that is wrong with any of them."""
        real = os.path.realpath(self.leaf.file)
        root = self.flatten(self.leaf, _boundary(real), ((real, self.leaf.file),))
        if self.problems:
            raise SpecError(self.problems)
        return root

    def flatten(self, document: Document, boundary: str, chain: tuple[tuple[str, str], ...]) -> Mapping:
        """The document merged onto its parents. `chain` holds the real and the shown names from the leaf to here."""
        base = Mapping({}, document.root.place)
        for reference in _references(document):
            try:
                parent = self.parent(reference, document.file, boundary, chain)
            except SpecError as failed:
                self.problems += failed.diagnostics
                self.texts |= failed.sources
            else:
                base = merge_maps(base, without(parent, "name", "summary", "waivers"))
        return merge_maps(base, without(document.root, "extends"))

    def parent(self, reference: Node, file: str, boundary: str, chain: tuple[tuple[str, str], ...]) -> Mapping:
        def fail(code: str, message: str, help: str | None = None) -> SpecError:
            return SpecError([error(code, reference.place, ("extends",), message, help)])

        if not (isinstance(reference, Scalar) and isinstance(reference.value, str) and reference.value):
            raise fail("MS101", "extends must be a path or a list of paths", "for example: extends: base.yaml")
        name = reference.value
        try:
            shown = _shipped(name)
        except SpecError as failed:
            raise fail("MS102", failed.diagnostics[0].message, failed.diagnostics[0].help) from None
        if shown is not None:
            boundary = os.path.realpath(os.path.dirname(shown))
        elif "://" in name:
            raise fail("MS103", f"{name} is a URL; specs extend files", "fetch it and name the file")
        else:
            shown = os.path.join(os.path.dirname(file), name)
        real = os.path.realpath(shown)
        if not Path(real).is_relative_to(boundary):
            hint = "the project is the nearest folder above the spec with .git or pyproject.toml, else the spec's own"
            raise fail("MS103", f"{name} lies outside of {boundary}", hint)
        if os.path.realpath(os.path.normpath(shown)) == real:
            shown = os.path.normpath(shown)
        seen = [known for known, _ in chain]
        if real in seen:
            circle = [known for _, known in chain[seen.index(real) :]] + [shown]
            raise fail("MS104", f"specs extend one another in a circle: {' -> '.join(circle)}")
        if real not in self.done:
            if len(chain) > MAX_CHAIN or len(self.texts) >= MAX_FILES:
                raise fail("MS105", _TOO_MANY)
            # Stands in for a file that cannot be used, so that its faults are told once.
            self.done[real] = Mapping({}, reference.place)
            try:
                document = read(shown)
            except SpecError as failed:
                if failed.exit_code == 2:
                    raise fail("MS102", failed.diagnostics[0].message, "paths are relative to this file") from None
                raise
            self.texts[shown] = document.text
            if sum(map(len, self.texts.values())) > MAX_BYTES:
                raise fail("MS105", f"the spec and all that it extends are larger than {MAX_BYTES // 1024} KiB")
            self.done[real] = self.flatten(document, boundary, (*chain, (real, shown)))
        return self.done[real]


def _references(document: Document) -> tuple[Node, ...]:
    entry = document.root.entries.get("extends")
    if entry is None:
        return ()
    items = entry.node.items if isinstance(entry.node, Sequence) else (entry.node,)
    if len(items) > MAX_FILES:
        raise SpecError([error("MS105", entry.node.place, ("extends",), _TOO_MANY)])
    return items


def _shipped(name: str) -> str | None:
    """The file of a spec that comes with the package, None if the name is not of the form `modelspec:NAME`."""
    if not name.startswith(SHIPPED):
        return None
    folder = Path(__file__).parent / "specs"
    names = sorted(file.stem for file in folder.glob("*.yaml"))
    wanted = name.removeprefix(SHIPPED)
    if wanted not in names:
        hint = suggestion(wanted, names) or f"there are {', '.join(names)}"
        message = f"no spec of the name {wanted!r} comes with modelspec"
        raise SpecError([error("MS001", Place(name, 1, 1), (), message, hint)], exit_code=2)
    return str(folder / f"{wanted}.yaml")


def _boundary(leaf: str) -> str:
    """The folder that includes may not leave."""
    folder = Path(leaf).parent
    marked = (
        above for above in (folder, *folder.parents) if any((above / m).exists() for m in (".git", "pyproject.toml"))
    )
    return str(next(marked, folder))


def _override(root: Mapping, lines: list[str]) -> Mapping:
    """The overrides as further layers, in order. All wrong ones are reported together."""
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
