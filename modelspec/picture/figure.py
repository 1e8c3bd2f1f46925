"""A model as one SVG for papers and slides: its numbers, the stack of layers, and every part with its tensors.

Text stays text, so that it can be searched, read aloud and set in the fonts at hand; no script, no reference to
anything outside. Sizes are pixels of a drawing 960 wide. Where fonts decide the width of a line, room is kept for the
widest.
"""

from collections.abc import Mapping, Sequence

from modelspec.amount import amount
from modelspec.picture import draw, palette, words
from modelspec.picture.anatomy import Anatomy, Part, Section, anatomy
from modelspec.picture.markup import Child, Markup, lines, number, tag
from modelspec.schema import ModelSpec

WIDTH, MARGIN = 960.0, 36.0
_INNER = WIDTH - 2 * MARGIN
_STACK, _GUTTER = 236.0, 30.0
_CARDS = _INNER - _STACK - _GUTTER
# Of the widest usual fonts, the width of a character as a part of the font's size.
_SANS, _MONO = 0.56, 0.61
_ROW = 17.0

_TYPE = f"""\
text {{ font-family: {palette.SANS}; font-size: 12px }}
.name {{ font-size: 26px; font-weight: 650; letter-spacing: -0.3px }}
.title {{ font-size: 15px; font-weight: 600 }}
.value {{ font-size: 19px; font-weight: 600 }}
.label {{ font-size: 11px }}
.mono {{ font-family: {palette.MONO}; font-size: 11px; white-space: pre }}
.end {{ text-anchor: end }}"""


def figure(spec: ModelSpec) -> str:
    """The picture of a valid spec as an SVG document, ending in a newline. Equal specs give equal text."""
    model = anatomy(spec)
    shades = palette.shades(model.parts.values())
    top, placed = 0.0, []
    for block, space in (
        (_head(spec, model), 26.0),
        (_layers(model, shades), 26.0),
        (_bars(model, shades), 34.0),
    ):
        placed.append(_at(block[0], MARGIN, top))
        top += block[1] + space
    stack, cards = _stack(model, shades), _cards(model, shades)
    placed += [_at(stack[0], MARGIN, top), _at(cards[0], MARGIN + _STACK + _GUTTER, top)]
    height = top + max(stack[1], cards[1]) + MARGIN
    document = tag(
        "svg",
        lines(
            (
                tag("title", f"The model {model.name}", id="figure-title"),
                tag("desc", f"{model.summary}. Layers: {words.strip(model)}.".lstrip(". "), id="figure-desc"),
                Markup(f"<style>\n{_TYPE}\n{palette.shapes()}\n</style>"),
                tag("rect", width=WIDTH, height=height, class_="fill-paper"),
                *placed,
            )
        ),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {number(WIDTH)} {number(height)}",
        width=WIDTH,
        height=height,
        role="img",
        aria_labelledby="figure-title figure-desc",
    )
    return document.source + "\n"


_Block = tuple[Markup, float]


def _at(shapes: Markup, x: float, y: float) -> Markup:
    return tag("g", shapes, transform=f"translate({number(x)} {number(y)})")


def _text(x: float, y: float, said: str, kind: str = "", colour: str = "ink") -> Markup:
    return tag("text", said, x=x, y=y, class_=f"{kind} fill-{colour}".strip())


def _cut(said: str, room: float, size: float, per_character: float = _SANS) -> str:
    """The text, cut where it would leave its room."""
    most = max(int(room / (size * per_character)), 1)
    return said if len(said) <= most else said[: most - 1] + "…"


def _wrapped(pieces: Sequence[str], room: float, size: float) -> list[str]:
    """Pieces in lines that fit; a piece stays whole unless it is longer than a line."""
    found: list[str] = []
    for piece in pieces:
        longer = f"{found[-1]}   {piece}" if found else piece
        if found and len(longer) * size * _MONO <= room:
            found[-1] = longer
        else:
            found.append(_cut(piece, room, size, _MONO))
    return found


def _head(spec: ModelSpec, model: Anatomy) -> _Block:
    main = [part for part in model.parts.values() if part.key != "mtp"]
    mtp = model.parts.get("mtp")
    numbers = [
        ("parameters", amount(sum(part.elements for part in main))),
        ("active for a token", amount(sum(part.active for part in main))),
        *([("added by MTP", amount(mtp.elements))] if mtp else []),
        ("layers", f"{model.layers:,}"),
        ("hidden size", f"{spec.model.hidden_size:,}"),
        ("vocabulary", f"{spec.model.vocab_size:,}"),
        ("longest position", f"{spec.model.max_position:,}"),
    ]
    step = _INNER / 7
    found = [
        _text(0, 58, _cut(model.name, _INNER, 26), "name"),
        _text(0, 82, _cut(model.summary, _INNER, 12), colour="soft"),
    ]
    for index, (label, value) in enumerate(numbers):
        found += [_text(index * step, 122, label, "label", "soft"), _text(index * step, 145, value, "value")]
    return lines(found), 145


def _layers(model: Anatomy, shades: Mapping[str, str]) -> _Block:
    drawn = draw.strip(model, shades, _INNER)
    label = _cut(f"Layers, first to last: {words.strip(model)}", _INNER, 11)
    caption = _text(0, 11, label, "label", "soft")
    return lines((caption, _at(drawn.shapes, 0, 22))), 22 + drawn.height


def _bars(model: Anatomy, shades: Mapping[str, str]) -> _Block:
    main = [part for part in model.parts.values() if part.key != "mtp"]
    found: list[Child] = []
    top = 0.0
    for label, sizes in (
        ("All parameters", [part.elements for part in main]),
        ("Active for one token", [part.active for part in main]),
    ):
        whole = sum(sizes)
        drawn = draw.bar([(size, shades[part.key]) for part, size in zip(main, sizes, strict=True)], _INNER, whole)
        found += [_text(0, top + 11, label, "label", "soft"), _at(drawn.shapes, 0, top + 18)]
        # Legends stand below, largest first, as many as fit.
        left = 0.0
        for part, size in sorted(zip(main, sizes, strict=True), key=lambda pair: -pair[1]):
            said = f"{_named(part)}  {size / whole:.1%}"
            room = len(said) * 11 * _SANS + 30
            if left + room > _INNER or size / whole < 0.0005:
                break
            found.append(tag("rect", x=left, y=top + 44, width=9, height=9, class_=f"fill-{shades[part.key]}"))
            found.append(_text(left + 14, top + 52, said, "label"))
            left += room
        top += 76
    return lines(found), top - 24


def _named(part: Part) -> str:
    return part.title if part.family == "rest" else part.name


def _stack(model: Anatomy, shades: Mapping[str, str]) -> _Block:
    """The model from the embedding down to the head, one box for each run."""
    found: list[Child] = [_text(0, 13, "The model", "title")]
    top, first = 28.0, 0

    def single(key: str, note: str) -> None:
        nonlocal top
        part = model.parts[key]
        found.append(_box(top, 44))
        found.append(tag("rect", x=0, y=top, width=5, height=44, class_=f"fill-{shades[key]}"))
        found.append(_text(18, top + 19, part.title))
        found.append(_text(18, top + 35, note, "label", "soft"))
        top += 44

    def arrow() -> None:
        nonlocal top
        found.append(tag("path", d=f"M{_STACK / 2:g} {number(top + 2)}v9m-3.5 -4l3.5 4l3.5 -4", class_="stroke-soft"))
        top += 14

    single("embed_tokens", amount(model.parts["embed_tokens"].elements))
    arrow()
    for section in model.sections:
        shapes, height = _section(model, section, first, shades)
        found.append(_at(shapes, 0, top))
        top, first = top + height, first + section.layers
        arrow()
    single("norm", amount(model.parts["norm"].elements))
    arrow()
    if "lm_head" in model.parts:
        single("lm_head", amount(model.parts["lm_head"].elements))
    else:
        found += [_box(top, 44), _text(18, top + 19, "Output head")]
        found.append(_text(18, top + 35, "the embedding's weight", "label", "soft"))
        top += 44
    if "mtp" in model.parts:
        part = model.parts["mtp"]
        top += 16
        found.append(_box(top, 62, dashes="4 3"))
        found.append(_text(18, top + 19, f"{part.title}"))
        found.append(_text(18, top + 35, f"{words.per_copy(part)}: a block and a projection", "label", "soft"))
        found.append(_text(18, top + 51, f"{amount(part.elements)}; shares embedding and head", "label", "soft"))
        top += 62
    return lines(found), top


def _box(top: float, height: float, width: float = _STACK, dashes: str | None = None) -> Markup:
    return lines(
        (
            tag("rect", x=0, y=top, width=width, height=height, class_="fill-card"),
            tag(
                "rect",
                x=0.5,
                y=top + 0.5,
                width=width - 1,
                height=height - 1,
                class_="stroke-line",
                stroke_dasharray=dashes,
            ),
        )
    )


def _section(model: Anatomy, section: Section, first: int, shades: Mapping[str, str]) -> _Block:
    """A box for each run; a bracket with the number of times around those that repeat together."""
    inset = 22.0 if section.repeat > 1 else 0.0
    found: list[Child] = []
    top = 0.0
    if section.repeat > 1:
        found.append(_text(0, 12, f"{section.repeat} times", "title"))
        found.append(_text(78, 12, words.which_layers(first, section.layers), "label", "soft"))
        top += 22
    start = top
    for run in section.runs:
        height = 92.0
        inside: list[Child] = [_box(0, height, width=_STACK - inset), _text(18, 22, f"{run.layers} ×", "title")]
        each = f"{amount(run.elements)} {'each' if run.layers * section.repeat > 1 else ''}"
        if section.repeat == 1:
            each = f"{words.which_layers(first, run.layers)}, {each}"
        inside.append(_text(62, 22, each, "label", "soft"))
        # The residual stream runs at the left; each half reads from it and adds to it.
        inside.append(tag("path", d="M25 32v52", class_="stroke-soft"))
        for key, y in ((run.attention, 40.0), (run.ffn, 66.0)):
            part = model.parts[key]
            inside.append(tag("path", d=f"M25 {number(y - 4)}h18M43 {number(y + 9)}h-12", class_="stroke-soft"))
            inside.append(tag("circle", cx=25, cy=y + 9, r=5, class_="fill-card"))
            inside.append(tag("circle", cx=25, cy=y + 9, r=5, class_="stroke-soft"))
            inside.append(tag("path", d=f"M22 {number(y + 9)}h6m-3 -3v6", class_="stroke-soft"))
            inside.append(tag("rect", x=43, y=y - 7, width=5, height=20, class_=f"fill-{shades[key]}"))
            inside.append(_text(55, y + 7, _cut(part.name, _STACK - inset - 140, 12)))
            inside.append(_text(_STACK - inset - 14, y + 7, amount(part.each), "label end", "soft"))
        found.append(_at(lines(inside), inset, top))
        top += height + 8
        if section.repeat == 1:
            first += run.layers
    top -= 8
    if section.repeat > 1:
        found.append(tag("path", d=f"M12 {number(start)}h-6v{number(top - start)}h6", class_="stroke-soft"))
    return lines(found), top


def _cards(model: Anatomy, shades: Mapping[str, str]) -> _Block:
    """Every part with its tensors; what all layers have in common and what stands once share the last table."""
    found: list[Child] = [_text(0, 13, "Its parts: tensors of one copy", "title")]
    top = 28.0
    for part in model.parts.values():
        if part.family != "rest":
            shapes, height = _card(part, shades[part.key])
            found.append(_at(shapes, 0, top))
            top += height + 14
    rest = [part for part in model.parts.values() if part.family == "rest" and part.key != "mtp"]
    rows = [row for part in rest for row in part.rows]
    extra: list[Child] = [_text(18, 25, "Everything else", "title")]
    y = 48.0
    for row in rows:
        note = f"  × {row.copies}" if row.copies > 1 else ""
        extra.append(_row(y, row.name + note, row.tensor.shape, row.tensor.numel))
        y += _ROW
    if "mtp" in model.parts:
        part = model.parts["mtp"]
        for row in part.rows:
            if not row.name.startswith("block."):
                note = f"  × {row.copies}" if row.copies > 1 else ""
                extra.append(_row(y, f"mtp.{row.name}{note}", row.tensor.shape, row.tensor.numel))
                y += _ROW
        block = sum(row.tensor.numel for row in part.rows if row.name.startswith("block."))
        extra.append(_row(y, "mtp.block", (), block, "a layer as above"))
        y += _ROW
    found.append(_at(lines((_ground(y), *extra)), 0, top))
    return lines(found), top + y


def _ground(height: float) -> Markup:
    return tag("rect", width=_CARDS, height=height, class_="fill-card")


def _row(y: float, name: str, shape: tuple[int, ...], elements: int, said: str = "") -> Markup:
    return lines(
        (
            _text(18, y, _cut(name, 240, 11, _MONO), "mono"),
            _text(_CARDS - 130, y, said or words.shape(shape), "mono end", "soft"),
            _text(_CARDS - 18, y, f"{elements:,}", "mono end"),
        )
    )


def _card(part: Part, shade: str) -> _Block:
    title = f"{part.name}" if part.family == "rest" else f"{part.name}: {part.title[:1].lower()}{part.title[1:]}"
    found: list[Child] = [
        _text(18, 25, _cut(title, _CARDS - 190, 15), "title"),
        _text(_CARDS - 18, 25, f"{amount(part.each)} in each of {words.per_copy(part)}", "label end", "soft"),
    ]
    y = 48.0
    for line in _wrapped([f"{fact.key} {fact.value}" for fact in part.facts], _CARDS - 36, 11):
        found.append(_text(18, y, line, "mono", "soft"))
        y += 15
    y += 8
    if part.experts:
        drawn = draw.experts(part.experts, shade)
        found.append(_text(18, y + 4, _cut(draw.told(part.experts), _CARDS - 36, 11), "label"))
        y += 16
        if drawn:
            scale = min(1.0, (_CARDS - 36) / drawn.width)
            placed = tag("g", drawn.shapes, transform=f"translate(18 {number(y)}) scale({number(scale)})")
            found.append(placed)
            y += drawn.height * scale + 12
        y += 10
    for row in part.rows:
        found.append(_row(y, row.name, row.tensor.shape, row.tensor.numel))
        y += _ROW
    return lines((_ground(y), tag("rect", width=5, height=y, class_=f"fill-{shade}"), *found)), y
