"""What a training run tells while it runs, as values; whoever watches decides what to show."""

from dataclasses import dataclass
from pathlib import Path

from modelspec.plan import Parameters
from modelspec.plan.planned import Planned


@dataclass(frozen=True, slots=True)
class Preparing:
    """Text is being made into tokens; `share` of the activity is behind, 0 to 1."""

    activity: str
    share: float


@dataclass(frozen=True, slots=True)
class Started:
    """The run begins, or goes on after `first_step` steps.

    `unigram_loss` is that of validation, in nats per token; None where the spec has no evaluation. `planned` is what
    the run is held against, where a plan was given.
    """

    out: Path
    name: str
    device: str
    parameters: Parameters
    first_step: int
    steps: int
    training_tokens: int
    validation_tokens: int
    unigram_loss: float | None
    planned: Planned | None = None


@dataclass(frozen=True, slots=True)
class Warned:
    """Something the user should know that does not end the run."""

    message: str


@dataclass(frozen=True, slots=True)
class FP8Shares:
    """What FP8 lost in a step, by kind of tensor, as it stands in metrics.jsonl; from 0 to 1. One process looks at the
    first microbatch of a step, each of many at all of its own.

    Saturated are codes of the largest magnitude, among all; underflown are numbers that became zero, among those that
    are not zero. See `kernels/fp8_health.py`.
    """

    fp8_activation_saturation: float
    fp8_activation_underflow: float
    fp8_weight_saturation: float
    fp8_weight_underflow: float
    fp8_gradient_saturation: float
    fp8_gradient_underflow: float


@dataclass(frozen=True, slots=True)
class StepDone:
    """One optimizer step, as it stands in metrics.jsonl.

    `step` counts from 1 and `tokens` includes this step's. Losses are in nats per token: `loss` is the total,
    `mtp_loss` unweighted, `balance_loss` with its factor. `expert_load` is the busiest expert's tokens over the mean,
    averaged over layers. `skipped`: the gradients were not finite and nothing was updated. `fp8` is None where the spec
    has no FP8, or its layers are compiled.
    """

    step: int
    tokens: int
    loss: float
    lm_loss: float
    mtp_loss: float | None
    balance_loss: float | None
    grad_norm: float
    learning_rate: float
    expert_load: float | None
    skipped: bool
    seconds: float
    tokens_per_second: float
    fp8: FP8Shares | None = None


@dataclass(frozen=True, slots=True)
class HeldAgainst:
    """What a plan says of a step, and the most memory that was held in it, as they stand in metrics.jsonl beside it.

    Tokens per second are of the step's stage of training. Memory is in bytes: of the process on a CPU, of tensors on a
    GPU, on both sides.
    """

    planned_tokens_per_second: float
    planned_memory: int
    memory: int


@dataclass(frozen=True, slots=True)
class Compared:
    """The plan beside what came, of this process's steps but the first, which warms up and compiles.

    Speeds are tokens per second, memory is in bytes. `hardware` is what was planned for.
    """

    hardware: str
    planned_tokens_per_second: float
    tokens_per_second: float
    planned_memory: int
    memory: int


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Loss on held-out text after `step` steps: nats per token, and bits per byte of the text."""

    step: int
    val_loss: float
    val_bits_per_byte: float
    unigram_loss: float


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint is on disk."""

    path: Path


@dataclass(frozen=True, slots=True)
class Sampled:
    """Text of the trained model: what it was given, and what it went on with."""

    prompt: str
    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The run has all its steps; `already` when there was nothing left to do. `seconds` is this process's training."""

    out: Path
    step: int
    seconds: float
    evaluation: Evaluated | None
    already: bool = False


Event = Preparing | Started | Warned | StepDone | Evaluated | Saved | Sampled | Compared | Finished
