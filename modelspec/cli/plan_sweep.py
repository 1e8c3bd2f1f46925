"""plan --sweep: a plan for every combination of values, as a table, as data, and drawn."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from math import prod
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import click

from modelspec.cli.options import HTML_SIGN, PNG_SIGN, diagnostics_json, may_write, print_table, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

    from modelspec.document import Document
    from modelspec.picture.sweep import Panel
    from modelspec.plan.sweep import Axis, Data, Sweep
    from modelspec.schema import ModelSpec

# Of the points with the same fault, so many are named.
_SHOWN = 5
# Headings are broken at this many letters.
_HEADING = 14
# So many points are there before anyone asks where they stay.
_SOON = 20


def _axes(context: click.Context, option: click.Parameter, given: tuple[str, ...]) -> "tuple[Axis, ...]":
    from modelspec.plan.sweep import axis

    try:
        return tuple(axis(text) for text in given)
    except ValueError as error:
        raise click.BadParameter(f"{error}, like model.ffn.moe.num_experts=64,128,256") from None


def _picture(context: click.Context, option: click.Parameter, file: Path | None) -> Path | None:
    sign = PNG_SIGN if file is not None and file.suffix == ".png" else HTML_SIGN
    return may_write(file, sign, ".png", ".html")


_OPTIONS = (
    click.option(
        "--sweep",
        "axes",
        multiple=True,
        callback=_axes,
        metavar="KEY=VALUE,VALUE",
        help="Tabulate the costs along a key, each value as by --set; several give every combination.",
    ),
    click.option(
        "--plot",
        type=click.Path(dir_okay=False, path_type=Path),
        callback=_picture,
        metavar="FILE",
        help="Draw the sweep or the search, too: a .png, or a page of .html.",
    ),
)


def sweep_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--sweep` and `--plot`; the command gets them as `axes` and `plot`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def show_sweep(
    spec: str,
    overrides: tuple[str, ...],
    axes: "tuple[Axis, ...]",
    cost: "Callable[[ModelSpec], Data]",
    plot: Path | None,
    *,
    as_json: bool,
    allow_outside: bool,
) -> None:
    """Prints the sweep, and draws it where that is wanted.

    `cost` plans one valid spec as JSON, and raises ValueError where it cannot. Ends the command with exit code 1 where
    no point is legal.
    """
    from modelspec.diagnostics import SpecError
    from modelspec.document import parse
    from modelspec.plan.sweep import sweep
    from modelspec.resolve import resolve

    if not axes:
        raise click.UsageError("--plot goes with --sweep or --search")
    try:
        base = resolve(spec, overrides, allow_outside=allow_outside)
    except SpecError as error:
        if not as_json:
            raise
        click.echo(diagnostics_json(False, error.diagnostics))
        raise click.exceptions.Exit(error.exit_code) from error
    # Read once for all points.
    file, text = next(iter(base.documents.items()))
    try:
        with _progress(prod(len(axis.values) for axis in axes)) as done:
            coster = _coster(parse(text, file), overrides, cost, allow_outside, done)
            result = sweep(str(base.data().get("name", spec)), axes, coster)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--sweep") from None
    if as_json:
        click.echo(json.dumps(_json(result), indent=2, allow_nan=False))
    else:
        _print(result)
    if not any(point.plan for point in result.points):
        raise click.exceptions.Exit(1)
    if plot is not None:
        _draw(result, plot)


def _coster(
    document: "Document",
    overrides: tuple[str, ...],
    cost: "Callable[[ModelSpec], Data]",
    allow_outside: bool,
    done: Callable[[], None],
) -> "Callable[[tuple[str, ...]], tuple[Data | None, Data | None]]":
    """Plans the point of some overrides, or says what is wrong with it first."""
    from modelspec.diagnostics import SpecError
    from modelspec.resolve import resolve
    from modelspec.validate import check

    def plan(values: tuple[str, ...]) -> "tuple[Data | None, Data | None]":
        done()
        try:
            spec, diagnostics = check(resolve(document, (*overrides, *values), allow_outside=allow_outside))
        except SpecError as error:
            return None, error.diagnostics[0].as_json()
        errors = [diagnostic for diagnostic in diagnostics if diagnostic.severity == "error"]
        if spec is None or errors:
            return None, errors[0].as_json()
        try:
            return cost(spec), None
        except ValueError as error:
            return None, {"message": str(error)}

    return plan


@contextmanager
def _progress(points: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr, where somebody watches it and there is something to wait for."""
    if points < _SOON or not sys.stderr.isatty():
        yield lambda: None
        return
    with click.progressbar(length=points, label="points", file=sys.stderr) as bar:
        yield lambda: bar.update(1)


def _json(result: "Sweep") -> dict[str, Any]:
    """The sweep as plain data; of each plan what is no list of parts or sentences."""
    from modelspec.document import parse_value
    from modelspec.resolve import plain

    def values(texts: tuple[str, ...]) -> dict[str, Any]:
        return {
            axis.key: plain(parse_value(text, 1)) if legal else text
            for axis, text in zip(result.axes, texts, strict=True)
        }

    points = []
    for point in result.points:
        legal = point.plan is not None
        told = {"plan": _numbers(point.plan)} if point.plan is not None else {"diagnostic": point.fault}
        points.append({"values": values(point.values), **told})
    axes = [{"key": axis.key, "values": list(axis.values)} for axis in result.axes]
    return {"name": result.name, "axes": axes, "points": points}


def _numbers(plan: "Data") -> dict[str, Any]:
    return {key: value for key, value in plan.items() if key not in ("modules", "assumptions")}


def _print(result: "Sweep") -> None:
    illegal = sum(1 for point in result.points if point.plan is None)
    if illegal < len(result.points):
        print_table(_table(result))
        click.echo()
        if same := [f"{column.label} {said}" for column, said in result.same()]:
            click.echo(f"Everywhere the same: {', '.join(same)}.")
    if illegal:
        click.echo(f"{illegal} of {len(result.points)} points {'is' if illegal == 1 else 'are'} illegal:")
    for (fault, help), points in result.faults().items():
        click.echo(f"  {fault}")
        if help:
            click.echo(f"    help: {help}")
        more = f"; and {len(points) - _SHOWN} more" if len(points) > _SHOWN else ""
        click.echo(f"    at {'; '.join(points[:_SHOWN])}{more}")


def _table(result: "Sweep") -> "Table":
    from rich.markup import escape
    from rich.table import Table

    shown = Table(title=f"{result.name}: costs", title_justify="left", box=None, pad_edge=False)
    for name, axis in zip(result.names, result.axes, strict=True):
        shown.add_column(name, justify="right" if axis.numbers else "left")
    for column in result.differing:
        shown.add_column(fill(column.label, _HEADING), justify="right", vertical="bottom")
    for point in result.points:
        if point.plan is not None:
            shown.add_row(*map(escape, point.values), *(column.cell(point.plan) for column in result.differing))
    return shown


def _draw(result: "Sweep", file: Path) -> None:
    from modelspec.picture import sweep as picture

    if file.suffix == ".html":
        write(picture.page(result), file, "--plot")
        return
    panels = picture.panels(result)
    # Slow to import, and of no use to whoever does not draw.
    from matplotlib.figure import Figure

    columns = 2 if len(panels) in (2, 4) else min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.1 * rows + 0.6), dpi=150, layout="constrained")
    figure.suptitle(f"{result.name} along {result.axes[0].key}", x=0.01, ha="left", fontsize=12, fontweight="bold")
    for index, panel in enumerate(panels):
        _chart(figure.add_subplot(rows, columns, index + 1), result, panel)
    if len(panels[0].lines) > 1:
        longest = max(len(line.label) for line in panels[0].lines)
        beside = max(int(4.2 * columns / (0.6 + 0.09 * longest)), 1)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, frameon=False, loc="outside lower left", ncols=beside, fontsize=9)
    image = BytesIO()
    figure.savefig(image, format="png", metadata={"Software": PNG_SIGN})
    write(image.getvalue(), file, "--plot")


def _chart(axes: "Axes", result: "Sweep", panel: "Panel") -> None:
    from modelspec.picture import palette
    from modelspec.picture import sweep as picture

    theme = palette.LIGHT
    for index, line in enumerate(panel.lines):
        colour, dash, mark = picture.style(index)
        axes.plot(
            [place for place, _ in line.points],
            [cost for _, cost in line.points],
            color=theme[colour],
            linestyle=((0, dash) if dash else "solid") if panel.joined else "none",
            linewidth=1.8,
            marker=mark,
            markersize=4.5,
            label=line.label,
        )
    for place in panel.illegal:
        axes.plot(place, panel.low, marker="x", color=theme["gone"], markersize=6, markeredgewidth=1.8, clip_on=False)
    axes.set_title(panel.title, loc="left", fontsize=10, color=theme["ink"])
    axes.set_ylim(panel.low, panel.high)
    axes.set_xlim(-0.06, 1.06)
    labels = picture.labelled(result)
    axes.set_xticks([place for _, place in labels], [value for value, _ in labels], fontsize=8)
    axes.set_yticks(panel.marks, [said for _, said in panel.named()], fontsize=8)
    if panel.rule is not None:
        axes.axhline(panel.rule, color=theme["gone"], linestyle=(0, (6, 4)), linewidth=1)
    axes.grid(axis="y", color=theme["line"], linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme["soft"], length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(theme["line"])
