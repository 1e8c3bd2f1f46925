"""Training: one loop over the steps of the timeline.

A run is a pure function of its spec, its text and the number of steps: initial values, the order of text and every
schedule come from the seed and the step alone. So a run that stopped goes on bit for bit as if it had not. What
happens is told to an observer as events; nothing here prints.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from math import log
from pathlib import Path
from time import perf_counter
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from modelspec import schema
from modelspec.builders import checkpoint as checkpoints
from modelspec.builders import tokenizer as bpe
from modelspec.builders.against import Against
from modelspec.builders.build import require_fp8
from modelspec.builders.checkpoint import TOKENIZER, Checkpoint, Position, latest_valid
from modelspec.builders.corpus import Corpus, prepare
from modelspec.builders.data import Samples, bytes_per_token, unigram_loss, validation_windows
from modelspec.builders.device import computing, forget_peak_memory, peak_memory, require_device
from modelspec.builders.errors import Refused, Stopped
from modelspec.builders.events import (
    Evaluated,
    Event,
    Finished,
    Preparing,
    Sampled,
    Saved,
    Started,
    StepDone,
    Warned,
)
from modelspec.builders.generate import sample
from modelspec.builders.learner import Learner
from modelspec.builders.plot import write_plot
from modelspec.builders.requirements import require_trainable, require_world
from modelspec.builders.run import Run, marked, opened, require_compatible
from modelspec.builders.start import require_fit, require_tokenizer, start_from
from modelspec.builders.weights import Weights
from modelspec.layout import microbatch_size
from modelspec.plan import parameters
from modelspec.plan.planned import Planned
from modelspec.timeline import Step, timeline

AnyEvent = TypeVar("AnyEvent", bound=Event)
_PROMPT_TOKENS, _SAMPLE_TOKENS = 24, 96


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


def train(
    spec: schema.ModelSpec,
    out: Path,
    *,
    steps: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    allow_changed: bool = False,
    start: Weights | None = None,
    planned: Planned | None = None,
    device: str = "cpu",
    watch: Watch = NOBODY,
) -> Finished:
    """Trains a spec, from the start or from the newest valid checkpoint in `out`, to its end or to `steps` in all.

    At step 0 the model has the values of `start`, if given, in place of initial ones. What is `planned` of this spec is
    held against what comes, in events and metrics. Raises Refused, Misuse or
    EnvironmentFailed before anything is written where it cannot begin, EnvironmentFailed when the disk fails later,
    and Stopped, with the state saved, when a signal asks for the end.
    """
    recipe = Recipe.of(spec, steps)
    target = require_device(device)
    require_fp8(spec, target)
    notices = require_fit(start, spec) if start is not None else ()
    with opened(out, resume=resume, overwrite=overwrite) as run, computing(recipe.training.deterministic):
        found = _newest(run, spec, allow_changed, watch) if run.earlier else None
        if found is not None and (finished := _nothing_left(run, recipe, found)) is not None:
            watch.observe(finished)
            return finished
        corpus = _text(recipe, found, allow_changed, watch)
        session = Session(run, recipe, corpus, target, found, allow_changed, watch, planned)
        if start is not None and found is None:
            notices += require_tokenizer(start, corpus.tokenizer)
            for notice in notices:
                watch.observe(Warned(notice))
            start_from(session.learner.model, start)
        run.begin(spec, corpus.tokenizer_json, session.position.step, overwrite=overwrite)
        return session.train()


class Session:
    """One process's part of a run: all that it needs to go from where the run stands to its end."""

    def __init__(
        self,
        run: Run,
        recipe: Recipe,
        corpus: Corpus,
        device: torch.device,
        found: Checkpoint | None,
        convert: bool,
        watch: Watch,
        planned: Planned | None = None,
    ) -> None:
        self.run, self.recipe, self.corpus, self.watch = run, recipe, corpus, watch
        self.against = Against(planned, device) if planned else None
        self.samples = _samples(corpus, recipe)
        self.position = replace(found.position if found else Position(), data=corpus.fingerprint)
        self.saved_step = self.position.step
        self.validation = Validation.of(corpus, recipe) if recipe.training.evaluation else None
        self.evaluation: Evaluated | None = None
        # The spec may have lost stages since; the first step enters its own.
        stage = min(self.position.stage, len(recipe.training.stages) - 1)
        self.learner = Learner(recipe.spec, recipe.training, device, stage)
        checkpoints.require_room(run.out, self.learner.model, self.learner.optimizer.state_dtype)
        if found is not None:
            self.learner.restore(found, convert=convert)

    def train(self) -> Finished:
        """Takes the steps that remain. Raises as the function `train` does."""
        self._announce()
        began = perf_counter()
        training = self.recipe.training
        try:
            self._make_up()
            for step in islice(timeline(training), self.position.step, self.recipe.steps):
                self.watch.check()
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
        self._sample()
        write_plot(self.run.plot, self.recipe.spec.name, self.run.rows())
        if self.against and (compared := self.against.all()) is not None:
            self._told(compared)
        return self._told(Finished(self.run.out, self.position.step, seconds, self.evaluation))

    def _announce(self) -> None:
        rows = self.corpus.rows
        self._told(
            Started(
                out=self.run.out,
                name=self.recipe.spec.name,
                device=str(self.learner.device),
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
        self.learner.enter(step.stage)
        batch = self.samples.batch(self.position.sequences, step.batch_size, step.sequence_length)
        if self.against:
            self.against.begin()
        done = self.learner.step(step, batch)
        self.position = Position(
            done.step, done.tokens, self.position.sequences + step.batch_size, step.stage, self.position.data
        )
        self.run.log(self._told(done), self.against.step(done, step.stage) if self.against else None)

    def _make_up(self) -> None:
        """Evaluates where a signal came between a step and its evaluation."""
        step = self.position.step
        recorded = any(row["step"] == step and "val_loss" in row for row in self.run.rows())
        if step > 0 and self._is_due(self.recipe.training.evaluation) and not recorded:
            self._evaluate()

    def _is_due(self, when: schema.Evaluation | schema.Checkpoint | None) -> bool:
        return when is not None and self.position.step % when.every_steps == 0

    def _evaluate(self) -> None:
        step = self.position.step
        if self.validation is None or (self.evaluation is not None and self.evaluation.step == step):
            return
        loss = self.learner.evaluate(self.validation.windows, self.validation.batch, self.watch.check)
        bits_per_byte = loss / log(2) / self.validation.bytes_per_token
        self.evaluation = Evaluated(step, loss, bits_per_byte, self.validation.unigram_loss)
        self.run.log(self._told(self.evaluation))

    def _save(self) -> None:
        if self.position.step == self.saved_step:
            return
        saved = checkpoints.save(
            self.run.checkpoints,
            self.position,
            checkpoints.model_tensors(self.learner.model),
            checkpoints.optimizer_tensors(self.learner.model, self.learner.optimizer),
            marked(self.recipe.spec),
            self.corpus.tokenizer_json,
        )
        self.saved_step = self.position.step
        if (policy := self.recipe.training.checkpoint) is not None:
            checkpoints.prune(self.run.checkpoints, policy.keep_last)
        self._told(Saved(saved.path))

    def _sample(self) -> None:
        """Lets the model go on with the beginning of a held-out window."""
        tokenizer = self.corpus.tokenizer
        end = bpe.end_of_text(tokenizer)
        prompt = [end] if self.validation is None else self.validation.windows[0][:_PROMPT_TOKENS].tolist()
        tokens = sample(
            self.learner.model,
            prompt,
            max_tokens=_SAMPLE_TOKENS,
            seed=self.recipe.training.seed,
            end=end,
            vocabulary=bpe.size(tokenizer),
        )
        # A window of another length each time is not worth compiling for.
        try:
            with torch.compiler.set_stance("force_eager"):
                text = "".join(bpe.decoded(tokenizer, tokens))
        except Refused as diverged:
            self._told(Warned(f"no sample: {diverged}"))
        else:
            self._told(Sampled(tokenizer.decode(prompt), text))

    def _told(self, event: AnyEvent) -> AnyEvent:
        self.watch.observe(event)
        return event


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


@dataclass(frozen=True, slots=True)
class DryRun:
    """One step that left nothing behind, and the most memory that it held, in bytes."""

    step: StepDone
    peak_memory: int


def dry_run(spec: schema.ModelSpec, *, device: str = "cpu", watch: Watch = NOBODY) -> DryRun:
    """Takes the first step of a spec and writes nothing but the cache. Raises as `train` does."""
    recipe = Recipe.of(spec, 1)
    target = require_device(device)
    require_fp8(spec, target)
    samples = _samples(_text(recipe, None, False, watch), recipe)
    with computing(recipe.training.deterministic):
        forget_peak_memory(target)
        learner = Learner(recipe.spec, recipe.training, target)
        first = next(timeline(recipe.training))
        done = learner.step(first, samples.batch(0, first.batch_size, first.sequence_length))
    return DryRun(done, peak_memory(target))


def _newest(run: Run, spec: schema.ModelSpec, allow_changed: bool, watch: Watch) -> Checkpoint | None:
    """The checkpoint to go on from. Raises Refused where the run's spec and this one do not go together."""
    assert run.earlier is not None
    require_compatible(run.earlier, spec, allow_changed=allow_changed)
    found = latest_valid(
        run.checkpoints, lambda path, reason: watch.observe(Warned(f"{path} is passed over: {reason}"))
    )
    if found is None:
        watch.observe(Warned(f"{run.out} has no valid checkpoint: the run starts at step 0"))
    return found


def _nothing_left(run: Run, recipe: Recipe, found: Checkpoint) -> Finished | None:
    """The end of a run that has all its steps and was evaluated after them; None where something remains."""
    step = found.position.step
    evaluated = [row for row in run.rows() if row["step"] == step and row.get("val_loss") is not None]
    if step < recipe.steps or (recipe.training.evaluation and not evaluated):
        return None
    if not run.plot.exists() or run.plot.stat().st_mtime < run.metrics.stat().st_mtime:
        write_plot(run.plot, recipe.spec.name, run.rows())
    return Finished(run.out, step, 0.0, Evaluated(**evaluated[-1]) if evaluated else None, already=True)


def _text(recipe: Recipe, found: Checkpoint | None, allow_changed: bool, watch: Watch) -> Corpus:
    """The tokens to train on: of a run that goes on, by its own tokenizer.

    Raises Refused where they are not those that the run began with, or do not fit the model.
    """
    if isinstance(recipe.tokenizer, schema.TokenizerFile):
        _require_rows(bpe.read(Path(recipe.tokenizer.path)), recipe.spec.model)
    corpus = prepare(recipe.sources, recipe.tokenizer, progress=watch.prepare)
    if found is None or corpus.fingerprint == found.position.data:
        return corpus
    kept = schema.TokenizerFile(type="file", path=str(found.path / TOKENIZER))
    corpus = prepare(recipe.sources, kept, progress=watch.prepare)
    if corpus.fingerprint != found.position.data and not allow_changed:
        raise Refused(
            f"the text of data.sources is not what the run was trained on until step {found.position.step}; "
            "--allow-changed goes on with it"
        )
    return corpus


def _require_rows(tokenizer: Tokenizer, model: schema.Model) -> None:
    if (size := bpe.size(tokenizer)) > model.vocab_size:
        raise Refused(
            f"data.tokenizer: {size:,} tokens do not fit the {model.vocab_size:,} rows of the model's embedding\n"
            f"  help: set model.vocab_size={size}"
        )


def _samples(corpus: Corpus, recipe: Recipe) -> Samples:
    samples = Samples(corpus, recipe.training.seed)
    for length in sorted(recipe.lengths):
        samples.require(length)
    return samples
