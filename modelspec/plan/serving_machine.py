"""A machine that serves a model, and how long it takes for what a step does.

A part of the model waits for the slower of its arithmetic and its memory, and parts follow one another. Tokens on their
way to experts hide behind computing in part. What software reaches of the hardware's peaks is `Efficiency`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from modelspec.plan.flops import is_matrix
from modelspec.plan.runs import Counted
from modelspec.plan.storage import bf16_bytes, fp8_bytes, in_fp8
from modelspec.schema import Tensors
from modelspec.schema.hardware import Hardware

Precision = Literal["fp8", "bfloat16"]
Limit = Literal["compute", "memory", "communication", "latency"]


@dataclass(frozen=True, slots=True)
class Efficiency:
    """What software reaches of the peaks, as shares, and what each layer costs beside; seconds.

    `overlap` is how much of the shorter of computing and exchanging tokens hides behind the longer. `imbalance` is the
    busiest device's share of the experts' tokens, as a multiple of the mean.
    """

    products: float = 0.5
    attention: float = 0.5
    memory: float = 0.8
    network: float = 0.95
    overlap: float = 0.4
    imbalance: float = 1.2
    exchange_latency: float = 40e-6
    layer_latency: float = 30e-6


@dataclass(frozen=True, slots=True)
class Layout:
    """`gpus` devices that hold the experts once, and all else over each `tensor` of them."""

    gpus: int
    tensor: int

    @property
    def replicas(self) -> int:
        """How often everything but the experts is there."""
        return self.gpus // self.tensor

    def slots(self, experts: int) -> int:
        """Of a layer's experts, those on each device; what is left over of the last ones holds copies."""
        return -(-experts // self.gpus)


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences in all, the tokens of each that one step computes, and those that it has in its cache by then.

    Of a prompt, `prefill` computes all tokens at once and only the last needs the head.
    """

    sequences: int
    queries: int
    context: int
    prefill: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """One device's work in a part of the model, all its layers together: FLOPs by format, bytes, seconds on links."""

    name: str
    layers: int
    fp8: float = 0.0
    bf16: float = 0.0
    attention: float = 0.0
    read: float = 0.0
    exchange: float = 0.0
    reduce: float = 0.0


@dataclass(frozen=True, slots=True)
class Time:
    """Seconds of one step, split by what is waited for; the four parts add up to it."""

    compute: float
    memory: float
    communication: float
    latency: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.compute + self.memory + self.communication + self.latency

    @property
    def limit(self) -> Limit:
        """What most of the time is spent on."""
        shares: dict[Limit, float] = {
            "compute": self.compute,
            "memory": self.memory,
            "communication": self.communication,
            "latency": self.latency,
        }
        return max(shares, key=lambda name: shares[name])


@dataclass(frozen=True, slots=True)
class Machine:
    """What a model runs on and how: everything about a step but its batch."""

    hardware: Hardware
    layout: Layout
    precision: Precision
    efficiency: Efficiency

    def time(self, parts: Iterator[Part]) -> Time:
        """The step: parts one after the other, except that an exchange of tokens hides behind computing in part."""
        use, peaks, bandwidth = self.efficiency, self.hardware.peak_flops, self.hardware.memory_bandwidth
        compute = memory = exchange = reduce = latency = 0.0
        for part in parts:
            products = part.fp8 / (peaks.fp8 or peaks.bfloat16) + part.bf16 / peaks.bfloat16
            arithmetic = products / use.products + part.attention / peaks.bfloat16 / use.attention
            reading = part.read / bandwidth / use.memory
            if arithmetic > reading:
                compute += arithmetic
            else:
                memory += reading
            exchange += part.exchange
            reduce += part.reduce
            # A layer has two halves.
            latency += part.layers * use.layer_latency / 2
        here, away = compute + memory + reduce + latency, exchange
        shown = 1 - use.overlap
        own, sent = (1.0, shown) if here >= away else (shown, 1.0)
        return Time(compute * own, memory * own, reduce * own + exchange * sent, latency * own)

    def weights(self, name: str, table: Tensors) -> int:
        """Bytes of a table of tensors whose names begin with `name`."""
        count = fp8_bytes if self.precision == "fp8" else bf16_bytes
        return sum(count(Counted(f"{name}.{key}", tensor, 1)) for key, tensor in table.items())

    def products(self, name: str, table: Tensors) -> tuple[int, int]:
        """FLOPs of one token with the matrices of a table: in FP8, and in BF16."""
        low = high = 0
        for key, tensor in table.items():
            if not is_matrix(tensor):
                continue
            if self.precision == "fp8" and in_fp8(f"{name}.{key}"):
                low += 2 * tensor.active
            else:
                high += 2 * tensor.active
        return low, high
