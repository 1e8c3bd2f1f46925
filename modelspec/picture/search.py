"""A search as a picture: how fast each layout that fits is and how much memory it takes, the front marked.

Of layouts that lie close together one stands for all: a picture of ten thousand dots shows no more than one of a
thousand. `chart` says what is drawn, for the page here and for a program that makes an image of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from modelspec.amount import amount_of_bytes, figure
from modelspec.picture.document import document, section, table
from modelspec.picture.markup import Child, Markup, lines, number, tag
from modelspec.plan.search import Candidate, Search

# Cells across and up in which one dot is drawn.
_CELLS = (120, 70)
_WIDTH, _HEIGHT = 912.0, 460.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 64.0, 16.0, 14.0, 44.0
ACROSS, UP = "tokens per second and device", "memory of the heaviest rank, GB"


@dataclass(frozen=True, slots=True)
class Chart:
    """Dots as (tokens per second and device, GB), the ends of both axes, and round numbers between these."""

    dots: tuple[tuple[float, float], ...]
    front: tuple[tuple[float, float], ...]
    width: float
    height: float
    across: tuple[float, ...]
    up: tuple[float, ...]
    device: float


def chart(search: Search) -> Chart:
    """What is drawn of a search whose front is not empty; the front comes by speed."""
    front = tuple(sorted(map(place, search.front)))
    bounds = [(rate, size / 1e9) for rate, size in search.bounds]
    device = search.device_bytes / 1e9
    width = 1.06 * max(rate for rate, _ in (*bounds, *front))
    height = 1.08 * device
    cells = {(int(rate / width * _CELLS[0]), int(size / height * _CELLS[1])): (rate, size) for rate, size in bounds}
    return Chart(tuple(cells.values()), front, width, height, _marks(width), _marks(height), device)


def place(candidate: Candidate) -> tuple[float, float]:
    """Where a layout stands."""
    return candidate.tokens_per_second_per_gpu, candidate.memory_bytes / 1e9


def label(candidate: Candidate) -> str:
    """A layout in few words."""
    layout = candidate.layout
    pipeline = f"pipeline {layout.pipeline} {layout.schedule}" if layout.pipeline > 1 else "no pipeline"
    degrees = (("tensor", layout.tensor), ("context", layout.context), ("expert", layout.expert))
    return ", ".join((pipeline, *(f"{name} {degree}" for name, degree in degrees if degree > 1)))


def page(search: Search) -> str:
    """The search as one file of HTML, ending in a newline: the chart, and the front as a table."""
    return document(f"{search.name}: layouts on {search.world_size:,} {search.hardware}", _body(search))


def _marks(end: float) -> tuple[float, ...]:
    """Round numbers from 0 on."""
    magnitude = 10.0 ** int(f"{end:e}".partition("e")[2])
    step = next(step * magnitude for step in (0.1, 0.2, 0.25, 0.5, 1.0, 2.0) if end / (step * magnitude) <= 8)
    return tuple(step * index for index in range(int(end / step) + 1))


def _body(search: Search) -> Iterator[Child]:
    told = (
        f"{search.examined:,} layouts on {search.world_size:,} {search.hardware}, of which {search.fitting:,} fit and "
        f"{len(search.front)} are on the front: no other one is faster with no more memory."
    )
    yield tag("header", tag("h1", search.name), tag("p", told, class_="soft"))
    note = (
        "A small dot stands for the layouts around it that fit, each at the fastest that it can be. The line is the "
        "front: the most speed for so much memory. The dashed line is the memory of the device."
    )
    yield section("Speed and memory", "chart", (_figure(search), tag("p", note, class_="soft small")))
    yield section("The front", "front", (_table(search),))


def _figure(search: Search) -> Markup:
    drawn = chart(search)
    told = "Layouts by speed and memory; the table below has the figures of the front"
    shapes = lines((tag("title", told), *_frame(drawn), *_dots(drawn, search)))
    box = f"0 0 {number(_WIDTH)} {number(_HEIGHT)}"
    return tag("figure", tag("svg", shapes, viewBox=box, width=_WIDTH, height=_HEIGHT, role="img"), style="margin: 0")


def _x(drawn: Chart, rate: float) -> float:
    return _LEFT + rate / drawn.width * (_WIDTH - _LEFT - _RIGHT)


def _y(drawn: Chart, size: float) -> float:
    return _HEIGHT - _BOTTOM - size / drawn.height * (_HEIGHT - _TOP - _BOTTOM)


def _frame(drawn: Chart) -> Iterator[Markup]:
    for size in drawn.up:
        y = _y(drawn, size)
        yield tag("path", d=f"M{number(_LEFT)} {number(y)}H{number(_WIDTH - _RIGHT)}", class_="stroke-line")
        yield _word(f"{size:,g}", _LEFT - 8, y + 4, "end")
    for rate in drawn.across:
        yield _word(f"{rate:,g}", _x(drawn, rate), _HEIGHT - 24, "middle")
    yield _word(ACROSS, _WIDTH - _RIGHT, _HEIGHT - 6, "end")
    yield _word(UP, _LEFT, _TOP - 3, "start")
    device = f"M{number(_LEFT)} {number(_y(drawn, drawn.device))}H{number(_WIDTH - _RIGHT)}"
    yield tag("path", d=device, style="stroke: var(--gone); fill: none", stroke_dasharray="6 4")


def _dots(drawn: Chart, search: Search) -> Iterator[Markup]:
    for rate, size in drawn.dots:
        yield tag("circle", cx=_x(drawn, rate), cy=_y(drawn, size), r=1.5, class_="fill-rest-1")
    corners = [f"{number(_x(drawn, rate))} {number(_y(drawn, size))}" for rate, size in drawn.front]
    yield tag("path", d="M" + "L".join(corners), style="stroke: var(--attention-0); stroke-width: 2; fill: none")
    for candidate in search.front:
        yield _dot(drawn, candidate, "fill-attention-0", "")
    for one, shade, word in (
        (search.own, "fill-dense-0", "the spec's own"),
        (search.chosen, "fill-experts-0", "chosen"),
    ):
        if one is not None and one.memory_bytes <= search.device_bytes:
            yield _dot(drawn, one, shade, word)


def _dot(drawn: Chart, candidate: Candidate, shade: str, word: str) -> Markup:
    rate, size = place(candidate)
    x, y = _x(drawn, rate), _y(drawn, size)
    told = f"{label(candidate)}: {figure(rate)} tokens/s, {amount_of_bytes(candidate.memory_bytes)}"
    shape = tag("circle", tag("title", told), cx=x, cy=y, r=6.0 if word else 3.5, class_=shade)
    at_right = x > _WIDTH * 0.85
    return (
        lines((shape, _word(word, x - 9 if at_right else x + 9, y - 8, "end" if at_right else "start")))
        if word
        else shape
    )


def _word(said: str, x: float, y: float, anchor: str) -> Markup:
    style = "font-size: 12px; font-family: inherit"
    return tag("text", said, x=x, y=y, text_anchor=anchor, class_="fill-soft", style=style)


def _table(search: Search) -> Markup:
    head = [("layout", False), ("ZeRO", True), ("microbatch", True), ("recompute", False), ("step, s", True)]
    head += [("tokens/s/GPU", True), ("bubble", True), ("memory", True), ("verdict", False)]
    rows = []
    for each in search.front:
        cells: list[tuple[str, bool]] = [
            (f"{each.layout.zero}", True),
            (f"{each.layout.microbatch_size} x {each.microbatches:,}", True),
            (", ".join(each.layout.recompute) or "-", False),
            (f"{each.step_seconds:,.3g}", True),
            (figure(each.tokens_per_second_per_gpu), True),
            (f"{each.bubble:.1%}", True),
            (amount_of_bytes(each.memory_bytes), True),
            (_verdict(each) + (", chosen" if each is search.chosen else ""), False),
        ]
        name = tag("th", label(each), scope="row")
        rows.append(tag("tr", name, *(tag("td", said, class_="n" if right else None) for said, right in cells)))
    return table("The front", head, rows)


def _verdict(each: Candidate) -> str:
    """That of the first stage, and the worst of later ones where it is another."""
    same = each.later in (None, each.verdict)
    return each.verdict if same else f"{each.verdict}, later {each.later}"
