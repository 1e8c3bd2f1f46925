"""Training on many processes: the loop of builders/session.py, taken by all ranks in step.

Rank 0 owns the folder of the run and writes what is written once; checkpoints are written by all. What could differ
between ranks, which checkpoint is the newest, whether a signal came, is asked of one and told to all.
"""

import json
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from modelspec import schema
from modelspec.builders.build import require_fp8
from modelspec.builders.checkpoint import SPEC, TOKENIZER, Checkpoint, Position, open_checkpoint
from modelspec.builders.corpus import Corpus
from modelspec.builders.device import computing, forget_peak_memory, peak_memory, require_memory
from modelspec.builders.errors import Stopped
from modelspec.builders.events import Evaluated, Event, Finished, HeldAgainst, StepDone, Warned
from modelspec.builders.files import require_free
from modelspec.builders.parallel.learner import DistributedLearner
from modelspec.builders.parallel.saving import bytes_of
from modelspec.builders.parallel.world import World
from modelspec.builders.run import Run, marked, opened
from modelspec.builders.session import (
    NOBODY,
    AnyEvent,
    Recipe,
    Session,
    Validation,
    Watch,
    prune,
    samples_of,
    stage_of,
)
from modelspec.builders.start import require_fit, require_tokenizer
from modelspec.builders.trainer import DryRun, newest, nothing_left, text_of
from modelspec.builders.weights import Weights
from modelspec.plan.planned import Planned
from modelspec.timeline import Step, timeline


def train(
    spec: schema.ModelSpec,
    out: Path,
    world: World,
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
    """As builders/trainer.py's `train`, called on every rank of `world`, which is the spec's.

    What is raised on one rank is raised on all.
    """
    recipe = Recipe.of(spec, steps)
    target = require_memory(device)
    require_fp8(spec, target)
    notices = require_fit(start, spec) if start is not None else ()
    run = Run(out)
    with ExitStack() as held, computing(recipe.training.deterministic):

        def open_run() -> str:
            nonlocal run
            run = held.enter_context(opened(out, resume=resume, overwrite=overwrite))
            found = newest(run, spec, allow_changed, watch) if run.earlier else None
            finished = nothing_left(run, recipe, found) if found is not None else None
            if finished is not None:
                watch.observe(finished)
            return json.dumps([found and str(found.path), finished is not None])

        path, finished = json.loads(world.first(open_run))
        found = None if path is None else open_checkpoint(Path(path), digests=False)
        if finished:
            assert found is not None
            return Finished(out, found.position.step, 0.0, None, already=True)
        world.pulse.begin("preparing text")
        corpus = _text(recipe, found, allow_changed, watch, world)
        world.pulse.begin("building the model")
        position = found.position if found else Position()
        learner = DistributedLearner(spec, recipe.training, target, stage_of(position, recipe))
        world.first(partial(require_free, out, bytes_of(learner.contents())))
        if found is not None:
            world.together(lambda: learner.restore(found, convert=allow_changed))
        elif start is not None:
            notices += require_tokenizer(start, corpus.tokenizer)
            learner.start_from(start)
        session = Together(run, recipe, corpus, position, watch, planned, learner, world)
        if found is None and world.speaks:
            for notice in notices:
                watch.observe(Warned(notice))
        world.first(partial(run.begin, spec, corpus.tokenizer_json, session.position.step, overwrite=overwrite))
        world.pulse.keep_stacks(run.logs / f"rank-{world.rank}.log")
        return session.train()


def dry_run(spec: schema.ModelSpec, world: World, *, device: str = "cpu", watch: Watch = NOBODY) -> DryRun:
    """As builders/trainer.py's `dry_run`, called on every rank of `world`: memory is that of the rank with most."""
    recipe = Recipe.of(spec, 1)
    target = require_memory(device)
    require_fp8(spec, target)
    world.pulse.begin("preparing text")
    samples = samples_of(_text(recipe, None, False, watch, world), recipe)
    with computing(recipe.training.deterministic):
        forget_peak_memory(target)
        world.pulse.begin("building the model")
        learner = DistributedLearner(recipe.spec, recipe.training, target)
        first = next(timeline(recipe.training))
        rows = learner.rows(first.batch_size)
        world.pulse.begin("step 1")
        done = learner.step(first, samples.batch(rows.start, len(rows), first.sequence_length))
    return DryRun(done, world.largest(peak_memory(target)))


class Together(Session):
    """The run of many processes, as one of them sees it."""

    def __init__(
        self,
        run: Run,
        recipe: Recipe,
        corpus: Corpus,
        position: Position,
        watch: Watch,
        planned: Planned | None,
        learner: DistributedLearner,
        world: World,
    ) -> None:
        super().__init__(run, recipe, corpus, position, watch, planned, learner.device)
        self.learner, self.world = learner, world
        self._watch_stages()

    def _watch_stages(self) -> None:
        """A microbatch that went through a stage shows that this rank gets on."""
        for stage in self.learner.local.stages.values():
            stage.register_forward_hook(lambda *_: self.world.pulse.finish())

    def stepped(self, step: Step) -> StepDone:
        self.world.pulse.begin(f"step {step.index + 1}")
        if step.stage != self.learner.stage:
            self._enter(step.stage)
        rows = self.learner.rows(step.batch_size)
        batch = self.samples.batch(self.position.sequences + rows.start, len(rows), step.sequence_length)
        if self.against:
            self.against.begin()
        return self.learner.step(step, batch)

    def _enter(self, stage: int) -> None:
        """Another stage may have another layout: the state goes through a checkpoint."""
        saved = self.written()
        self.learner = DistributedLearner(self.recipe.spec, self.recipe.training, self.device, stage)
        self._watch_stages()
        self.world.together(lambda: self.learner.restore(saved, convert=False))

    def evaluated(self, validation: Validation) -> float:
        self.world.pulse.begin(f"the evaluation after step {self.position.step}")
        first = next(timeline(self.recipe.training))
        return self.learner.evaluate(self._cut(validation), first.batch_size)

    def _cut(self, validation: Validation) -> NDArray[np.int64]:
        """Windows as long as the ranks that share a sequence can divide."""
        context, tensor = self.learner.mesh.context.size, self.learner.mesh.tensor.size
        parts = tensor * (2 * context if context > 1 else 1)
        length = (validation.windows.shape[1] - 1) // parts * parts
        return validation.windows[:, : length + 1]

    def written(self) -> Checkpoint:
        self.world.pulse.begin(f"the checkpoint of step {self.position.step}")
        texts = {SPEC: marked(self.recipe.spec), TOKENIZER: self.corpus.tokenizer_json}
        saved = self.learner.save(self.run.checkpoints, self.position, texts, self.world)
        if self.world.speaks:
            prune(self.run, self.recipe)
        return saved

    def check(self) -> None:
        if signal_number := self.world.largest(self.watch.stop() or 0):
            raise Stopped(signal_number)

    def has_evaluated(self) -> bool:
        return self.world.first(lambda: str(super(Together, self).has_evaluated())) == "True"

    def log(self, event: StepDone | Evaluated, held: HeldAgainst | None = None) -> None:
        self.world.first(partial(super().log, event, held))

    def told(self, event: AnyEvent) -> AnyEvent:
        if self.world.speaks:
            self.watch.observe(event)
        return event

    def ended(self) -> None:
        self.world.first(super().ended)


def _text(recipe: Recipe, found: Checkpoint | None, allow_changed: bool, watch: Watch, world: World) -> Corpus:
    """The tokens to train on. One rank of a machine makes them, the others find them in the cache."""
    corpus: list[Corpus] = []
    stopped = 0

    def observe(event: Event) -> None:
        world.pulse.finish()
        if world.speaks:
            watch.observe(event)

    def prepare() -> None:
        nonlocal stopped
        try:
            corpus.append(text_of(recipe, found, allow_changed, replace(watch, observe=observe)))
        except Stopped as end:
            stopped = end.exit_code - 128

    for mine in (world.local_rank == 0, world.local_rank != 0):
        world.together(prepare if mine else lambda: None)
        if signal_number := world.largest(stopped):
            raise Stopped(signal_number)
    return corpus[0]
