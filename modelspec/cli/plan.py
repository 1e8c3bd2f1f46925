"""plan: what a spec costs. For now its parameters, counted exactly."""

import json

import click

from modelspec.cli.options import amount, output_format, overrides, print_table, read


@click.command(name="plan")
@click.argument("spec")
@overrides
@output_format("text", "json")
def command(spec: str, overrides: tuple[str, ...], output: str) -> None:
    """Count the parameters of SPEC, without torch and without allocating anything."""
    from modelspec.plan import plan

    model, _ = read(spec, overrides, as_json=output == "json")
    result = plan(model)
    if output == "json":
        click.echo(json.dumps(result.as_json(), indent=2))
        return

    from rich.table import Table

    counts = result.parameters
    table = Table(title=f"{result.name}: parameters", title_justify="left", box=None, pad_edge=False)
    table.add_column("part")
    table.add_column("parameters", justify="right")
    table.add_column("", justify="right")
    table.add_column("share", justify="right")
    rows = [(part.replace("_", " "), number) for part, number in counts.parts.items()]
    for label, number in [*rows, ("total", counts.total), ("active for one token", counts.active)]:
        table.add_section() if label == "total" else None
        table.add_row(label, f"{number:,}", amount(number), f"{number / counts.total:.2%}")
    if counts.mtp:
        table.add_row("added by multi-token prediction", f"{counts.mtp:,}", amount(counts.mtp), "")
    print_table(table)
    click.echo("Total is the main model; selection biases (FP32 buffers) count. Active includes embedding and head.")
