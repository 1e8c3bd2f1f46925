"""plan --search --overlay: the layout that a search chooses, as a spec that extends the one that was searched."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelspec.amount import amount_of_bytes, figure
from modelspec.cli.options import write

if TYPE_CHECKING:
    from modelspec.plan.search import Search
    from modelspec.schema import ModelSpec


def overlay_base(file: Path, source: str, overrides: tuple[str, ...], allow_outside: bool) -> dict[str, Any]:
    """What an overlay says beside its layout: the spec that it extends, and the values of --set.

    Ends the command where the file cannot be written or cannot say that.
    """
    if not file.parent.is_dir():
        raise click.UsageError(f"--overlay {file}: there is no folder {file.parent}; make it first")
    if file == Path():
        raise click.UsageError("--overlay names no file")
    if file.exists():
        raise click.UsageError(f"--overlay {file}: exists; remove it or name another file")
    return {"extends": _extended(source, file, allow_outside), **_said(overrides)}


def write_overlay(
    file: Path, base: dict[str, Any], spec: "ModelSpec", result: "Search", *, allow_outside: bool
) -> None:
    """Writes the chosen layout over what `overlay_base` gives: a spec that is sure to be valid."""
    from modelspec.cli.init import schema_seen_from
    from modelspec.document import parse
    from modelspec.init import SCHEMA
    from modelspec.plan.layouts import applied
    from modelspec.plan.overlay import overlay
    from modelspec.plan.search import written
    from modelspec.resolve import resolve
    from modelspec.validate import check

    assert result.chosen is not None, "there is nothing to write"
    chosen, layout, schema = result.chosen, result.chosen.layout, schema_seen_from(file)
    name = f"{spec.name}-{result.world_size}-{result.hardware}"[:64]
    data = {"extends": base["extends"], "name": name, **base}
    data = _merged(data, {"parallelism": {"world_size": result.world_size, **written(spec, layout)}})
    head = [
        *(["`modelspec schema` prints the schema that the first line names."] if schema == SCHEMA else []),
        f"{result.name} on {result.world_size:,} {result.hardware}: a step of {chosen.batch_size:,} sequences in "
        f"{chosen.step_seconds:,.3g} s,",
        f"{figure(chosen.tokens_per_second_per_gpu)} tokens a second and device, "
        f"{amount_of_bytes(chosen.memory_bytes)} of {amount_of_bytes(result.device_bytes)} on the heaviest rank.",
        *(
            f"It does not fit in stage {each.name}, which needs {amount_of_bytes(each.total)}: give that `parallelism`."
            for each in result.stages
            if each.verdict == "OOM"
        ),
        "Chosen by `modelspec plan --search`; `modelspec plan` with the same --hardware says more.",
    ]
    text = overlay(schema, head, data)
    there, diagnostics = check(resolve(parse(text, str(file)), allow_outside=allow_outside))
    assert not any(each.severity == "error" for each in diagnostics), diagnostics
    assert there is not None and there.parallelism == applied(spec, layout).parallelism, text
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
