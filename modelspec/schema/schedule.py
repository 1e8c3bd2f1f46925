"""One grammar for every quantity that changes while training: a number, or a list of phases.

    learning_rate:
      - {until_steps: 2000, ramp: [0.0, 2.2e-4]}      # linear
      - {until_tokens: 10e12, value: 2.2e-4}
      - {until_tokens: 14.3e12, cosine: [2.2e-4, 2.2e-5]}
      - {value: 7.3e-6}                               # the last phase may be open

`until_*` are marks, not lengths. Inside a stage they count from the stage's start, elsewhere from the run's.
`modelspec.timeline` says what the schedules mean at each step.
"""

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from modelspec.schema.base import AsTuple, Count, NonNegative, StepCount, Strict, TokenCount


class _Phase(Strict):
    until_tokens: TokenCount | None = Field(default=None, description="the phase ends at this mark; tokens")
    until_steps: StepCount | None = Field(default=None, description="the phase ends at this mark; optimizer steps")


class Constant(_Phase):
    """One value for the whole phase."""

    value: NonNegative = Field(description="the quantity during the phase, in its own unit")


class Ramp(_Phase):
    """A straight line from the first value at the phase's start to the second at its end."""

    ramp: Annotated[tuple[NonNegative, NonNegative], AsTuple] = Field(description="values at the phase's start and end")


class Cosine(_Phase):
    """Half a cosine from the first value at the phase's start to the second at its end."""

    cosine: Annotated[tuple[NonNegative, NonNegative], AsTuple] = Field(
        description="values at the phase's start and end"
    )


class BatchConstant(_Phase):
    """One batch size for the whole phase."""

    value: Count = Field(description="sequences per optimizer step")


class BatchRamp(_Phase):
    """A batch that grows in whole multiples of `multiple_of`, rounded down."""

    ramp: Annotated[tuple[Count, Count], AsTuple] = Field(description="sequences per step at the phase's start and end")
    multiple_of: Count = Field(default=1, description="granule of the ramp; sequences")


def _phase_tag(value: Any) -> str:
    for tag, kinds in {"ramp": (Ramp, BatchRamp), "cosine": (Cosine,)}.items():
        if isinstance(value, kinds) or (isinstance(value, dict) and tag in value and "value" not in value):
            return tag
    return "value"


Phase = Annotated[
    Annotated[Constant, Tag("value")] | Annotated[Ramp, Tag("ramp")] | Annotated[Cosine, Tag("cosine")],
    Discriminator(_phase_tag),
]
BatchPhase = Annotated[
    Annotated[BatchConstant, Tag("value")] | Annotated[BatchRamp, Tag("ramp")], Discriminator(_phase_tag)
]


def _schedule_tag(value: Any) -> str:
    return "phases" if isinstance(value, list | tuple) else "number"


Schedule = Annotated[
    Annotated[NonNegative, Tag("number")]
    | Annotated[Annotated[tuple[Phase, ...], Field(min_length=1), AsTuple], Tag("phases")],
    Discriminator(_schedule_tag),
]
BatchSchedule = Annotated[
    Annotated[Count, Tag("number")]
    | Annotated[Annotated[tuple[BatchPhase, ...], Field(min_length=1), AsTuple], Tag("phases")],
    Discriminator(_schedule_tag),
]
