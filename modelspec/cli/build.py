"""build: compile a spec on the meta device and show what came out, and write initial weights if wanted."""

import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import click

from modelspec.amount import amount_of_bytes
from modelspec.cli.options import allow_outside, overrides, print_table, read, size
from modelspec.cli.transfer import transferring
from modelspec.schema import ModelSpec, TensorSpec


@click.command(name="build")
@click.argument("spec")
@overrides
@allow_outside
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Write initial weights into this folder.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the initial weights.")
def command(spec: str, overrides: tuple[str, ...], allow_outside: bool, out: Path | None, seed: int) -> None:
    """Compile SPEC on the meta device, at any size, and print its modules.

    Nothing is allocated. The parameters of the built model are compared with the table that the schema states.
    With -o the initial weights are written, one tensor at a time, beside the spec, and config.json where a Hugging
    Face family can say what the spec says.
    """
    model_spec, _ = read(spec, overrides, allow_outside=allow_outside)
    import time

    from rich.table import Table

    from modelspec.builders import build
    from modelspec.plan import parameters

    started = time.perf_counter()
    model = build(model_spec, device="meta")
    seconds = time.perf_counter() - started
    stated = model_spec.tensors()
    built = {name: tuple(tensor.shape) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    if built != {name: tensor.shape for name, tensor in stated.items()}:
        wrong = sorted(
            name for name in {*built, *stated} if name not in stated or built.get(name) != stated[name].shape
        )
        raise click.ClickException(f"the model differs from its spec's table of tensors at {', '.join(wrong)}")

    table = Table(title=f"{model_spec.name}: {type(model).__name__}", title_justify="left", box=None, pad_edge=False)
    for column in ("module", "tensor", "shape"):
        table.add_column(column)
    table.add_column("parameters", justify="right")
    for prefix, repeat, tensors in _modules(stated):
        total = repeat * sum(tensor.numel for tensor in tensors.values())
        table.add_section()
        for row, (name, tensor) in enumerate(tensors.items()):
            shape = " x ".join(f"{size:,}" for size in tensor.shape)
            table.add_row("" if row else prefix, name, shape, "" if row else f"{total:,}")
    print_table(table)
    total = sum(tensor.numel for tensor in stated.values())
    click.echo(
        f"{len(stated):,} tensors, {total:,} elements: {size(parameters(model_spec))}, built on meta in {seconds:.2f} s"
    )
    if out is not None:
        _write(model_spec, out, seed)


def _write(spec: ModelSpec, out: Path, seed: int) -> None:
    from modelspec.builders.start import save_initial
    from modelspec.hf_config import HFError, config_from_spec

    texts = {}
    try:
        texts["config.json"] = json.dumps(config_from_spec(spec, spec.precision.master_weights), indent=2) + "\n"
    except HFError as error:
        click.echo(f"no config.json: {error}")
    with transferring(f"writing {out}") as progress:
        written = save_initial(spec, out, texts, seed=seed, progress=progress)
    total = sum((written.path / name).stat().st_size for name in written.files)
    click.echo(f"{out}: {amount_of_bytes(total)} of initial weights, seed {seed}")


def _modules(tensors: dict[str, TensorSpec]) -> Iterator[tuple[str, int, dict[str, TensorSpec]]]:
    """Top-level modules in order, equal neighbouring layers as one: name, how many, the tensors of one."""
    modules = [
        (prefix, {name.removeprefix(f"{prefix}."): tensors[name] for name in names})
        for prefix, names in groupby(tensors, key=_prefix)
    ]
    for _, group in groupby(modules, key=lambda module: (module[0].split(".")[0], module[1])):
        run = list(group)
        yield _span(prefix for prefix, _ in run), len(run), run[0][1]


def _prefix(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[:2] if parts[1].isdecimal() else parts[:1])


def _span(prefixes: Iterable[str]) -> str:
    first, *rest = prefixes
    return f"{first} to {rest[-1].rpartition('.')[2]}" if rest else first
