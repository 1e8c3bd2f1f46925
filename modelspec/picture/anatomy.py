"""What a picture shows of a model: its parts with their tensors, and how the layers run.

A *part* is what the spec names once and layers use many times: an attention variant, a feed-forward variant, the norms
of a layer; and what stands once by itself, such as the embedding. Its rows are the tensors of one copy, read off the
schema's table, each with the number of copies, so that the rows of all parts add up to the model. Runs of equal layers,
and lists of runs that repeat, are found in the layers themselves: how the author cut them makes no difference.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel

from modelspec.schema import Model, ModelSpec, MoE, TensorSpec

Family = Literal["attention", "dense", "experts", "rest"]
# A list of runs is looked for up to this length.
LONGEST_PATTERN = 16


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor of a part: its name inside the part, its shape, and how many copies the model has."""

    name: str
    tensor: TensorSpec
    copies: int

    @property
    def elements(self) -> int:
        """Number of elements of all copies."""
        return self.tensor.numel * self.copies


@dataclass(frozen=True, slots=True)
class Fact:
    """A key of a variant that is not at its default: path below the variant, value, and what the key means."""

    key: str
    value: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Experts:
    """Routed experts, how many one token uses, the groups that limit the choice (1 and 1 without), shared experts."""

    total: int
    used: int
    groups: int
    used_groups: int
    shared: int


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of the model. `key` is its path, like attention.mla; `copies` counts layers, or modules for mtp."""

    key: str
    family: Family
    title: str
    copies: int
    rows: tuple[Row, ...]
    facts: tuple[Fact, ...] = ()
    experts: Experts | None = None

    @property
    def name(self) -> str:
        """The last piece of the path: what the spec calls it."""
        return self.key.rpartition(".")[2]

    @property
    def elements(self) -> int:
        """Number of elements of all copies."""
        return sum(row.elements for row in self.rows)

    @property
    def active(self) -> int:
        """Number of elements of all copies that take part in the computation for one token."""
        return sum(row.tensor.active * row.copies for row in self.rows)

    @property
    def each(self) -> int:
        """Number of elements of one copy."""
        return sum(row.tensor.numel for row in self.rows)


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring equal layers; attention and ffn are keys of parts, `elements` counts one layer."""

    layers: int
    attention: str
    ffn: str
    elements: int


@dataclass(frozen=True, slots=True)
class Section:
    """A list of runs, repeated as a whole."""

    repeat: int
    runs: tuple[Run, ...]

    @property
    def layers(self) -> int:
        """Layers of all repetitions."""
        return self.repeat * sum(run.layers for run in self.runs)


@dataclass(frozen=True, slots=True)
class Anatomy:
    """A model taken apart: parts by key in the order of the model, and the sections of its layers."""

    name: str
    summary: str
    parts: Mapping[str, Part]
    sections: tuple[Section, ...]

    def runs(self) -> Iterator[Run]:
        """The runs of the whole model, one after the other."""
        for section in self.sections:
            for _ in range(section.repeat):
                yield from section.runs

    @property
    def layers(self) -> int:
        """Layers of the main model."""
        return sum(section.layers for section in self.sections)


def anatomy(spec: ModelSpec, names: Mapping[str, str] | None = None) -> Anatomy:
    """Takes a model apart. `names` gives keys of variants, like ffn.moe, another name: the one that a diff uses."""
    model, names = spec.model, names or {}
    layers = [
        (names.get(f"attention.{layer.attention}", f"attention.{layer.attention}"), _ffn(names, layer.ffn))
        for layer in model.expanded_layers()
    ]
    rows: dict[str, dict[str, Row]] = {}
    for name, tensor in model.tensors().items():
        key, inner = _home(name, layers)
        found = rows.setdefault(key, {})
        row = found.get(inner, Row(inner, tensor, 0))
        found[inner] = replace(row, copies=row.copies + 1)
    variants: dict[str, Any] = {}
    for kind, named in (("attention", model.attention), ("ffn", model.ffn)):
        for name, variant in named.items():
            key = f"{kind}.{name}"
            variants[names.get(key, key)] = variant
    parts = [_part(key, rows[key], variants.get(key), model) for key in sorted(rows, key=_order)]
    sizes = {part.key: part.each for part in parts}
    runs = [
        (count, Run(count, attention, ffn, sizes[attention] + sizes[ffn] + sizes["norms"]))
        for count, (attention, ffn) in _runs(layers)
    ]
    return Anatomy(spec.name, spec.summary or "", {part.key: part for part in parts}, fold([run for _, run in runs]))


def fold(runs: list[Run]) -> tuple[Section, ...]:
    """Lists of runs that repeat, each as one section: the one that covers most, and of these the shortest."""
    sections: list[Section] = []
    start = 0
    while start < len(runs):
        length, repeat = 1, 1
        for size in range(1, min(LONGEST_PATTERN, (len(runs) - start) // 2) + 1):
            pattern, times = runs[start : start + size], 1
            while runs[start + times * size : start + (times + 1) * size] == pattern:
                times += 1
            if times > 1 and times * size > length * repeat:
                length, repeat = size, times
        sections.append(Section(repeat, tuple(runs[start : start + length])))
        start += length * repeat
    return tuple(sections)


def _runs(layers: list[tuple[str, str]]) -> Iterator[tuple[int, tuple[str, str]]]:
    start = 0
    for index, layer in enumerate(layers):
        if index + 1 == len(layers) or layers[index + 1] != layer:
            yield index + 1 - start, layer
            start = index + 1


def _ffn(names: Mapping[str, str], name: str) -> str:
    return names.get(f"ffn.{name}", f"ffn.{name}")


def _home(name: str, layers: list[tuple[str, str]]) -> tuple[str, str]:
    """The part that a tensor belongs to, and its name there."""
    match name.split("."):
        case ["layers", index, "attention", *rest]:
            return layers[int(index)][0], ".".join(rest)
        case ["layers", index, "ffn", *rest]:
            return layers[int(index)][1], ".".join(rest)
        case ["layers", _, *rest]:
            return "norms", ".".join(rest)
        case ["mtp", _, *rest]:
            return "mtp", ".".join(rest)
        case [part, *_]:
            return part, name
        case _:
            raise AssertionError("a tensor has a name")


_TITLES = {
    "embed_tokens": "Token embedding",
    "norms": "Norms of the layers",
    "norm": "Final norm",
    "lm_head": "Output head",
    "mtp": "Multi-token prediction",
}


def _order(key: str) -> int:
    places = ("embed_tokens", "attention", "ffn", "norms", "norm", "lm_head", "mtp")
    place = key.partition(".")[0]
    return places.index(place) if place in places else len(places)


def _part(key: str, rows: Mapping[str, Row], variant: Any, model: Model) -> Part:
    copies = max(row.copies for row in rows.values())
    if variant is None:
        return Part(key, "rest", _TITLES.get(key, key), copies, tuple(rows.values()))
    has_experts = any(row.tensor.experts_per_token is not None for row in rows.values())
    family: Family = "attention" if key.startswith("attention.") else "experts" if has_experts else "dense"
    title = type(variant).model_fields["type"].description or variant.type
    return Part(
        key,
        family,
        title[:1].upper() + title[1:],
        copies,
        tuple(rows.values()),
        tuple(_facts("", variant)),
        _experts(variant),
    )


def _experts(variant: Any) -> Experts | None:
    if not isinstance(variant, MoE):
        return None
    groups = variant.router.selection.groups
    return Experts(
        total=variant.num_experts,
        used=variant.num_experts_per_tok,
        groups=groups.num if groups else 1,
        used_groups=groups.topk if groups else 1,
        shared=variant.shared_experts.num if variant.shared_experts else 0,
    )


def _facts(prefix: str, value: BaseModel) -> Iterator[Fact]:
    for name, field in type(value).model_fields.items():
        item = getattr(value, name)
        if isinstance(item, BaseModel):
            yield from _facts(f"{prefix}{name}.", item)
        elif (item != field.default or field.is_required()) and (prefix or name != "type"):
            yield Fact(f"{prefix}{name}", _said(item), field.description or "")


def _said(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    if isinstance(value, float):
        return f"{int(value):,}" if value.is_integer() and abs(value) < 1e12 else f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
