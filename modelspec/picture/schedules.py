"""Pipeline schedules as one SVG and as a page: how each passes the microbatches of a step, and what it wastes."""

from collections.abc import Iterable, Iterator, Sequence

from modelspec.picture import palette
from modelspec.picture.document import document, image, section, soft, table
from modelspec.picture.markup import Child, Markup, lines, number, tag
from modelspec.picture.timeline import MARGIN, WIDTH, Timeline, assumptions, in_flight, rows, rules, told, visible

_LEGEND = (
    (("forward-0",), "forward"),
    (("input-0",), "backward: gradient of the input"),
    (("weight-0",), "backward: gradient of the weights"),
    (("waits-0",), "waiting"),
    (("forward-0", "forward-7"), "first and last stage of a rank"),
)
_TYPE = f"""\
text {{ font-family: {palette.SANS}; font-size: 12px }}
.name {{ font-size: 22px; font-weight: 650; letter-spacing: -0.3px }}
.title {{ font-size: 15px; font-weight: 600 }}"""


def schedules_figure(name: str, shown: Sequence[Timeline]) -> str:
    """Schedules one below the other as an SVG document, ending in a newline. Equal arguments give equal text."""
    span, inner = visible(shown), WIDTH - 2 * MARGIN
    placed: list[Child] = [tag("text", name, x=MARGIN, y=48, class_="name fill-ink"), _at(_legend(shown), MARGIN, 66)]
    top = 112.0
    for each in shown:
        placed += [
            tag("text", each.schedule, x=MARGIN, y=top, class_="title fill-ink"),
            tag("text", told(each), x=MARGIN + inner, y=top, class_="end fill-soft"),
        ]
        drawn = rows(each, span)
        placed.append(_at(drawn.shapes, MARGIN, top + 12))
        top += drawn.height + 36
    for sentence in (*_notes(shown), *assumptions(shown)):
        placed.append(tag("text", sentence, x=MARGIN, y=top, class_="fill-soft"))
        top += 17
    height = top + 12
    source = tag(
        "svg",
        lines(
            (
                tag("title", name, id="schedules-title"),
                tag("desc", "; ".join(f"{each.schedule}: {told(each)}" for each in shown), id="schedules-desc"),
                Markup(f"<style>\n{_TYPE}\n{palette.shapes()}\n{rules()}\n</style>"),
                tag("rect", width=WIDTH, height=height, class_="fill-paper"),
                *placed,
            )
        ),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {number(WIDTH)} {number(height)}",
        width=WIDTH,
        height=height,
        role="img",
        aria_labelledby="schedules-title schedules-desc",
    ).source
    return source + "\n"


def schedules_page(name: str, summary: str, shown: Sequence[Timeline], refused: Iterable[tuple[str, str]]) -> str:
    """Schedules one below the other as one file of HTML, ending in a newline; `refused` says why others are not."""
    return document(name, _body(name, summary, shown, tuple(refused)))


def _body(name: str, summary: str, shown: Sequence[Timeline], refused: Sequence[tuple[str, str]]) -> Iterator[Child]:
    yield Markup(f"<style>\n{_TYPE}\n{rules()}\n</style>")
    yield tag("header", tag("h1", name), tag("p", summary, class_="soft"))
    known = shown[0].work.told
    time = "step" if known else "step, of the shortest"
    numbers = ("stages on a rank", "bubble", *(("if stages were equal",) if known else ()), time, "in flight")
    columns = (("schedule", False), *((said, True) for said in numbers))
    shortest = min(each.total.makespan for each in shown)
    cells = (
        tag(
            "tr",
            tag("th", tag("a", each.schedule, href=f"#{each.schedule}"), scope="row"),
            *(tag("td", said, class_="n") for said in _numbers(each, shortest)),
        )
        for each in shown
    )
    yield table("Schedules", columns, cells)
    yield tag(
        "p",
        "Bubble is the share of all ranks' time in which they wait. In flight is the most that a rank holds for the "
        "backward pass, in microbatches of all its stages.",
        class_="soft small",
    )
    for schedule, reason in refused:
        yield tag("p", f"{schedule} does not work here: {reason}.", class_="small")
    yield tag("svg", _legend(shown), viewBox="0 0 888 20", width=888, height=20, aria_hidden="true")
    span = visible(shown)
    for each in shown:
        drawn = rows(each, span)
        yield section(each.schedule, each.schedule, (tag("p", soft(told(each))), image(drawn, told(each))))
    yield tag("p", " ".join((*_notes(shown), *assumptions(shown))), class_="soft small")


def _numbers(shown: Timeline, shortest: float) -> Iterator[str]:
    yield str(shown.stages_per_rank)
    yield f"{shown.total.bubble:.2%}"
    if shown.work.told:
        yield f"{shown.even.bubble:.2%}"
    yield f"{shown.total.makespan:,.3f} s" if shown.work.told else f"{shown.total.makespan / shortest:.3f}"
    yield in_flight(shown)


def _notes(shown: Sequence[Timeline]) -> Iterator[str]:
    if shown[0].work.told is None:
        yield "The axis counts forward passes of a microbatch through all stages of a rank."
    if any(each.drawn < each.microbatches or each.total.makespan > visible(shown) for each in shown):
        yield "Where dots stand, work that repeats is left out; times and microbatches after them are as they are."
    if any(action.kind == "backward" for each in shown for action in each.simulation.order[0]):
        yield "A box of two colours is a backward pass done whole: its gradient leaves when both are done."
    if any(each.schedule == "dualpipev" and each.work.pair is not None for each in shown):
        yield "Half boxes, one above the other, are a forward and a backward pass that overlap."


def _legend(shown: Sequence[Timeline]) -> Markup:
    found: list[Child] = []
    left = 0.0
    for shades, said in _LEGEND:
        if len(shades) > 1 and all(each.stages_per_rank == 1 for each in shown):
            continue
        for shade in shades:
            found.append(tag("rect", x=left, y=4, width=12, height=12, class_=shade))
            left += 13
        found.append(tag("text", said, x=left + 5, y=14, class_="fill-soft"))
        left += 6.0 * len(said) + 26
    return lines(found)


def _at(shapes: Markup, x: float, y: float) -> Markup:
    return tag("g", shapes, transform=f"translate({number(x)} {number(y)})")
