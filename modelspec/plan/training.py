"""What training takes: seconds, GPU hours, energy and money, stage by stage.

Every stage of a spec is walked by its batch sizes. A step's time is computed for a few of them, and between those,
while a batch grows, taken to lie on a line: with the batch a step grows by whole microbatches.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from modelspec import schema
from modelspec.hardware.calibration import calibration
from modelspec.layout import mesh, microbatches_needed
from modelspec.plan.flops import flops
from modelspec.plan.step import Speed, Steps, StepTime
from modelspec.schema import ModelSpec
from modelspec.schema.hardware import Hardware
from modelspec.timeline import stage_spec, steps_by_batch_size

# Batch sizes of a growing batch at which a step is computed.
_SAMPLES = 4
# A spec without training is planned at sequences of at most so many tokens, as most models are trained on.
ASSUMED_SEQUENCE = 4096
# And with batches of so many for each device: DeepSeek-V3 trained on 7.5.
ASSUMED_SEQUENCES = 8


@dataclass(frozen=True, slots=True)
class Utilization:
    """Model FLOPs over what the device could do: of the main model and with multi-token prediction.

    Attention counts causally and what is computed again does not count; the peaks are dense.
    """

    flops_per_second: float
    flops_per_second_with_mtp: float
    bfloat16: float
    bfloat16_with_mtp: float
    fp8: float | None
    fp8_with_mtp: float | None


@dataclass(frozen=True, slots=True)
class StageTime:
    """One stage of training. `step` is a step at the batch size that most of its tokens have."""

    name: str
    tokens: int
    steps: int
    sequence_length: int
    seconds: float
    gpu_hours: float
    tokens_per_second_per_gpu: float
    step: StepTime
    utilization: Utilization


@dataclass(frozen=True, slots=True)
class Training:
    """All stages together. `tokens_per_second_per_gpu` and `utilization` are the first stage's.

    What depends on the length of training is None where a spec has no training and no number of tokens is given; the
    one stage is then one step that is assumed. `cost_usd` is None where no price is known.
    """

    stages: tuple[StageTime, ...]
    world_size: int
    tokens: int | None
    gpu_hours: float | None
    days: float | None
    energy_kwh: float | None
    usd_per_gpu_hour: float | None
    cost_usd: float | None
    tokens_per_second_per_gpu: float
    utilization: Utilization
    assumptions: tuple[str, ...]


def training(
    spec: ModelSpec,
    hardware: Hardware,
    speed: Speed,
    *,
    tokens: int | None = None,
    price: float | None = None,
    imbalance: float = 1.0,
) -> Training:
    """The time of training a valid spec.

    `tokens` replaces the first stage's length, `price` the device's, in US dollars an hour; `imbalance` is the load of
    the busiest expert rank over the mean.
    """
    stages = tuple(
        _stage(applied, stage, hardware, speed, imbalance) for applied, stage in stages_of_training(spec, tokens)
    )
    has_length = spec.training is not None or tokens is not None
    seconds = sum(stage.seconds for stage in stages) if has_length else None
    world = spec.parallelism.world_size
    hours = None if seconds is None else seconds * world / 3600
    listed = hardware.price.usd_per_hour if hardware.price else None
    hourly = listed if price is None else price
    return Training(
        stages=stages,
        world_size=world,
        tokens=sum(stage.tokens for stage in stages) if has_length else None,
        gpu_hours=hours,
        days=None if seconds is None else seconds / 86400,
        energy_kwh=None if hours is None else hours * hardware.power / 1000,
        usd_per_gpu_hour=hourly,
        cost_usd=None if hours is None or hourly is None else hours * hourly,
        tokens_per_second_per_gpu=stages[0].tokens_per_second_per_gpu,
        utilization=stages[0].utilization,
        assumptions=tuple(_assumptions(spec, hardware, speed, imbalance, price)),
    )


def stages_of_training(spec: ModelSpec, tokens: int | None = None) -> Iterator[tuple[ModelSpec, schema.Stage]]:
    """Each stage with the spec as it stands in it; of a spec without training one that is assumed, of one step."""
    if spec.training is None:
        layout = spec.parallelism
        size = layout.microbatch_size or 1
        together = mesh(layout).data * size
        count = max(-(-ASSUMED_SEQUENCES * layout.world_size // together), microbatches_needed(layout))
        # Without validation: the bounds of a batch that people write are not those of a large world.
        assumed = schema.Stage.model_construct(
            name="assumed",
            tokens=tokens,
            steps=1 if tokens is None else None,
            sequence_length=min(ASSUMED_SEQUENCE, spec.model.max_position),
            batch_size=count * together,
            learning_rate=0.0,
        )
        update = {"parallelism": layout.model_copy(update={"microbatch_size": size})}
        yield spec.model_copy(update=update), assumed
        return
    for index, stage in enumerate(spec.training.stages):
        length: dict[str, int | None] = {"tokens": tokens, "steps": None}
        replaced = stage.model_copy(update=length) if index == 0 and tokens is not None else stage
        yield stage_spec(spec, index), replaced


def _stage(spec: ModelSpec, stage: schema.Stage, hardware: Hardware, speed: Speed, imbalance: float) -> StageTime:
    steps = Steps(spec, stage.sequence_length, hardware, speed, imbalance)
    runs = steps_by_batch_size(stage)
    times = _interpolated(steps, sorted({size for size, _ in runs}))
    seconds = sum(count * times[size] for size, count in runs)
    done = sum(count * size for size, count in runs) * stage.sequence_length
    most = max(runs, key=lambda run: run[0] * run[1])[0]
    world = spec.parallelism.world_size
    rate = done / seconds / world
    return StageTime(
        name=stage.name,
        tokens=done,
        steps=sum(count for _, count in runs),
        sequence_length=stage.sequence_length,
        seconds=seconds,
        gpu_hours=seconds * world / 3600,
        tokens_per_second_per_gpu=rate,
        step=steps.step(most),
        utilization=_utilization(spec, stage.sequence_length, hardware, rate),
    )


def _interpolated(steps: Steps, sizes: list[int]) -> Mapping[int, float]:
    """Seconds of a step of each batch size; exact at a few of them, on lines between."""
    last = len(sizes) - 1
    known = [sizes[last * index // (_SAMPLES - 1)] for index in range(_SAMPLES)] if last >= _SAMPLES else sizes
    seconds = [steps.step(size).seconds for size in known]
    found = dict(zip(known, seconds, strict=True))
    for size in sizes:
        if size not in found:
            right = bisect_right(known, size)
            share = (size - known[right - 1]) / (known[right] - known[right - 1])
            found[size] = seconds[right - 1] + share * (seconds[right] - seconds[right - 1])
    return found


def _utilization(spec: ModelSpec, sequence_length: int, hardware: Hardware, rate: float) -> Utilization:
    counted = flops(spec, sequence_length)
    main, with_mtp = rate * float(counted.training), rate * float(counted.training_with_mtp)
    wide, narrow = hardware.peak_flops.bfloat16, hardware.peak_flops.fp8
    return Utilization(
        flops_per_second=main,
        flops_per_second_with_mtp=with_mtp,
        bfloat16=main / wide,
        bfloat16_with_mtp=with_mtp / wide,
        fp8=main / narrow if narrow else None,
        fp8_with_mtp=with_mtp / narrow if narrow else None,
    )


def _assumptions(
    spec: ModelSpec, hardware: Hardware, speed: Speed, imbalance: float, price: float | None
) -> Iterator[str]:
    yield (
        f"Step times are those of {speed.stack} on {hardware.name}: rates fitted to published throughput, "
        "not measured on your machine; --measure does that."
    )
    if hardware.slowdown is None and hardware.name not in calibration().devices:
        yield f"No throughput on {hardware.name} is published: it is taken to reach as much of its peaks as others do."
    sharing = f"{hardware.fast_domain} devices share a" if hardware.fast_domain > 1 else "No two devices share a"
    yield (
        f"{sharing} fast link. Tokens reach experts on other nodes once for each node. "
        + (
            "Over a step, experts are loaded evenly."
            if imbalance == 1
            else f"Over a step, the busiest expert rank has {imbalance:g} times the mean."
        )
    )
    if spec.parallelism.pipeline.schedule == "dualpipev" and spec.parallelism.pipeline.size > 1:
        yield (
            "In dualpipev's overlapped pairs the exchange with experts runs under computation. A batch with fewer "
            "microbatches than stages runs zbv."
        )
    if spec.training is None:
        yield (
            "The spec has no training: sequences are 4,096 tokens or the longest position, 8 of them for each device "
            "in a batch, one in a microbatch unless the spec says more; --tokens says how long it trains."
        )
    yield "Energy is the devices' full power for the whole time, without hosts and cooling."
    if price is not None:
        yield f"A device costs ${price:g} an hour: --price."
    elif hardware.price:
        listed = hardware.price
        yield f"A device costs ${listed.usd_per_hour:g} an hour: {listed.source}, {listed.date}."
    else:
        yield f"No price of {hardware.name} is known: give --price."
