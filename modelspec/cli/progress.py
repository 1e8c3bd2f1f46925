"""How a training run looks: a live panel on a terminal, plain lines anywhere else.

Both are observers of the trainer's events. Nothing that a model wrote, or that a file holds, may move the cursor:
text from outside is shown with its control characters replaced.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from modelspec.amount import amount_of_bytes
from modelspec.builders.events import (
    Compared,
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
from modelspec.cli.options import amount, size
from modelspec.plan.planned import error

_BARS = "▁▂▃▄▅▆▇█"
_LINES = 50  # Plain lines for the steps of a whole run.
_REFRESH = 0.1


@contextmanager
def shown(console: Console) -> Iterator[Callable[[Event], None]]:
    """An observer that shows events on the console while the block runs."""
    if not console.is_terminal or console.is_dumb_terminal:
        yield Plain(console)
        return
    panel = Panel(console)
    with Live(console=console, auto_refresh=False, transient=True, get_renderable=panel.render) as live:
        panel.live = live
        yield panel


class Terminal(Console):
    """A console whose reader may go away without ending the run."""

    def __init__(self) -> None:
        super().__init__(highlight=False)

    def on_broken_pipe(self) -> None:
        """Says nothing from now on; rich would exit."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Pace:
    """Smoothed speed of the last steps. The first one, which warms up and compiles, counts only until the second."""

    def __init__(self) -> None:
        self.seconds = self.tokens_per_second = 0.0
        self._steps = 0

    def add(self, event: StepDone) -> None:
        """Takes a step into the means."""
        share = 1 / min(max(self._steps, 1), 20)
        self.seconds += (event.seconds - self.seconds) * share
        self.tokens_per_second += (event.tokens_per_second - self.tokens_per_second) * share
        self._steps += 1

    def left(self, steps: int) -> str:
        """Time for so many more steps, as people say it."""
        return spoken(steps * self.seconds)


class Plain:
    """Lines of plain text, about fifty for the steps of a run, whatever its length."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._pace = Pace()
        self._activity = ""
        self._first = self._steps = 0

    def __call__(self, event: Event) -> None:
        for line in self._told(event):
            self._console.print(Text(line), soft_wrap=True)

    def _told(self, event: Event) -> Iterable[str]:
        match event:
            case Preparing(activity=activity) if activity != self._activity:
                self._activity = activity
                yield f"{activity} ..."
            case Started():
                self._first, self._steps = event.first_step, event.steps
                yield from opening(event)
            case StepDone():
                self._pace.add(event)
                every = max(self._steps // _LINES, 1)
                if event.step % every == 0 or event.step in (self._first + 1, self._steps):
                    yield self._line(event)
                if event.skipped:
                    yield skipped(event)
            case Evaluated():
                yield validation(event)
            case Saved(path=path):
                yield f"saved {path}"
            case Warned(message=message):
                yield f"warning: {message}"
            case Sampled():
                yield from sampled(event)
            case Compared():
                yield compared(event)
            case Finished():
                yield from closing(event)
            case _:
                pass

    def _line(self, event: StepDone) -> str:
        parts = [f"step {event.step:>{len(str(self._steps))}}/{self._steps}", f"loss {event.lm_loss:.4f}"]
        if event.mtp_loss is not None:
            parts.append(f"mtp {event.mtp_loss:.4f}")
        parts += [f"grad {event.grad_norm:.3f}", f"lr {event.learning_rate:.2e}"]
        if event.expert_load is not None:
            parts.append(f"load {event.expert_load:.2f}")
        parts += [f"{event.tokens_per_second:,.0f} tokens/s", f"eta {self._pace.left(self._steps - event.step)}"]
        return "  ".join(parts)


class Panel:
    """The run at a glance, redrawn in place; what should stay is printed above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._pace = Pace()
        self._preparing: Preparing | None = None
        self._started: Started | None = None
        self._step: StepDone | None = None
        self._evaluation: Evaluated | None = None
        self._losses: list[float] = []
        self._drawn = 0.0
        self.live: Live | None = None

    def __call__(self, event: Event) -> None:
        match event:
            case Preparing():
                self._preparing = event
            case Started():
                self._started, self._preparing = event, None
                self._say(*opening(event))
            case StepDone():
                self._pace.add(event)
                self._step = event
                self._losses.append(event.lm_loss)
                if event.skipped:
                    self._say(skipped(event))
            case Evaluated():
                self._evaluation = event
            case Warned(message=message):
                self._say(f"warning: {message}")
            case Saved():
                pass
            case Sampled():
                self._clear()
                self._console.print(
                    Text("sample  ", "bold").append(_safe(event.prompt), "dim").append(_safe(event.text), "")
                )
            case Compared():
                self._clear()
                self._say(compared(event))
            case Finished():
                self._clear()
                self._say(*closing(event))
        now = time.monotonic()
        if self.live is not None and now - self._drawn >= _REFRESH:
            self._drawn = now
            self.live.refresh()

    def render(self) -> RenderableType:
        """What the panel shows now."""
        if self._preparing is not None:
            return _bar(_safe(self._preparing.activity), self._preparing.share, f"{self._preparing.share:4.0%}")
        if self._started is None or self._step is None:
            return Text("starting", "dim")
        step, steps = self._step, self._started.steps
        progress = _bar(
            f"step {step.step:,}/{steps:,}",
            step.step / steps,
            f"{self._pace.tokens_per_second:,.0f} tokens/s  {self._pace.left(steps - step.step)} left",
        )
        return Group(progress, self._numbers(step))

    def _numbers(self, step: StepDone) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        table.add_column(justify="right")
        table.add_column(style="cyan")
        curve = "" if self._console.options.ascii_only else sparkline(self._losses, 40)
        table.add_row("loss", f"{step.lm_loss:.3f}", curve)
        if step.mtp_loss is not None:
            table.add_row("mtp loss", f"{step.mtp_loss:.3f}", "")
        table.add_row("grad norm", f"{step.grad_norm:.3f}", "")
        table.add_row("learning rate", f"{step.learning_rate:.2e}", "")
        if step.expert_load is not None:
            table.add_row("expert load", f"{step.expert_load:.2f}", Text("busiest over mean", "dim"))
        if self._evaluation is not None:
            note = f"at step {self._evaluation.step:,}, unigram {self._evaluation.unigram_loss:.3f}"
            table.add_row("validation", f"{self._evaluation.val_loss:.3f}", Text(note, "dim"))
        return table

    def _say(self, *lines: str) -> None:
        for line in lines:
            self._console.print(Text(line))

    def _clear(self) -> None:
        self._started = None
        if self.live is not None:
            self.live.stop()
            self.live = None


def opening(event: Started) -> Iterator[str]:
    """What a run is."""
    yield (f"{event.name}: {size(event.parameters)} on {event.device}, {event.steps:,} steps, into {event.out}")
    yield f"text: {amount(event.training_tokens)} tokens to train on, {amount(event.validation_tokens)} held out"
    if event.unigram_loss is not None:
        yield f"unigram baseline: {event.unigram_loss:.4f} nats per token on the held-out text"
    if event.first_step:
        yield f"resumed after step {event.first_step:,}"


def validation(event: Evaluated) -> str:
    """How good the model is, beside what it must beat."""
    return (
        f"validation after step {event.step:,}: {event.val_loss:.4f} nats per token, "
        f"{event.val_bits_per_byte:.4f} bits per byte (unigram {event.unigram_loss:.4f})"
    )


def skipped(event: StepDone) -> str:
    """That a step changed nothing."""
    return f"warning: step {event.step:,} was skipped: its gradients are not finite"


def sampled(event: Sampled) -> Iterator[str]:
    """Text of the model, its beginning marked off from what it wrote."""
    yield "sample, after the words in brackets:"
    yield f"[{_safe(event.prompt)}]{_safe(event.text)}"


def compared(event: Compared) -> str:
    """The plan beside what came, and by how much it was too high."""
    speed = error(event.planned_tokens_per_second, event.tokens_per_second)
    memory = error(event.planned_memory, event.memory)
    return (
        f"plan for {event.hardware}: {event.planned_tokens_per_second:,.0f} tokens/s, "
        f"measured {event.tokens_per_second:,.0f} ({speed:+.1%}); "
        f"memory {amount_of_bytes(event.planned_memory)}, measured {amount_of_bytes(event.memory)} ({memory:+.1%})"
    )


def closing(event: Finished) -> Iterator[str]:
    """The end of a run."""
    if event.already:
        yield f"{event.out} has all its {event.step:,} steps already"
    else:
        yield f"{event.step:,} steps done in {spoken(event.seconds)}: {event.out}"
    if event.evaluation is not None:
        yield validation(event.evaluation)


def sparkline(values: list[float], width: int) -> str:
    """The course of the values in one line of text: means over equal spans, from low to high."""
    width = min(width, len(values))
    edges = [round(index * len(values) / max(width, 1)) for index in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    span = (high - low) or 1.0
    return "".join(_BARS[min(int((mean - low) / span * len(_BARS)), len(_BARS) - 1)] for mean in means)


def spoken(seconds: float) -> str:
    """A duration: 0:42, 12:03, 3:05:10, 2 days 4:00:00."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
    return f"{days} day{'s' if days > 1 else ''} {clock}" if days else clock


def _bar(label: str, share: float, note: str) -> Table:
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    table.add_column(no_wrap=True, justify="right", style="green")
    table.add_row(label, ProgressBar(total=1.0, completed=share), note)
    return table


def _safe(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
