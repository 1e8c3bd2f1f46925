"""plan --measure: a few steps on the present machine beside the plan of them; plan --out: a plan to hold a run to."""

import json
import os
import re
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelspec.amount import amount_of_bytes, figure
from modelspec.cli.options import may_write, print_table, table, write

if TYPE_CHECKING:
    from modelspec.builders.measure import Measured
    from modelspec.plan import Plan
    from modelspec.schema import ModelSpec
    from modelspec.schema.hardware import Hardware

_SUFFIXES = (".yaml", ".yml")


def _plan_file(context: click.Context, option: click.Parameter, file: Path | None) -> Path | None:
    return may_write(file, '"plan_version"')


def _hardware_file(context: click.Context, option: click.Parameter, file: Path | None) -> Path | None:
    if file == Path():
        raise click.BadParameter("names no file; it must end in .yaml, so that --hardware takes it for a file")
    if file is not None and file.suffix not in _SUFFIXES:
        raise click.BadParameter(f"{file}: must end in .yaml, so that --hardware takes it for a file")
    return file


_OPTIONS = (
    click.option(
        "--out",
        type=click.Path(dir_okay=False, path_type=Path),
        callback=_plan_file,
        metavar="FILE",
        help="Write the plan, its spec and its arguments as JSON, for train --plan.",
    ),
    click.option(
        "--measure", is_flag=True, help="Take steps on this machine and compare: time, tokens per second, memory."
    ),
    click.option(
        "--steps",
        type=click.IntRange(min=1, max=1000),
        metavar="N",
        help="Steps that --measure takes after one that warms up. [default: 3]",
    ),
    click.option(
        "--calibrated",
        type=click.Path(dir_okay=False, path_type=Path),
        callback=_hardware_file,
        metavar="FILE",
        help="Write a hardware file with which the plan says what --measure found.",
    ),
)


def measure_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--out`, `--measure`, `--steps` and `--calibrated`; the command gets them by these names."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def check_measure(
    spec: str, measure: bool, steps: int | None, calibrated: Path | None, out: Path | None, hardware: str
) -> None:
    """Raises UsageError where the options contradict each other, or would write over the spec.

    Or over a hardware file, whose price and power somebody may have set: unless it is the one that is measured.
    """
    if not measure and (steps is not None or calibrated is not None):
        raise click.UsageError("--steps and --calibrated go with --measure")
    if measure and out is not None:
        raise click.UsageError("--out goes without --measure: write --calibrated FILE, and plan with --hardware FILE")
    for option, file in (("--out", out), ("--calibrated", calibrated)):
        if file is not None and file.exists() and Path(spec).exists() and file.samefile(spec):
            raise click.UsageError(f"{option} {file}: this is the spec")
    if calibrated is None or not os.path.isfile(calibrated) or not os.path.getsize(calibrated):
        return
    if not os.path.isfile(hardware) or not calibrated.samefile(hardware):
        raise click.UsageError(
            f"--calibrated {calibrated}: exists; remove it, name another file, or measure it with "
            f"--hardware {_as_path(calibrated)}, which keeps its price and power"
        )


def save_plan(
    spec: "ModelSpec",
    result: "Plan",
    hardware: "Hardware",
    file: Path,
    sequence_length: int | None,
    stack: str | None,
    tokens: float | None,
    price: float | None,
    imbalance: float | None,
) -> None:
    """Writes plan.json; the file is then whole or as it was."""
    from modelspec.plan.saved import plan_text

    arguments = {
        "hardware": hardware.model_dump(mode="json", exclude_none=True),
        "sequence_length": sequence_length,
        "stack": stack,
        "tokens": tokens,
        "price": price,
        "imbalance": imbalance,
    }
    write(plan_text(spec, result, arguments), file, "--out")


def show_measured(
    spec: "ModelSpec",
    hardware: "Hardware | None",
    stack: str | None,
    steps: int | None,
    calibrated: Path | None,
    as_json: bool,
) -> int:
    """Measures, prints planned against measured, and writes the hardware file if wanted. Returns the exit code.

    Without hardware it is the present machine, with its peaks measured where it is none that ships.
    """
    from modelspec.builders import measure
    from modelspec.builders.allocator import keep_freed_memory
    from modelspec.builders.errors import Stopped
    from modelspec.cli.train import best_device, stop_signals
    from modelspec.hardware.calibration import calibration
    from modelspec.plan.planned import slowdown
    from modelspec.plan.step import speed
    from modelspec.plan.training import stages_of_training, training

    measure.require_measurable(spec)
    device = best_device()
    _require_kind(hardware, device)
    keep_freed_memory()
    with stop_signals() as stop:

        def check() -> None:
            if (number := stop()) is not None:
                raise Stopped(number)

        try:
            fresh = False
            if hardware is None:
                hardware, fresh = measure.present(device)
            pace = speed(calibration(), hardware, stack)
            step = training(spec, hardware, pace).stages[0].step
            applied, stage = next(stages_of_training(spec))
            shape = (stage.sequence_length, step.batch_size)
            rank = measure.heaviest(applied, *shape, hardware)
            measure.require_room(spec.name, rank, device)
            found = measure.measured(spec, step.batch_size, steps=steps or 3, device=device, check=check)
        except Stopped as stopped:
            click.echo("stopped by a signal; nothing was written", err=True)
            return stopped.exit_code
    memory = rank.total if device == "cpu" else rank.total - rank.margin
    compared = {
        "seconds": (step.seconds, found.step),
        "tokens_per_second": (found.tokens / step.seconds, found.tokens / found.step),
        "memory": (float(memory), float(found.memory)),
    }
    right = slowdown(applied, *shape, hardware, pace, found.step)
    if as_json:
        click.echo(json.dumps(_plain(hardware, pace.stack, found, compared, right), indent=2, allow_nan=False))
    else:
        _print(spec.name, hardware, pace.stack, found, compared, right, fresh)
    if calibrated is not None:
        write(_text(hardware, calibrated, spec.name, pace.stack, right, found), calibrated, "--calibrated")
        if not as_json:
            click.echo(f"{calibrated} has it: modelspec plan SPEC --hardware {_as_path(calibrated)}")
    return 0


def _require_kind(hardware: "Hardware | None", device: str) -> None:
    kind = "cpu" if device == "cpu" else "gpu"
    if hardware is not None and hardware.kind != kind:
        raise click.UsageError(
            f"--hardware {hardware.name} is of kind {hardware.kind}, and this machine is of kind {kind}: "
            "leave it out, and the machine is measured"
        )


def _print(
    name: str,
    hardware: "Hardware",
    stack: str,
    found: "Measured",
    compared: "dict[str, tuple[float, float]]",
    right: float,
    fresh: bool,
) -> None:
    from modelspec.plan.planned import LEAST_SLOWDOWN, error

    if fresh:
        rates = hardware.peak_flops.model_dump(exclude_none=True).items()
        told = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, rate in rates)
        click.echo(f"{found.device}: products at {told}; memory at {hardware.memory_bandwidth / 1e9:,.0f} GB/s\n")
    shown = table(f"{name}: planned and measured on {found.device}", "", "planned", "measured", "error")
    for label, key, said in (
        ("seconds for a step", "seconds", lambda number: f"{number:,.3g}"),
        ("tokens/s", "tokens_per_second", figure),
        ("peak memory", "memory", lambda number: amount_of_bytes(round(number))),
    ):
        planned, measured = compared[key]
        shown.add_row(label, said(planned), said(measured), f"{error(planned, measured):+.1%}")
    print_table(shown)
    seconds = ", ".join(f"{each:,.3g}" for each in found.seconds)
    click.echo(
        f"Steps of {found.tokens:,} tokens took {seconds} s after one of {found.warm_up:,.3g} s; "
        "the middle one counts. Tokens are random and load experts evenly."
    )
    click.echo(
        "Memory is what the process held at most, Python and its libraries included."
        if hardware.kind == "cpu"
        else "Memory is what tensors held at most, on both sides without fragments and libraries."
    )
    taken = f"{hardware.slowdown:.3g}" if hardware.slowdown else "none"
    if right > LEAST_SLOWDOWN:
        click.echo(
            f"The plan of this spec is right with slowdown {right:.3g} (it had {taken}): so many times longer does "
            f"computation take here than the rates of {stack} say."
        )
    else:
        click.echo(f"No slowdown makes the plan right: launches alone take longer by the rates of {stack}.")


def _plain(
    hardware: "Hardware", stack: str, found: "Measured", compared: "dict[str, tuple[float, float]]", right: float
) -> dict[str, Any]:
    from modelspec.plan.planned import error

    return {
        "device": found.device,
        "hardware": hardware.model_dump(mode="json", exclude_none=True),
        "stack": stack,
        "sequence_length": found.sequence_length,
        "batch_size": found.batch_size,
        "warm_up_seconds": found.warm_up,
        "step_seconds": list(found.seconds),
        "planned": {key: planned for key, (planned, _) in compared.items()},
        "measured": {key: measured for key, (_, measured) in compared.items()},
        "error": {key: error(*pair) for key, pair in compared.items()},
        "slowdown": right,
    }


def _text(hardware: "Hardware", file: Path, spec: str, stack: str, right: float, found: "Measured") -> str:
    """A hardware file; what nobody measured says so."""
    from modelspec.dump import lines
    from modelspec.schema.hardware import Reference

    name = re.sub(r"[^A-Za-z0-9._-]", "-", file.stem)[:64]
    source = Reference(fields=("slowdown",), text=f"steps of {spec} on {found.device}", date=date.today().isoformat())
    others = tuple(each for each in hardware.sources if each.fields != ("slowdown",))
    changed = {
        "name": name if name[:1].isalnum() else "measured",
        "stack": stack,
        "slowdown": float(f"{right:.4g}"),
        "sources": (*others, source),
    }
    data = hardware.model_copy(update=changed).model_dump(mode="json", exclude_none=True)
    written = [f"{line}  # {note}" if note else line for line, note in lines(data, lambda path: _NOTES.get(path, ""))]
    return "\n".join(["# Measured by modelspec plan --measure.", *written, *([] if hardware.price else [_PRICE]), ""])


# What a user knows better.
_NOTES: dict[tuple[str | int, ...], str] = {
    ("power",): "watts of one device at full load: set what yours takes",
    ("slowdown",): "measured; it goes with the stack",
}
_PRICE = '# price: {usd_per_hour: 1.0, source: "what you pay", date: 2026-01}'


def _as_path(file: Path) -> str:
    return str(file) if file.parent != Path() else f"./{file}"
