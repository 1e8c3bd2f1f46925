"""The recipe: optimizer, losses, and stages that say how long, how wide and how fast."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from modelspec.schema.base import AsTuple, Count, NonNegative, Position, Positive, StepCount, Strict, TokenCount
from modelspec.schema.parallelism import ParallelismOverride
from modelspec.schema.rope import RopeScaling
from modelspec.schema.schedule import BatchSchedule, Schedule

Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamW(Strict):
    """Adam with decoupled weight decay (arXiv 1711.05101); decay falls on matrices and embeddings only."""

    type: Literal["adamw"] = Field(description="kind of optimizer")
    betas: Annotated[tuple[Beta, Beta], AsTuple] = Field(
        description="decay of the first and the second moment; per step"
    )
    eps: Positive = Field(description="added to the root of the second moment; no unit")
    weight_decay: NonNegative = Field(
        description="share of a weight removed per step, times the learning rate; no unit"
    )


Optimizer = AdamW


class BalanceLosses(Strict):
    """Losses that pull expert load together."""

    sequence: Schedule | None = Field(
        default=None,
        description="factor of the loss within a sequence (arXiv 2412.19437, equations 17 to 20); no unit. Left out: 0",
    )


class Losses(Strict):
    """What is added to the mean cross-entropy of the next token; no unit."""

    mtp: Schedule | None = Field(
        default=None, description="weight of the multi-token prediction loss; no unit. Left out: 0"
    )
    balance: BalanceLosses | None = Field(default=None, description="balance of expert load; left out: none")


def _scaling_tag(value: object) -> str:
    return "none" if isinstance(value, str) else "scaling"


StageRopeScaling = Annotated[
    Annotated[RopeScaling, Tag("scaling")] | Annotated[Literal["none"], Tag("none")], Discriminator(_scaling_tag)
]


class Stage(Strict):
    """A part of training with its own length and sequence length; ends with the first step that reaches its length."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] = Field(description="name of the stage")
    tokens: TokenCount | None = Field(
        default=None, description="length of the stage; tokens. Exactly one of tokens and steps"
    )
    steps: StepCount | None = Field(default=None, description="length of the stage; optimizer steps")
    sequence_length: Position = Field(description="length of a training sequence; tokens")
    batch_size: BatchSchedule = Field(description="sequences per optimizer step, over all ranks")
    learning_rate: Schedule = Field(description="step size of the optimizer; no unit")
    rope_scaling: StageRopeScaling | None = Field(
        default=None, description="rotary scaling during this stage, or the word none; left out: the model's own"
    )
    parallelism: ParallelismOverride | None = Field(
        default=None, description="parts of parallelism that differ in this stage"
    )


class Evaluation(Strict):
    """Loss on held-out text while training, and at the end."""

    every_steps: StepCount = Field(description="optimizer steps between evaluations")
    tokens: TokenCount = Field(description="held-out tokens per evaluation")


class Checkpoint(Strict):
    """When state is saved, beside the end of the run."""

    every_steps: StepCount = Field(description="optimizer steps between checkpoints")
    keep_last: Count = Field(description="checkpoints kept; older ones are deleted once a newer one is whole")


class Training(Strict):
    """How the model is trained."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=0, description="of initial values and of the order of data"
    )
    deterministic: bool = Field(default=False, description="refuse operations whose result depends on scheduling")
    optimizer: Optimizer = Field(description="update rule")
    gradient_clip: Positive | None = Field(
        default=None, description="largest norm of all gradients together; left out: no clipping"
    )
    losses: Losses = Field(default=Losses(), description="losses beside the main one")
    router_bias_update_speed: Schedule | None = Field(
        default=None, description="step of each selection bias towards even load after an optimizer step; left out: 0"
    )
    stages: Annotated[tuple[Stage, ...], Field(min_length=1), AsTuple] = Field(description="stages, in order")
    evaluation: Evaluation | None = Field(default=None, description="evaluation while training; left out: none")
    checkpoint: Checkpoint | None = Field(
        default=None, description="checkpoints while training; left out: only at the end"
    )
