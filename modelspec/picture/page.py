"""A model as a page: figures, the run of its layers, where the parameters are, and every part down to its tensors."""

from collections.abc import Iterable, Iterator, Mapping

from modelspec.amount import amount
from modelspec.picture import draw, palette, words
from modelspec.picture.anatomy import Anatomy, Part, Row, Run, Section, anatomy
from modelspec.picture.document import bar, document, image, named, numbers, plural, section, soft, swatch, table
from modelspec.picture.markup import Child, Markup, lines, tag
from modelspec.schema import ModelSpec

_Shades = Mapping[str, str]


def page(spec: ModelSpec) -> str:
    """The picture of a valid spec as one file of HTML, ending in a newline. Equal specs give equal text."""
    model = anatomy(spec)
    shades = palette.shades(model.parts.values())
    return document(f"{model.name}: the model", _body(spec, model, shades))


def _body(spec: ModelSpec, model: Anatomy, shades: _Shades) -> Iterator[Child]:
    main = [part for part in model.parts.values() if part.key != "mtp"]
    yield tag("header", tag("h1", model.name), tag("p", model.summary, class_="soft"), _figures(spec, model, main))
    strip = image(draw.strip(model, shades, 912), f"Layers, first to last: {words.strip(model)}")
    used = [part for part in model.parts.values() if part.family != "rest"]
    legend = tag("ul", lines(tag("li", swatch(shades[part.key]), part.name) for part in used), class_="legend")
    told = "Each column is a layer, the first at the left: attention above, feed-forward below."
    yield section("Layers", "layers", (tag("p", told, class_="soft small"), strip, legend, _stack(spec, model, shades)))
    elements, active = [part.elements for part in main], [part.active for part in main]
    bars = (
        bar("All parameters", main, elements, shades, sum(elements)),
        bar("Active for one token", main, active, shades, sum(active)),
    )
    yield section("Where the parameters are", "parameters", bars)
    yield section("Parts", "parts", (_card(part, shades[part.key]) for part in model.parts.values()))


def _figures(spec: ModelSpec, model: Anatomy, main: Iterable[Part]) -> Markup:
    parts = list(main)
    total, active = sum(part.elements for part in parts), sum(part.active for part in parts)
    mtp = model.parts.get("mtp")
    return numbers(
        [
            ("parameters", amount(total), f"{total:,}"),
            ("active for one token", amount(active), f"{active:,}"),
            *([("added by multi-token prediction", amount(mtp.elements), f"{mtp.elements:,}")] if mtp else []),
            ("layers", f"{model.layers:,}", ""),
            ("hidden size", f"{spec.model.hidden_size:,}", "elements"),
            ("vocabulary", f"{spec.model.vocab_size:,}", "tokens"),
            ("longest position", f"{spec.model.max_position:,}", "tokens"),
        ]
    )


def _stack(spec: ModelSpec, model: Anatomy, shades: _Shades) -> Markup:
    """The model from embedding to head as a list; a run opens to show what happens in one of its layers."""
    items: list[Child] = [_single(model.parts["embed_tokens"], shades)]
    first = 0
    for each in model.sections:
        items.append(_section(model, each, first, shades))
        first += each.layers
    items.append(_single(model.parts["norm"], shades))
    if "lm_head" in model.parts:
        items.append(_single(model.parts["lm_head"], shades))
    else:
        shared = tag("div", tag("span", "Output head"), soft("the embedding's weight"), class_="line")
        items.append(tag("div", shared, class_="box"))
    if "mtp" in model.parts:
        items.append(_single(model.parts["mtp"], shades, words.per_copy(model.parts["mtp"])))
    return tag("ol", lines(tag("li", item) for item in items), class_="stack")


def _single(part: Part, shades: _Shades, note: str = "") -> Markup:
    name = tag("span", swatch(shades[part.key]), tag("a", part.title, href=f"#{part.key}"), class_="with-swatch")
    size = tag("span", amount(part.elements), class_="end")
    return tag("div", tag("div", name, *([soft(note)] if note else []), size, class_="line"), class_="box")


def _section(model: Anatomy, these: Section, first: int, shades: _Shades) -> Markup:
    if these.repeat == 1:
        return _run(model, these.runs[0], words.which_layers(first, these.layers), shades)
    times = tag("p", tag("strong", f"{these.repeat} times"), " ", soft(words.which_layers(first, these.layers)))
    runs = tag("ol", lines(tag("li", _run(model, each, "", shades)) for each in these.runs), class_="stack")
    return tag("div", times, runs, class_="repeat")


def _run(model: Anatomy, this: Run, where: str, shades: _Shades) -> Markup:
    attention, ffn = model.parts[this.attention], model.parts[this.ffn]
    norms = {row.name: row.tensor.numel for row in model.parts["norms"].rows}
    size = f"{amount(this.elements)}{' each' if this.layers > 1 or not where else ''}"
    head = tag(
        "span",
        tag("strong", f"{this.layers} × {words.run(model, this)}"),
        *([soft(where)] if where else []),
        tag("span", size, class_="end"),
        class_="line",
    )

    def step(said: Child, elements: int | None) -> Markup:
        return tag("li", said, tag("span", "" if elements is None else f"{elements:,}", class_="end"))

    def link(part: Part) -> Markup:
        return tag("span", swatch(shades[part.key]), tag("a", part.name, href=f"#{part.key}"), class_="with-swatch")

    steps = (
        step("norm", norms["attention_norm.weight"]),
        step(link(attention), attention.each),
        step("added to the residual stream", None),
        step("norm", norms["ffn_norm.weight"]),
        step(link(ffn), ffn.each),
        step("added to the residual stream", None),
    )
    return tag("details", tag("summary", head), tag("ol", lines(steps), class_="flow"), class_="box")


def _card(part: Part, shade: str) -> Markup:
    title = tag("h3", swatch(shade), tag("span", named(part)), class_="with-swatch")
    what = f"{part.title}. " if part.family != "rest" else ""
    copies = "" if part.copies == 1 and part.key != "mtp" else f" in each of {words.per_copy(part)}"
    children: list[Child] = [
        title,
        tag("p", f"{what}{amount(part.each)} parameters{copies}.", class_="soft small"),
    ]
    if part.experts:
        drawn = draw.experts(part.experts, shade)
        said = f"{draw.told(part.experts)}."
        children += [
            tag("p", said, class_="small"),
            *([image(drawn, f"{said} {draw.EXAMPLE}")] if drawn else []),
        ]
    if part.facts:
        children.append(_facts(part))
    children.append(tensors(part))
    return tag("article", lines(children), class_="card", id=part.key)


def _facts(part: Part) -> Markup:
    rows = (
        tag(
            "tr",
            tag("th", tag("code", fact.key), scope="row"),
            tag("td", tag("code", fact.value), class_="n"),
            tag("td", fact.meaning, class_="soft"),
        )
        for fact in part.facts
    )
    shown = table(f"Keys of {part.name}", [("key", False), ("value", True), ("meaning", False)], rows)
    return tag("details", tag("summary", plural(len(part.facts), "key")), shown)


def tensors(part: Part) -> Markup:
    """The tensors of a part, behind a line that says how many; their sizes add up in the last row."""
    label = plural(len(part.rows), "tensor")
    head = [("tensor", False), ("shape", True), ("elements", True), ("copies", True)]
    foot = tag(
        "tr",
        tag("th", "one of each", scope="row"),
        tag("td", ""),
        tag("td", f"{part.each:,}", class_="n"),
        tag("td", ""),
    )
    shown = table(f"Tensors of {part.name}", head, map(_tensor, part.rows), foot if len(part.rows) > 1 else None)
    # What the spec names is what a reader came for.
    return tag("details", tag("summary", label), shown, open="open" if part.family != "rest" else None)


def _tensor(row: Row) -> Markup:
    notes = [str(row.tensor.dtype)] if row.tensor.dtype else []
    if row.tensor.kind == "buffer":
        notes.append("buffer")
    return tag(
        "tr",
        tag("th", tag("code", row.name), *([Markup(" "), soft(", ".join(notes))] if notes else []), scope="row"),
        tag("td", words.shape(row.tensor.shape), class_="n"),
        tag("td", f"{row.tensor.numel:,}", class_="n"),
        tag("td", f"{row.copies:,}", class_="n"),
    )
