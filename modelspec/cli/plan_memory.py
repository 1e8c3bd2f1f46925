"""plan: memory of a training step on every pipeline rank, the verdict, and what would take memory off it."""

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

import click

from modelspec.amount import amount_of_bytes
from modelspec.cli.options import print_table, table

if TYPE_CHECKING:
    from rich.table import Table

    from modelspec.plan import Lever, Memory, Plan, RankMemory

# Columns of the table, by the names of the fields.
_PARTS = (
    ("weights", "weights"),
    ("fp8_copies", "FP8 copies"),
    ("gradients", "gradients"),
    ("master", "master"),
    ("optimizer", "moments"),
    ("activations", "activations"),
    ("logits", "losses"),
    ("expert_buffers", "exchange"),
    ("working", "working"),
    ("margin", "margin"),
)
# Levers shown; the JSON has all.
_SHOWN = 6


def show_memory(result: "Plan") -> None:
    """Prints all of it."""
    click.echo()
    print_table(_ranks(result))
    for sentence in _sentences(result.memory):
        click.echo(sentence)
    if result.memory.levers:
        click.echo()
        print_table(_levers(result.memory))
    click.echo()


def _ranks(result: "Plan") -> "Table":
    """A row for every pipeline rank, equal neighbours as one, the heaviest marked."""
    memory = result.memory
    most = max(getattr(memory.ranks[memory.heaviest], name) for name, _ in _PARTS if name != "margin")
    unit, name_of_unit = (10**9, "GB") if most >= 10**9 else (10**6, "MB")

    def cell(count: int) -> str:
        return f"{count / unit:,.2f}" if count else ""

    shown = table(
        f"{result.name}: memory of a training step on each {memory.device}, {name_of_unit}",
        *("rank", "layers", "in flight", *(title for _, title in _PARTS), "total"),
    )
    for same in _folded(memory.ranks):
        first, last = same[0], same[-1]
        heaviest = first.rank <= memory.heaviest <= last.rank
        shown.add_row(
            f"{first.rank}" if first is last else f"{first.rank}-{last.rank}",
            f"{first.layers}",
            " + ".join(map(str, first.in_flight if first is last else (sum(first.in_flight),))),
            *(cell(getattr(first, name)) for name, _ in _PARTS),
            cell(first.total) + (" *" if heaviest and len(memory.ranks) > 1 else ""),
        )
    return shown


def _levers(memory: "Memory") -> "Table":
    """What saves most on the heaviest rank, as texts to paste."""
    shown = table("what would take memory off it", "change", "saves", "then", "verdict", "FLOPs")
    shown.add_column("cost")
    for lever in memory.levers[:_SHOWN]:
        shown.add_row(
            _pasted(lever),
            amount_of_bytes(lever.saves),
            amount_of_bytes(lever.total),
            lever.verdict,
            f"+{lever.flops:.1%}" if lever.flops else "",
            lever.cost,
        )
    return shown


def _sentences(memory: "Memory") -> Iterator[str]:
    """The verdict, that of other stages of training, and what the bytes rest on."""
    heaviest = memory.ranks[memory.heaviest]
    filled = heaviest.total / memory.device_bytes
    which = f" on rank {heaviest.rank}" if len(memory.ranks) > 1 else ""
    yield (
        f"{memory.verdict}: {amount_of_bytes(heaviest.total)} of {amount_of_bytes(memory.device_bytes)}{which}, "
        f"{filled:.0%} of the device"
    )
    for stage in memory.stages[1:]:
        yield f"{stage.verdict}: {amount_of_bytes(stage.total)} in {stage.name}, at {stage.sequence_length:,} tokens"


def _folded(rows: "tuple[RankMemory, ...]") -> "Iterator[list[RankMemory]]":
    """Neighbours that hold as much."""

    def alike(row: "RankMemory") -> tuple[object, ...]:
        return (row.layers, sum(row.in_flight), *(getattr(row, name) for name, _ in _PARTS))

    for _, same in groupby(rows, key=alike):
        yield list(same)


def _pasted(lever: "Lever") -> str:
    """Options as a shell takes them, and as a table does."""
    from rich.markup import escape

    quoted = (f"'{text}'" if any(sign in text for sign in " []{},") else text for text in lever.set)
    return escape(" ".join(f"--set {text}" for text in quoted))
