"""The best layouts of a spec on so many devices: the front of time and memory, and why all others fall out.

A layout is on the front if no other one takes less time and no more memory, or less memory and no more time. The walk
over the layouts is in plan/walk.py; here is what it means for the one who pays.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from modelspec import layout as arithmetic
from modelspec.amount import amount_of_bytes
from modelspec.plan.layouts import MAX_PIPELINE, MICROBATCHES, MIN_TOKENS, Layout, applied, of
from modelspec.plan.memory import StageMemory, Verdict, memory, stage_memory, training_memory, verdict
from modelspec.plan.ranks import IMBALANCE
from modelspec.plan.step import Speed
from modelspec.plan.training import Training, stages_of_training, training
from modelspec.plan.walk import Judged, Sized, Walk
from modelspec.schema import ModelSpec
from modelspec.schema.hardware import Hardware

Objective = Literal["time", "memory", "cost"]
# Where nothing fits, so many times the devices are tried.
_TIMES = (2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layout: time of a step of the first stage of training, memory of its heaviest rank.

    `later` is the worst verdict of the stages after the first, None where there are none.
    `set` are texts for --set, `data` the length of the data axis. Tokens and dollars are those of this step; the price
    is None where none of the device is known.
    """

    set: tuple[str, ...]
    layout: Layout
    data: int
    batch_size: int
    microbatches: int
    step_seconds: float
    tokens_per_second_per_gpu: float
    bubble: float
    exposed: float
    memory_bytes: int
    verdict: Verdict
    later: Verdict | None
    usd_per_billion_tokens: float | None


@dataclass(frozen=True, slots=True)
class Rejected:
    """Layouts that fall out for one reason: what a check, of this code, says of the example, or what that needs.

    Of layouts that are too big the example is the smallest, and the code is `memory`.
    """

    code: str
    reason: str
    help: str | None
    count: int
    example: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Nearest:
    """Where nothing fits: the smallest layout; number formats and what it needs with them; devices that are enough."""

    set: tuple[str, ...]
    memory_bytes: int
    formats: tuple[tuple[str, int], ...]
    gpus: int | None


@dataclass(frozen=True, slots=True)
class Search:
    """All that a search found. The front comes in the order of the objective; `chosen` is its first that FITS in every
    stage of training, else its first that is not OOM in any, else its first that FITS in the first stage, else its
    first.

    Of `examined` layouts some are illegal or too big: `rejected`. Of those that fit, `simulated` pipelines were gone
    through; the others are dominated for certain. `own` is the layout that the spec has, where that is legal.
    `training` is all of training with the chosen layout, and `stages` its memory in each stage. `bounds` are the tokens
    per second of a device, at most, and bytes of everything that fits: for a picture.
    """

    name: str
    hardware: str
    device_bytes: int
    world_size: int
    stage: str
    sequence_length: int
    objective: Objective
    examined: int
    fitting: int
    simulated: int
    rejected: tuple[Rejected, ...]
    front: tuple[Candidate, ...]
    chosen: Candidate | None
    own: Candidate | None
    training: Training | None
    stages: tuple[StageMemory, ...]
    nearest: Nearest | None
    assumptions: tuple[str, ...]
    bounds: tuple[tuple[float, int], ...]


def search(
    spec: ModelSpec,
    hardware: Hardware,
    speed: Speed,
    *,
    fixed: Mapping[str, Any] | None = None,
    objective: Objective = "time",
    tokens: int | None = None,
    price: float | None = None,
    imbalance: float | None = None,
) -> Search:
    """The front of a spec on its world of devices; all but its own layout is valid.

    Parts of `Layout` in `fixed` keep their value; the other arguments are those of `plan`.
    Raises ValueError where the first stage of training has a layout of its own, for too many layouts, and for cost
    without a price.
    """
    listed = hardware.price.usd_per_hour if hardware.price else None
    hourly = listed if price is None else price
    if objective == "cost" and hourly is None:
        raise ValueError(f"no price of {hardware.name} is known: give --price")
    if spec.training is not None and spec.training.stages[0].parallelism is not None:
        raise ValueError(
            "the first stage of training has a layout of its own, which would hide the one that is found: "
            "--set training.stages.0.parallelism=null removes it"
        )
    walk = Walk(spec, hardware, speed, fixed=fixed, tokens=tokens, imbalance=imbalance)
    judged = walk.judged()
    load = IMBALANCE if imbalance is None else imbalance
    front = _ordered((_candidate(walk, each, hourly, load) for each in judged.front), objective)
    chosen = min(front, key=_trouble, default=None)
    there = None if chosen is None else applied(spec, chosen.layout)
    options: dict[str, Any] = {"tokens": tokens, "price": price, "imbalance": imbalance or 1.0}
    return Search(
        name=spec.name,
        hardware=hardware.name,
        device_bytes=hardware.memory,
        world_size=spec.parallelism.world_size,
        stage=walk.stage.name,
        sequence_length=walk.length,
        objective=objective,
        examined=judged.examined,
        fitting=judged.fitting,
        simulated=judged.simulated,
        rejected=tuple(sorted(_rejected(spec, hardware, judged), key=lambda each: -each.count)),
        front=front,
        chosen=chosen,
        own=_own(walk, hourly, load),
        training=None if there is None else training(there, hardware, speed, **options),
        stages=() if there is None else training_memory(there, hardware, imbalance=imbalance).stages,
        nearest=None if front or judged.smallest is None else _nearest(walk, judged.smallest, imbalance),
        assumptions=_assumptions(spec, hardware),
        bounds=tuple((1 / (seconds * spec.parallelism.world_size), size) for seconds, size in judged.bounds),
    )


def _ordered(found: Iterable[Candidate], objective: Objective) -> tuple[Candidate, ...]:
    """The best first. On so many devices cost is time, at a price."""

    def key(each: Candidate) -> tuple[float, float]:
        speed = -each.tokens_per_second_per_gpu
        return (each.memory_bytes, speed) if objective == "memory" else (speed, each.memory_bytes)

    return tuple(sorted(found, key=key))


def _trouble(candidate: Candidate) -> int:
    """How far a layout is from fitting with ease in every stage of training; 0 where it does."""
    verdicts = {candidate.verdict, candidate.later}
    if "OOM" in verdicts:
        return 2 if candidate.verdict == "FITS" else 3
    return 1 if "TIGHT" in verdicts else 0


def texts(spec: ModelSpec, layout: Layout) -> tuple[str, ...]:
    """A layout as texts for --set, the world included."""
    found = [f"parallelism.world_size={spec.parallelism.world_size}"]
    for key, value in written(spec, layout).items():
        below = value.items() if isinstance(value, dict) else [("", value)]
        for inner, each in below:
            said = "null" if each is None else f"[{', '.join(each)}]" if isinstance(each, list) else each
            found.append(f"parallelism.{key}{'.' if inner else ''}{inner}={said}")
    return tuple(found)


def written(spec: ModelSpec, layout: Layout) -> dict[str, Any]:
    """The keys below `parallelism` that say a layout over the spec's own; None removes one of these."""
    pipeline: dict[str, Any] = {"size": layout.pipeline, "schedule": layout.schedule}
    if layout.stages_per_rank is not None or spec.parallelism.pipeline.stages_per_rank is not None:
        pipeline["stages_per_rank"] = layout.stages_per_rank
    return {
        "pipeline": pipeline,
        "expert": layout.expert,
        "tensor": layout.tensor,
        "context": layout.context,
        "data": {"zero": layout.zero},
        "microbatch_size": layout.microbatch_size,
        "recompute": list(layout.recompute),
    }


def _rejected(spec: ModelSpec, hardware: Hardware, judged: Judged) -> Iterator[Rejected]:
    for each in judged.illegal:
        finding, example = each.finding, texts(spec, each.example)
        yield Rejected(each.code, _said(finding.path, finding.message), finding.help, each.layouts, example)
    if judged.smallest_too_big is not None:
        need, layout = judged.smallest_too_big
        reason = f"needs {_over(need, hardware.memory)}; the others need more"
        yield Rejected("memory", reason, None, judged.too_big, texts(spec, layout))


def _over(need: int, has: int) -> str:
    """How much it needs of how much there is, to as many digits as tell them apart."""
    said = amount_of_bytes(need), amount_of_bytes(has)
    return " of ".join(said) if said[0] != said[1] else f"{need:,} of {has:,} bytes"


def _candidate(walk: Walk, sized: Sized, hourly: float | None, imbalance: float) -> Candidate:
    layout, step = sized.layout, walk.step(sized.layout)
    world = walk.spec.parallelism.world_size
    rate = step.batch_size * walk.length / step.seconds / world
    return Candidate(
        set=texts(walk.spec, layout),
        layout=layout,
        data=world // (layout.pipeline * layout.tensor * layout.context),
        batch_size=step.batch_size,
        microbatches=step.microbatches,
        step_seconds=step.seconds,
        tokens_per_second_per_gpu=rate,
        bubble=step.bubble,
        exposed=step.exposed,
        memory_bytes=sized.bytes,
        verdict=verdict(sized.bytes, walk.hardware.memory),
        later=_later(walk, layout, imbalance),
        usd_per_billion_tokens=None if hourly is None else hourly * 1e9 / (rate * 3600),
    )


def _later(walk: Walk, layout: Layout, imbalance: float) -> Verdict | None:
    """The worst verdict of a layout in the stages of training after the first."""
    _, *later = stages_of_training(applied(walk.spec, layout))
    found = {stage_memory(there, stage, walk.hardware, imbalance).verdict for there, stage in later}
    worst: tuple[Verdict, ...] = ("OOM", "TIGHT", "FITS")
    return next((each for each in worst if each in found), None)


def _own(walk: Walk, hourly: float | None, imbalance: float) -> Candidate | None:
    """The spec's layout in the first stage."""
    parallelism = walk.spec.parallelism
    if parallelism.world_size % (parallelism.pipeline.size * parallelism.tensor * parallelism.context):
        return None
    plain = of(parallelism, parallelism.microbatch_size or 1)
    layout = of(parallelism, arithmetic.microbatch_size(parallelism, walk.usual(plain)))
    if walk.legality.fault(layout) is not None:
        return None
    return _candidate(walk, Sized(walk.size(layout), layout), hourly, imbalance)


def _nearest(walk: Walk, smallest: Sized, imbalance: float | None) -> Nearest:
    """What would help where nothing fits."""
    there, batch = applied(walk.first, smallest.layout), walk.largest(smallest.layout)
    load = IMBALANCE if imbalance is None else imbalance
    found = memory(there, sequence_length=walk.length, batch_size=batch, hardware=walk.hardware, imbalance=load)
    formats = [
        (each.set[0], each.total) for each in found.levers if all(key.startswith("precision.") for key in each.set)
    ]
    return Nearest(texts(walk.spec, smallest.layout), smallest.bytes, tuple(formats), _enough(walk, imbalance))


def _enough(walk: Walk, imbalance: float | None) -> int | None:
    """Devices with which the layouts that need least memory fit."""
    fixed = {"zero": 3, "recompute": ("layer",), "microbatch_size": 1, **walk.fixed}
    for times in _TIMES:
        world = times * walk.spec.parallelism.world_size
        more = walk.spec.model_copy(
            update={"parallelism": walk.spec.parallelism.model_copy(update={"world_size": world})}
        )
        smallest = Walk(more, walk.hardware, walk.speed, fixed=fixed, imbalance=imbalance).smallest()
        if smallest is not None and smallest <= walk.hardware.memory:
            return world
    return None


def _said(path: tuple[str | int, ...], message: str) -> str:
    """A check's message; where it speaks of a later stage of training, with the place."""
    return message if path[:2] != ("training", "stages") else f"{'.'.join(map(str, path))}: {message}"


def _assumptions(spec: ModelSpec, hardware: Hardware) -> tuple[str, ...]:
    told = [
        f"Walked: pipelines of up to {MAX_PIPELINE} ranks, tensor ranks inside a fast link's {hardware.fast_domain}, "
        f"context ranks with at least {MIN_TOKENS:,} tokens each, microbatches of "
        f"{', '.join(map(str, MICROBATCHES))} sequences, 2, 4 or 8 stages on a rank; no gpipe, which takes as long as "
        "1f1b and more memory.",
        "Time and memory are those of the first stage of training. What --set says of the layout is kept.",
    ]
    if spec.training is None:
        told.append(
            "The spec has no training, so a batch has eight sequences for each device, more where a schedule needs "
            "them. Compared is the time of a token."
        )
    return tuple(told)
