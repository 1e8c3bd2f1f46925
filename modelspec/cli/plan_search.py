"""plan --search: the layouts that are worth choosing from, as a table, as data, and the chosen one as a spec."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from modelspec.amount import amount_of_bytes
from modelspec.cli.options import diagnostics_json, print_table, table, write

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
) -> None:
    """Prints the search, and writes the overlay where that is wanted. Ends the command with exit code 1 where nothing
    fits.
    """
    from modelspec.hardware.calibration import calibration
    from modelspec.plan.search import search
    from modelspec.plan.step import speed

    spec, resolved = _read(source, overrides, as_json=as_json, allow_outside=allow_outside)
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
    if asked["overlay"] is not None and result.chosen is not None:
        _write_overlay(asked["overlay"], source, overrides, spec, result, allow_outside)
    if as_json:
        click.echo(json.dumps({"name": result.name, "search": _json(result, asked["top"])}, indent=2))
    else:
        _print(result, asked["top"] or _SHOWN)
        if asked["overlay"] is not None and result.chosen is not None:
            click.echo(f"{asked['overlay']}: the chosen layout; `modelspec plan` with --hardware {result.hardware}")
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
    shown = table(
        f"{result.name} on {result.world_size:,} {result.hardware}: layouts by {result.objective}, "
        f"stage {result.stage}, sequences of {result.sequence_length:,}",
        "pipeline",
        *headings,
        *("bubble", "memory", "verdict", ""),
    )
    for candidate in result.front[:top]:
        shown.add_row(*_cells(candidate), "chosen" if candidate is result.chosen else "")
    if result.chosen is not None and result.chosen not in result.front[:top]:
        shown.add_section()
        shown.add_row(*_cells(result.chosen), "chosen")
    if result.own is not None:
        shown.add_section()
        shown.add_row(*_cells(result.own), "the spec's own")
    return shown


def _cells(candidate: "Candidate") -> Iterator[str]:
    layout = candidate.layout
    yield _pipeline(layout)
    yield f"{candidate.data:,}"
    yield from map(str, (layout.tensor, layout.context, layout.expert, layout.zero))
    yield f"{layout.microbatch_size} x {candidate.microbatches:,}"
    yield _recomputed(layout)
    yield f"{candidate.step_seconds:,.3g} s"
    yield f"{candidate.tokens_per_second_per_gpu:,.0f}"
    yield f"{candidate.bubble:.1%}"
    yield amount_of_bytes(candidate.memory_bytes)
    yield candidate.verdict


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
    yield f"Chosen: {' '.join(f'--set {text}' for text in chosen.set)}"
    if own is not None:
        yield f"The spec's own layout takes {_longer(own, chosen)} than the chosen one."
    if result.training is not None and result.training.gpu_hours is not None:
        cost = "" if result.training.cost_usd is None else f", ${result.training.cost_usd:,.0f}"
        yield f"With it, all of training takes {result.training.gpu_hours:,.0f} GPU hours{cost}."
    for stage in result.stages:
        if stage.verdict == "OOM":
            yield (
                f"In stage {stage.name} it needs {amount_of_bytes(stage.total)}, which does not fit: give that stage "
                "`parallelism` of its own."
            )


def _longer(one: "Candidate", other: "Candidate") -> str:
    """How much longer a layout takes for a token than another one."""
    more = other.tokens_per_second_per_gpu / one.tokens_per_second_per_gpu - 1
    return f"{more:.1%} longer" if more >= 0 else f"{-more:.1%} less time"


def _rejected(result: "Search") -> "Table":
    from rich.table import Table

    shown = Table(title="Not in the choice", title_justify="left", box=None, pad_edge=False)
    shown.add_column("layouts", justify="right")
    for heading in ("code", "for example", "at"):
        shown.add_column(heading)
    for each in result.rejected:
        shown.add_row(f"{each.count:,}", each.code, each.reason, _short(each.example))
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
        yield from (f"{each.code}: {each.help}" for each in result.rejected[:3] if each.help)
        return
    nearest = result.nearest
    yield (
        f"Nothing fits. The smallest needs {amount_of_bytes(nearest.memory_bytes)} of "
        f"{amount_of_bytes(result.device_bytes)}: {' '.join(f'--set {text}' for text in nearest.set)}"
    )
    for text, total in nearest.formats:
        yield f"With --set {text} it needs {amount_of_bytes(total)}."
    if nearest.gpus is not None:
        yield f"A layout fits with --gpus {nearest.gpus}."
    else:
        yield "More devices of this kind do not help: other formats, shorter sequences or a larger device might."


def _write_overlay(
    file: Path,
    source: str,
    overrides: tuple[str, ...],
    spec: "ModelSpec",
    result: "Search",
    allow_outside: bool,
) -> None:
    """The chosen layout as a spec that is sure to be valid."""
    from modelspec.cli.init import schema_seen_from
    from modelspec.document import parse
    from modelspec.init import SCHEMA
    from modelspec.plan.layouts import applied
    from modelspec.plan.overlay import overlay
    from modelspec.plan.search import written
    from modelspec.resolve import resolve
    from modelspec.validate import check

    assert result.chosen is not None
    if not file.parent.is_dir():
        raise click.UsageError(f"--overlay {file}: there is no folder {file.parent}; make it first")
    if file.exists():
        raise click.UsageError(f"--overlay {file}: exists; remove it or name another file")
    chosen, layout = result.chosen, result.chosen.layout
    data = _merged({"name": f"{spec.name}-{result.world_size}-{result.hardware}"[:64]}, _said(overrides))
    data = _merged(data, {"parallelism": {"world_size": result.world_size, **written(spec, layout)}})
    schema = schema_seen_from(file)
    head = [
        *(["`modelspec schema` prints the schema that the first line names."] if schema == SCHEMA else []),
        f"{result.name} on {result.world_size:,} {result.hardware}: a step of {chosen.batch_size:,} sequences in "
        f"{chosen.step_seconds:,.3g} s,",
        f"{chosen.tokens_per_second_per_gpu:,.0f} tokens a second and device, "
        f"{amount_of_bytes(chosen.memory_bytes)} of {amount_of_bytes(result.device_bytes)} on the heaviest rank.",
        f"Chosen by `modelspec plan --search`; `modelspec plan {file.name} --hardware {result.hardware}` says more.",
    ]
    text = overlay(schema, head, _extended(source, file, allow_outside), data)
    there, diagnostics = check(resolve(parse(text, str(file)), allow_outside=allow_outside))
    assert not any(each.severity == "error" for each in diagnostics), diagnostics
    assert there is not None and there.parallelism == applied(spec, layout).parallelism
    write(text, file, "--overlay")


def _said(overrides: tuple[str, ...]) -> dict[str, Any]:
    """The values of --set as an overlay has them."""
    from modelspec.document import parse_value
    from modelspec.resolve import plain

    data: dict[str, Any] = {}
    for text in overrides:
        key, _, value = text.partition("=")
        steps = key.strip().split(".")
        if any(step.isdigit() for step in steps):
            raise click.UsageError(f"--overlay cannot say --set {key}, an item of a list: write it into a spec first")
        below: Any = plain(parse_value(value, 1))
        for step in reversed(steps):
            below = {step: below}
        data = _merged(data, below)
    return data


def _merged(base: Any, over: Any) -> Any:
    """`over` laid on `base`: maps merge, all else replaces."""
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    return base | {key: _merged(base.get(key), value) for key, value in over.items()}


def _extended(source: str, file: Path, allow_outside: bool) -> str:
    """How the overlay names the spec: by a path inside its project, else as one that ships."""
    from modelspec.resolve import SHIPPED, project, shipped

    if source.startswith(SHIPPED):
        return source
    real = Path(os.path.realpath(source))
    if allow_outside or real.is_relative_to(project(file)):
        return Path(os.path.relpath(real, file.resolve().parent)).as_posix()
    ships = shipped(f"{SHIPPED}{real.stem}") if real.parent.name == "specs" else None
    if ships is not None and os.path.samefile(ships, real):
        return f"{SHIPPED}{real.stem}"
    raise click.UsageError(f"--overlay {file}: must be in the project of {source}, which it extends")
