"""A sweep as small charts, one for each cost, all along the first axis; what further axes combine to is a line each.

`panels` says what is drawn, for the page here and for a program that makes an image of it. A chart starts at zero, so
that heights compare; where everything lies close together it does not, and its axis says so.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import log, log10

from modelspec.picture.document import document, section, table
from modelspec.picture.markup import Child, Markup, lines, number, tag
from modelspec.plan.sweep import Column, Sweep

COLOURS = ("attention-0", "dense-0", "experts-0", "attention-2", "rest-0")
DASHES = ((), (6, 3), (2, 2), (8, 3, 2, 3))
# Lines beyond the colours have another dash, and their points another shape, named as matplotlib does.
MARKS = ("o", "s", "^", "D")
_SHAPES = {"s": "m-3 -3h6v6h-6z", "^": "m0 -4.5l4.5 8h-9z", "D": "m0 -4.5l4.5 4.5l-4.5 4.5l-4.5 -4.5z"}
_WIDTH, _HEIGHT = 296.0, 190.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 82.0, 14.0, 10.0, 26.0
# Below a chart: the longest label, and the room of a letter as a share of the axis.
_LONGEST_LABEL = 12
_LETTER = 0.038
# A limit is drawn where it is no more than so many times the largest cost.
_NEAR = 2
_SAID = re.compile(r"(\$?)([0-9.,]+)(.*)")


@dataclass(frozen=True, slots=True)
class Line:
    """Costs for one combination of the other axes: place on the first axis, from 0 to 1, and cost."""

    label: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart: its lines, the range of its costs with marks at round numbers, and where a point was illegal.

    Only numbers have an order that a line between two points could follow; of other values there are points alone.
    `limit` is what costs should not exceed, None where there is no such thing.
    """

    column: Column
    lines: tuple[Line, ...]
    joined: bool
    low: float
    high: float
    marks: tuple[float, ...]
    illegal: tuple[float, ...]
    limit: float | None = None

    @property
    def title(self) -> str:
        """What it shows, of how much there is, and whether heights compare."""
        notes = [] if self.limit is None else [f"of {self.column.said(self.limit)}"]
        notes += ["not from 0"] if self.low else []
        return f"{self.column.label} ({', '.join(notes)})" if notes else self.column.label

    @property
    def rule(self) -> float | None:
        """The limit, where it is near enough to be drawn."""
        return self.limit if self.limit is not None and self.low <= self.limit <= self.high else None

    def named(self) -> list[tuple[float, str]]:
        """The marks with what is written beside them: in short, with more digits where two would look the same."""
        short = [round_said(self.column, mark) for mark in self.marks]
        if len(set(short)) < len(short):
            short = _apart(self.marks, short[-1])
        return list(zip(self.marks, short, strict=True))

    def height(self, cost: float) -> float:
        """Where a cost stands, from 0 at the bottom to 1 at the top."""
        return (cost - self.low) / (self.high - self.low)


def panels(sweep: Sweep) -> tuple[Panel, ...]:
    """A panel for each cost that differs between points; for all costs where none does."""
    return tuple(_panel(sweep, column) for column in sweep.differing)


def places(sweep: Sweep) -> dict[str, float]:
    """Where the values of the first axis stand, from 0 to 1: by size, by magnitude where they span much, or evenly."""
    axis = sweep.axes[0]
    at = axis.numbers
    if at is None or len(set(at)) < len(at):
        at = tuple(map(float, range(len(axis.values))))
    elif min(at) > 0 and max(at) / min(at) >= 8:
        at = tuple(map(log, at))
    low, high = min(at), max(at)
    return {value: (x - low) / (high - low) if high > low else 0.5 for value, x in zip(axis.values, at, strict=True)}


def page(sweep: Sweep) -> str:
    """The sweep as one file of HTML, ending in a newline: charts, table and what was illegal."""
    *others, last = (axis.key for axis in sweep.axes)
    keys = f"{', '.join(others)} and {last}" if others else last
    return document(f"{sweep.name}: costs along {keys}", _body(sweep, keys))


def _costs(sweep: Sweep, column: Column) -> list[float]:
    read = (column.read(plan) for plan in sweep.plans)
    return [cost for cost in read if cost is not None]


def _panel(sweep: Sweep, column: Column) -> Panel:
    at = places(sweep)
    others = list(product(*(axis.values for axis in sweep.axes[1:])))
    found: dict[tuple[str, ...], list[tuple[float, float]]] = {other: [] for other in others}
    illegal = set()
    for point in sweep.points:
        cost = None if point.plan is None else column.read(point.plan)
        if point.plan is None:
            illegal.add(at[point.values[0]])
        elif cost is not None:
            found[point.values[1:]].append((at[point.values[0]], cost))
    drawn = tuple(Line(_label(sweep, other), tuple(sorted(points))) for other, points in found.items() if points)
    costs = _costs(sweep, column)
    limits = [plan for plan in sweep.plans if column.limit]
    limit = Column(column.limit, "", column.unit).read(limits[0]) if limits else None
    # One that is far away would press the costs together.
    ends = [*costs, *([limit] if limit is not None and limit <= _NEAR * max(costs) else [])]
    low, high, marks = _range(min(ends), max(ends))
    return Panel(column, drawn, sweep.axes[0].numbers is not None, low, high, marks, tuple(sorted(illegal)), limit)


def _apart(marks: Sequence[float], longest: str) -> list[str]:
    """Marks in the unit of the last one, written as `longest`, with as many digits as tell all exactly."""
    found = _SAID.fullmatch(longest)
    assert found, longest
    sign, digits, unit = found.groups()
    scale = 10.0 ** round(log10(marks[-1] / float(digits.replace(",", ""))))
    step = marks[1] - marks[0]
    places = next(n for n in range(20) if all(abs(round(m / scale, n) * scale - m) < step / 1000 for m in marks))
    return [f"{sign}{mark / scale:,.{places}f}{unit}" if mark else "0" for mark in marks]


def _label(sweep: Sweep, values: Sequence[str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in zip(sweep.names[1:], values, strict=True))


def _range(least: float, most: float) -> tuple[float, float, tuple[float, ...]]:
    """Bottom, top, and round numbers between them."""
    low = 0.0 if least <= 0.8 * most or most <= 0 else least - (most - least) * 0.25
    if most == least:
        low = 0.0
    span = (most - low) or 1.0
    magnitude = 10.0 ** int(f"{span:e}".partition("e")[2])
    step = next(step * magnitude for step in (0.2, 0.25, 0.5, 1.0, 2.0, 2.5, 5.0) if span / (step * magnitude) <= 5)
    first, last = -(-low // step), (low + span) // step
    marks = tuple(step * index for index in range(int(first), int(last) + 1))
    return low, low + span * 1.08, marks


def _body(sweep: Sweep, keys: str) -> Iterator[Child]:
    legal = sum(1 for point in sweep.points if point.plan is not None)
    illegal = legal < len(sweep.points)
    said = f"Costs along {keys}: {legal} of {len(sweep.points)} points are valid."
    yield tag("header", tag("h1", sweep.name), tag("p", said, class_="soft"))
    drawn = panels(sweep)
    grid = "display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 2rem 1.5rem"
    charts = tag("div", lines(_figure(sweep, panel) for panel in drawn), style=grid)
    cross = " A cross marks a value with an illegal point." if illegal else ""
    note = tag("p", f"Across: {sweep.axes[0].key}.{cross}", class_="soft small")
    if drawn:
        yield section("Charts", "charts", (*_legend(drawn[0]), charts, note))
    yield section("Table", "table", (_table(sweep),))
    if illegal:
        rows = (
            tag("li", tag("strong", fault), *([f" ({help})"] if help else []), f": {'; '.join(points)}")
            for (fault, help), points in sweep.faults().items()
        )
        yield section("Illegal points", "illegal", (tag("ul", lines(rows), class_="small"),))


def _legend(panel: Panel) -> list[Markup]:
    if len(panel.lines) < 2:
        return []
    items = (
        tag("li", tag("svg", *_key(panel, index, line), width=24, height=12, aria_hidden="true"), line.label)
        for index, line in enumerate(panel.lines)
    )
    return [tag("ul", lines(items), class_="legend")]


def _key(panel: Panel, index: int, line: Line) -> Iterator[Markup]:
    if panel.joined:
        yield _stroke(index, "M0 6h24")
    yield _spot(index, 12.0, 6.0, line.label)


def _stroke(index: int, path: str) -> Markup:
    colour, dash, _ = style(index)
    return tag(
        "path",
        d=path,
        style=f"stroke: var(--{colour}); stroke-width: 2; fill: none",
        stroke_dasharray=" ".join(map(str, dash)) or None,
    )


def _figure(sweep: Sweep, panel: Panel) -> Markup:
    caption = tag("figcaption", panel.title, class_="small")
    told = f"{panel.column.label} along {sweep.axes[0].key}; the table below has every number"
    shapes = lines((tag("title", told), *_frame(sweep, panel), *_drawn(panel)))
    svg = tag(
        "svg",
        shapes,
        viewBox=f"0 0 {number(_WIDTH)} {number(_HEIGHT)}",
        width=_WIDTH,
        height=_HEIGHT,
        role="img",
        # A long word below may reach into the gap beside.
        style="overflow: visible",
    )
    return tag("figure", caption, svg, style="margin: 0")


def _x(place: float) -> float:
    return _LEFT + 8 + place * (_WIDTH - _LEFT - _RIGHT - 16)


def _y(height: float) -> float:
    return _HEIGHT - _BOTTOM - height * (_HEIGHT - _TOP - _BOTTOM)


def _frame(sweep: Sweep, panel: Panel) -> Iterator[Markup]:
    for mark, said in panel.named():
        y = _y(panel.height(mark))
        yield tag("path", d=f"M{number(_LEFT)} {number(y)}H{number(_WIDTH - _RIGHT)}", class_="stroke-line")
        yield _word(said, _LEFT - 6, y + 4, "end")
    if panel.rule is not None:
        style = "stroke: var(--gone); stroke-width: 1.5; stroke-dasharray: 6 4"
        told = tag("title", f"{panel.column.said(panel.rule)} there are")
        height = number(_y(panel.height(panel.rule)))
        yield tag("path", told, d=f"M{number(_LEFT)} {height}H{number(_WIDTH - _RIGHT)}", style=style)
    for value, place in labelled(sweep):
        yield _word(value, _x(place), _HEIGHT - 8, "middle")
    for place in panel.illegal:
        corner = f"{number(_x(place) - 4)} {number(_y(0) - 4)}"
        yield tag("path", d=f"M{corner}l8 8m0 -8l-8 8", style="stroke: var(--gone); stroke-width: 2; fill: none")


def labelled(sweep: Sweep) -> list[tuple[str, float]]:
    """The values of the first axis that are named below a chart, short, and their places: as many as have room.

    The outermost come first, then those with a legal point.
    """
    at = sorted(places(sweep).items(), key=lambda pair: pair[1])
    legal = {point.values[0] for point in sweep.points if point.plan is not None}
    inner = sorted(at[1:-1], key=lambda pair: pair[0] not in legal)
    chosen: list[tuple[str, float]] = []
    for value, place in (*at[-1:], *at[:-1][:1], *inner):
        short = value if len(value) <= _LONGEST_LABEL else f"{value[: _LONGEST_LABEL - 1]}…"
        if all(abs(place - x) >= _LETTER * ((len(short) + len(other)) / 2 + 1) for other, x in chosen):
            chosen.append((short, place))
    return sorted(chosen, key=lambda pair: pair[1])


def round_said(column: Column, mark: float) -> str:
    """A round number as people say it, without zeros at its end."""
    if mark == 0:
        return "0"
    head, space, unit = column.said(mark).partition(" ")
    digits = head.rstrip("KMBT")
    kept = digits.rstrip("0").rstrip(".") if "." in digits else digits
    return f"{kept}{head[len(digits) :]}{space}{unit}"


def _word(said: str, x: float, y: float, anchor: str) -> Markup:
    return tag(
        "text", said, x=x, y=y, text_anchor=anchor, class_="fill-soft", style="font-size: 11px; font-family: inherit"
    )


def _drawn(panel: Panel) -> Iterator[Markup]:
    for index, line in enumerate(panel.lines):
        spots = [(_x(place), _y(panel.height(cost)), cost) for place, cost in line.points]
        if panel.joined:
            yield _stroke(index, "M" + "L".join(f"{number(x)} {number(y)}" for x, y, _ in spots))
        for x, y, cost in spots:
            told = f"{line.label}: {_exact(cost)}" if line.label else _exact(cost)
            yield _spot(index, x, y, told)


def style(index: int) -> tuple[str, tuple[int, ...], str]:
    """Colour, dash and mark of a line."""
    again = index // len(COLOURS)
    return COLOURS[index % len(COLOURS)], DASHES[again % len(DASHES)], MARKS[again % len(MARKS)]


def _spot(index: int, x: float, y: float, told: str) -> Markup:
    colour, _, mark = style(index)
    said, shade = tag("title", told), f"fill-{colour}"
    if mark == "o":
        return tag("circle", said, cx=x, cy=y, r=3.5, class_=shade)
    return tag("path", said, d=f"M{number(x)} {number(y)}{_SHAPES[mark]}", class_=shade)


def _exact(cost: float) -> str:
    return f"{cost:,}" if isinstance(cost, int) else f"{cost:,.6g}"


def _table(sweep: Sweep) -> Markup:
    head = [(name, False) for name in sweep.names] + [(column.label, True) for column in sweep.columns]
    rows = (
        tag(
            "tr",
            *(tag("th", value, scope="row") for value in point.values),
            *(tag("td", column.cell(point.plan), class_="n") for column in sweep.columns),
        )
        for point in sweep.points
        if point.plan is not None
    )
    return table("Every valid point", head, rows)
