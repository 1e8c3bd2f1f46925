"""A pipeline in time: a row for each rank, a box for each piece of work, nothing where a rank waits.

Blue is a forward pass, amber the gradient of the input, green the gradient of the weights; a box of both is a backward
pass done whole, and half boxes one above the other are two passes that overlap. A box says its microbatch where there
is room. The stages of one rank differ in shade. All schedules of one picture have one scale, so that lengths compare.
Many microbatches repeat the same work: the middle is then left out, and the axis goes on with the time as it is.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from typing import Literal, NamedTuple

from modelspec.layout import stages_of
from modelspec.picture.draw import Drawing
from modelspec.picture.markup import Child, Markup, lines, number, tag
from modelspec.plan.pipeline import Durations, Pair, Simulation, Total, simulate, step
from modelspec.plan.schedules import held_together, order, shortened
from modelspec.schema.parallelism import PipelineSchedule

WIDTH, MARGIN = 960.0, 36.0
# Rows beyond this number would be thinner than can be seen.
MOST_RANKS = 128
_LABELS, _GAP, _AXIS = 124.0, 28.0, 30.0
_PLOT = WIDTH - 2 * MARGIN - _LABELS
_SHADES = 8
# Of the first and the last stage of a rank. Any two kinds differ for every common form of colour blindness.
_LIGHT = {
    "forward": ("#1f4e9e", "#8c98e0"),
    "input": ("#e3980f", "#f8d06e"),
    "weight": ("#45b47c", "#a6e6b4"),
    "waits": ("#eceef2", "#eceef2"),
}
_DARK = {
    "forward": ("#8486dc", "#2853a8"),
    "input": ("#e8ab3c", "#96611a"),
    "weight": ("#66dbb0", "#168f76"),
    "waits": ("#252c38", "#252c38"),
}


@dataclass(frozen=True, slots=True)
class Work:
    """How long things take: each stage's pieces, a transfer between ranks, and an overlapped pair (see `simulate`).

    In seconds, `told` saying where they come from, or, where nothing is known, in forward passes of a whole rank.
    """

    durations: tuple[Durations, ...]
    transfer: float = 0.0
    pair: Pair = 1.0
    told: str | None = None


def even_work(ranks: int, stages_per_rank: int) -> Work:
    """Equal stages whose three pieces take equally long, without transfers."""
    piece = 1 / stages_per_rank
    return Work((Durations(piece, piece, piece),) * (ranks * stages_per_rank))


@dataclass(frozen=True, slots=True)
class Timeline:
    """A schedule with its times: `total` of all microbatches, `simulation` of as many as it takes to show its course.

    `even` is the total if all stages were equal: what remains of the bubble is the schedule's own. `in_flight` is the
    most that a rank holds at once, as microbatches that would have passed all its stages.
    """

    schedule: PipelineSchedule
    ranks: int
    stages_per_rank: int
    microbatches: int
    work: Work
    total: Total
    even: Total
    drawn: int
    simulation: Simulation
    in_flight: float


def timeline(
    schedule: PipelineSchedule, ranks: int, stages_per_rank: int, microbatches: int, work: Work | None = None
) -> Timeline:
    """The schedule in time; without `work` with even pieces.

    Raises ValueError for counts with which the schedule does not work, and for more ranks than can be drawn.
    """
    if ranks > MOST_RANKS:
        raise ValueError(f"{ranks} pipeline ranks are more than the {MOST_RANKS} that can be drawn")
    times = work or even_work(ranks, stages_per_rank)
    arguments = (times.durations, times.transfer, times.pair)
    stages = len(times.durations)
    mean = _mean(times.durations)
    even_pair = (_mean(times.pair),) * stages if isinstance(times.pair, tuple) else times.pair
    drawn = shortened(schedule, ranks, microbatches, max(4, ceil(40 / ranks)))
    return Timeline(
        schedule=schedule,
        ranks=ranks,
        stages_per_rank=stages_per_rank,
        microbatches=microbatches,
        work=times,
        total=step(schedule, ranks, stages_per_rank, microbatches, *arguments),
        even=step(schedule, ranks, stages_per_rank, microbatches, (mean,) * stages, times.transfer, even_pair),
        drawn=drawn,
        simulation=simulate(order(schedule, ranks, stages_per_rank, drawn), *arguments),
        in_flight=max(
            sum(counts) / stages_per_rank
            for rank in held_together(schedule, ranks, stages_per_rank, microbatches)
            for counts in rank
        ),
    )


def _mean(durations: Sequence[Durations]) -> Durations:
    return Durations(*(sum(piece) / len(durations) for piece in zip(*durations, strict=True)))


def told(shown: Timeline) -> str:
    """Counts, bubble and what is held, in one line."""
    stages = "" if shown.stages_per_rank == 1 else f" with {shown.stages_per_rank} stages each"
    even = "" if shown.work.told is None else f" ({shown.even.bubble:.2%} if stages were equal)"
    return (
        f"{shown.ranks} ranks{stages}, {shown.microbatches:,} microbatches, bubble {shown.total.bubble:.2%}{even}, "
        f"at most {in_flight(shown)} in flight on a rank"
    )


def in_flight(shown: Timeline) -> str:
    """The most that a rank holds, in microbatches."""
    return f"{shown.in_flight:.2f}".rstrip("0").rstrip(".")


def assumptions(shown: Sequence[Timeline]) -> Iterator[str]:
    """What the times rest on, in sentences."""
    known = shown[0].work.told
    yield known or "All stages are assumed equal and the three pieces of work equally long: the times are no spec's."
    if not any(each.work.transfer for each in shown):
        yield "Transfers between ranks take no time."
    if any(each.schedule == "dualpipev" for each in shown):
        pairs = {each.work.pair for each in shown if each.schedule == "dualpipev"}
        if pairs == {1.0}:
            yield "dualpipev gains nothing from overlap: a pair takes as long as its two passes one after the other."
        elif None not in pairs:
            yield "In an overlapped pair, exchange with experts runs under computation."


def visible(shown: Sequence[Timeline]) -> float:
    """Time that the width of a picture stands for: all of it, or what a pipeline takes to fill and to drain.

    A pipeline has filled when a microbatch has gone through all stages and back; the rest shows that work repeats.
    """
    needed = 0.0
    for each in shown:
        there_and_back = sum(map(sum, each.work.durations)) + 2 * each.work.transfer * (each.ranks - 1)
        forward = sum(piece.forward for piece in each.work.durations) / len(each.work.durations)
        needed = max(needed, 2.4 * there_and_back, 44 * forward)
    longest = max(each.total.makespan for each in shown)
    whole = all(each.drawn == each.microbatches for each in shown)
    return longest if whole and longest < 1.3 * needed else needed


def rules() -> str:
    """The stylesheet of what is drawn here, in both themes."""
    return f"{_TYPE}\n{_rules(_LIGHT)}\n@media (prefers-color-scheme: dark) {{\n{_rules(_DARK)}\n}}"


_TYPE = """\
.tick { font-size: 10px }
.box-number { font-size: 8px; text-anchor: middle }
.cut { font-size: 20px }
.middle { text-anchor: middle }
.end { text-anchor: end }"""


def _rules(theme: Mapping[str, tuple[str, str]]) -> str:
    """`.KIND-SHADE` fills a box, `.on-KIND-SHADE` the number on it."""
    found = []
    for kind, (first, last) in theme.items():
        for shade in range(_SHADES):
            colour = _mixed(first, last, shade / (_SHADES - 1))
            found.append(f".{kind}-{shade} {{ fill: {colour} }} .on-{kind}-{shade} {{ fill: {_readable(colour)} }}")
    return "\n".join(found)


def _mixed(first: str, last: str, share: float) -> str:
    channels = [(int(first[at : at + 2], 16), int(last[at : at + 2], 16)) for at in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in channels)


def _readable(ground: str) -> str:
    """Black or white, whichever has the greater contrast by WCAG 2.2: never less than 4.5 to 1."""
    channels = (int(ground[at : at + 2], 16) / 255 for at in (1, 3, 5))
    red, green, blue = (each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels)
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "#000000" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "#ffffff"


class _Box(NamedTuple):
    """One colour of a box; `half` is 0 for the whole height of a row, 1 for its upper half, 2 for its lower one."""

    kind: Literal["forward", "input", "weight"]
    shade: int
    microbatch: int | None
    begin: float
    end: float
    half: int
    joined: bool = False


class _Window(NamedTuple):
    """A stretch of the simulation, how far right of its own time it is drawn, and what was skipped before it."""

    begin: float
    end: float
    shift: float
    time: float
    microbatches: int


def rows(shown: Timeline, span: float) -> Drawing:
    """The rows of one schedule with their labels and the axis; the full width stands for `span`."""
    height = min(24.0, max(4.0, 400 / shown.ranks))
    pitch = height + (2.0 if height > 8 else 1.0)
    scale = _PLOT / span
    windows = list(_windows(shown, span))
    cells: dict[str, list[str]] = {}
    words: list[Child] = []

    def cell(shade: str, left: float, top: float, width: float, tall: float) -> None:
        place = f"M{number(left)} {number(top)}h{number(width)}v{number(tall)}h-{number(width)}z"
        cells.setdefault(shade, []).append(place)

    for window in windows:
        left, width = _LABELS + window.begin * scale + window.shift, (window.end - window.begin) * scale
        for rank in range(shown.ranks):
            cell("waits-0", left, rank * pitch, width, height)
    for rank, stages in enumerate(stages_of(shown.schedule, shown.ranks, shown.stages_per_rank)):
        top = rank * pitch
        if rank % ceil(11 / pitch) == 0:
            stage = f"stage{'s' if len(stages) > 1 else ''} {', '.join(map(str, stages))}"
            said = f"rank {rank}" + (f", {stage}" if 1 < len(stages) < 3 else "")
            label = tag("text", said, x=_LABELS - 10, y=top + height / 2 + 3.5, class_="tick end fill-soft")
            words.append(label)
        for box in _boxes(shown, rank, stages):
            for window in windows:
                begin, end = max(box.begin, window.begin), min(box.end, window.end)
                if end <= begin:
                    continue
                tall = height / 2 if box.half else height
                left, width = _LABELS + begin * scale + window.shift, (end - begin) * scale
                y = top + (tall if box.half == 2 else 0)
                cell(f"{box.kind}-{box.shade}", left, y, width - (0 if box.joined else min(0.75, width / 4)), tall)
                if box.microbatch is None or (begin, end) != (box.begin, box.end) or tall < 9:
                    continue
                said = str(box.microbatch + window.microbatches)
                if width > 4.6 * len(said) + 2.6:
                    place = {"x": left + width / 2 - 0.4, "y": y + tall / 2 + 2.9}
                    words.append(tag("text", said, class_=f"box-number on-{box.kind}-{box.shade}", **place))
    bottom = shown.ranks * pitch
    axis = [shape for window in windows for shape in _ticks(window, span, bottom, shown.work.told is not None)]
    if len(windows) > 1:
        middle = _LABELS + windows[0].end * scale + _GAP / 2
        words.append(tag("text", "⋯", x=middle, y=bottom / 2 + 6, class_="cut middle fill-soft"))
    drawn = (tag("path", d="".join(places), class_=shade) for shade, places in cells.items())
    return Drawing(lines((*drawn, *axis, *words)), _LABELS + _PLOT, bottom + _AXIS)


def _windows(shown: Timeline, span: float) -> Iterator[_Window]:
    """All of the simulation, or its begin and its end."""
    makespan, hidden = shown.simulation.makespan, shown.microbatches - shown.drawn
    if makespan <= span and not hidden:
        yield _Window(0, makespan, 0, 0, 0)
        return
    scale = _PLOT / span
    # The gap is room that both parts give up.
    part = min(makespan, span - _GAP / scale) / 2
    yield _Window(0, part, 0, 0, 0)
    later = (2 * part - makespan) * scale + _GAP
    yield _Window(makespan - part, makespan, later, shown.total.makespan - makespan, hidden)


def _boxes(shown: Timeline, rank: int, stages: tuple[int, ...]) -> Iterator[_Box]:
    """The boxes of a rank, in time."""
    last = max(len(stages) - 1, 1)
    shades = {stage: local * (_SHADES - 1) // last for local, stage in enumerate(stages)}
    half = 0
    for (kind, stage, microbatch, overlaps_next), begin, end in shown.simulation.spans[rank]:
        shade = shades[stage]
        half = 2 if half == 1 else 1 if overlaps_next and shown.work.pair is not None else 0
        if kind == "backward":
            _, inputs, weight = shown.work.durations[stage]
            middle = begin + (end - begin) * inputs / (inputs + weight)
            yield _Box("input", shade, microbatch, begin, middle, half, joined=True)
            yield _Box("weight", shade, None, middle, end, half)
        else:
            yield _Box(kind, shade, microbatch, begin, end, half)


def _ticks(window: _Window, span: float, top: float, seconds: bool) -> Iterator[Markup]:
    """The axis below a window, at round numbers of the time as it is with everything that is left out."""
    scale = _PLOT / span
    apart = span * 64 / _PLOT
    unit = 10.0 ** floor(log10(apart))
    apart = next(unit * times for times in (1, 2, 5, 10) if unit * times >= apart)
    left, right = (_LABELS + time * scale + window.shift for time in (window.begin, window.end))
    yield tag("path", d=f"M{number(left)} {number(top + 2.5)}h{number(right - left)}", class_="stroke-line")
    first = ceil((window.begin + window.time) / apart - 1e-9)
    for index in range(first, floor((window.end + window.time) / apart + 1e-9) + 1):
        x = _LABELS + (index * apart - window.time) * scale + window.shift
        yield tag("path", d=f"M{number(x)} {number(top + 2.5)}v4", class_="stroke-soft")
        yield tag("text", _time(index * apart, seconds, apart), x=x, y=top + 17, class_="tick middle fill-soft")


def _time(value: float, seconds: bool, step: float) -> str:
    if not seconds:
        return f"{value:g}"
    milli = step < 0.5
    digits = max(0, -floor(log10(step * (1000 if milli else 1)) + 1e-9))
    return f"{value * 1000:,.{digits}f} ms" if milli else f"{value:,.{digits}f} s"
