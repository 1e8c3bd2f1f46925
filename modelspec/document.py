"""YAML text to a tree whose nodes know where they stand: file, line and column of every value and of every key.

ruamel.yaml scans and parses, this module composes: it pulls one parser event after the other and builds three kinds
of nodes. So each bound holds before anything is built, and the rules for scalars are exactly those of the YAML 1.2
core schema: `1e-4` is a number, `no` and `2024-01-01` are text, `010` is ten. A spec is plain data: tags are refused,
and so are merge keys, which would copy maps inside one file before `extends` and `like` merge them with provenance.
Aliases share the node that they name; it counts, with all below it, each time that it is used.
"""

import math
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    StreamEndEvent,
    StreamStartEvent,
)

from modelspec.diagnostics import Diagnostic, Place, SpecError

# The largest published architecture needs 300 nodes in 5 KB. Within these bounds the worst text that exists is read,
# or refused, in well under a second.
MAX_BYTES = 256 * 1024
MAX_NODES = 20_000
MAX_DEPTH = 64
SET = "--set"

Value = str | int | float | bool | None
_Path = tuple[str | int, ...]

_NULLS = {"", "~", "null", "Null", "NULL"}
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_VERSION = re.compile(r"(?<![^\r\n])%YAML")
_NOT_ALLOWED = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# No number with a meaning is written with more characters.
_LONGEST_NUMBER = 100
_SYNTAX_HINTS = {
    "'\\t'": "indent with spaces",
    "mapping values are not allowed": "quote text that holds a colon and a space; begin each key in its own line",
}


@dataclass(frozen=True, slots=True)
class Scalar:
    """A single value; `text` is what the file says, without quotes."""

    value: Value
    place: Place
    text: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A value under its key. `overrides` holds what earlier layers wrote for this key, the nearest layer first."""

    key_place: Place
    node: "Node"
    overrides: "tuple[Entry, ...]" = ()


@dataclass(frozen=True, slots=True)
class Mapping:
    """A map, in the order of the text."""

    entries: dict[str, Entry]
    place: Place


@dataclass(frozen=True, slots=True)
class Sequence:
    """A list."""

    items: "tuple[Node, ...]"
    place: Place


Node = Scalar | Mapping | Sequence


@dataclass(frozen=True, slots=True)
class Document:
    """One file: its name as the user wrote it, its text and its tree."""

    file: str
    text: str
    root: Mapping


def read(path: str | os.PathLike[str]) -> Document:
    """The document in a file. Raises SpecError, with exit code 2 when the file cannot be read at all."""
    file = os.fspath(path)
    start = Place(file or "''", 1, 1)
    if not file:
        raise SpecError([Diagnostic("MS001", "error", start, "", "the name of a file is empty")], exit_code=2)
    try:
        raw = _read_bytes(file)
    except (OSError, ValueError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        message = f"cannot read {file}: {reason[:1].lower()}{reason[1:]}"
        raise SpecError([Diagnostic("MS001", "error", start, "", message)], exit_code=2) from None
    if len(raw) > MAX_BYTES:
        _fail("MS002", start, f"the file is larger than {MAX_BYTES // 1024} KiB; a spec has a few")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8-sig")
        message = f"byte 0x{raw[error.start]:02x} is not UTF-8"
        _fail("MS003", _place_at(before, file), message, help="save the file as UTF-8")
    return parse(text, file)


def parse(text: str, file: str) -> Document:
    """The document in a text. Raises SpecError."""
    root = _compose(text, file, line_offset=0)
    if root is None:
        _fail("MS006", Place(file, 1, 1), "the file is empty", help="a spec has at least spec_version, name and model")
    if not isinstance(root, Mapping):
        _fail("MS008", root.place, "a spec is a map of keys to values", text=text)
    return Document(file, text, root)


def parse_value(text: str, number: int) -> Node:
    """The value of the override with this number, by the same rules as in a file. Raises SpecError.

    Leading spaces count as columns, so that a caller may blank out the key to keep the places right.
    """
    node = _compose(text, SET, line_offset=number - 1)
    return Scalar(None, Place(SET, number, 1), "") if node is None else node


def _read_bytes(file: str) -> bytes:
    """At most one byte more than a spec may have. Never blocks: a pipe without a writer is opened and refused."""
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(0, "it is a directory")
        if not stat.S_ISREG(mode):
            raise OSError(0, "it is not a regular file")
        with open(descriptor, "rb", closefd=False) as stream:
            return stream.read(MAX_BYTES + 1)
    finally:
        os.close(descriptor)


def _fail(
    code: str, place: Place, message: str, *, path: _Path = (), help: str | None = None, text: str | None = None
) -> NoReturn:
    spelled = ".".join(map(str, path))
    sources = {} if text is None else {place.file: text}
    raise SpecError([Diagnostic(code, "error", place, spelled, message, help)], sources)


def _place_at(before: str, file: str, line_offset: int = 0) -> Place:
    """The place right after a text."""
    lines = re.split(r"\r\n|\r|\n", before)
    return Place(file, len(lines) + line_offset, len(lines[-1]) + 1)


def _compose(text: str, file: str, line_offset: int) -> Node | None:
    """The only document of a text, None if there is none."""
    if len(text) > MAX_BYTES:
        _fail("MS002", Place(file, 1 + line_offset, 1), f"the text is larger than {MAX_BYTES // 1024} KiB")
    if bad := _NOT_ALLOWED.search(text):
        place = _place_at(text[: bad.start()], file, line_offset)
        _fail("MS004", place, f"character U+{ord(bad.group()):04X} is not allowed in YAML")
    return _Composer(text, file, line_offset).document()


class _Composer:
    """Builds the tree of one text from its events, and counts what it builds."""

    def __init__(self, text: str, file: str, line_offset: int) -> None:
        self.text = text
        self.file = file
        self.line_offset = line_offset
        self.events: Iterator[Any] = YAML(typ="safe", pure=True).parse(text)
        self.nodes = 0
        # Name of an anchor to its node, how many nodes that is written out, and how deep it is; None while unfinished.
        self.anchors: dict[str, tuple[Node, int, int] | None] = {}
        # What has been written at this place so far is deepest at this depth.
        self.deepest = 0

    def document(self) -> Node | None:
        event = self.next_event()
        while isinstance(event, StreamStartEvent):
            event = self.next_event()
        if isinstance(event, StreamEndEvent):
            return None
        assert isinstance(event, DocumentStartEvent)
        if event.version not in (None, (1, 2)):
            self.fail("MS005", self.version_directive(event), "specs are YAML 1.2", help="remove the %YAML directive")
        first = self.next_event()
        # A document of nothing but `---` or comments.
        if isinstance(first, ScalarEvent) and not first.value and first.implicit[0] and not first.anchor:
            root: Node | None = None
        else:
            root = self.node(first, (), 1)
        self.next_event()
        following = self.next_event()
        if not isinstance(following, StreamEndEvent):
            self.fail("MS007", self.place(following), "a second document begins here", help="keep one spec per file")
        return root

    def next_event(self) -> Any:
        try:
            return next(self.events)
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = Place(self.file, mark.line + 1 + self.line_offset, mark.column + 1) if mark else self.start()
            problem, context = error.problem or "", error.context
            message = f"not valid YAML: {problem}" + (f" ({context})" if context else "")
        except (YAMLError, ValueError):
            # ruamel hands these to int() and chr() without looking, and so knows no place.
            place, problem = self.start(), ""
            message = "not valid YAML: the number of an escape or of a %YAML directive is out of range"
        hints = (hint for symptom, hint in _SYNTAX_HINTS.items() if symptom in problem)
        self.fail("MS005", place, message, help=next(hints, None))

    def fail(self, code: str, place: Place, message: str, path: _Path = (), help: str | None = None) -> NoReturn:
        _fail(code, place, message, path=path, help=help, text=None if self.file == SET else self.text)

    def start(self) -> Place:
        return Place(self.file, 1 + self.line_offset, 1)

    def version_directive(self, document: Any) -> Place:
        """Where the directive stands that the event of a document's start reports without a place."""
        directive = _VERSION.search(self.text, 0, document.start_mark.index)
        return _place_at(self.text[: directive.start()], self.file, self.line_offset) if directive else self.start()

    def place(self, event: Any) -> Place:
        return Place(self.file, event.start_mark.line + 1 + self.line_offset, event.start_mark.column + 1)

    def count(self, place: Place, path: _Path, nodes: int, depth: int) -> None:
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            hint = "every alias counts as what it stands for"
            self.fail("MS010", place, f"more than {MAX_NODES:,} values; a spec has a few hundred", path, hint)
        if depth > MAX_DEPTH:
            self.fail("MS009", place, f"maps and lists are nested more than {MAX_DEPTH} deep", path)
        self.deepest = max(self.deepest, depth)

    def node(self, event: Any, path: _Path, depth: int) -> Node:
        place = self.place(event)
        if isinstance(event, AliasEvent):
            return self.alias(event.anchor, place, path, depth)
        if event.tag is not None:
            hint = "remove the tag; quote a value to make it text"
            self.fail("MS011", place, "tags are not read: specs are plain data", path, hint)
        self.count(place, path, 1, depth)
        if event.anchor is None:
            return self.content(event, place, path, depth)
        self.anchors[event.anchor] = None
        before, deepest, self.deepest = self.nodes, self.deepest, depth
        node = self.content(event, place, path, depth)
        self.anchors[event.anchor] = (node, self.nodes - before + 1, self.deepest - depth)
        self.deepest = max(self.deepest, deepest)
        return node

    def alias(self, name: str, place: Place, path: _Path, depth: int) -> Node:
        anchored = self.anchors.get(name)
        if anchored is None:
            what = "stands inside its own anchor" if name in self.anchors else "has no anchor before it"
            self.fail("MS015", place, f"the alias *{name} {what}", path)
        node, nodes, height = anchored
        self.count(place, path, nodes, depth + height)
        return node

    def content(self, event: Any, place: Place, path: _Path, depth: int) -> Node:
        if isinstance(event, ScalarEvent):
            return Scalar(self.value(event, place, path), place, event.value)
        if isinstance(event, MappingStartEvent):
            return self.mapping(place, path, depth)
        items: list[Node] = []
        while not isinstance(event := self.next_event(), SequenceEndEvent):
            items.append(self.node(event, (*path, len(items)), depth + 1))
        return Sequence(tuple(items), place)

    def mapping(self, place: Place, path: _Path, depth: int) -> Mapping:
        entries: dict[str, Entry] = {}
        while not isinstance(event := self.next_event(), MappingEndEvent):
            key_place = self.place(event)
            key = self.key(event, key_place, path)
            if key in entries:
                first = entries[key].key_place
                self.fail("MS012", key_place, f"the key {key!r} stands twice, first in line {first.line}", (*path, key))
            entries[key] = Entry(key_place, self.node(self.next_event(), (*path, key), depth + 1))
        return Mapping(entries, place)

    def key(self, event: Any, place: Place, path: _Path) -> str:
        if not isinstance(event, ScalarEvent) or event.anchor is not None or event.tag is not None:
            self.fail("MS013", place, "a key is plain text, not a list, a map, an alias or an anchor", path)
        if event.value == "<<" and event.implicit[0]:
            hint = "use `extends` between files and `like` between variants"
            self.fail("MS014", place, "merge keys are not read", path, hint)
        value = self.value(event, place, path)
        if not isinstance(value, str):
            message = "this key is empty" if event.value == "" else f"this key is {event.value}, which is not text"
            self.fail("MS013", place, message, path, help="keys are names")
        return value

    def value(self, event: Any, place: Place, path: _Path) -> Value:
        text: str = event.value
        if not event.implicit[0]:
            # Only an escape in a quoted text can make such a character.
            if bad := _NOT_ALLOWED.search(text):
                self.fail("MS004", place, f"the escape for U+{ord(bad.group()):04X} makes no text", path)
            return text
        if text in _NULLS:
            return None
        if text in _BOOLEANS:
            return _BOOLEANS[text]
        if _NOT_FINITE.fullmatch(text):
            self.fail("MS016", place, f"{text} is not a finite number", path)
        if _INTEGER.fullmatch(text):
            return self.integer(text, place, path)
        return self.real(text, place, path) if _FLOAT.fullmatch(text) else text

    def integer(self, text: str, place: Place, path: _Path) -> int:
        # Judged by its length first: building a long integer takes time that grows with its square.
        value = int(text, {"0o": 8, "0x": 16}.get(text[:2], 10)) if len(text) <= _LONGEST_NUMBER else None
        if value is None or not -(2**63) <= value < 2**63:
            self.fail("MS016", place, f"the integer {_short(text)} does not fit 64 bits", path)
        return value

    def real(self, text: str, place: Place, path: _Path) -> float:
        value = float(text) if len(text) <= _LONGEST_NUMBER else math.inf
        vanishes = value == 0 and bool(re.match(r"[-+.0]*[1-9]", text))
        if math.isinf(value) or vanishes:
            self.fail("MS016", place, f"the number {_short(text)} does not fit a 64-bit float", path)
        return value


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:20]}... ({len(text):,} characters)"
