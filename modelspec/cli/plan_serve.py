"""plan --serve: what it takes to serve a spec, as a page of numbers."""

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from modelspec.amount import amount_of_bytes, figure
from modelspec.cli.options import print_table, table

if TYPE_CHECKING:
    from rich.table import Table

    from modelspec.plan import Plan
    from modelspec.plan.serving import Rate, Serving
    from modelspec.schema import ModelSpec
    from modelspec.schema.hardware import Hardware


def _prices(context: click.Context, option: click.Parameter, value: str | None) -> tuple[float, float] | None:
    if value is None:
        return None
    try:
        given, taken = (float(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(
            f"{value!r} must be two prices like 0.27,1.10, of a million input and output tokens"
        ) from None
    if not (0 < given < float("inf") and 0 < taken < float("inf")):
        raise click.BadParameter(f"{value!r}: prices must be above 0")
    return given, taken


_OPTIONS = (
    click.option("--serve", is_flag=True, help="Show what serving takes: memory, rates, dollars per million tokens."),
    click.option("--batch", type=click.IntRange(min=1), metavar="B", help="Sequences decoded at once, on all devices."),
    click.option("--context", type=click.IntRange(min=1), metavar="T", help="Tokens in the cache of each sequence."),
    click.option("--input-tokens", type=click.IntRange(min=1), metavar="N", help="Tokens of a prompt. [default: T]"),
    click.option(
        "--acceptance",
        type=click.FloatRange(0, 1),
        metavar="A",
        help="Share of drafts accepted; decodes with MTP, too.",
    ),
    click.option(
        "--precision", type=click.Choice(["fp8", "bfloat16"]), help="Weights. [default: the spec's FP8, or BF16]"
    ),
    click.option(
        "--list-price",
        callback=_prices,
        metavar="IN,OUT",
        help="What a vendor asks for a million tokens, to compare with.",
    ),
)


def serve_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--serve` and what goes with it; the command gets them as keywords."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def check(options: dict[str, Any], of_training: dict[str, Any]) -> None:
    """Ends the command where an option of serving stands without `--serve`, or one of training with it."""
    given = [name for name, value in options.items() if name != "serve" and value is not None]
    if given and not options["serve"]:
        raise click.UsageError(f"--{given[0].replace('_', '-')} goes with --serve")
    if options["serve"] and (others := [name for name, value in of_training.items() if value]):
        instead = "; --context and --input-tokens say how long sequences are" if others[0] == "sequence" else ""
        raise click.UsageError(f"--{others[0]} is of training and does not go with --serve{instead}")


def show(
    spec: "ModelSpec", hardware: "Hardware", gpus: int | None, options: dict[str, Any], plan: "Plan", as_json: bool
) -> None:
    """Prints the plan of serving, or all of the plan with it as JSON."""
    from modelspec.plan.serving import ListPrice, serve
    from modelspec.plan.serving_machine import Efficiency

    prices, imbalance = options["list_price"], options["imbalance"]
    try:
        serving = serve(
            spec,
            hardware,
            gpus=gpus,
            batch=options["batch"],
            context=options["context"],
            input_tokens=options["input_tokens"],
            acceptance=options["acceptance"],
            precision=options["precision"],
            price=options["price"],
            list_price=ListPrice(*prices) if prices else None,
            efficiency=Efficiency() if imbalance is None else Efficiency(imbalance=imbalance),
        )
    except ValueError as error:
        raise click.UsageError(f"--serve: {error}") from None
    if as_json:
        click.echo(json.dumps(plan.as_json() | {"serving": serving.as_json()}, indent=2, allow_nan=False))
        return
    print_table(_memory(serving))
    print_table(_rates(serving))
    for sentence in (*_verdict(serving), "", *serving.assumptions):
        click.echo(sentence)


def _memory(serving: "Serving") -> "Table":
    devices = f"{serving.gpus:,} x {serving.hardware}"
    shown = table(
        f"{serving.name}: served by {devices}, {serving.context:,} tokens in each cache", "memory", "exactly", ""
    )
    memory = serving.memory
    rows = [
        ("weights of all devices", memory.weights_of_all),
        ("of one device: weights", memory.weights),
        ("of one device: room for caches", max(memory.usable - memory.weights, 0)),
        ("cache of a sequence", memory.cache_per_sequence),
    ]
    for label, number in rows:
        shown.add_row(label, f"{number:,}", amount_of_bytes(number))
    shown.add_row("largest batch, all devices", f"{serving.largest_batch:,}", "")
    fewest = "none" if serving.fewest_gpus is None else f"{serving.fewest_gpus:,}"
    shown.add_row("fewest devices", fewest, "")
    return shown


def _rates(serving: "Serving") -> "Table":
    title = "rates: tokens per second"
    drafted = ["with MTP: a device", "a sequence"] if serving.acceptance is not None else []
    shown = table(title, "step", "batch", "ms", "all devices", "a device", "a sequence", "waits for", *drafted)
    if serving.prefill is not None:
        shown.add_row(f"prefill of {serving.input_tokens:,}", "", *_cells(serving.prefill, with_sequence=False))
    for row in serving.decode:
        if row.plain is None:
            shown.add_row("decode", f"{row.batch:,}", "", "does not fit")
            continue
        mtp = [figure(row.mtp.per_gpu), f"{row.mtp.per_sequence:,.1f}"] if row.mtp else []
        shown.add_row("decode", f"{row.batch:,}", *_cells(row.plain), *mtp)
    return shown


def _cells(rate: "Rate", with_sequence: bool = True) -> Iterator[str]:
    yield f"{rate.step.seconds * 1e3:,.2f}"
    yield figure(rate.tokens_per_second)
    yield figure(rate.per_gpu)
    yield f"{rate.per_sequence:,.1f}" if with_sequence else ""
    yield rate.limit


def _verdict(serving: "Serving") -> Iterator[str]:
    """What the numbers say, in sentences."""
    chosen = serving.chosen
    if chosen.plain is None:
        yield f"A batch of {chosen.batch:,} does not fit: at most {serving.largest_batch:,} sequences do."
        if serving.fewest_gpus is None:
            yield f"No number of {serving.hardware} holds the weights and one sequence."
        elif serving.gpus < serving.fewest_gpus:
            yield f"Weights and one sequence need {serving.fewest_gpus:,} devices."
        return
    drafts = chosen.mtp is not None and chosen.mtp.per_gpu > chosen.plain.per_gpu
    output = chosen.mtp if chosen.mtp and drafts else chosen.plain
    how = (
        f", {serving.tokens_per_step:.2f} tokens for each step" if drafts else ", without drafts" if chosen.mtp else ""
    )
    asked = serving.list_price
    if serving.prefill is not None and serving.prefill.usd_per_million is not None:
        yield _price("input", serving.prefill.usd_per_million, "", asked.input if asked else None)
    if output.usd_per_million is not None:
        yield _price(
            "output", output.usd_per_million, f", batch {chosen.batch:,}{how}", asked.output if asked else None
        )


def _price(what: str, cost: float, how: str, asked: float | None) -> str:
    times = f", {asked / cost:.1f} times" if asked and cost else ""
    beside = f"; the vendor's list price that was given is ${asked:.2f}{times}" if asked else ""
    # To a tenth of a cent, and what is less in its own digits.
    said = f"{cost:,.3f}" if cost >= 0.01 or cost == 0 else figure(cost)
    return f"A million {what} tokens cost ${said}{how}{beside}."
