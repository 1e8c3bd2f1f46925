"""What it takes to serve a model: devices, memory, tokens per second, dollars per million of them.

Prefill and decoding are planned apart, each as if the devices did nothing else, which is how large installations run.
Memory decides how many sequences fit beside the weights; the roofline of a step then gives its rate. A step of decoding
gives one token to every sequence. With multi-token prediction it verifies `depth` drafted ones besides: a draft counts
as long as all before it were accepted, so that a share `a` of accepted drafts gives 1 + a + a^2 + ... tokens.
"""

from dataclasses import asdict, dataclass, replace
from itertools import chain, count
from typing import Any

from modelspec.plan.roofline import draft_parts, step_parts
from modelspec.plan.serving_assumptions import PREFILL_TOKENS, assumptions
from modelspec.plan.serving_machine import Batch, Efficiency, Layout, Limit, Machine, Precision, Time
from modelspec.plan.serving_memory import ServingMemory, demand, fewest_gpus, layouts
from modelspec.schema import ModelSpec
from modelspec.schema.hardware import Hardware


@dataclass(frozen=True, slots=True)
class ListPrice:
    """What somebody asks for a million tokens; US dollars."""

    input: float
    output: float


@dataclass(frozen=True, slots=True)
class Rate:
    """What a step gives: tokens per second of all devices, of one device, and of one sequence; what it waits for.

    `usd_per_million` is None where no price of a device is known.
    """

    step: Time
    tokens_per_second: float
    per_gpu: float
    per_sequence: float
    usd_per_million: float | None

    @property
    def limit(self) -> Limit:
        """What most of the time is spent on."""
        return self.step.limit


@dataclass(frozen=True, slots=True)
class Decode:
    """Decoding a batch of so many sequences, over all devices; no rates where they do not fit."""

    batch: int
    fits: bool
    plain: Rate | None
    mtp: Rate | None


@dataclass(frozen=True, slots=True)
class Serving:
    """How a model is served by `gpus` devices, at `context` tokens in the cache of each sequence.

    `fewest_gpus` hold the weights and one such sequence; None where no number does. `largest_batch` counts sequences
    over all devices. `decode` ascends; `chosen` is that of the batch in question.
    """

    name: str
    hardware: str
    precision: Precision
    gpus: int
    tensor: int
    replicas: int
    fewest_gpus: int | None
    context: int
    input_tokens: int
    acceptance: float | None
    tokens_per_step: float
    memory: ServingMemory
    largest_batch: int
    prefill: Rate | None
    decode: tuple[Decode, ...]
    chosen: Decode
    usd_per_gpu_hour: float | None
    list_price: ListPrice | None
    efficiency: Efficiency
    assumptions: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """As plain data: every rate with what it waits for."""
        data = asdict(self)
        data["prefill"] = _rate_json(self.prefill)
        data["decode"] = [_decode_json(row) for row in self.decode]
        data["chosen"] = _decode_json(self.chosen)
        return data


def serve(
    spec: ModelSpec,
    hardware: Hardware,
    *,
    gpus: int | None = None,
    batch: int | None = None,
    context: int | None = None,
    input_tokens: int | None = None,
    acceptance: float | None = None,
    precision: Precision | None = None,
    price: float | None = None,
    list_price: ListPrice | None = None,
    efficiency: Efficiency = Efficiency(),  # noqa: B008 (frozen)
) -> Serving:
    """Serving a valid spec on `gpus` devices; left out, the fewest that hold the weights and one sequence.

    `batch` sequences are decoded over all devices; left out, as many as fit. Matrices are cut over as many devices as
    decode this batch fastest.

    `context` tokens stand in the cache of each sequence, by default 4,096 or as many as the model is meant for, and a
    prompt has as many unless `input_tokens` says otherwise. Weights are in the spec's FP8, or BF16, unless `precision`
    says otherwise. `acceptance` is the share of drafts accepted given those before; without it nothing is drafted.
    `price` is that of one device in US dollars per hour, by default the hardware's.

    Raises ValueError for lengths that the model is not meant for, and for drafts of a model that makes none.
    """
    length = min(4096, spec.model.max_position) if context is None else context
    prompt = length if input_tokens is None else input_tokens
    for value, what in ((length, "context"), (prompt, "prompt")):
        if not 1 <= value <= spec.model.max_position:
            raise ValueError(
                f"a {what} of {value:,} tokens: it must be at least 1 and at most model.max_position, "
                f"{spec.model.max_position:,}"
            )
    if acceptance is not None and spec.model.mtp is None:
        raise ValueError("accepted drafts need multi-token prediction: the spec has no model.mtp")
    if acceptance is not None and not 0 <= acceptance <= 1:
        raise ValueError(f"a share of {acceptance} accepted drafts: it must be at least 0 and at most 1")
    weights: Precision = precision or ("fp8" if spec.precision.fp8 else "bfloat16")
    needs = demand(spec, weights, length, drafts=acceptance is not None)
    hourly = price if price is not None else hardware.price.usd_per_hour if hardware.price else None
    fewest = fewest_gpus(needs, hardware)

    def server_of(layout: Layout) -> _Server:
        machine = Machine(hardware, layout, weights, efficiency)
        return _Server(spec, machine, needs.on(hardware, layout), length, acceptance, hourly)

    devices = gpus or fewest or hardware.gpus_per_node
    server = max(map(server_of, layouts(devices)), key=lambda each: each.speed(batch))
    layout, memory, largest = server.machine.layout, server.memory, server.largest
    asked = batch or max(largest, 1)
    rows = tuple(map(server.decode, _batches(asked, largest)))
    return Serving(
        name=spec.name,
        hardware=hardware.name,
        precision=weights,
        gpus=layout.gpus,
        tensor=layout.tensor,
        replicas=layout.replicas,
        fewest_gpus=fewest,
        context=length,
        input_tokens=prompt,
        acceptance=acceptance,
        tokens_per_step=server.tokens_per_step,
        memory=memory,
        largest_batch=largest,
        prefill=server.prefill(prompt) if memory.weights <= memory.usable else None,
        decode=rows,
        chosen=next(row for row in rows if row.batch == asked),
        usd_per_gpu_hour=hourly,
        list_price=list_price,
        efficiency=efficiency,
        assumptions=assumptions(spec, server.machine, acceptance, hourly),
    )


@dataclass(frozen=True, slots=True)
class _Server:
    """A machine at work on sequences of one length."""

    spec: ModelSpec
    machine: Machine
    memory: ServingMemory
    context: int
    acceptance: float | None
    price: float | None

    @property
    def tokens_per_step(self) -> float:
        """Tokens that one step gives a sequence, drafts that were accepted included."""
        depth = self.spec.model.mtp.depth if self.spec.model.mtp and self.acceptance is not None else 0
        return sum((self.acceptance or 0.0) ** accepted for accepted in range(depth + 1))

    @property
    def largest(self) -> int:
        """Sequences that fit, over all devices."""
        return self.memory.sequences * self.machine.layout.replicas

    def speed(self, batch: int | None) -> tuple[float, int, int]:
        """For comparison: tokens per second of a batch, by default the largest; then how many fit, or how nearly."""
        row = self.decode(batch or self.largest)
        speed = row.plain.tokens_per_second if row.plain else 0.0
        return speed, self.largest, self.memory.usable - self.memory.weights

    def prefill(self, prompt: int) -> Rate:
        """Prompts of one length, so many at once that each replica has a good number of tokens."""
        sequences = max(PREFILL_TOKENS // prompt, 1) * self.machine.layout.replicas
        batch = Batch(sequences, queries=prompt, context=prompt, prefill=True)
        time = self.machine.time(step_parts(self.machine, self.spec.model, batch))
        return self._rate(time, sequences, float(prompt))

    def decode(self, sequences: int) -> Decode:
        """One row of the table."""
        if not 0 < sequences <= self.largest:
            return Decode(sequences, False, None, None)
        model, batch = self.spec.model, Batch(sequences, queries=1, context=self.context)
        plain = self._rate(self.machine.time(step_parts(self.machine, model, batch)), sequences, 1.0)
        if self.acceptance is None or model.mtp is None:
            return Decode(sequences, True, plain, None)
        verified = replace(batch, queries=1 + model.mtp.depth)
        parts = chain(step_parts(self.machine, model, verified), draft_parts(self.machine, model, verified))
        return Decode(sequences, True, plain, self._rate(self.machine.time(parts), sequences, self.tokens_per_step))

    def _rate(self, time: Time, sequences: int, tokens: float) -> Rate:
        rate, gpus = sequences * tokens / time.seconds, self.machine.layout.gpus
        cost = None if self.price is None else self.price * gpus / 3600 / rate * 1e6
        return Rate(time, rate, rate / gpus, tokens / time.seconds, cost)


def _batches(asked: int, largest: int) -> list[int]:
    """1, 8, 32, 128, ... below the largest, which is the last that fits, and the one in question."""
    steps = chain([1], (8 * 4**power for power in count()))
    below = []
    for size in steps:
        if size >= max(largest, 1):
            break
        below.append(size)
    return sorted({*below, *([largest] if largest else []), asked})


def _rate_json(rate: Rate | None) -> dict[str, Any] | None:
    if rate is None:
        return None
    step = asdict(rate.step) | {"seconds": rate.step.seconds}
    return asdict(rate) | {"step": step, "limit": rate.limit}


def _decode_json(row: Decode) -> dict[str, Any]:
    return asdict(row) | {"plain": _rate_json(row.plain), "mtp": _rate_json(row.mtp)}
