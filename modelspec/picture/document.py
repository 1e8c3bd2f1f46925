"""The frame of a page: one file of HTML that asks for nothing outside itself, and the pieces that pages share.

The page forbids itself every request by its own policy. There is no script: what opens is a `details` of the browser,
which the keyboard reaches and a screen reader announces. In print everything stands open.
"""

from collections.abc import Iterable, Mapping, Sequence

from modelspec.amount import amount
from modelspec.picture import draw, palette
from modelspec.picture.anatomy import Part
from modelspec.picture.draw import Drawing
from modelspec.picture.markup import Child, Markup, lines, number, tag

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = f"""\
:root {{ color-scheme: light dark }}
* {{ box-sizing: border-box }}
body {{ margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 {palette.SANS} }}
main {{ max-width: 60rem; margin: 0 auto; padding: 3rem 1.5rem 5rem }}
h1 {{ font-size: 2rem; line-height: 1.2; letter-spacing: -.01em; margin: 0; overflow-wrap: anywhere }}
h2 {{ font-size: 1.25rem; margin: 3.5rem 0 1rem }}
h3 {{ font-size: 1.0625rem; margin: 0; overflow-wrap: anywhere }}
p {{ margin: .5rem 0 }}
a {{ color: var(--link) }}
a:focus-visible, summary:focus-visible, .wide:focus-visible {{
  outline: 3px solid var(--link); outline-offset: 3px; border-radius: 3px }}
svg {{ display: block; max-width: 100%; height: auto }}
code, .mono {{ font: .8125rem/1.5 {palette.MONO} }}
.soft {{ color: var(--soft) }}
.small {{ font-size: .875rem }}
.numbers {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: 1.25rem 1rem;
  margin: 2rem 0 0 }}
.numbers dt {{ color: var(--soft); font-size: .8125rem; line-height: 1.25; min-height: 2.5em; display: flex;
  align-items: end }}
.numbers dd {{ margin: 0; font-size: 1.25rem; font-weight: 600; font-variant-numeric: tabular-nums }}
.numbers small {{ display: block; font-weight: 400; color: var(--soft); font-size: .75rem }}
.legend {{ display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; list-style: none; margin: .5rem 0 1.5rem; padding: 0;
  font-size: .875rem }}
.legend li, .with-swatch {{ display: flex; align-items: center; gap: .5rem }}
.swatch {{ flex: none; width: 12px; height: 12px }}
.stack {{ list-style: none; margin: 1.5rem 0 0; padding: 0 }}
.stack > li + li::before {{ content: ""; display: block; width: 1px; height: 14px; margin-left: 2rem;
  background: var(--line) }}
.box {{ background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .75rem 1.25rem }}
.box > .line, summary .line {{ display: flex; flex-wrap: wrap; gap: 0 1rem; align-items: baseline }}
.line .end {{ margin-left: auto; font-variant-numeric: tabular-nums }}
.repeat {{ border-left: 3px solid var(--line); padding: .25rem 0 .25rem 1rem }}
.repeat > p {{ margin: 0 0 .5rem }}
.repeat .stack {{ margin: 0 }}
.card {{ background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 1rem 1.25rem;
  margin: 1rem 0 }}
.card svg:not(.swatch) {{ margin: .75rem 0 }}
summary {{ cursor: pointer }}
.box summary {{ list-style-position: inside }}
summary .line {{ display: inline-flex; width: calc(100% - 1.5rem) }}
.card details {{ margin-top: .375rem }}
.card > p {{ margin: .25rem 0 }}
.card summary, .more summary {{ color: var(--link); font-size: .875rem; padding: .25rem 0 }}
.flow {{ list-style: none; margin: .75rem 0 .25rem; padding: 0 0 0 1rem; border-left: 2px solid var(--soft) }}
.flow li {{ padding: .25rem 0; display: flex; gap: 1rem }}
.flow .end {{ margin-left: auto; font-variant-numeric: tabular-nums }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; width: 100%; font-size: .875rem; margin: .5rem 0 }}
th {{ text-align: left; font-weight: 500; color: var(--soft); font-size: .8125rem }}
th, td {{ padding: .3125rem .75rem .3125rem 0; border-bottom: 1px solid var(--line); vertical-align: top }}
tbody tr:last-child > * {{ border-bottom: 0 }}
td.n, th.n {{ text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; padding-left: .75rem }}
tbody th {{ color: var(--ink); font-weight: 400 }}
tfoot td, tfoot th {{ border-top: 1px solid var(--line); border-bottom: 0; color: var(--ink); font-weight: 600 }}
.new, .gone, .changed {{ border-radius: 3px; padding: 0 .375rem; white-space: nowrap }}
.new {{ color: var(--new); background: var(--new-ground) }}
.gone {{ color: var(--gone); background: var(--gone-ground) }}
.changed {{ color: var(--changed); background: var(--changed-ground) }}
.badges {{ display: flex; flex-wrap: wrap; gap: .5rem; list-style: none; padding: 0; margin: 1.25rem 0 0 }}
.badges li {{ border: 1px solid var(--line); border-radius: 999px; padding: .125rem .75rem; font-size: .875rem }}
td.value {{ overflow-wrap: anywhere; min-width: 7rem }}
.was {{ color: var(--soft) }}
.sides {{ display: flex; flex-wrap: wrap; gap: 1rem 2.5rem }}
@media print {{ main {{ max-width: none; padding: 0 }} .card, .box {{ break-inside: avoid }}
  details::details-content {{ content-visibility: visible; block-size: auto }} }}"""


def document(title: str, body: Iterable[Child]) -> str:
    """A whole page, ending in a newline."""
    head = tag(
        "head",
        lines(
            (
                tag("meta", charset="utf-8"),
                tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
                tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
                tag("title", title),
                Markup(f"<style>\n{palette.variables()}\n{_STYLE}\n{palette.shapes()}\n</style>"),
            )
        ),
    )
    page = tag("html", head, tag("body", tag("main", lines(body))), lang="en")
    return f"<!DOCTYPE html>\n{page.source}\n"


def section(title: str, identity: str, children: Iterable[Child]) -> Markup:
    """A part of the page with its heading."""
    return tag("section", tag("h2", title, id=identity), lines(children), aria_labelledby=identity)


def image(drawn: Drawing, told: str) -> Markup:
    """A drawing in a page, with the words that say what it shows."""
    return tag(
        "svg",
        tag("title", told),
        drawn.shapes,
        viewBox=f"0 0 {number(drawn.width)} {number(drawn.height)}",
        width=drawn.width,
        height=drawn.height,
        role="img",
    )


def swatch(shade: str) -> Markup:
    """The colour of a part, beside its name."""
    square = tag("rect", width=12, height=12, class_=f"fill-{shade}")
    return tag("svg", square, class_="swatch", viewBox="0 0 12 12", aria_hidden="true")


def bar(label: str, parts: Sequence[Part], sizes: Sequence[int], shades: Mapping[str, str], whole: int) -> Markup:
    """Parts by size beside one another, and the legend with their shares. The width stands for `whole`."""
    total = sum(sizes)
    pairs = [(part, size) for part, size in zip(parts, sizes, strict=True) if size]
    drawn = draw.bar([(size, shades[part.key]) for part, size in pairs], 912, whole)
    told = ", ".join(f"{named(part)} {size / total:.1%}" for part, size in pairs)
    legend = [
        tag("li", swatch(shades[part.key]), f"{named(part)} {size / total:.1%}", Markup(" "), soft(amount(size)))
        for part, size in sorted(pairs, key=lambda pair: -pair[1])
        if size / total >= 0.0005
    ]
    heading = tag("p", f"{label}: ", tag("strong", amount(total)), class_="small")
    shown = image(Drawing(drawn.shapes, 912, drawn.height), f"{label}: {told}")
    return lines((heading, shown, tag("ul", lines(legend), class_="legend")))


def named(part: Part) -> str:
    """What a part is called in a picture."""
    return part.title if part.family == "rest" else part.name


def soft(said: str) -> Markup:
    """Said in passing."""
    return tag("span", said, class_="soft")


def numbers(said: Iterable[tuple[str, str, str]]) -> Markup:
    """Key figures: label, figure, and the same to the last digit or what differs."""
    return tag(
        "dl",
        lines(
            tag("div", tag("dt", label), tag("dd", figure, *([tag("small", exact)] if exact else [])))
            for label, figure, exact in said
        ),
        class_="numbers",
    )


def plural(count: int, noun: str) -> str:
    """A count with its noun."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def table(caption: str, head: Sequence[tuple[str, bool]], body: Iterable[Markup], foot: Markup | None = None) -> Markup:
    """A table that scrolls sideways by itself where the page is narrow; a column's flag says that it holds numbers."""
    columns = tag("tr", *(tag("th", label, scope="col", class_="n" if right else None) for label, right in head))
    pieces = [tag("thead", columns), tag("tbody", lines(body)), *([tag("tfoot", foot)] if foot else [])]
    shown = tag("table", lines(pieces), aria_label=caption)
    return tag("div", shown, class_="wide", tabindex=0, role="region", aria_label=caption)
