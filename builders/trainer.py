"""Training: one loop over the steps of the timeline.

A run is a pure function of its spec, its text and the number of steps: initial values, the order of text and every
schedule come from the seed and the step alone. So a run that stopped goes on bit for bit as if it had not. What
happens is told to an observer as events; nothing here prints.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from modelspec import schema
from modelspec.builders import checkpoint as checkpoints
from modelspec.builders import tokenizer as bpe
from modelspec.builders.build import require_fp8
from modelspec.builders.checkpoint import TOKENIZER, Checkpoint, Position, latest_valid
from modelspec.builders.corpus import Corpus, prepare
from modelspec.builders.device import computing, forget_peak_memory, peak_memory, require_memory
from modelspec.builders.errors import Refused
from modelspec.builders.events import (
    Evaluated,
    Finished,
    Sampled,
    StepDone,
    Warned,
)
from modelspec.builders.generate import sample
from modelspec.builders.learner import Learner
from modelspec.builders.plot import write_plot
from modelspec.builders.requirements import require_alone
from modelspec.builders.run import Run, marked, opened, require_compatible
from modelspec.builders.session import NOBODY, Recipe, Session, Validation, Watch, prune, samples_of, stage_of
from modelspec.builders.start import require_fit, require_tokenizer, start_from
from modelspec.builders.weights import Weights
from modelspec.plan.planned import Planned
from modelspec.timeline import Step, timeline

_PROMPT_TOKENS, _SAMPLE_TOKENS = 24, 96


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
    require_alone(spec)
    target = require_memory(device)
    require_fp8(spec, target)
    notices = require_fit(start, spec) if start is not None else ()
    with opened(out, resume=resume, overwrite=overwrite) as run, computing(recipe.training.deterministic):
        found = newest(run, spec, allow_changed, watch) if run.earlier else None
        if found is not None and (finished := nothing_left(run, recipe, found)) is not None:
            watch.observe(finished)
            return finished
        corpus = text_of(recipe, found, allow_changed, watch)
        position = found.position if found else Position()
        learner = Learner(recipe.spec, recipe.training, target, stage_of(position, recipe))
        checkpoints.require_room(run.out, learner.model, learner.optimizer.state_dtype)
        if found is not None:
            learner.restore(found, convert=allow_changed)
        session = Alone(run, recipe, corpus, position, watch, planned, learner)
        if start is not None and found is None:
            notices += require_tokenizer(start, corpus.tokenizer)
            for notice in notices:
                watch.observe(Warned(notice))
            start_from(learner.model, start)
        run.begin(spec, corpus.tokenizer_json, session.position.step, overwrite=overwrite)
        return session.train()


class Alone(Session):
    """The run of one process."""

    def __init__(
        self,
        run: Run,
        recipe: Recipe,
        corpus: Corpus,
        position: Position,
        watch: Watch,
        planned: Planned | None,
        learner: Learner,
    ) -> None:
        super().__init__(run, recipe, corpus, position, watch, planned, learner.device)
        self.learner = learner

    def stepped(self, step: Step) -> StepDone:
        self.learner.enter(step.stage)
        batch = self.samples.batch(self.position.sequences, step.batch_size, step.sequence_length)
        if self.against:
            self.against.begin()
        return self.learner.step(step, batch)

    def evaluated(self, validation: "Validation") -> float:
        return self.learner.evaluate(validation.windows, validation.batch, self.watch.check)

    def written(self) -> Checkpoint:
        saved = checkpoints.save(
            self.run.checkpoints,
            self.position,
            checkpoints.model_tensors(self.learner.model),
            checkpoints.optimizer_tensors(self.learner.model, self.learner.optimizer),
            marked(self.recipe.spec),
            self.corpus.tokenizer_json,
        )
        prune(self.run, self.recipe)
        return saved

    def ended(self) -> None:
        self._sample()
        super().ended()

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
            self.told(Warned(f"no sample: {diverged}"))
        else:
            self.told(Sampled(tokenizer.decode(prompt), text))


@dataclass(frozen=True, slots=True)
class DryRun:
    """One step that left nothing behind, and the most memory that it held, in bytes."""

    step: StepDone
    peak_memory: int


def dry_run(spec: schema.ModelSpec, *, device: str = "cpu", watch: Watch = NOBODY) -> DryRun:
    """Takes the first step of a spec and writes nothing but the cache. Raises as `train` does."""
    recipe = Recipe.of(spec, 1)
    require_alone(spec)
    target = require_memory(device)
    require_fp8(spec, target)
    samples = samples_of(text_of(recipe, None, False, watch), recipe)
    with computing(recipe.training.deterministic):
        forget_peak_memory(target)
        learner = Learner(recipe.spec, recipe.training, target)
        first = next(timeline(recipe.training))
        done = learner.step(first, samples.batch(0, first.batch_size, first.sequence_length))
    return DryRun(done, peak_memory(target))


def newest(run: Run, spec: schema.ModelSpec, allow_changed: bool, watch: Watch) -> Checkpoint | None:
    """The checkpoint to go on from. Raises Refused where the run's spec and this one do not go together."""
    assert run.earlier is not None
    require_compatible(run.earlier, spec, allow_changed=allow_changed)
    found = latest_valid(
        run.checkpoints, lambda path, reason: watch.observe(Warned(f"{path} is passed over: {reason}"))
    )
    if found is None:
        watch.observe(Warned(f"{run.out} has no valid checkpoint: the run starts at step 0"))
    return found


def nothing_left(run: Run, recipe: Recipe, found: Checkpoint) -> Finished | None:
    """The end of a run that has all its steps and was evaluated after them; None where something remains."""
    step = found.position.step
    evaluated = [row for row in run.rows() if row["step"] == step and row.get("val_loss") is not None]
    if step < recipe.steps or (recipe.training.evaluation and not evaluated):
        return None
    if not run.plot.exists() or run.plot.stat().st_mtime < run.metrics.stat().st_mtime:
        write_plot(run.plot, recipe.spec.name, run.rows())
    return Finished(run.out, step, 0.0, Evaluated(**evaluated[-1]) if evaluated else None, already=True)


def text_of(recipe: Recipe, found: Checkpoint | None, allow_changed: bool, watch: Watch) -> Corpus:
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
