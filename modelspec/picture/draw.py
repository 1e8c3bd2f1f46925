"""What is drawn to scale: the strip of layers, bars of parameters, the experts. Shapes only, no words.

Each function returns elements placed at the origin; who composes them moves them and says in words what they show.
Equal shapes share one path, so that 512 experts cost two elements.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from modelspec.picture.anatomy import Anatomy, Experts
from modelspec.picture.markup import Markup, lines, number, tag

# Above this number experts are told in words alone.
MOST_EXPERTS = 2048
# Said with the drawing of experts.
EXAMPLE = "Which are filled is an example."
_HALF = 13
_SLOT, _SQUARE = 11.0, 9.0
_IN_A_ROW = 32


@dataclass(frozen=True, slots=True)
class Drawing:
    """Elements and the room that they take, in pixels."""

    shapes: Markup
    width: float
    height: float


def strip(model: Anatomy, shades: Mapping[str, str], width: float, layers: int | None = None) -> Drawing:
    """One column per layer, first layer left: attention above, feed-forward below.

    `layers` is what the whole width stands for; left out, the model's own.
    """
    step = min(width / (layers or model.layers), 40.0)
    gap = 1.0 if step >= 4 else 0.0
    cells: dict[str, list[str]] = {}
    start = 0
    for run in model.runs():
        for key, top in ((run.attention, 0), (run.ffn, _HALF + 1)):
            found = cells.setdefault(f"fill-{shades[key]}", [])
            if gap:
                found.extend(_rect((start + layer) * step, top, step - gap, _HALF) for layer in range(run.layers))
            else:
                found.append(_rect(start * step, top, run.layers * step, _HALF))
        start += run.layers
    return Drawing(_paths(cells), start * step, 2 * _HALF + 1)


def bar(amounts: Sequence[tuple[int, str]], width: float, whole: int, height: float = 18.0) -> Drawing:
    """Amounts with their shades side by side; `whole` is what the width stands for."""
    at, pieces = 0.0, []
    for amount, shade in amounts:
        length = width * amount / whole
        # A part too small to see still leaves its neighbours in place.
        if length >= 0.3:
            gap = 1.0 if length > 3 else 0.0
            pieces.append(tag("rect", x=at, y=0, width=length - gap, height=height, class_=f"fill-{shade}"))
        at += length
    return Drawing(lines(pieces), at, height)


def experts(these: Experts, shade: str) -> Drawing | None:
    """A square per routed expert, those of one token filled; a row per group where there are groups; shared ones apart.

    Which experts are filled is an example. None where there are too many to draw.
    """
    if these.total > MOST_EXPERTS:
        return None
    # A diff also takes specs whose groups do not fit.
    group = max(these.total // these.groups, 1)
    rows = these.groups if these.groups > 1 else 1
    in_row = group if rows > 1 and group <= 2 * _IN_A_ROW else min(_IN_A_ROW, these.total)
    chosen = set(example(these))
    cells: dict[str, list[str]] = {"fill-idle": [], f"fill-{shade}": []}
    for expert in range(these.total):
        row, column = divmod(expert, in_row)
        place = _rect(column * _SLOT, row * _SLOT, _SQUARE, _SQUARE)
        cells[f"fill-{shade}" if expert in chosen else "fill-idle"].append(place)
    drawn_rows = -(-these.total // in_row)
    shapes = [_paths(cells)]
    width, height = in_row * _SLOT - (_SLOT - _SQUARE), drawn_rows * _SLOT - (_SLOT - _SQUARE)
    if these.shared:
        # Shared experts stand below, all filled.
        shared = [_rect(index * 2 * _SLOT, height + 7, 2 * _SQUARE, _SQUARE) for index in range(min(these.shared, 16))]
        shapes.append(tag("path", d="".join(shared), class_=f"fill-{shade}"))
        width = max(width, len(shared) * 2 * _SLOT)
        height += 7 + _SQUARE
    return Drawing(lines(shapes), width, height)


def example(these: Experts) -> list[int]:
    """Experts that one token might use: as many as it uses, from as many groups as it may, spread out."""
    per_group = these.total // these.groups
    groups = [index * these.groups // these.used_groups for index in range(these.used_groups)]
    taken: list[int] = []
    for place, group in enumerate(groups):
        count = these.used * (place + 1) // len(groups) - these.used * place // len(groups)
        # Each in a stretch of its own, at another place in each.
        stretch = max(per_group // max(count, 1), 1)
        taken.extend(
            group * per_group + index * per_group // count + (5 * index + 3 * place + 2) % stretch
            for index in range(count)
        )
    return taken


def told(these: Experts) -> str:
    """The drawing of experts in words."""
    groups = f", from the best {these.used_groups} of {these.groups} groups" if these.groups > 1 else ""
    shared = ""
    if these.shared:
        shared = f"; {these.shared} shared {'experts see' if these.shared > 1 else 'expert sees'} every token"
    return f"{these.used} of {these.total:,} experts for each token{groups}{shared}"


def _rect(x: float, y: float, width: float, height: float) -> str:
    return f"M{number(x)} {number(y)}h{number(width)}v{number(height)}h-{number(width)}z"


def _paths(cells: Mapping[str, Iterable[str]]) -> Markup:
    return lines(tag("path", d="".join(places), class_=shade) for shade, places in cells.items())
