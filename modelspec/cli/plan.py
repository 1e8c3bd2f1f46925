"""plan: what a spec costs, before anyone pays for it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from modelspec.amount import amount, amount_of_bytes, flop_amount
from modelspec.cli.options import (
    allow_outside,
    hardware,
    output_format,
    overrides,
    print_table,
    read,
    require_finite,
    table,
)
from modelspec.cli.plan_measure import check_measure, measure_options, save_plan, show_measured
from modelspec.cli.plan_memory import show_memory
from modelspec.cli.plan_search import search_asked, search_options, show_search
from modelspec.cli.plan_serve import check, serve_options, show
from modelspec.cli.plan_sweep import show_sweep, sweep_options
from modelspec.cli.plan_timeline import show_timeline, timeline_option
from modelspec.cli.plan_training import show_step, show_training, training_options

if TYPE_CHECKING:
    from rich.table import Table

    from modelspec.plan import Plan
    from modelspec.plan.sweep import Axis
    from modelspec.schema import ModelSpec


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
@hardware("h800")
@click.option("--gpus", type=click.IntRange(min=1, max=2**24), metavar="N", help="Devices in all.")
@training_options
@serve_options
@sweep_options
@search_options
@timeline_option
@measure_options
@output_format("text", "json")
def command(
    spec: str,
    overrides: tuple[str, ...],
    allow_outside: bool,
    sequence_length: int | None,
    by_module: bool,
    hardware: str,
    gpus: int | None,
    output: str,
    axes: "tuple[Axis, ...]",
    plot: Path | None,
    stack: str | None,
    tokens: float | None,
    price: float | None,
    imbalance: float | None,
    by_step: bool,
    timeline: Path | None,
    out: Path | None,
    measure: bool,
    steps: int | None,
    calibrated: Path | None,
    **serving: Any,
) -> int | None:
    """Count what SPEC costs: parameters, FLOPs, cache and checkpoints, exactly; memory, time and cost of training it.

    With --serve, serving it; with --sweep, the same for many values of a key; with --timeline, its pipeline drawn;
    with --search, the best layouts on --gpus devices.
    With --measure, a few steps are taken on this machine and held against the plan; that alone needs torch.

    No torch, and nothing is allocated.
    """
    from modelspec.hardware import load
    from modelspec.plan import plan

    if not spec:
        raise click.UsageError("SPEC is empty; name a spec, like spec.yaml or modelspec:deepseek-v3-nano")
    require_finite(click.get_current_context())
    # Of -0, too.
    price = None if price is None else abs(price)
    asked = search_asked(serving)
    check(
        serving, {"stack": stack, "tokens": tokens, "sequence": sequence_length, "step": by_step, "modules": by_module}
    )
    serving |= {"price": price, "imbalance": imbalance}
    everywhere = overrides if gpus is None or serving["serve"] else (*overrides, f"parallelism.world_size={gpus}")
    device = load(hardware)
    check_measure(spec, measure, steps, calibrated, out, hardware)
    if (measure or out) and (axes or plot or timeline or by_module or by_step or serving["serve"]):
        raise click.UsageError("--measure and --out do not go with --sweep, --timeline, --modules, --step or --serve")

    def planned(model: "ModelSpec") -> "Plan":
        length = None if tokens is None else int(tokens)
        options: dict[str, Any] = {"stack": stack, "tokens": length, "price": price, "imbalance": imbalance}
        return plan(model, sequence_length=sequence_length, hardware=device, **options)

    if asked is not None:
        if axes or timeline or measure or out or by_module or by_step or sequence_length or serving["serve"]:
            others = "--sweep, --timeline, --measure, --out, --modules, --step, --sequence or --serve"
            raise click.UsageError(f"--search does not go with {others}")
        length = None if tokens is None else int(tokens)
        options: dict[str, Any] = {"stack": stack, "tokens": length, "price": price, "imbalance": imbalance}
        options |= {"as_json": output == "json", "allow_outside": allow_outside, "plot": plot}
        show_search(spec, everywhere, device, asked, **options)
        return None
    if timeline and (axes or plot or by_module or by_step or serving["serve"] or output == "json"):
        raise click.UsageError("--timeline does not go with --sweep, --modules, --step, --serve or --format json")
    if axes or plot:
        if by_module or serving["serve"]:
            raise click.UsageError("--sweep does not go with --modules or --serve")
        show_sweep(
            spec,
            everywhere,
            axes,
            lambda point: planned(point).as_json(),
            plot,
            as_json=output == "json",
            allow_outside=allow_outside,
        )
        return None
    model, _ = read(spec, everywhere, as_json=output == "json", allow_outside=allow_outside)
    if measure:
        given = click.get_current_context().get_parameter_source("hardware") is not ParameterSource.DEFAULT
        return show_measured(model, device if given else None, stack, steps, calibrated, output == "json")
    if timeline:
        show_timeline(model, timeline, device, stack, imbalance)
        return None
    try:
        result = planned(model)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--sequence") from None
    if out:
        save_plan(model, result, device, out, sequence_length, stack, tokens, price, imbalance)
    if serving["serve"]:
        show(model, device, gpus, serving, result, output == "json")
        return None
    if output == "json":
        click.echo(json.dumps(result.as_json(), indent=2, allow_nan=False))
        return None
    if by_module:
        print_table(_modules(result))
    elif by_step:
        show_step(result)
    else:
        print_table(_parameters(result))
        click.echo(
            "Total is the main model; selection biases (FP32 buffers) count. Active includes embedding and head.\n"
        )
        print_table(_costs(result))
        show_memory(result)
        show_training(result)
    for sentence in _assumptions(result, by_module, by_step):
        click.echo(sentence)
    return None


def _assumptions(result: "Plan", by_module: bool, by_step: bool) -> Iterator[str]:
    """Those of what is shown."""
    if not by_step:
        yield from result.assumptions
    if not by_module and not by_step:
        yield from result.memory.assumptions
    if not by_module:
        yield from result.training.assumptions


def _parameters(result: "Plan") -> "Table":
    counts = result.parameters
    shown = table(f"{result.name}: parameters", "part", "parameters", "", "share")
    rows = [(part.replace("_", " "), number) for part, number in counts.parts.items()]
    for label, number in [*rows, ("total", counts.total), ("active for one token", counts.active)]:
        shown.add_section() if label == "total" else None
        shown.add_row(label, f"{number:,}", amount(number), f"{number / counts.total:.2%}")
    if counts.mtp:
        shown.add_row("added by multi-token prediction", f"{counts.mtp:,}", amount(counts.mtp), "")
    return shown


def _costs(result: "Plan") -> "Table":
    title = f"{result.name}: FLOPs per token of sequences of {result.sequence_length:,}, and bytes"
    shown = table(title, "cost", "exactly", "")
    for label, number in _flops(result):
        shown.add_row(label, f"{number:,}", flop_amount(number))
    shown.add_section()
    for label, number in _bytes(result):
        shown.add_row(label, f"{number:,}", amount_of_bytes(number))
    return shown


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
    shown = table(
        title, "module", "layers", "parameters", "active", "forward FLOPs per token", "share", "cache per token"
    )
    for part in result.modules:
        in_main = part.name != "mtp"
        share = f"{float(part.forward_flops / result.flops_per_token.forward):.2%}" if in_main else ""
        numbers = (part.parameters, part.active, round(part.forward_flops))
        kept = f"{part.kv_cache_bytes_per_token:,}"
        shown.add_row(part.name, f"{part.layers:,}", *(f"{number:,}" for number in numbers), share, kept)
    return shown
