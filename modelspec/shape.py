"""What pydantic finds wrong with each value by itself, told in the user's words and at the user's place.

One mistake is one diagnostic: what merely follows from a misspelt key or from a wrong `type` is left out.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from pydantic_core import ErrorDetails

from modelspec.diagnostics import Diagnostic, Fix, Place, Related
from modelspec.document import Mapping, Node, Scalar
from modelspec.document import Sequence as List
from modelspec.grammar import Grammar, Position, described, keys, words
from modelspec.hints import another_format, key_hint, value_hint
from modelspec.merge import Steps, correction, nearest, spelled, suggestion, types_differ
from modelspec.resolve import Resolved

# Nobody reads more, and each costs a search for what was meant.
MAX_TOLD = 100


def told(errors: list[ErrorDetails], resolved: Resolved, grammar: Grammar) -> list[Diagnostic]:
    """The errors as diagnostics."""
    if foreign := another_format(resolved):
        return [foreign]
    faults = [
        _Fault(details["type"], grammar.position(details["loc"]), details.get("ctx", {}), resolved, grammar)
        for details in errors[:MAX_TOLD]
    ]
    if deciding := next((fault for fault in faults if fault.decides), None):
        return [deciding.diagnostic()]
    diagnostics = [
        fault.diagnostic() for fault in faults if not fault.is_listed_wrongly and not _follows(fault, faults)
    ]
    if len(errors) > MAX_TOLD:
        message = f"{len(errors) - MAX_TOLD} more errors are not shown"
        diagnostics.append(Diagnostic("MS209", "error", resolved.root.place, "", message))
    return diagnostics


def _follows(fault: "_Fault", faults: list["_Fault"]) -> bool:
    """Whether another fault explains this one."""
    for other in faults:
        if other.is_wrong_type and other is not fault and fault.path[: len(other.map)] == other.map:
            return True
        if other is fault or other.kind != "extra_forbidden" or other.map != fault.map or not other.meant:
            continue
        if fault.kind == "missing" and fault.path[-1] == other.meant:
            return True
        # The misspelt key may be the one by which a phase or a run shows of which kind it is.
        unsure = len(other.position.around) > 1
        if unsure and (fault.kind == "missing" or fault.path[-1] in keys(fault.position.around)):
            return True
    return False


@dataclass(frozen=True)
class _Fault:
    """One error of pydantic's, together with what it speaks about."""

    kind: str
    position: Position
    context: dict[str, Any]
    resolved: Resolved
    grammar: Grammar

    @property
    def path(self) -> Steps:
        return self.position.path

    @property
    def node(self) -> Node | None:
        return self.resolved.node(self.path)

    @property
    def is_wrong_type(self) -> bool:
        return self.kind == "union_tag_invalid" or (self.kind == "literal_error" and self.path[-1] == "type")

    @property
    def is_listed_wrongly(self) -> bool:
        """Pydantic calls a list too short from which it has dropped faulty items."""
        return (
            self.kind == "too_short"
            and isinstance(self.node, List)
            and len(self.node.items) >= self.context["min_length"]
        )

    @property
    def map(self) -> Steps:
        """The path of the map that is at fault, where the fault is one of its keys."""
        return self.path if self.kind == "union_tag_invalid" else self.path[:-1]

    @property
    def decides(self) -> bool:
        """Whether nothing can be said of the rest: it is of another version, or what it extends was not read."""
        another_version = self.path == ("spec_version",) and self.kind != "missing"
        return another_version or (self.kind == "extra_forbidden" and self.meant == "extends")

    @property
    def legal_here(self) -> list[str]:
        """The keys of the map that holds an unknown key, with those that stand there in files only."""
        of_files = ["extends"] if len(self.path) == 1 else ["like"] if _is_variant(self.path[:-1]) else []
        return [*keys(self.position.around), *of_files]

    @cached_property
    def meant(self) -> str | None:
        """The key of this map that an unknown key most resembles, of those that do not stand beside it already."""
        key, file = str(self.path[-1]), self.resolved.key_place(self.path).file
        around = self.resolved.node(self.path[:-1])
        entries = around.entries.items() if isinstance(around, Mapping) else ()
        written = {name for name, entry in entries if entry.key_place.file == file}
        return nearest(key, [known for known in self.legal_here if known not in written], 0.8 if self.is_known else 0.6)

    @property
    def is_known(self) -> bool:
        """Whether an unknown key is one that the language has elsewhere."""
        return any(self.path[-1] in keys([schema]) for _, schema in self.grammar.maps)

    def diagnostic(self) -> Diagnostic:
        match self.kind:
            case "extra_forbidden":
                return self.unknown_key()
            case "missing" if isinstance(self.path[-1], int):
                return self.wrong_length(self.path[:-1])
            case "missing":
                return self.missing_key()
            case "union_tag_not_found":
                return self.missing_type()
            case "union_tag_invalid" | "literal_error" if self.is_wrong_type:
                return self.unknown_type()
            case "literal_error":
                return self.unknown_word()
            case "too_short" | "too_long":
                return self.wrong_length(self.path)
            case "string_pattern_mismatch" if not isinstance(self.node, Scalar):
                return self.wrong_name()
            case "string_pattern_mismatch" | "string_too_short" | "string_too_long":
                return self.wrong_value("MS207")
            case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
                return self.wrong_value("MS204")
            case "value_error":
                return self.error("MS203", self.path, f"{spelled(self.path)}: {self.context['error']}")
            case _:
                return self.wrong_value("MS203")

    def unknown_key(self) -> Diagnostic:
        key, around = str(self.path[-1]), self.path[:-1]
        fix = None
        if self.meant:
            help: str | None = f"did you mean {self.meant!r}?"
            # Measured against keys that are written already too: a second `num_heads` is no `num_kv_heads`.
            sure = None if self.is_known else correction(key, self.legal_here)
            fix = sure if sure and sure.new == self.meant else None
        else:
            help = key_hint(key, around, keys(self.position.around), self.grammar, self.resolved)
        message = f"unknown key {key!r} {_inside(around)}"
        return self.error("MS201", self.path, message, help, self.resolved.key_place(self.path), fix=fix)

    def missing_key(self) -> Diagnostic:
        key, around = str(self.path[-1]), self.path[:-1]
        schemas = [schema["properties"][key] for schema in self.position.around if key in keys([schema])]
        help = schemas[0].get("description") if schemas else None
        if self.path == ("spec_version",):
            help = "write spec_version: 1, the version of the language"
        if help and schemas[0].get("examples"):
            help += f"; for example {schemas[0]['examples'][0]}"
        if self.path == ("name",) and len(self.resolved.documents) > 2:
            help = "a spec does not inherit the name of the one that it extends"
        message = f"missing key {key!r} {_inside(around)}"
        return self.error("MS202", self.path, message, help, self.resolved.key_place(around), self.why_gone(self.path))

    def missing_type(self) -> Diagnostic:
        assert isinstance(self.node, Mapping)
        known = keys(self.position.value)
        wanted = ["type", "like"] if _is_variant(self.path) else ["type"]
        for misspelt in self.node.entries:
            if misspelt not in known and (meant := nearest(misspelt, wanted)):
                path = (*self.path, misspelt)
                message, help = f"unknown key {misspelt!r} {_inside(self.path)}", f"did you mean {meant!r}?"
                fix = correction(misspelt, [*known, *wanted])
                return self.error("MS201", path, message, help, self.resolved.key_place(path), fix=fix)
        path, message = (*self.path, "type"), f"missing key 'type' {_inside(self.path)}"
        return self.error(
            "MS202",
            path,
            message,
            _types(self.types(self.path)),
            self.resolved.key_place(self.path),
            self.why_gone(path),
        )

    def unknown_type(self) -> Diagnostic:
        path = (*self.map, "type")
        types = self.types(self.map)
        kind = self.resolved.node(path)
        written = kind.text if isinstance(kind, Scalar) else ""
        help = suggestion(written, types) or _types(types)
        fix = correction(written, types)
        return self.error("MS206", path, f"unknown type {_given(kind)} {_inside(self.map)}", help, fix=fix)

    def unknown_word(self) -> Diagnostic:
        legal = [str(word) for word in words(self.position.value)]
        if self.path == ("spec_version",):
            newer = isinstance(self.node, Scalar) and type(self.node.value) is int and self.node.value > 1
            help = f"this modelspec reads version {' and '.join(legal)} of the language"
            return self.wrong_value("MS205", f"{help}; a newer one reads this spec" if newer else f"{help}: write 1")
        if not isinstance(self.node, Scalar):
            return self.wrong_value("MS205")
        return self.wrong_value("MS205", suggestion(self.node.text, legal), correction(self.node.text, legal))

    def wrong_length(self, path: Steps) -> Diagnostic:
        node = self.resolved.node(path)
        has = len(node.items) if isinstance(node, List) else len(node.entries) if isinstance(node, Mapping) else 0
        lengths = [_lengths(schema) for schema in self.grammar.at(path) if schema.get("type") in ("array", "object")]
        least, most = lengths[0] if lengths else (1, None)
        one, many = ("entry", "entries") if isinstance(node, Mapping) else ("item", "items")
        wanted = f"{'' if least == most else 'at least '}{least} {one if least == 1 else many}"
        message = f"{spelled(path)} must have {wanted}, has {has}"
        return self.error("MS208", path, message)

    def wrong_name(self) -> Diagnostic:
        message = f"{str(self.path[-1])!r} {_inside(self.path[:-1])} is no legal name"
        help = f"a name has the form {self.context['pattern']}"
        return self.error("MS207", self.path, message, help, self.resolved.key_place(self.path))

    def wrong_value(self, code: str, help: str | None = None, fix: Fix | None = None) -> Diagnostic:
        legal = self.position.value
        message = f"{spelled(self.path)} must be {described(legal)}, got {_given(self.node)}"
        return self.error(code, self.path, message, help or value_hint(self.node, legal), fix=fix)

    def error(
        self,
        code: str,
        path: Steps,
        message: str,
        help: str | None = None,
        place: Place | None = None,
        related: tuple[Related, ...] = (),
        fix: Fix | None = None,
    ) -> Diagnostic:
        place = place or self.resolved.place(path)
        related += self.resolved.origin(path, place)
        return Diagnostic(code, "error", place, spelled(path), message, help, related, fix)

    def types(self, path: Steps) -> list[str]:
        return [
            str(word) for word in words(map_.get("properties", {}).get("type", {}) for map_ in self.grammar.at(path))
        ]

    def why_gone(self, path: Steps) -> tuple[Related, ...]:
        """What keeps a missing key from being inherited: a null, or a change of `type`."""
        for gone in (path, path[:-1]):
            if gone in self.resolved.removed:
                place = self.resolved.removed[gone].node.place
                return (Related(spelled(gone), place, f"{spelled(gone)} was removed here"),)
        for over, below in pairwise(self.resolved.chain(path[:-1])):
            if (
                isinstance(over.node, Mapping)
                and isinstance(below.node, Mapping)
                and types_differ(below.node, over.node)
            ):
                message = f"{spelled(path[:-1])} is of another type here, so nothing of it is inherited"
                return (Related(spelled(path[:-1]), below.key_place, message),)
        return ()


def _lengths(schema: dict[str, Any]) -> tuple[int, int | None]:
    # Pydantic writes `minLength` for `minItems` where a validator runs before the bound is checked.
    return schema.get("minItems", schema.get("minProperties", schema.get("minLength", 1))), schema.get("maxItems")


def _is_variant(path: Steps) -> bool:
    return path[:-1] in (("model", "attention"), ("model", "ffn"))


def _inside(path: Steps) -> str:
    return f"in {spelled(path)}" if path else "at the top level"


def _types(names: list[str]) -> str:
    return f"the only type here is {names[0]!r}" if len(names) == 1 else f"the types here are {', '.join(names)}"


def _given(node: Node | None) -> str:
    match node:
        case Mapping():
            return "a map"
        case List():
            return "a list"
        case Scalar(str(), _, text):
            return repr(text if len(text) <= 60 else f"{text[:60]}...")
        case Scalar(_, _, text):
            return text or "nothing"
    return "nothing"
