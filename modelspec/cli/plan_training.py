"""plan: time, cost and traffic of training, as tables."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from modelspec.amount import amount, amount_of_bytes
from modelspec.cli.options import print_table, table

if TYPE_CHECKING:
    from rich.table import Table

    from modelspec.plan import Plan, Training


def _known(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    from modelspec.hardware.calibration import calibration

    if value is not None and value not in calibration().stacks:
        raise click.BadParameter(f"no stack {value!r}; there are {', '.join(calibration().stacks)}")
    return value


_OPTIONS = (
    click.option(
        "--stack",
        metavar="NAME",
        callback=_known,
        help="Software whose speed is assumed. [default: the hardware's]",
    ),
    click.option(
        "--tokens",
        type=click.FloatRange(min=1, max=1e18),
        metavar="T",
        help="Tokens of the first stage of training, like 15e12. [default: the spec's]",
    ),
    click.option(
        "--price",
        type=click.FloatRange(min=0, max=1e6),
        metavar="USD",
        help="Of a device for an hour. [default: the hardware's]",
    ),
    click.option(
        "--imbalance",
        type=click.FloatRange(min=1, max=1000),
        metavar="X",
        help="Load of the busiest rank of experts over the mean.",
    ),
    click.option("--step", "by_step", is_flag=True, help="Show where a step's time goes, and what ranks send in it."),
)

# What the seconds of a step are spent on, in the words of a reader.
WORDS = {
    "fp8_products": "matrix products in FP8",
    "products": "other matrix products",
    "expert_rows": "experts with few rows",
    "attention": "core of attention",
    "residual": "norms and additions",
    "heads": "queries, keys and values",
    "experts": "permutation and activation of experts",
    "quantize": "quantisation",
    "layer": "launches and gaps",
    "moe_layer": "launches and gaps of experts",
    "node": "exchange with experts, in a node",
    "network": "exchange with experts, between nodes",
    "tensor": "exchange of tensor and context ranks",
    "data": "exchange of gradients and weights",
    "optimizer": "optimizer",
}


def training_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of training; the command gets them as keywords."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def show_training(result: "Plan") -> None:
    """Prints stages and totals."""
    print_table(_stages(result))
    for sentence in _totals(result.training):
        click.echo(sentence)
    click.echo()


def show_step(result: "Plan") -> None:
    """Prints where a step's time goes, and what is sent in it."""
    print_table(_step(result))
    if result.traffic:
        print_table(_traffic(result))


def _stages(result: "Plan") -> "Table":
    """Every stage of training, and all together."""
    training = result.training
    shown = table(
        f"{result.name}: training on {training.world_size:,} {result.hardware} with {result.stack}",
        *("stage", "tokens", "steps", "batch", "microbatches", "step", "bubble", "tokens/s/GPU", "GPU hours"),
    )
    for stage in training.stages:
        step = stage.step
        shown.add_row(
            stage.name,
            amount(stage.tokens),
            f"{stage.steps:,}",
            f"{step.batch_size:,}",
            f"{step.microbatches:,}",
            f"{step.seconds:,.3g} s",
            f"{step.bubble:.1%}",
            f"{stage.tokens_per_second_per_gpu:,.0f}",
            "" if training.gpu_hours is None else _hours(stage.gpu_hours),
        )
    return shown


def _totals(training: "Training") -> Iterator[str]:
    """What it comes to, in sentences."""
    if training.gpu_hours is not None and training.days is not None and training.energy_kwh is not None:
        cost = "" if training.cost_usd is None else f", ${training.cost_usd:,.0f}"
        yield (
            f"In all {_hours(training.gpu_hours)} GPU hours, {training.days:,.1f} days, "
            f"{training.energy_kwh:,.0f} kWh{cost}."
        )
    used = training.utilization
    narrow = "" if used.fp8 is None else f", {used.fp8:.1%} of the peak in FP8"
    yield (
        f"Utilisation, main model, causal attention, nothing recomputed: {used.flops_per_second / 1e12:,.0f} TFLOP/s, "
        f"{used.bfloat16:.1%} of the peak in BF16{narrow}."
    )
    if used.flops_per_second_with_mtp != used.flops_per_second:
        narrow = "" if used.fp8_with_mtp is None else f", {used.fp8_with_mtp:.1%} in FP8"
        yield (
            f"With multi-token prediction: {used.flops_per_second_with_mtp / 1e12:,.0f} TFLOP/s, "
            f"{used.bfloat16_with_mtp:.1%} in BF16{narrow}."
        )


def _step(result: "Plan") -> "Table":
    """Where the busiest rank's time goes in a step of the first stage."""
    first = result.training.stages[0].step
    shown = table(f"{result.name}: one step of the busiest rank", "work", "seconds", "share")
    rows = [(WORDS[kind], seconds) for kind, seconds in sorted(first.kinds.items(), key=lambda item: -item[1])]
    rows += [("exchange that computation hides", -first.hidden), ("waiting for other ranks", first.waiting)]
    for label, seconds in rows:
        if abs(seconds) / first.seconds >= 0.001:
            shown.add_row(label, f"{seconds:,.3g}", f"{seconds / first.seconds:.1%}")
    shown.add_section()
    shown.add_row("the step", f"{first.seconds:,.3g}", "100.0%")
    shown.add_row("exchange that is not hidden", f"{first.exposed * first.seconds:,.3g}", f"{first.exposed:.1%}")
    return shown


def _traffic(result: "Plan") -> "Table":
    """What a rank sends in a step."""
    title = f"{result.name}: sent in a step by the rank that sends most"
    shown = table(title, "collective", "over", "bytes", "")
    for each in result.traffic:
        sent = round(each.bytes)
        shown.add_row(f"{each.axis}: {each.name}", f"{each.link}", f"{sent:,}", amount_of_bytes(sent))
    return shown


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"
