"""plan --search: the layouts that are worth choosing from, as a table, as data, and the chosen one as a spec."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, get_args

import click

from modelspec.amount import amount_of_bytes, figure
from modelspec.cli.options import diagnostics_json, print_table, table
from modelspec.cli.plan_overlay import overlay_base, write_overlay
from modelspec.cli.plan_search_plot import draw_search

if TYPE_CHECKING:
    from rich.table import Table

    from modelspec.plan.layouts import Layout
    from modelspec.plan.search import Candidate, Search
    from modelspec.resolve import Resolved
    from modelspec.schema import ModelSpec
    from modelspec.schema.hardware import Hardware

# Rows of the front in the text; the JSON has all.
_SHOWN = 10
_OPTIONS = (
    click.option(
        "--search",
        "searched",
        is_flag=True,
        help="Walk the layouts that are legal on --gpus devices; what --set says of the layout is kept.",
    ),
    click.option(
        "--objective",
        type=click.Choice(("time", "memory", "cost")),
        help="What --search orders the best layouts by, and chooses one for. [default: time]",
    ),
    click.option("--top", type=click.IntRange(min=1), metavar="N", help="Layouts to show. [default: 10; JSON: all]"),
    click.option(
        "--overlay",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Write the layout that --search chooses as a spec that extends this one.",
    ),
)


def search_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--search` and what goes with it; the command gets them as keywords, of which `search_asked` takes its own."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def search_asked(options: dict[str, Any]) -> dict[str, Any] | None:
    """Takes the options of a search out of all; None without one. Ends the command where one stands without it."""
    found = {name: options.pop(name) for name in ("searched", "objective", "top", "overlay")}
    given = [name for name, value in found.items() if name != "searched" and value is not None]
    if given and not found["searched"]:
        raise click.UsageError(f"--{given[0]} goes with --search")
    return found if found.pop("searched") else None


def show_search(
    source: str,
    overrides: tuple[str, ...],
    hardware: "Hardware",
    asked: dict[str, Any],
    *,
    stack: str | None,
    tokens: int | None,
    price: float | None,
    imbalance: float | None,
    as_json: bool,
    allow_outside: bool,
    plot: Path | None,
) -> None:
    """Prints the search; writes the overlay and the picture where these are wanted.

    Ends the command with exit code 1 where nothing fits.
    """
    from modelspec.hardware.calibration import calibration
    from modelspec.plan.search import search
    from modelspec.plan.step import speed

    spec, resolved = _read(source, overrides, as_json=as_json, allow_outside=allow_outside)
    file: Path | None = asked["overlay"]
    base = None if file is None else overlay_base(file, source, overrides, allow_outside)
    try:
        result = search(
            spec,
            hardware,
            speed(calibration(), hardware, stack),
            fixed=_fixed(spec, resolved),
            objective=asked["objective"] or "time",
            tokens=tokens,
            price=price,
            imbalance=imbalance,
        )
    except ValueError as error:
        raise click.UsageError(f"--search: {error}") from None
    if file is not None and base is not None and result.chosen is not None:
        write_overlay(file, base, spec, result, allow_outside=allow_outside)
    if plot is not None and result.front:
        draw_search(result, plot)
    if as_json:
        click.echo(json.dumps({"search": _json(result, asked["top"])}, indent=2, allow_nan=False))
    else:
        _print(result, asked["top"] or _SHOWN)
        if base is not None and result.chosen is not None:
            click.echo(f"{file}: the chosen layout")
    if result.chosen is None:
        raise click.exceptions.Exit(1)


def _read(
    source: str, overrides: tuple[str, ...], *, as_json: bool, allow_outside: bool
) -> "tuple[ModelSpec, Resolved]":
    """The spec, valid but for its layout: whose errors (MS4..) are what a search is about."""
    from modelspec.diagnostics import SpecError
    from modelspec.resolve import resolve
    from modelspec.validate import check

    try:
        resolved = resolve(source, overrides, allow_outside=allow_outside)
        spec, diagnostics = check(resolved)
        errors = [each for each in diagnostics if each.severity == "error"]
        others = [each for each in errors if spec is None or not each.code.startswith("MS4")]
        if spec is None or others:
            raise SpecError(others, resolved.documents)
    except SpecError as error:
        if not as_json:
            raise
        click.echo(diagnostics_json(False, error.diagnostics))
        raise click.exceptions.Exit(error.exit_code) from error
    return spec, resolved


def _fixed(spec: "ModelSpec", resolved: "Resolved") -> dict[str, Any]:
    """The parts of a layout that --set says."""
    from modelspec.document import SET
    from modelspec.plan.layouts import KEYS, of

    layout = of(spec.parallelism, spec.parallelism.microbatch_size or 1)
    said = {}
    for part, keys in KEYS.items():
        path = ("parallelism", *keys)
        if resolved.node(path) is not None and resolved.place(path).file == SET:
            said[part] = getattr(layout, part)
    return said


def _json(result: "Search", top: int | None) -> dict[str, Any]:
    """The search as plain data."""
    data = asdict(result)
    for each, candidate in [*zip(data["front"], result.front, strict=True), (data["chosen"], result.chosen)]:
        if candidate is not None:
            each["layout"] = candidate.layout._asdict()
    if result.own is not None:
        data["own"]["layout"] = result.own.layout._asdict()
    del data["bounds"]
    return data | {"front": data["front"][:top]}


def _print(result: "Search", top: int) -> None:
    if result.front:
        print_table(_table(result, top))
        click.echo()
    for sentence in _sentences(result, top):
        click.echo(sentence)
    if result.rejected:
        click.echo()
        print_table(_rejected(result))
    for sentence in (*_help(result), "", *result.assumptions):
        click.echo(sentence)


def _table(result: "Search", top: int) -> "Table":
    headings = ("data", "tensor", "context", "expert", "ZeRO", "microbatch", "recompute", "step", "tokens/s/GPU")
    later = ("later stages",) if any(each.later for each in result.front) else ()
    priced = ("$ for 1T tokens",) if result.objective == "cost" else ()
    shown = table(
        f"{result.name} on {result.world_size:,} {result.hardware}: layouts by {result.objective}, "
        f"stage {result.stage}, sequences of {result.sequence_length:,}",
        "pipeline",
        *headings,
        *("bubble", "memory", "verdict", *later, *priced, ""),
    )
    for candidate in result.front[:top]:
        shown.add_row(*_cells(candidate, bool(priced)), "chosen" if candidate is result.chosen else "")
    if result.chosen is not None and result.chosen not in result.front[:top]:
        shown.add_section()
        shown.add_row(*_cells(result.chosen, bool(priced)), "chosen")
    if result.own is not None:
        shown.add_section()
        shown.add_row(*_cells(result.own, bool(priced)), "the spec's own")
    return shown


def _cells(candidate: "Candidate", priced: bool) -> Iterator[str]:
    layout = candidate.layout
    yield _pipeline(layout)
    yield f"{candidate.data:,}"
    yield from map(str, (layout.tensor, layout.context, layout.expert, layout.zero))
    yield f"{layout.microbatch_size} x {candidate.microbatches:,}"
    yield _recomputed(layout)
    yield f"{candidate.step_seconds:,.3g} s"
    yield figure(candidate.tokens_per_second_per_gpu)
    yield f"{candidate.bubble:.1%}"
    yield amount_of_bytes(candidate.memory_bytes)
    yield candidate.verdict
    if candidate.later is not None:
        yield candidate.later
    if priced and candidate.usd_per_billion_tokens is not None:
        yield figure(1000 * candidate.usd_per_billion_tokens)


def _pipeline(layout: "Layout") -> str:
    each = "" if layout.stages_per_rank is None else f" x{layout.stages_per_rank}"
    return f"{layout.pipeline} {layout.schedule}{each}" if layout.pipeline > 1 else "1"


def _recomputed(layout: "Layout") -> str:
    from modelspec.schema.parallelism import Recompute

    short = {"mla_up_projection": "up"}
    return "+".join(short.get(item, item) for item in get_args(Recompute) if item in layout.recompute) or "-"


def _sentences(result: "Search", top: int) -> Iterator[str]:
    illegal = sum(each.count for each in result.rejected if each.code != "memory")
    big = result.examined - illegal - result.fitting
    more = f", of which {top} are shown" if len(result.front) > top else ""
    yield (
        f"{result.examined:,} layouts: {illegal:,} are illegal, {big:,} too big, {result.fitting:,} fit. "
        f"{len(result.front)} of these are on the front of time and memory{more}; {result.simulated} pipelines were "
        "simulated, all others are slower for certain."
    )
    chosen, own = result.chosen, result.own
    if chosen is None:
        return
    yield f"Chosen: {_options(chosen.set)}"
    if own is not None:
        yield f"The spec's own layout takes {_longer(own, chosen)} than the chosen one."
    if result.training is not None and result.training.gpu_hours is not None:
        cost = "" if result.training.cost_usd is None else f", ${figure(result.training.cost_usd)}"
        yield f"With it, all of training takes {figure(result.training.gpu_hours)} GPU hours{cost}."
    elif result.objective == "cost" and chosen.usd_per_billion_tokens is not None:
        each = figure(1000 * chosen.usd_per_billion_tokens)
        yield f"With it, a trillion tokens cost ${each}; how many are trained on is not known: --tokens says it."
    too_big = [f"{amount_of_bytes(each.total)} in {each.name}" for each in result.stages if each.verdict == "OOM"]
    if too_big:
        yield (
            f"No layout of the front fits in every stage of training. The chosen one needs {', '.join(too_big)}: give "
            "such stages `parallelism` of their own. Hours and dollars above are as if it fitted."
        )


def _options(texts: tuple[str, ...]) -> str:
    """Texts for --set as a shell takes them."""
    return " ".join(f"--set {quote(text)}" for text in texts)


def _longer(one: "Candidate", other: "Candidate") -> str:
    """How much longer a layout takes for a token than another one."""
    more = other.tokens_per_second_per_gpu / one.tokens_per_second_per_gpu - 1
    return f"{more:.1%} longer" if more >= 0 else f"{-more:.1%} less time"


def _rejected(result: "Search") -> "Table":
    from rich.markup import escape
    from rich.table import Table

    shown = Table(title="Not in the choice", title_justify="left", box=None, pad_edge=False)
    shown.add_column("layouts", justify="right")
    for heading in ("code", "for example", "at"):
        shown.add_column(heading)
    for each in result.rejected:
        shown.add_row(f"{each.count:,}", each.code, escape(each.reason), escape(_short(each.example)))
    return shown


def _short(example: tuple[str, ...]) -> str:
    """The texts of an example without what they share, degrees of 1 and what is off."""
    parts = (text.removeprefix("parallelism.").split("=", 1) for text in example[1:])
    alike = {"1", "0", "[]", "null"}
    return ", ".join(f"{key}={value}" for key, value in parts if value not in alike) or "one rank for each copy"


def _help(result: "Search") -> Iterator[str]:
    """What would help where nothing fits."""
    if result.front:
        return
    yield ""
    if result.nearest is None:
        yield "No layout is legal on so many devices."
        yield from (f"{each.code}: {each.reason}; {each.help}" for each in result.rejected[:3] if each.help)
        return
    nearest = result.nearest
    yield (
        f"Nothing fits. The smallest needs {amount_of_bytes(nearest.memory_bytes)} of "
        f"{amount_of_bytes(result.device_bytes)}: {_options(nearest.set)}"
    )
    for text, total in nearest.formats:
        yield f"With {_options((text,))} it needs {amount_of_bytes(total)}."
    if nearest.gpus is not None:
        yield f"A layout fits with --gpus {nearest.gpus}."
    else:
        yield "More devices of this kind do not help: other formats, shorter sequences or a larger device might."
