"""Several ways to do one thing, each checked and then timed beside the others, in one process.

A `Case` is one operation at one shape. Its sides take turns: a few calls of each, round after round and in alternating
order, so that what the card does meanwhile falls on all of them alike. Calls go round several sets of inputs, which are
together larger than the caches. Each call stands between two events of the device, behind enough other work that the
device never waits for Python. Before a side is timed its result is compared with the truth, from memory that held NaN.

On a machine without a GPU the same runs once with tiny shapes and is not timed: what is timed later has run before.
"""

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from modelspec.kernels.op import use

ROUNDS = 5
# Of one side, in one round.
SECONDS = 0.02
# All sets of inputs of a case together: several times the L2 cache of an H200.
ROTATED_BYTES = 256 * 2**20
CYCLES_PER_SECOND = 2e9

Row = dict[str, Any]
Format = Literal["fp8", "bf16"]


@dataclass(frozen=True)
class Place:
    """Where the benchmarks run: `dry` means in Triton's interpreter, with tiny shapes."""

    device: torch.device
    dry: bool

    def randn(self, *shape: int, seed: int) -> Tensor:
        """Random BF16 numbers, of which each row has a size of its own."""
        generator = torch.Generator(self.device).manual_seed(seed)
        options: dict[str, Any] = {"generator": generator, "device": self.device, "dtype": torch.bfloat16}
        return torch.randn(*shape, **options) * torch.randn(*shape[:-1], 1, **options).exp()

    def matrices(self, rows: int, columns: int) -> Callable[[int], Tensor]:
        """Such matrices, by seed."""
        return lambda seed: self.randn(rows, columns, seed=seed)


@dataclass(frozen=True)
class Side:
    """One way: what a call does, the FLOPs and bytes that it cannot do without, and how wrong its result is.

    `error(result, truth)` must be at most `limit`, or the side is not timed. Sides that are not `ours` may be absent:
    torch offers some of them only for some devices and shapes.
    """

    name: str
    run: Callable[[Any], Any]
    error: Callable[[Any, Any], float]
    limit: float
    bytes: float
    flops: float = 0
    format: Format = "fp8"
    ours: bool = True


@dataclass(frozen=True)
class Case:
    """One operation at one shape; `make(seed)` gives a set of inputs, `truth` what it should come to."""

    operation: str
    shape: str
    make: Callable[[int], Any]
    truth: Callable[[Any], Any]
    sides: list[Side] = field(default_factory=list)


def distance(result: Tensor, truth: Tensor) -> float:
    """||result - truth|| / ||truth||; NaN where either holds one."""
    truth = truth.to(torch.float32)
    return (torch.linalg.vector_norm(result.to(torch.float32) - truth) / torch.linalg.vector_norm(truth)).item()


def differing(result: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    """The largest share of bytes that differ, over all tensors of two results; 1 if shapes do."""
    if len(result) != len(truth) or any(a.shape != b.shape for a, b in zip(result, truth, strict=True)):
        return 1.0
    bytes = [[each.contiguous().view(torch.uint8) for each in pair] for pair in zip(result, truth, strict=True)]
    return max((a != b).float().mean().item() for a, b in bytes)


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is taken and not written holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before)


def measured(case: Case, place: Place) -> Iterator[Row]:
    """A row for each side: the median of its times in seconds, or why there is none."""
    first = case.make(0)
    truth = case.truth(first)
    rows: dict[str, Row] = {}
    running: list[Side] = []
    for side in case.sides:
        row: Row = {"operation": case.operation, "shape": case.shape, "side": side.name, "ours": side.ours}
        row |= {"flops": side.flops, "bytes": side.bytes, "format": side.format}
        rows[side.name] = row | _checked(side, first, truth, place)
        if "error" in rows[side.name]:
            running.append(side)
    del truth
    if place.dry:
        yield from rows.values()
        return
    spent = {side.name: _warm(side, first) for side in running}
    size = max(min(side.bytes for side in case.sides), 1)
    sets = [first, *(case.make(seed) for seed in range(1, min(max(2, int(ROTATED_BYTES / size)), 12)))]
    times: dict[str, list[float]] = {side.name: [] for side in running}
    for number in range(ROUNDS):
        for side in running if number % 2 == 0 else running[::-1]:
            times[side.name] += _times(side, sets, max(3, min(40, int(SECONDS / spent[side.name]))))
    for name, row in rows.items():
        if name in times:
            cuts = statistics.quantiles(times[name], n=4)
            row |= {"seconds": statistics.median(times[name]), "quartiles": [cuts[0], cuts[2]]}
        yield row


def _checked(side: Side, inputs: Any, truth: Any, place: Place) -> Row:
    try:
        with poisoned(), use("triton"):
            error = side.error(side.run(inputs), truth)
        if not place.dry:
            torch.cuda.synchronize()
    except Exception as exception:
        if not side.ours:
            return {"absent": _told(exception)}
        return {"failed": _told(exception)}
    # Also where the error is NaN.
    return {"error": error} if error <= side.limit else {"failed": f"error {error:.3g}, at most {side.limit:.3g}"}


def _told(exception: Exception) -> str:
    return f"{type(exception).__name__}: {exception}".splitlines()[0][:200]


def _warm(side: Side, inputs: Any) -> float:
    """Seconds of a call, the launch included."""
    torch.cuda.synchronize()
    calls = 3
    started = time.perf_counter()
    for _ in range(calls):
        side.run(inputs)
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / calls


def _times(side: Side, sets: list[Any], calls: int) -> list[float]:
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
    # The device sleeps while Python fills its queue.
    torch.cuda._sleep(int(calls * 300e-6 * CYCLES_PER_SECOND))
    for number, (start, end) in enumerate(marks):
        start.record()
        side.run(sets[number % len(sets)])
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in marks]
