"""build: compile a spec on the meta device and show what came out, whole or by rank; write initial weights."""

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import click

from modelspec.amount import amount_of_bytes
from modelspec.cli.options import allow_outside, overrides, print_table, read, size, table
from modelspec.cli.transfer import transferring
from modelspec.schema import ModelSpec, TensorSpec


@click.command(name="build")
@click.argument("spec")
@overrides
@allow_outside
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Write initial weights into this folder.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the initial weights.")
@click.option("--check", is_flag=True, help="Lay the model out over all ranks of the spec, and print what each holds.")
@click.option("--world", type=click.IntRange(min=1), metavar="N", help="Short for --set parallelism.world_size=N.")
def command(
    spec: str,
    overrides: tuple[str, ...],
    allow_outside: bool,
    out: Path | None,
    seed: int,
    check: bool,
    world: int | None,
) -> None:
    """Compile SPEC on the meta device, at any size, and print its modules.

    Nothing is allocated. The parameters of the built model are compared with the table that the schema states.
    With --check the ranks of the spec's parallelism are built instead, as training builds them, and compared with the
    table and with the plan. With -o the initial weights are written, one tensor at a time, beside the spec, and
    config.json where a Hugging Face family can say what the spec says.
    """
    shorthand = () if world is None else (f"parallelism.world_size={world}",)
    model_spec, _ = read(spec, (*overrides, *shorthand), allow_outside=allow_outside)
    if check:
        if out is not None:
            raise click.UsageError("--check only looks; leave out -o")
        for stage, each in _layouts(model_spec):
            _check(each, stage)
        return
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

    shown = Table(title=f"{model_spec.name}: {type(model).__name__}", title_justify="left", box=None, pad_edge=False)
    for column in ("module", "tensor", "shape"):
        shown.add_column(column)
    shown.add_column("parameters", justify="right")
    for prefix, repeat, tensors in _modules(stated):
        total = repeat * sum(tensor.numel for tensor in tensors.values())
        shown.add_section()
        for row, (name, tensor) in enumerate(tensors.items()):
            shape = " x ".join(f"{size:,}" for size in tensor.shape)
            shown.add_row("" if row else prefix, name, shape, "" if row else f"{total:,}")
    print_table(shown)
    total = sum(tensor.numel for tensor in stated.values())
    click.echo(
        f"{len(stated):,} tensors, {total:,} elements: {size(parameters(model_spec))}, built on meta in {seconds:.2f} s"
    )
    if out is not None:
        _write(model_spec, out, seed)


def _layouts(spec: ModelSpec) -> Iterator[tuple[str, ModelSpec]]:
    """Stages of training that place tensors otherwise than those before them: the name, and the spec as it stands
    there.
    """
    from modelspec.timeline import stage_spec

    seen = []
    names = [stage.name for stage in spec.training.stages] if spec.training is not None else []
    stages = [(name, stage_spec(spec, index)) for index, name in enumerate(names)] or [("", spec)]
    for name, stage in stages:
        places = stage.parallelism.model_copy(update={"microbatch_size": None, "recompute": (), "compile": "none"})
        if places not in seen:
            seen.append(places)
            yield name, stage


def _check(spec: ModelSpec, stage: str) -> None:
    """Lays out the ranks of one layout, prints what they hold, and fails where that is not what the spec states."""
    import time

    from modelspec.builders.parallel.check import Laid, differences, laid_out
    from modelspec.plan.ranks import Batch, rank_memory

    started = time.perf_counter()
    ranks: list[Laid] = []
    title = f"{spec.name}{stage and ', '}{stage}: {spec.parallelism.world_size:,} ranks"
    shown = table(title, "pipeline rank", *_COLUMNS)
    for laid in laid_out(spec):
        ranks.append(laid)
        counts = (len(laid.parameters), laid.elements, laid.updated)
        places = (_numbers(laid.stages), _numbers(laid.layers))
        shown.add_row(str(laid.pipeline_rank), *places, *(f"{count:,}" for count in counts))
    print_table(shown)
    seconds = time.perf_counter() - started
    if wrong := differences(spec, ranks):
        raise click.ClickException(f"the ranks' parts are not the spec's table of tensors at {', '.join(wrong)}")
    planned = [row.parameters for row in rank_memory(spec, Batch(1, spec.parallelism.world_size))]
    if planned != [laid.elements for laid in ranks]:
        raise click.ClickException(f"plan has {planned} parameters on the ranks of the pipeline")
    click.echo(f"every tensor of the spec stands on the ranks, in whole or in parts; laid out in {seconds:.1f} s")


_COLUMNS = ("stages", "layers", "tensors", "parameters", "updated by one rank")


def _numbers(values: Sequence[int]) -> str:
    """0, 3 to 5."""
    runs = (list(run) for _, run in groupby(enumerate(values), key=lambda pair: pair[1] - pair[0]))
    spans = [(run[0][1], run[-1][1]) for run in runs]
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in spans)


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
