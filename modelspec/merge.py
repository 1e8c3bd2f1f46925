"""The rule by which layers of a spec become one tree, and `like`, which applies it between siblings.

Layers are merged as JSON Merge Patch (RFC 7396) has it: maps merge, lists and scalars replace, `null` removes. One
rule is added: where both sides state `type` and differ, the map replaces, because keys of one type mean nothing to
another. Nothing is copied and nothing is changed: a merged map shares its nodes with its layers, so each value still
knows the place where it was written, and each entry knows the entries that it overrides.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from difflib import SequenceMatcher, get_close_matches

from modelspec.diagnostics import Diagnostic, Fix, Place, Related, SpecError
from modelspec.document import MAX_NODES, Entry, Mapping, Node, Scalar, Sequence

Steps = tuple[str | int, ...]

# More in a row than this, of files or of variants, is a mistake; the walk over them is recursive.
MAX_CHAIN = 16
MAX_HISTORY = 64


def merge(base: Node | None, over: Node) -> Node:
    """`over` as a patch on `base`."""
    return merge_maps(base, over) if isinstance(base, Mapping) and isinstance(over, Mapping) else over


def merge_maps(base: Mapping, over: Mapping) -> Mapping:
    """`over` as a patch on `base`, both maps; where it says nothing, `base` stands."""
    if types_differ(base, over):
        return over
    entries = dict(base.entries)
    for key, entry in over.entries.items():
        below = entries.get(key)
        entries[key] = entry if below is None else _on_top(entry, below)
    return Mapping(entries, over.place)


def types_differ(base: Mapping, over: Mapping) -> bool:
    """Whether both maps state a `type`, and not the same."""
    kinds = [mapping.entries["type"].node for mapping in (base, over) if "type" in mapping.entries]
    values = {kind.value if isinstance(kind, Scalar) else None for kind in kinds}
    return len(values) == 2 and None not in values


def _on_top(entry: Entry, below: Entry) -> Entry:
    # A file that is reached on many ways counts once, or the history would double with each diamond.
    history = {layer.key_place: layer for layer in (*entry.overrides, *layers(below))}
    history.pop(entry.key_place, None)
    return Entry(entry.key_place, merge(below.node, entry.node), tuple(history.values())[:MAX_HISTORY])


def layers(entry: Entry) -> tuple[Entry, ...]:
    """The entry, then what it overrides, the nearest layer first."""
    return (replace(entry, overrides=()), *entry.overrides)


def is_null(node: Node) -> bool:
    """Whether the node is the value that removes."""
    return isinstance(node, Scalar) and node.value is None


def without(mapping: Mapping, *keys: str) -> Mapping:
    """The map without these keys."""
    return Mapping({key: entry for key, entry in mapping.entries.items() if key not in keys}, mapping.place)


def without_nulls(mapping: Mapping, removed: dict[Steps, Entry], path: Steps = ()) -> Mapping:
    """The map without its null entries. `removed` learns each null, also if a later layer writes again."""

    def clean(node: Node, path: Steps) -> Node:
        if isinstance(node, Mapping):
            return without_nulls(node, removed, path)
        if isinstance(node, Sequence):
            return Sequence(tuple(clean(item, (*path, index)) for index, item in enumerate(node.items)), node.place)
        return node

    entries: dict[str, Entry] = {}
    for key, entry in mapping.entries.items():
        null = next((layer for layer in layers(entry) if is_null(layer.node)), None)
        if null is not None:
            removed[(*path, key)] = null
        if not is_null(entry.node):
            entries[key] = replace(entry, node=clean(entry.node, (*path, key)))
    return Mapping(entries, mapping.place)


def with_like(root: Mapping) -> Mapping:
    """The tree with every variant of attention and ffn that is `like` a sibling merged onto it. Raises SpecError."""
    model = root.entries.get("model")
    if model is None or not isinstance(model.node, Mapping):
        return root
    problems: list[Diagnostic] = []
    sections: dict[str, Entry] = {}
    for name in ("attention", "ffn"):
        section = model.node.entries.get(name)
        if section is not None and isinstance(section.node, Mapping):
            sections[name] = replace(section, node=_Variants(("model", name), section.node, problems).merged())
    if problems:
        raise SpecError(problems)
    changed = Mapping(model.node.entries | sections, model.node.place)
    return Mapping(root.entries | {"model": replace(model, node=changed)}, root.place)


class _Variants:
    """The variants of one map while `like` is resolved: each once, the sibling before the one that is like it."""

    def __init__(self, path: Steps, section: Mapping, problems: list[Diagnostic]) -> None:
        self.path = path
        self.section = section
        self.problems = problems
        self.done: dict[str, Node] = {}
        self.nodes = 0

    def merged(self) -> Mapping:
        entries = {name: replace(entry, node=self.variant(name, ())) for name, entry in self.section.entries.items()}
        return Mapping(entries, self.section.place)

    def variant(self, name: str, chain: tuple[str, ...]) -> Node:
        if name not in self.done:
            node = self.section.entries[name].node
            like = node.entries.get("like") if isinstance(node, Mapping) else None
            if isinstance(node, Mapping) and like is not None and not is_null(like.node):
                node = self.onto_sibling(name, without(node, "like"), like.node, (*chain, name))
                self.nodes += size(node)
            self.done[name] = node
        return self.done[name]

    def onto_sibling(self, name: str, own: Mapping, like: Node, chain: tuple[str, ...]) -> Mapping:
        siblings = [sibling for sibling, entry in self.section.entries.items() if not is_null(entry.node)]
        target = like.value if isinstance(like, Scalar) else None
        at = (*self.path, name, "like")
        if not isinstance(target, str) or target not in siblings:
            what = f"{target!r} is no variant" if isinstance(target, str) else "like must name a variant"
            hint = suggestion(str(target), siblings) or f"there are {', '.join(siblings)}"
            self.problems.append(error("MS121", like.place, at, f"{what} of {spelled(self.path)}", hint))
            return own
        if target in chain:
            circle = " -> ".join([*chain[chain.index(target) :], target])
            self.problems.append(error("MS122", like.place, at, f"variants are like one another in a circle: {circle}"))
            return own
        if len(chain) > MAX_CHAIN or self.nodes > MAX_NODES:
            raise SpecError([error("MS122", like.place, at, "too many variants are like one another")])
        base = self.variant(target, chain)
        if not isinstance(base, Mapping):
            return own
        if types_differ(base, own):
            kind, other = (mapping.entries["type"].node for mapping in (own, base))
            message = f"{name} is like {target}, but of another type"
            hint = f"leave `type` out, or write {name} in full without `like`"
            note = Related(spelled((*self.path, target, "type")), other.place, f"the type of {target}")
            self.problems.append(
                replace(error("MS123", kind.place, (*at[:-1], "type"), message, hint), related=(note,))
            )
            return own
        return merge_maps(base, own)


def size(node: Node) -> int:
    """How many nodes the tree has, shared ones counted wherever they stand."""
    match node:
        case Mapping(entries):
            return 1 + sum(size(entry.node) for entry in entries.values())
        case Sequence(items):
            return 1 + sum(map(size, items))
        case Scalar():
            return 1


def spelled(path: Steps) -> str:
    """The path as `--set` spells it."""
    return ".".join(map(str, path))


def error(code: str, place: Place, path: Steps, message: str, help: str | None = None) -> Diagnostic:
    """A diagnostic of severity error."""
    return Diagnostic(code, "error", place, spelled(path), message, help)


def nearest(word: str, choices: SequenceOf[str], cutoff: float = 0.6) -> str | None:
    """The choice that resembles the word most, None when none does."""
    # Compared with a long word, each choice costs milliseconds; and it resembles no key anyway.
    return next(iter(get_close_matches(word, choices, 1, cutoff)), None) if len(word) <= 100 else None


def correction(word: str, choices: SequenceOf[str]) -> Fix | None:
    """The choice that a misspelt word can only mean: close to it, and no other nearly as close.

    None also where digits would change: which number was meant nobody can tell.
    """
    best = nearest(word, choices)
    if best is None or _digits(word) != _digits(best):
        return None
    # In a short word two letters that changed places weigh as much as one that is wrong.
    if _likeness(word, best) < 0.8 and sorted(word) != sorted(best):
        return None
    others = [choice for choice in choices if choice != best]
    return None if nearest(word, others, min(1.0, _likeness(word, best) - 0.1)) else Fix(word, best)


def _likeness(word: str, choice: str) -> float:
    """How alike two words are, from 0 to 1, as `nearest` measures it."""
    return SequenceMatcher(None, choice, word).ratio()


def _digits(word: str) -> str:
    return "".join(filter(str.isdigit, word))


def suggestion(word: str, choices: SequenceOf[str]) -> str | None:
    """The question that names the nearest of the choices, None when nothing is near."""
    near = nearest(word, choices)
    return f"did you mean {near!r}?" if near else None
