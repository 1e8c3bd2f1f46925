"""Two models side by side: what a change of architecture does to layers, parameters, parts and every tensor.

Variants are matched as the diff matches them, so that another name or another cut of the layers shows no change. A
change is told by its sign and a word first, + new, - gone, ~ changed, and by colour beside them.
"""

from collections.abc import Iterator, Mapping, Sequence

from modelspec.amount import amount, amount_of_bytes, figure, flop_amount
from modelspec.diff import Change, Class, Summary, TensorChanges, TensorGroup, diff, summarize, waived
from modelspec.diff.canonical import Names, canonical_names
from modelspec.diff.words import value
from modelspec.picture import draw, palette, words
from modelspec.picture.anatomy import Anatomy, Part, Row, anatomy
from modelspec.picture.document import bar, document, image, named, numbers, plural, section, soft, swatch, table
from modelspec.picture.draw import Drawing
from modelspec.picture.markup import Child, Markup, lines, tag
from modelspec.schema import ModelSpec
from modelspec.schema.hardware import Hardware

_Shades = Mapping[str, str]
# Sign and word of a state, and its colour.
_MARKS = {
    "new": ("+ new", "new"),
    "gone": ("- gone", "gone"),
    "changed": ("~ changed", "changed"),
    "reshaped": ("~ reshaped", "changed"),
    "copies": ("~ copies", "changed"),
}
_CLASS_COLOURS: dict[Class, str] = {"checkpoint-breaking": "gone", "convergence": "changed"}
_WIDTH = 912.0


def comparison(old: ModelSpec, new: ModelSpec, hardware: Hardware | None = None) -> str:
    """The changes from one spec to another as one file of HTML, ending in a newline. Equal specs give equal text.

    Training is planned for a device: H800 if left out.
    """
    ours, theirs = canonical_names(old.model, new.model)
    before, after = anatomy(old, _keys(ours)), anatomy(new, _keys(theirs))
    changes, summary = diff(old, new), summarize(old, new, hardware)
    added = [part for key, part in after.parts.items() if key not in before.parts]
    shades = palette.shades([*before.parts.values(), *added])
    return document(f"{old.name} to {new.name}: what changes", _body(new, before, after, changes, summary, shades))


def _keys(names: Names) -> dict[str, str]:
    """Of each variant that layers use, the key of its part beside the other side's."""
    return {f"{kind}.{name}": f"{kind}.{other}" for kind, variants in names.items() for name, other in variants.items()}


def _body(
    new: ModelSpec, before: Anatomy, after: Anatomy, changes: list[Change], summary: Summary, shades: _Shades
) -> Iterator[Child]:
    counts: list[tuple[Class, int]] = [(name, number) for name, number in summary.classes.items() if number]
    badges = [tag("li", tag("strong", number), " ", _class_mark(name)) for name, number in counts]
    badges = badges or [tag("li", "no change")]
    yield tag(
        "header",
        tag("h1", f"{before.name} → {after.name}"),
        tag("ul", lines(badges), class_="badges", aria_label="Changes by class"),
        numbers(_figures(before, after, summary)),
    )
    yield section("Layers", "layers", _layers(before, after, shades))
    yield section("Where the parameters are", "parameters", _bars(before, after, shades))
    yield section("Parts", "parts", _parts(before, after, changes, shades))
    if summary.tensors.groups:
        yield section("Tensors that change", "tensors", [_tensors(summary.tensors)])
    if changes:
        tables = (_class(name, [one for one in changes if one.change_class == name], new) for name, _ in counts)
        yield section("All changes by class", "changes", tables)


def _figures(before: Anatomy, after: Anatomy, summary: Summary) -> Iterator[tuple[str, str, str]]:
    for key, (was, now) in summary.parameters.items():
        if was or now:
            label = {"total": "parameters", "active": "active for one token", "mtp": "multi-token prediction"}.get(
                key, key
            )
            yield label, amount(now), f"was {amount(was)}, {now - was:+,}" if was != now else "as before"
    same = before.layers == after.layers
    yield "layers", f"{after.layers:,}", "as before" if same else f"was {before.layers:,}"
    yield from _costs(summary)
    tensors = summary.tensors
    said = f"tensors: {len(tensors.new):,} new, {len(tensors.gone):,} gone, {len(tensors.reshaped):,} reshaped"
    fits = not (tensors.new or tensors.gone or tensors.reshaped)
    yield "to initialise anew", amount(tensors.elements), "a checkpoint loads" if fits else said


def _costs(summary: Summary) -> Iterator[tuple[str, str, str]]:
    """What a token and a checkpoint cost, where the two sides differ."""
    key, what = summary.most_inclusive
    was, now = (round(flops) for flops in summary.flops_per_token[key])
    if was != now:
        yield f"for a token: {what}", flop_amount(now), f"was {flop_amount(was)}, at {summary.sequence_length:,} tokens"
    for label, (old, new) in (
        ("cache for a token", summary.kv_cache_bytes_per_token),
        ("state of a sequence", summary.state_bytes_per_sequence),
    ):
        if old != new:
            yield label, amount_of_bytes(new), f"was {amount_of_bytes(old)}"
    weights = summary.checkpoint_bytes["weights"]
    if weights[0] != weights[1]:
        before, after = (amount_of_bytes(count or 0) for count in weights)
        yield "weights of a checkpoint", after, f"was {before}"
    yield from _training(summary)


def _training(summary: Summary) -> Iterator[tuple[str, str, str]]:
    """What a plan says of both sides, where they differ."""
    if summary.memory_bytes and summary.memory_bytes[0] != summary.memory_bytes[1]:
        assert summary.memory_stages and summary.memory_verdicts
        old, new = map(amount_of_bytes, summary.memory_bytes)
        before, after = summary.memory_verdicts
        stage, on = summary.memory_stages[1], summary.hardware
        yield "memory of the heaviest rank, all stages", f"{new} {after}", f"in {stage} on {on}, was {old} {before}"
    for label, pair, unit in (("GPU hours", summary.gpu_hours, ""), ("cost of training", summary.cost_usd, "$")):
        if pair and pair[0] != pair[1]:
            was, now = (f"{unit}{figure(each)}" for each in pair)
            yield label, now, f"was {was}, on {summary.hardware}"


def _layers(before: Anatomy, after: Anatomy, shades: _Shades) -> Iterator[Child]:
    most = max(before.layers, after.layers)
    for side, word in ((before, "before"), (after, "after")):
        drawn = draw.strip(side, shades, _WIDTH, most)
        told = words.strip(side)
        yield tag("p", tag("strong", f"{side.name}"), soft(f" {word}: {told}"), class_="small")
        yield image(Drawing(drawn.shapes, _WIDTH, drawn.height), f"Layers {word}: {told}")
    used = {part.key: part for side in (after, before) for part in side.parts.values() if part.family != "rest"}
    legend = [tag("li", swatch(shades[key]), part.name) for key, part in sorted(used.items())]
    yield tag("ul", lines(legend), class_="legend")


def _bars(before: Anatomy, after: Anatomy, shades: _Shades) -> Iterator[Child]:
    """Both sides to the same scale, so that lengths compare."""
    mains = [[part for part in side.parts.values() if part.key != "mtp"] for side in (before, after)]
    for label in ("All parameters", "Active for one token"):
        sizes = [[part.elements if label.startswith("All") else part.active for part in main] for main in mains]
        whole = max(map(sum, sizes))
        for side, main, these in zip((before, after), mains, sizes, strict=True):
            yield bar(f"{label}, {side.name}", main, these, shades, whole)


def _parts(before: Anatomy, after: Anatomy, changes: Sequence[Change], shades: _Shades) -> Iterator[Child]:
    unchanged = []
    keys = [*before.parts, *(key for key in after.parts if key not in before.parts)]
    for key in keys:
        old, new = before.parts.get(key), after.parts.get(key)
        part = new or old
        assert part is not None
        own = [change for change in changes if _belongs(change, part)]
        if old and new and not own and old.rows == new.rows:
            unchanged.append(named(part))
        else:
            yield _card(old, new, part, own, shades[key])
    if unchanged:
        yield tag("p", "Unchanged: ", ", ".join(unchanged), ".", class_="soft")


def _belongs(change: Change, part: Part) -> bool:
    path = f"model.{part.key}"
    return change.path == path or change.path.startswith(f"{path}.")


def _card(old: Part | None, new: Part | None, part: Part, changes: list[Change], shade: str) -> Markup:
    state = "changed" if old and new else "new" if new else "gone"
    each = [amount(side.each) for side in (old, new) if side]
    copies = [words.per_copy(side) for side in (old, new) if side]
    title = tag("h3", swatch(shade), tag("span", named(part)), mark(state), class_="with-swatch")
    sizes = " → ".join(dict.fromkeys(each))
    where = " → ".join(dict.fromkeys(copies))
    what = f"{part.title}. " if part.family != "rest" else ""
    told = f"{what}{sizes} parameters" + (f", {where}." if part.copies > 1 or len(set(copies)) > 1 else ".")
    children: list[Child] = [title, tag("p", told, class_="soft small")]
    drawings = [
        tag("div", tag("p", f"{word}: {draw.told(side.experts)}", class_="small"), _experts(side, shade))
        for side, word in ((old, "before"), (new, "after"))
        if side and side.experts
    ]
    if len(drawings) == 2 and old and new and old.experts == new.experts:
        drawings = drawings[1:]
    if drawings:
        children.append(tag("div", lines(drawings), class_="sides"))
    if changes:
        children.append(_changes(f"Keys of {named(part)} that change", changes, len(f"model.{part.key}.")))
    pairs = list(_pairs(old, new))
    differing = [pair for pair in pairs if _state(*pair) is not None]
    label = f"{plural(len(pairs), 'tensor')}, {len(differing) or 'none'} changed"
    head = [("", False), ("tensor", False), ("shape", True), ("elements", True), ("copies", True)]
    shown = table(f"Tensors of {named(part)}, before and after", head, (_tensor(*pair) for pair in pairs))
    is_open = "open" if differing and part.family != "rest" else None
    children.append(tag("details", tag("summary", label), shown, open=is_open))
    return tag("article", lines(children), class_="card", id=part.key)


def _experts(part: Part, shade: str) -> Markup:
    drawn = draw.experts(part.experts, shade) if part.experts else None
    return image(drawn, f"{draw.told(part.experts)}. {draw.EXAMPLE}") if drawn and part.experts else lines(())


def mark(state: str) -> Markup:
    """A state by its sign, a word and its colour."""
    said, colour = _MARKS[state]
    return tag("span", said, class_=f"{colour} small")


_Pair = tuple[Row | None, Row | None]


def _pairs(old: Part | None, new: Part | None) -> Iterator[_Pair]:
    """Rows of the same name together, in the order of the old side, then what only the new one has."""
    before = {row.name: row for row in old.rows} if old else {}
    after = {row.name: row for row in new.rows} if new else {}
    for name in dict.fromkeys((*before, *after)):
        yield before.get(name), after.get(name)


def _state(old: Row | None, new: Row | None) -> str | None:
    if old is None or new is None:
        return "gone" if new is None else "new"
    stored = [(row.tensor.shape, row.tensor.kind, row.tensor.dtype) for row in (old, new)]
    if stored[0] != stored[1]:
        return "reshaped"
    return None if old.copies == new.copies else "copies"


def _tensor(old: Row | None, new: Row | None) -> Markup:
    state = _state(old, new)
    sides = [row for row in (old, new) if row is not None]

    def both(values: Sequence[str]) -> Markup:
        if len(set(values)) == 1:
            return tag("td", values[0], class_="n")
        return tag("td", tag("span", values[0], class_="was"), tag("br"), f"→ {values[1]}", class_="n")

    return tag(
        "tr",
        tag("td", mark(state)) if state else tag("td", soft("= same")),
        tag("th", tag("code", sides[0].name), scope="row"),
        both([words.shape(row.tensor.shape) for row in sides]),
        both([f"{row.tensor.numel:,}" for row in sides]),
        both([f"{row.copies:,}" for row in sides]),
    )


def _tensors(changes: TensorChanges) -> Markup:
    """A row per tensor of a checkpoint, layers folded."""
    head = [("", False), ("tensor", False), ("before", True), ("after", True), ("copies", True)]
    return table("Tensors that change, by name", head, map(_group, changes.groups))


def _group(group: TensorGroup) -> Markup:
    state = "new" if group.before is None else "gone" if group.after is None else "reshaped"
    shapes = (soft("none") if shape is None else words.shape(shape) for shape in (group.before, group.after))
    return tag(
        "tr",
        tag("td", mark(state)),
        tag("th", tag("code", group.name), scope="row"),
        *(tag("td", shape, class_="n") for shape in (*shapes, f"{group.count:,}")),
    )


def _class_mark(name: Class) -> Markup:
    return tag("span", name, class_=_CLASS_COLOURS.get(name))


def _class(name: Class, changes: list[Change], new: ModelSpec) -> Markup:
    return lines((tag("h3", name), _changes(f"Changes of class {name}", changes, 0, new)))


def _changes(caption: str, changes: list[Change], cut: int, new: ModelSpec | None = None) -> Markup:
    """A row per change. `cut` characters of the paths are said by what stands around; with `new`, its waivers show."""
    head = [("", False), ("key", False), ("before", False), ("after", False), *([] if new else [("class", False)])]
    return table(caption, head, (_change(change, cut, new) for change in changes))


def _change(change: Change, cut: int, new: ModelSpec | None) -> Markup:
    state = "new" if change.before is None else "gone" if change.after is None else "changed"
    reason = waived(change, new) if new else None
    note = [soft(f" waived: {reason}")] if reason else []
    return tag(
        "tr",
        tag("td", mark(state)),
        tag("th", tag("code", change.path[cut:] or change.path), *note, scope="row"),
        *(tag("td", tag("code", value(side)), class_="value") for side in (change.before, change.after)),
        *([] if new else [tag("td", _class_mark(change.change_class))]),
    )
