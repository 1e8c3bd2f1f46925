"""What a run found: each time beside the least that its bytes and FLOPs could take, and the goals beside the figures.

The least is predicted from the two ceilings of the same card in the same run: the larger of bytes over the rate of a
copy, and FLOPs over the rate of a product, twice BF16's for FP8. What was not measured is compared with nothing.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal

Row = dict[str, Any]


@dataclass(frozen=True)
class Ceilings:
    """Bytes per second of a copy, read and written, and FLOP/s of a BF16 product."""

    copy: float
    bf16: float

    def least(self, row: Row) -> float:
        """Seconds that this cannot do without."""
        rate = self.bf16 * (2 if row["format"] == "fp8" else 1)
        return max(row["bytes"] / self.copy, row["flops"] / rate)


def ceilings(rows: Iterable[Row]) -> Ceilings | None:
    """From the rows of that section, if both were measured."""
    found = {row["operation"]: row for row in rows if row["section"] == "ceilings" and "seconds" in row}
    if found.keys() != {"copy", "BF16 product"}:
        return None
    copy, product = found["copy"], found["BF16 product"]
    return Ceilings(copy["bytes"] / copy["seconds"], product["flops"] / product["seconds"])


@dataclass(frozen=True)
class Goal:
    """At least so much of something: TFLOP/s, TB/s, or how many times as fast as another side."""

    operation: str
    shape: str
    unit: Literal["TFLOP/s", "TB/s", "x"]
    least: float
    against: str = ""


DENSE, EXPERTS = "4096x7168x16384", "8x32768x4096x7168"
GOALS = (
    Goal("fprop", DENSE, "TFLOP/s", 1000),
    Goal("fprop", DENSE, "x", 1.0, "FP8 blocks"),
    Goal("grouped fprop", EXPERTS, "TFLOP/s", 900),
    Goal("grouped dgrad", "8x32768x7168x4096", "TFLOP/s", 900),
    Goal("wgrad", "7168x16384x4096", "TFLOP/s", 750),
    Goal("grouped wgrad", EXPERTS, "TFLOP/s", 750),
    Goal("quantize", "32768x7168", "TB/s", 3.7),
    Goal("quantize_both", "32768x7168", "TB/s", 3.7),
    Goal("MoE forward and backward", "8192x7168x2048x32x8", "x", 1.4, "BF16"),
)


def figure(goal: Goal, rows: list[Row]) -> float | None:
    """What was measured for a goal, in its unit; None if it was not."""
    sides = {
        row["side"]: row
        for row in rows
        if (row["operation"], row.get("shape")) == (goal.operation, goal.shape)
        and row["section"] not in ("configs", "specialized")
        and "seconds" in row
    }
    ours = sides.get("ours")
    if ours is None:
        return None
    if goal.unit == "x":
        other = sides.get(goal.against)
        return None if other is None else other["seconds"] / ours["seconds"]
    return ours["flops" if goal.unit == "TFLOP/s" else "bytes"] / ours["seconds"] / 1e12


def rate(row: Row) -> str:
    """TFLOP/s, or TB/s of what does no products."""
    if row["flops"]:
        return f"{row['flops'] / row['seconds'] / 1e12:.0f} TFLOP/s"
    return f"{row['bytes'] / row['seconds'] / 1e12:.2f} TB/s"


def table(rows: list[Row]) -> Iterator[str]:
    """A line for each case: our time, its rate and its share of the least; then the others, with how we compare."""
    top = ceilings(rows)
    if top is not None:
        yield f"ceilings: copy {top.copy / 1e12:.2f} TB/s, BF16 product {top.bf16 / 1e12:.0f} TFLOP/s"
    timed = [row for row in rows if row["section"] not in ("tests", "ceilings") and "shape" in row]
    for (section, operation, shape), group in groupby(timed, itemgetter("section", "operation", "shape")):
        sides = list(group)
        first = sides[0]
        parts = [_ours(first, top)]
        parts += [_beside(row, first) for row in sides[1:]]
        yield f"{section:11} {operation} {shape}: " + " | ".join(parts)


def _ours(row: Row, top: Ceilings | None) -> str:
    if "seconds" not in row:
        return f"{row['side']}: {row.get('failed') or row.get('absent') or 'not timed'}"
    told = f"{row['side']} {row['seconds'] * 1e3:.3f} ms {rate(row)}"
    if top is None:
        return told
    least = top.least(row)
    return f"{told}, least {least * 1e3:.3f} ms ({least / row['seconds']:.0%})"


def _beside(row: Row, first: Row) -> str:
    if "seconds" not in row:
        return f"{row['side']}: {'FAILED ' + row['failed'] if 'failed' in row else 'absent'}"
    told = f"{row['side']} {row['seconds'] * 1e3:.3f} ms"
    return f"{told} ({row['seconds'] / first['seconds']:.2f}x)" if "seconds" in first else told


def winners(rows: list[Row]) -> dict[str, str]:
    """Of each case that compares configurations, the fastest: for the table in kernels/configs.py."""
    timed = [row for row in rows if row["section"] in ("configs", "specialized") and "seconds" in row]
    best: dict[str, Row] = {}
    for row in timed:
        case = f"{row['section']}: {row['operation']} {row['shape']}"
        if case not in best or row["seconds"] < best[case]["seconds"]:
            best[case] = row
    return {case: row["side"] for case, row in best.items()}


def goals(rows: list[Row]) -> Iterator[str]:
    """A line for each goal."""
    for goal in GOALS:
        wanted = f"at least {goal.least:g} {goal.unit}" + (f" as fast as {goal.against}" if goal.against else "")
        found = figure(goal, rows)
        told = "not measured"
        if found is not None:
            told = f"{found:.4g} {goal.unit}, {'met' if found >= goal.least else 'MISSED'}"
        yield f"goal: {goal.operation} {goal.shape} {wanted}: {told}"


def failures(rows: list[Row]) -> list[str]:
    """What of ours did not run, or was wrong."""
    return [
        " ".join(str(row[key]) for key in ("section", "operation", "shape", "side", "failed") if key in row)
        for row in rows
        if "failed" in row
    ]


def short_name(device: str) -> str:
    """ "NVIDIA H200" -> "h200", "NVIDIA H100 80GB HBM3" -> "h100", for names of files."""
    model = re.search(r"[A-Za-z]+\d+[A-Za-z]*", device)
    return (model[0] if model else re.sub(r"\W+", "-", device)).lower()
