"""plan --timeline: the pipeline in time, as a picture."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelspec.cli.options import HTML_SIGN, SVG_SIGN, may_write, write

if TYPE_CHECKING:
    from modelspec.picture.timeline import Timeline
    from modelspec.schema import ModelSpec
    from modelspec.schema.hardware import Hardware


def _picture(context: click.Context, option: click.Parameter, file: Path | None) -> Path | None:
    sign = SVG_SIGN if file is not None and file.suffix == ".svg" else HTML_SIGN
    return may_write(file, sign, ".svg", ".html")


def timeline_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--timeline`; the command gets it as `timeline`."""
    return click.option(
        "--timeline",
        type=click.Path(dir_okay=False, path_type=Path),
        callback=_picture,
        metavar="FILE",
        help="Draw the pipeline in time: its schedule as .svg, or a page of .html with every schedule that works.",
    )(command)


def show_timeline(
    spec: "ModelSpec", file: Path, hardware: "Hardware", stack: str | None, imbalance: float | None
) -> None:
    """Draws the pipeline of a valid spec into the file, and prints what it shows in a line for each schedule."""
    from modelspec.hardware.calibration import calibration
    from modelspec.picture.pipeline import all_timelines, own_timeline
    from modelspec.picture.schedules import schedules_figure, schedules_page
    from modelspec.picture.timeline import told
    from modelspec.plan.step import speed

    shown: tuple[Timeline, ...]
    refused: tuple[tuple[str, str], ...]
    try:
        pace = speed(calibration(), hardware, stack)
        if file.suffix == ".svg":
            shown, refused = (own_timeline(spec, hardware, pace, imbalance or 1.0),), ()
        else:
            shown, refused = all_timelines(spec, hardware, pace, imbalance or 1.0)
    except ValueError as error:
        raise click.UsageError(f"--timeline: {error}") from None
    own = spec.parallelism.pipeline.schedule
    if file.suffix == ".svg":
        text = schedules_figure(f"{spec.name}: its pipeline", shown)
    else:
        text = schedules_page(f"{spec.name}: pipeline schedules", f"The spec has {own}.", shown, refused)
    write(text, file, "--timeline")
    for each in shown:
        click.echo(f"{each.schedule}: {told(each)}")
    for name, reason in refused:
        click.echo(f"{name}: {reason}")
