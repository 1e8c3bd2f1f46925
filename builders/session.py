"""The loop over the steps of the timeline: what a run does whoever learns, and wherever.

`Session` is what one process and many have in common: which step comes, when to evaluate and to save, what happens on a
signal. What happens is told to an observer as events; nothing here prints.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from math import log
from time import perf_counter
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from modelspec import schema
from modelspec.builders import checkpoint as checkpoints
from modelspec.builders.against import Against
from modelspec.builders.checkpoint import Checkpoint, Position
from modelspec.builders.corpus import Corpus
from modelspec.builders.data import Samples, bytes_per_token, unigram_loss, validation_windows
from modelspec.builders.errors import Stopped
from modelspec.builders.events import Evaluated, Event, Finished, HeldAgainst, Preparing, Saved, Started, StepDone
from modelspec.builders.plot import write_plot
from modelspec.builders.requirements import require_trainable, require_world
from modelspec.builders.run import Run
from modelspec.layout import microbatch_size
from modelspec.plan import parameters
from modelspec.plan.planned import Planned
from modelspec.timeline import Step, timeline

AnyEvent = TypeVar("AnyEvent", bound=Event)


@dataclass(frozen=True, slots=True)
class Watch:
    """Who hears of events, and who says when to stop: a signal's number, or None to go on."""

    observe: Callable[[Event], None] = lambda event: None
    stop: Callable[[], int | None] = lambda: None

    def check(self) -> None:
        """Raises Stopped once a signal asked for the end."""
        if (signal_number := self.stop()) is not None:
            raise Stopped(signal_number)

    def prepare(self, activity: str, share: float) -> None:
        self.check()
        self.observe(Preparing(activity, share))


NOBODY = Watch()


@dataclass(frozen=True, slots=True)
class Recipe:
    """A spec that has all that training needs, and the steps that it takes."""

    spec: schema.ModelSpec
    training: schema.Training
    sources: tuple[schema.Source, ...]
    tokenizer: schema.TrainedBPE | schema.TokenizerFile
    steps: int
    lengths: frozenset[int]

    @classmethod
    def of(cls, spec: schema.ModelSpec, steps: int | None = None) -> "Recipe":
        """Raises Refused with all that is missing or not trained yet, Misuse for a launcher's other world."""
        require_world(spec)
        require_trainable(spec)
        assert spec.training and spec.data and spec.data.sources and spec.data.tokenizer, "see require_trainable"
        walk = [step.sequence_length for step in islice(timeline(spec.training), steps)]
        return cls(spec, spec.training, spec.data.sources, spec.data.tokenizer, len(walk), frozenset(walk))


def stage_of(position: Position, recipe: Recipe) -> int:
    """The stage to begin with. The spec may have lost stages since; the first step enters its own."""
    return min(position.stage, len(recipe.training.stages) - 1)


class Session(ABC):
    """All that a run needs to go from where it stands to its end, but for how it learns, and who writes."""

    def __init__(
        self,
        run: Run,
        recipe: Recipe,
        corpus: Corpus,
        position: Position,
        watch: Watch,
        planned: Planned | None,
        device: torch.device,
    ) -> None:
        self.run, self.recipe, self.corpus, self.watch, self.device = run, recipe, corpus, watch, device
        self.against = Against(planned, device) if planned else None
        self.samples = samples_of(corpus, recipe)
        self.position = replace(position, data=corpus.fingerprint)
        self.saved_step = self.position.step
        self.validation = Validation.of(corpus, recipe) if recipe.training.evaluation else None
        self.evaluation: Evaluated | None = None

    @abstractmethod
    def stepped(self, step: Step) -> StepDone:
        """Takes one optimizer step on the batch that is next."""

    @abstractmethod
    def evaluated(self, validation: "Validation") -> float:
        """The validation loss, in nats per token."""

    @abstractmethod
    def written(self) -> Checkpoint:
        """Writes the state of the run."""

    def check(self) -> None:
        """Raises Stopped once a signal asked for the end."""
        self.watch.check()

    def has_evaluated(self) -> bool:
        """Whether the metrics have an evaluation of where the run stands."""
        return any(row["step"] == self.position.step and "val_loss" in row for row in self.run.rows())

    def log(self, event: StepDone | Evaluated, held: HeldAgainst | None = None) -> None:
        """Adds an event to the metrics."""
        self.run.log(event, held)

    def told(self, event: AnyEvent) -> AnyEvent:
        """Lets whoever watches hear of an event."""
        self.watch.observe(event)
        return event

    def ended(self) -> None:
        """What is left to write once all steps are taken: the plot."""
        write_plot(self.run.plot, self.recipe.spec.name, self.run.rows())

    def train(self) -> Finished:
        """Takes the steps that remain. Raises as the function `train` does."""
        self._announce()
        began = perf_counter()
        training = self.recipe.training
        try:
            self._make_up()
            for step in islice(timeline(training), self.position.step, self.recipe.steps):
                self.check()
                self._learn(step)
                if self._is_due(training.evaluation):
                    self._evaluate()
                if self._is_due(training.checkpoint):
                    self._save()
            self._evaluate()
        except Stopped:
            self._save()
            raise
        self._save()
        seconds = perf_counter() - began
        self.ended()
        if self.against and (compared := self.against.all()) is not None:
            self.told(compared)
        return self.told(Finished(self.run.out, self.position.step, seconds, self.evaluation))

    def _announce(self) -> None:
        rows = self.corpus.rows
        self.told(
            Started(
                out=self.run.out,
                name=self.recipe.spec.name,
                device=str(self.device),
                parameters=parameters(self.recipe.spec),
                first_step=self.position.step,
                steps=self.recipe.steps,
                training_tokens=sum(len(row.train) for row in rows),
                validation_tokens=sum(len(row.validation) for row in rows),
                unigram_loss=self.validation.unigram_loss if self.validation else None,
                planned=self.against.planned if self.against else None,
            )
        )

    def _learn(self, step: Step) -> None:
        done = self.stepped(step)
        self.position = Position(
            done.step, done.tokens, self.position.sequences + step.batch_size, step.stage, self.position.data
        )
        self.log(self.told(done), self.against.step(done, step.stage) if self.against else None)

    def _make_up(self) -> None:
        """Evaluates where a signal came between a step and its evaluation."""
        if self.position.step > 0 and self._is_due(self.recipe.training.evaluation) and not self.has_evaluated():
            self._evaluate()

    def _is_due(self, when: schema.Evaluation | schema.Checkpoint | None) -> bool:
        return when is not None and self.position.step % when.every_steps == 0

    def _evaluate(self) -> None:
        step = self.position.step
        if self.validation is None or (self.evaluation is not None and self.evaluation.step == step):
            return
        loss = self.evaluated(self.validation)
        bits_per_byte = loss / log(2) / self.validation.bytes_per_token
        self.evaluation = Evaluated(step, loss, bits_per_byte, self.validation.unigram_loss)
        self.log(self.told(self.evaluation))

    def _save(self) -> None:
        if self.position.step == self.saved_step:
            return
        saved = self.written()
        self.saved_step = self.position.step
        self.told(Saved(saved.path))


def prune(run: Run, recipe: Recipe) -> None:
    """Deletes the checkpoints that the spec does not keep."""
    if (policy := recipe.training.checkpoint) is not None:
        checkpoints.prune(run.checkpoints, policy.keep_last)


@dataclass(frozen=True, slots=True)
class Validation:
    """Fixed held-out windows, int64 [windows, length + 1], evaluated `batch` at a time, and what to compare with."""

    windows: NDArray[np.int64]
    batch: int
    unigram_loss: float
    bytes_per_token: float

    @classmethod
    def of(cls, corpus: Corpus, recipe: Recipe) -> "Validation":
        """Raises Misuse where no text is held out."""
        first = next(timeline(recipe.training))
        assert recipe.training.evaluation is not None
        windows = validation_windows(corpus, first.sequence_length, recipe.training.evaluation.tokens)
        batch = microbatch_size(recipe.spec.parallelism, first.batch_size)
        return cls(windows, batch, unigram_loss(corpus, windows), bytes_per_token(corpus))


def samples_of(corpus: Corpus, recipe: Recipe) -> Samples:
    samples = Samples(corpus, recipe.training.seed)
    for length in sorted(recipe.lengths):
        samples.require(length)
    return samples
