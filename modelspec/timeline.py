"""What the schedules of a spec mean, step by step.

Training is a walk over optimizer steps. At each step every schedule is read once, from the number of steps and of
tokens done before it. The walk is pure arithmetic: trainer, checks and plan see the same steps, and a resumed run
finds its place by skipping.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from math import cos, pi

from modelspec import schema
from modelspec.schema.schedule import BatchPhase, BatchSchedule, Phase, Schedule


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step: where it stands in the run, and the value of every schedule there."""

    index: int
    stage: int
    stage_step: int
    tokens: int
    batch_size: int
    sequence_length: int
    learning_rate: float
    mtp_weight: float
    balance_weight: float
    bias_update_speed: float


@dataclass(slots=True)
class _Reader:
    """Follows one schedule through its phases; positions must not go back."""

    phases: tuple[Phase | BatchPhase, ...]
    index: int = 0
    start_steps: int = 0
    start_tokens: int = 0

    def advance(self, steps: int, tokens: int) -> Phase | BatchPhase:
        while self.index + 1 < len(self.phases):
            phase = self.phases[self.index]
            if phase.until_tokens is not None and tokens >= phase.until_tokens:
                self.start_steps, self.start_tokens = steps, phase.until_tokens
            elif phase.until_steps is not None and steps >= phase.until_steps:
                self.start_steps, self.start_tokens = phase.until_steps, tokens
            else:
                break
            self.index += 1
        return self.phases[self.index]

    def progress(self, phase: Phase | BatchPhase, steps: int, tokens: int) -> tuple[int, int]:
        """How far the phase has gone and how long it is, in the unit of its mark."""
        if phase.until_tokens is not None:
            done, length = tokens - self.start_tokens, phase.until_tokens - self.start_tokens
        else:
            assert phase.until_steps is not None, "a ramp or cosine has an end: checked by validate"
            done, length = steps - self.start_steps, phase.until_steps - self.start_steps
        return min(done, length), max(length, 1)


def _reader(schedule: Schedule | BatchSchedule | None) -> _Reader:
    match schedule:
        case None:
            return _Reader((schema.Constant(value=0.0),))
        case tuple():
            return _Reader(schedule)
        case number:
            return _Reader((schema.Constant(value=float(number)),))


def _value(reader: _Reader, steps: int, tokens: int, steps_from: int = 0) -> float:
    """The value at a position; `steps_from` 1 makes a ramp over steps begin with its first increment."""
    match phase := reader.advance(steps, tokens):
        case schema.Constant(value=value):
            return value
        case schema.Ramp(ramp=(first, last)):
            offset = steps_from if phase.until_tokens is None else 0
            done, length = reader.progress(phase, steps + offset, tokens)
            return first + (last - first) * (done / length)
        case schema.Cosine(cosine=(first, last)):
            done, length = reader.progress(phase, steps, tokens)
            return last + (first - last) * 0.5 * (1.0 + cos(pi * done / length))
        case _:
            raise AssertionError(f"not a phase of numbers: {phase!r}")


def _batch_size(reader: _Reader, steps: int, tokens: int) -> int:
    match phase := reader.advance(steps, tokens):
        case schema.Constant(value=value):
            return int(value)
        case schema.BatchConstant(value=value):
            return value
        case schema.BatchRamp(ramp=(first, last), multiple_of=granule):
            done, length = reader.progress(phase, steps, tokens)
            return max((first + (last - first) * done // length) // granule, 1) * granule
        case _:
            raise AssertionError(f"not a phase of batch sizes: {phase!r}")


def timeline(training: schema.Training) -> Iterator[Step]:
    """Every optimizer step of a run, in order. The spec has passed `validate`."""
    losses = training.losses
    mtp, balance = _reader(losses.mtp), _reader(losses.balance.sequence if losses.balance else None)
    bias = _reader(training.router_bias_update_speed)
    index = tokens = 0
    for stage_index, stage in enumerate(training.stages):
        batches, rates = _reader(stage.batch_size), _reader(stage.learning_rate)
        stage_start = tokens
        for stage_step in count():
            stage_tokens = tokens - stage_start
            if stage_tokens >= stage.tokens if stage.tokens is not None else stage_step >= (stage.steps or 0):
                break
            batch_size = _batch_size(batches, stage_step, stage_tokens)
            yield Step(
                index=index,
                stage=stage_index,
                stage_step=stage_step,
                tokens=tokens,
                batch_size=batch_size,
                sequence_length=stage.sequence_length,
                learning_rate=_value(rates, stage_step, stage_tokens, steps_from=1),
                mtp_weight=_value(mtp, index, tokens),
                balance_weight=_value(balance, index, tokens),
                bias_update_speed=_value(bias, index, tokens),
            )
            index += 1
            tokens += batch_size * stage.sequence_length


def stage_spec(spec: schema.ModelSpec, index: int) -> schema.ModelSpec:
    """The spec as it stands during one stage: with the stage's rotary scaling and parallelism."""
    assert spec.training is not None, "stages need `training`"
    stage = spec.training.stages[index]
    update: dict[str, object] = {}
    if stage.parallelism is not None:
        update["parallelism"] = stage.parallelism.applied_to(spec.parallelism)
    if stage.rope_scaling is not None:
        scaling = None if stage.rope_scaling == "none" else stage.rope_scaling
        attention = {name: _with_scaling(variant, scaling) for name, variant in spec.model.attention.items()}
        update["model"] = spec.model.model_copy(update={"attention": attention})
    return spec.model_copy(update=update)


def _with_scaling(variant: schema.Attention, scaling: schema.RopeScaling | None) -> schema.Attention:
    if variant.rope == "none":
        return variant
    return variant.model_copy(update={"rope": variant.rope.model_copy(update={"scaling": scaling})})


def steps_by_batch_size(stage: schema.Stage) -> tuple[tuple[int, int], ...]:
    """The steps of a stage as runs of equal batch size: (sequences per step, steps), in order.

    The walk of `timeline` over batch sizes alone, in as many moves as there are different ones.
    """
    reader, steps, tokens = _reader(stage.batch_size), 0, 0
    found: list[tuple[int, int]] = []
    while not _is_over(stage, steps, tokens):
        size = _batch_size(reader, steps, tokens)
        step_tokens = size * stage.sequence_length
        far = 1
        while _keeps(stage, reader, size, steps + far, tokens + far * step_tokens):
            far *= 2
        # The last step of the run is among the first `far`, and not before half of them.
        low, high = far // 2, far
        while high - low > 1:
            middle = (low + high) // 2
            if _keeps(stage, reader, size, steps + middle, tokens + middle * step_tokens):
                low = middle
            else:
                high = middle
        if found and found[-1][0] == size:
            found[-1] = (size, found[-1][1] + high)
        else:
            found.append((size, high))
        steps, tokens = steps + high, tokens + high * step_tokens
    return tuple(found)


def _is_over(stage: schema.Stage, steps: int, tokens: int) -> bool:
    return tokens >= stage.tokens if stage.tokens is not None else steps >= (stage.steps or 0)


def _keeps(stage: schema.Stage, reader: _Reader, size: int, steps: int, tokens: int) -> bool:
    """Whether a step that begins there is in the same phase and has the same batch size.

    A copy of the reader is asked, for a reader never goes back. It may not jump into the next phase: where that one
    begins is known at its first step only.
    """
    ahead = replace(reader)
    return (
        not _is_over(stage, steps, tokens) and _batch_size(ahead, steps, tokens) == size and ahead.index == reader.index
    )
