"""The costs of a spec along its keys: what doubling the experts does, and doubling them again.

An axis is a key with the values that it takes in turn; several axes give every combination. Each point is a plan of its
own, taken from the plan's JSON, so that whatever a plan counts can be a column here. A point that is no valid spec
carries its first diagnostic instead, and spoils no other.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import isfinite, prod
from typing import Any, Literal

from modelspec.amount import amount, amount_of_bytes, figure, flop_amount

MAX_POINTS = 1000

Data = Mapping[str, Any]
Unit = Literal["number", "FLOP", "bytes", "USD"]
_BRACKETS = {"[": "]", "{": "}"}
# Behind other characters a quote is one like any other; behind itself it is doubled, and so stands for one.
_BEFORE_QUOTE = ("", ",", "[", "{", ":", "'", '"')
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


@dataclass(frozen=True, slots=True)
class Axis:
    """A key of the spec and its values in turn, as they are written behind `--set KEY=`."""

    key: str
    values: tuple[str, ...]

    @property
    def numbers(self) -> tuple[float, ...] | None:
        """The values as numbers, None where one is no finite number."""
        found = tuple(float(value) for value in self.values if _NUMBER.fullmatch(value))
        return found if len(found) == len(self.values) and all(map(isfinite, found)) else None


@dataclass(frozen=True, slots=True)
class Column:
    """A number of a plan: its path in the plan's JSON, with `*` for the item of a list that has most of it."""

    path: str
    label: str
    unit: Unit
    # Path of a word that goes with it, and of a number that it should not exceed.
    note: str = ""
    limit: str = ""

    def read(self, plan: Data) -> float | None:
        """The number, None where this plan does not have it."""
        return _read(plan, self.path.split("."))

    def cell(self, plan: Data) -> str:
        """The number as people say it, with its word; nothing where the plan does not have it."""
        number, note = self.read(plan), _at(plan, self.note.split("."))
        return "" if number is None else f"{self.said(number)} {note or ''}".rstrip()

    def said(self, number: float) -> str:
        """The number as people say it, with its unit."""
        match self.unit:
            case "bytes":
                return amount_of_bytes(round(number))
            case "FLOP":
                return flop_amount(round(number))
            case "USD":
                short = f"{number:.2f}" if number >= 1 or number == 0 else figure(number)
                return f"${_short(number) if number >= 1000 else short}"
            case "number":
                return _short(number)


COLUMNS = (
    Column("parameters.total", "parameters", "number"),
    Column("parameters.active", "active for one token", "number"),
    Column("flops_per_token.training_with_recompute", "training FLOPs per token", "FLOP"),
    Column("kv_cache_bytes_per_token", "cache per token", "bytes"),
    Column("checkpoint_bytes.weights", "checkpoint: weights", "bytes"),
    Column("memory.ranks.*.total", "memory of the heaviest rank", "bytes", "memory.verdict", "memory.device_bytes"),
    Column("training.stages.0.step.seconds", "seconds per step", "number"),
    Column("training.tokens_per_second_per_gpu", "tokens/s per device", "number"),
    Column("training.gpu_hours", "device hours", "number"),
    Column("training.days", "days", "number"),
    Column("training.cost_usd", "cost", "USD"),
)


@dataclass(frozen=True, slots=True)
class Point:
    """One combination of values, one for each axis: its plan, or the first diagnostic that makes it illegal."""

    values: tuple[str, ...]
    plan: Data | None
    fault: Data | None = None


@dataclass(frozen=True, slots=True)
class Sweep:
    """All points, the last axis running fastest."""

    name: str
    axes: tuple[Axis, ...]
    points: tuple[Point, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """What the axes are called: the last two parts of each key, where that tells them apart."""
        short = tuple(".".join(axis.key.split(".")[-2:]) for axis in self.axes)
        return short if len(set(short)) == len(short) else tuple(axis.key for axis in self.axes)

    def faults(self) -> dict[tuple[str, str], list[str]]:
        """What is wrong and what helps, with the points of which that is so."""
        keys = {axis.key for axis in self.axes}
        found: dict[tuple[str, str], list[str]] = {}
        for point in self.points:
            if point.fault is not None:
                code, path = point.fault.get("code"), point.fault.get("path", "")
                # Where the fault lies with another key than those of the sweep, the reader has to be told.
                key = "" if path in point.fault["message"] or path in keys else f", at {path}"
                said = f"error{f'[{code}]' if code else ''}: {point.fault['message']}{key}"
                fault = said, point.fault.get("help") or ""
                where = (f"{axis.key}={value}" for axis, value in zip(self.axes, point.values, strict=True))
                found.setdefault(fault, []).append(", ".join(where))
        return found

    @property
    def plans(self) -> list[Data]:
        """Those of the legal points."""
        return [point.plan for point in self.points if point.plan is not None]

    @property
    def columns(self) -> tuple[Column, ...]:
        """What at least one point has."""
        return tuple(column for column in COLUMNS if any(column.read(plan) is not None for plan in self.plans))

    @property
    def differing(self) -> tuple[Column, ...]:
        """The columns in which points differ; all where there is one point only, or no difference."""
        found = [
            column
            for column in self.columns
            if len({(column.read(plan), column.cell(plan)) for plan in self.plans}) > 1
        ]
        return tuple(found) or self.columns

    def same(self) -> list[tuple[Column, str]]:
        """The columns that say the same of every point, and what."""
        differing = self.differing
        return [(column, column.cell(self.plans[0])) for column in self.columns if column not in differing]


def sweep(name: str, axes: Sequence[Axis], cost: Callable[[tuple[str, ...]], tuple[Data | None, Data | None]]) -> Sweep:
    """The plans of every combination; `cost` takes overrides `KEY=VALUE` and gives a plan, or else a diagnostic.

    Raises ValueError for more than MAX_POINTS points, and for a key that stands on two axes.
    """
    keys = [axis.key for axis in axes]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ValueError(f"{twice[0]} stands twice: give all of its values at once")
    count = prod(len(axis.values) for axis in axes)
    if count > MAX_POINTS:
        raise ValueError(f"{count:,} points: at most {MAX_POINTS:,} are computed at once")
    points = []
    for values in product(*(axis.values for axis in axes)):
        plan, fault = cost(tuple(f"{key}={value}" for key, value in zip(keys, values, strict=True)))
        points.append(Point(values, plan, fault))
    return Sweep(name, tuple(axes), tuple(points))


def axis(text: str) -> Axis:
    """The axis of `KEY=VALUE,VALUE,...`; commas in brackets, braces and quotes part nothing. Raises ValueError.

    What stands there again is no other value.
    """
    key, equals, values = text.partition("=")
    found = tuple(dict.fromkeys(value.strip() for value in _parted(values)))
    if not equals or not key.strip() or not all(found):
        raise ValueError(f"{text!r} is not of the form KEY=VALUE,VALUE")
    return Axis(key.strip(), found)


def _short(number: float) -> str:
    if number >= 100_000:
        return amount(round(number))
    return f"{number:,.0f}" if number >= 1000 or isinstance(number, int) else f"{number:#.4g}"


def _parted(text: str) -> Iterator[str]:
    start, closing, quote = 0, "", ""
    for at, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and text[:at].rstrip()[-1:] in _BEFORE_QUOTE:
            quote = character
        elif character in _BRACKETS:
            closing = _BRACKETS[character] + closing
        elif closing.startswith(character):
            closing = closing[1:]
        elif character == "," and not closing:
            yield text[start:at]
            start = at + 1
    yield text[start:]


def _read(value: Any, path: Sequence[str]) -> float | None:
    if "*" in path:
        split = path.index("*")
        items = _at(value, path[:split])
        found = [_read(item, path[split + 1 :]) for item in items] if isinstance(items, Sequence) else []
        return max((number for number in found if number is not None), default=None)
    number = _at(value, path)
    return number if isinstance(number, int | float) and not isinstance(number, bool) else None


def _at(value: Any, path: Sequence[str]) -> Any:
    """What stands at a path, None where nothing does."""
    for step in path:
        if isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, Sequence) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value
