"""Many texts to one tree: `extends`, then `--set`, then `like`, then the nulls go.

Parents are merged from left to right, the file onto them, each override onto that; `merge` has the rule. Nulls stay
in the tree until the end, so that one file may remove what another one brings. Files are read under the folder of the
project only, a bounded number of them, each once.
"""

import os
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from modelspec.diagnostics import Diagnostic, Place, Related, SpecError
from modelspec.document import (
    MAX_BYTES,
    MAX_NODES,
    SET,
    Document,
    Entry,
    Mapping,
    Node,
    Scalar,
    Sequence,
    read,
)
from modelspec.files import project as project
from modelspec.files import way
from modelspec.merge import (
    MAX_CHAIN,
    Steps,
    error,
    layers,
    merge_maps,
    size,
    spelled,
    suggestion,
    with_like,
    without,
    without_nulls,
)
from modelspec.override import override

MAX_FILES = 32
SHIPPED = "modelspec:"
_PACKAGE = Path(__file__).parent
_TOO_MANY = f"more than {MAX_CHAIN} specs in a row or {MAX_FILES} in all"


@dataclass(frozen=True, slots=True)
class Resolved:
    """One spec, whole: the merged tree, the texts that it came from, and the nulls that took something away.

    `extended` has, for each file that is extended, the place in the spec's own file that leads there.
    """

    root: Mapping
    documents: dict[str, str] = field(default_factory=dict)
    removed: dict[Steps, Entry] = field(default_factory=dict)
    extended: dict[str, Place] = field(default_factory=dict)

    def data(self) -> dict[str, Any]:
        """The tree as plain dicts, lists and values."""
        return {key: plain(entry.node) for key, entry in self.root.entries.items()}

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

    def marked(self, path: Steps) -> Place:
        """The place to point at for a path: of a single value the value, of a whole map or list its key."""
        return self.place(path) if isinstance(self.node(path), Scalar) else self.key_place(path)

    def origin(self, path: Steps, place: Place) -> tuple[Related, ...]:
        """How the text at a place came into this spec, where its own file does not say it."""
        if place.file in self.extended:
            return (_inherited(spelled(path), place, self.extended),)
        if place.file == SET:
            # What a key overrides stands below it; of an unknown or missing key nothing does.
            below = [layer.key_place for layer in self.chain(path) if layer.key_place.file != SET]
            what = f"set by --set #{place.line}"
            return (Related(spelled(path), *((below[0], f"{what}, which overrides this") if below else (place, what))),)
        return ()

    def is_stated(self, path: Steps) -> bool:
        """Whether something was written for a path: a value, or the null that took it or an ancestor away."""
        above = [path[:length] for length in range(1, len(path) + 1)]
        return self.node(path) is not None or any(key in self.removed and self.node(key) is None for key in above)

    def chain(self, path: Steps) -> tuple[Entry, ...]:
        """The entries that were written for a key, the one that holds first, then those that it overrides."""
        parent = self.node(path[:-1])
        entry = parent.entries.get(str(path[-1])) if path and isinstance(parent, Mapping) else None
        return () if entry is None else layers(entry)


def resolve(
    source: Document | str | os.PathLike[str], overrides: SequenceOf[str] = (), *, allow_outside: bool = False
) -> Resolved:
    """The spec in a document, in a file or shipped as `modelspec:NAME`, with its parents and the overrides applied.

    The file and its parents must lie under the project's folder, or anywhere with `allow_outside`. Raises SpecError.
    """
    leaf = source if isinstance(source, Document) else read_inside(os.fspath(source), allow_outside)
    # A line break in an override is as good as a space, and one line each keeps the places right.
    lines = [" ".join(line.splitlines()) for line in ([overrides] if isinstance(overrides, str) else overrides)]
    parents = _Parents(leaf, os.path.abspath(os.sep) if allow_outside else project(leaf.file))
    removed: dict[Steps, Entry] = {}
    try:
        root = with_like(override(parents.merged(), lines))
        if size(root) > MAX_NODES:
            raise SpecError(
                [error("MS010", root.place, (), f"with its parents the spec has over {MAX_NODES:,} values")]
            )
        root = without_nulls(root, removed)
    except SpecError as failed:
        sources = parents.texts | failed.sources | {SET: "\n".join(lines)}
        told = [
            replace(each, related=(*each.related, _inherited(each.path, each.place, parents.extended)))
            if each.place.file in parents.extended
            else each
            for each in failed.diagnostics
        ]
        raise SpecError(told, sources, failed.exit_code) from None
    return Resolved(root, parents.texts | {SET: "\n".join(lines)}, removed, parents.extended)


def read_inside(source: str, allow_outside: bool) -> Document:
    """The document in a file, or shipped as `modelspec:NAME`. Raises SpecError.

    A link out of the file's project is refused before it is read: errors quote what they read.
    """
    file = shipped(source)
    if file is None and not allow_outside:
        try:
            *_, real = way(source)
            boundary = project(source)
        except FileNotFoundError:
            told = error("MS001", Place(source, 1, 1), (), f"cannot read {source}: the working directory is gone")
            raise SpecError([told], exit_code=2) from None
        if not Path(real).is_relative_to(boundary):
            told = error("MS103", Place(source, 1, 1), (), *_outside(source, boundary))
            raise SpecError([told], exit_code=2)
    return read(file or source)


def _outside(name: str, boundary: str) -> tuple[str, str]:
    """What is wrong with a file out of the project, and what helps."""
    hint = "the project is the nearest folder above the spec with .git or pyproject.toml, else the spec's own"
    return f"{name} lies outside of {boundary}", f"{hint}; `validate --allow-outside` reads it"


def _inherited(path: str, place: Place, extended: dict[str, Place]) -> Related:
    return Related(path, extended[place.file], f"inherited from {place.file}:{place.line}")


def plain(node: Node) -> Any:
    """The tree below a node as plain dicts, lists and values."""
    match node:
        case Mapping(entries):
            return {key: plain(entry.node) for key, entry in entries.items()}
        case Sequence(items):
            return [plain(item) for item in items]
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

    def __init__(self, leaf: Document, boundary: str) -> None:
        self.leaf = leaf
        self.boundary = boundary
        self.texts = {leaf.file: leaf.text}
        self.extended: dict[str, Place] = {}
        self.done: dict[str, Mapping] = {}
        self.problems: list[Diagnostic] = []

    def merged(self) -> Mapping:
        """The leaf merged onto its parents. Raises SpecError with all that is wrong with any of them."""
        real = os.path.realpath(self.leaf.file)
        root = self.flatten(self.leaf, self.boundary, ((real, self.leaf.file),))
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
            shown = shipped(name)
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
            raise fail("MS103", *_outside(name, boundary))
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
            self.extended[shown] = self.extended.get(file, reference.place)
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


def shipped(name: str) -> str | None:
    """The file that comes with the package as `modelspec:NAME` or `modelspec:hardware/NAME`, None for other names."""
    if not name.startswith(SHIPPED):
        return None
    wanted = name.removeprefix(SHIPPED)
    what = "hardware" if wanted.startswith("hardware/") else "spec"
    folder = _PACKAGE / ("hardware" if what == "hardware" else "specs")
    wanted = wanted.removeprefix("hardware/")
    names = sorted(file.stem for file in folder.glob("*.yaml"))
    if wanted not in names:
        hint = suggestion(wanted, names) or f"there are {', '.join(names)}"
        message = f"no {what} of the name {wanted!r} comes with modelspec"
        raise SpecError([error("MS001", Place(name, 1, 1), (), message, hint)], exit_code=2)
    return str(folder / f"{wanted}.yaml")


def ships(file: str) -> bool:
    """Whether a file is one that `shipped` gives."""
    return Path(file).parent in (_PACKAGE / "specs", _PACKAGE / "hardware")
