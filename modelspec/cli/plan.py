"""plan: what a spec costs, before anyone pays for it."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from modelspec.amount import amount, amount_of_bytes, flop_amount
from modelspec.cli.options import allow_outside, output_format, overrides, print_table, read

if TYPE_CHECKING:
    from rich.table import Table

    from modelspec.plan import Plan


@click.command(name="plan")
@click.argument("spec")
@overrides
@allow_outside
@click.option(
    "--sequence",
    "sequence_length",
    type=click.IntRange(min=1),
    metavar="N",
    help="Length of the sequences that FLOPs are counted for; tokens. "
    "[default: the first training stage's, else model.max_position]",
)
@click.option(
    "--modules", "by_module", is_flag=True, help="Show every part of the model: each half of a run of layers."
)
@output_format("text", "json")
def command(
    spec: str,
    overrides: tuple[str, ...],
    allow_outside: bool,
    sequence_length: int | None,
    by_module: bool,
    output: str,
) -> None:
    """Count what SPEC costs: parameters, FLOPs, cache and checkpoints, exactly.

    No torch, and nothing is allocated.
    """
    from modelspec.plan import plan

    model, _ = read(spec, overrides, as_json=output == "json", allow_outside=allow_outside)
    try:
        result = plan(model, sequence_length=sequence_length)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--sequence") from None
    if output == "json":
        click.echo(json.dumps(result.as_json(), indent=2))
        return
    if by_module:
        print_table(_modules(result))
    else:
        print_table(_parameters(result))
        click.echo(
            "Total is the main model; selection biases (FP32 buffers) count. Active includes embedding and head.\n"
        )
        print_table(_costs(result))
    for sentence in result.assumptions:
        click.echo(sentence)


def _parameters(result: "Plan") -> "Table":
    counts = result.parameters
    table = _table(f"{result.name}: parameters", "part", "parameters", "", "share")
    rows = [(part.replace("_", " "), number) for part, number in counts.parts.items()]
    for label, number in [*rows, ("total", counts.total), ("active for one token", counts.active)]:
        table.add_section() if label == "total" else None
        table.add_row(label, f"{number:,}", amount(number), f"{number / counts.total:.2%}")
    if counts.mtp:
        table.add_row("added by multi-token prediction", f"{counts.mtp:,}", amount(counts.mtp), "")
    return table


def _costs(result: "Plan") -> "Table":
    title = f"{result.name}: FLOPs per token of sequences of {result.sequence_length:,}, and bytes"
    table = _table(title, "cost", "exactly", "")
    for label, number in _flops(result):
        table.add_row(label, f"{number:,}", flop_amount(number))
    table.add_section()
    for label, number in _bytes(result):
        table.add_row(label, f"{number:,}", amount_of_bytes(number))
    return table


def _flops(result: "Plan") -> Iterator[tuple[str, int]]:
    """What is the same as the line above is left out."""
    counts = result.flops_per_token
    yield "forward pass", round(counts.forward)
    yield "training", round(counts.training)
    if counts.training_with_mtp != counts.training:
        yield "training with multi-token prediction", round(counts.training_with_mtp)
    if counts.training_with_recompute != counts.training_with_mtp:
        yield "training with what is recomputed, too", round(counts.training_with_recompute)


def _bytes(result: "Plan") -> Iterator[tuple[str, int]]:
    sizes = result.checkpoint_bytes
    yield "cache per token", result.kv_cache_bytes_per_token
    if result.state_bytes_per_sequence:
        yield "state per sequence, beside the cache", result.state_bytes_per_sequence
    yield "checkpoint: weights", sizes.weights
    yield "checkpoint: optimizer", sizes.optimizer
    if sizes.hugging_face_bf16 is not None and sizes.hugging_face_fp8 is not None:
        yield "Hugging Face files in BF16", sizes.hugging_face_bf16
        yield "Hugging Face files in FP8 by blocks", sizes.hugging_face_fp8


def _modules(result: "Plan") -> "Table":
    title = f"{result.name}: modules, all layers of a run together, sequences of {result.sequence_length:,}"
    table = _table(
        title, "module", "layers", "parameters", "active", "forward FLOPs per token", "share", "cache per token"
    )
    for part in result.modules:
        in_main = part.name != "mtp"
        share = f"{float(part.forward_flops / result.flops_per_token.forward):.2%}" if in_main else ""
        numbers = (part.parameters, part.active, round(part.forward_flops))
        kept = f"{part.kv_cache_bytes_per_token:,}"
        table.add_row(part.name, f"{part.layers:,}", *(f"{number:,}" for number in numbers), share, kept)
    return table


def _table(title: str, first: str, *numbers: str) -> "Table":
    """A table whose first column is text and whose others are numbers."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column(first)
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table
