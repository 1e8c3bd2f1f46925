"""train: the main job, on a terminal, in a log or under a launcher."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from modelspec.cli.options import allow_outside, overrides, read

if TYPE_CHECKING:
    from modelspec.builders.parallel.world import World
    from modelspec.builders.session import Watch
    from modelspec.builders.trainer import DryRun
    from modelspec.plan.planned import Planned
    from modelspec.resolve import Resolved
    from modelspec.schema import ModelSpec


@click.command(name="train")
@click.argument("spec")
@click.option("--out", metavar="FOLDER", help="Folder of the run. [default: runs/NAME]")
@overrides
@allow_outside
@click.option("--resume", is_flag=True, help="Go on from the newest valid checkpoint in the folder.")
@click.option("--overwrite", is_flag=True, help="Delete the run in the folder and start again.")
@click.option("--allow-changed", is_flag=True, help="Resume although training or number formats changed.")
@click.option("--steps", type=click.IntRange(min=1), help="Optimizer steps in all; schedules stay as they are.")
@click.option("--device", help="Like cpu or cuda:0. [default: a GPU if there is one]")
@click.option("--nproc", type=click.IntRange(min=1), help="Start so many processes here; sets parallelism.world_size.")
@click.option("--world", "--gpus", "world", type=click.IntRange(min=1), help="Set parallelism.world_size.")
@click.option(
    "--hang-timeout",
    type=click.IntRange(min=1),
    default=600,
    show_default=True,
    metavar="SECONDS",
    help="End a run of several processes whose ranks wait for each other for so long.",
)
@click.option("--tensorboard", is_flag=True, help="Write TensorBoard events into the folder.")
@click.option("--init-from", metavar="DIR", help="Start with the weights in DIR, imported or trained.")
@click.option(
    "--plan",
    "plan_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Hold the run against what plan --out wrote; refuse where the spec is another now.",
)
@click.option(
    "--dry-run", is_flag=True, help="Take one step on all ranks, print its time and peak memory, write nothing."
)
def command(
    spec: str,
    out: str | None,
    overrides: tuple[str, ...],
    allow_outside: bool,
    resume: bool,
    overwrite: bool,
    allow_changed: bool,
    steps: int | None,
    device: str | None,
    nproc: int | None,
    world: int | None,
    hang_timeout: int,
    tensorboard: bool,
    init_from: str | None,
    plan_file: Path | None,
    dry_run: bool,
) -> int:
    """Train SPEC: progress, metrics, checkpoints, a plot and a sample.

    SIGINT and SIGTERM save the state and exit with 130 and 143; --resume goes on bit for bit.
    """
    if resume and overwrite:
        raise click.UsageError("--resume and --overwrite exclude each other")
    if init_from is not None and dry_run:
        raise click.UsageError("--dry-run takes a step from initial values; it takes no --init-from")
    if plan_file is not None and dry_run:
        raise click.UsageError("--dry-run takes one step, which warms up; there is nothing to hold against a --plan")
    if out == "":
        raise click.UsageError("--out is empty; it names a folder, like runs/first")
    if nproc is not None and world is not None:
        raise click.UsageError("--nproc and --world exclude each other: both set parallelism.world_size")
    world = world if nproc is None else nproc
    with stop_signals() as stop:
        shorthand = () if world is None else (f"parallelism.world_size={world}",)
        model_spec, resolved = read(spec, (*overrides, *shorthand), allow_outside=allow_outside)
        planned = None if plan_file is None else _planned(plan_file, model_spec, resolved)
        if nproc is not None and nproc > 1 and "WORLD_SIZE" not in os.environ:
            from modelspec.cli.processes import run_processes

            return run_processes(sys.argv[1:], nproc, None if dry_run else _folder(out, model_spec), stop)
        # Of a rank that is gone torch's C++ warns with stacks of its own.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        from modelspec.builders.allocator import keep_freed_memory
        from modelspec.builders.errors import Stopped
        from modelspec.builders.events import Event, Warned
        from modelspec.builders.hf.convert import open_weights
        from modelspec.builders.session import Watch
        from modelspec.builders.track import TensorBoard
        from modelspec.cli.progress import Terminal, shown

        keep_freed_memory()
        board = TensorBoard() if tensorboard and not dry_run else None
        console = Terminal()
        target = device if device is not None else best_device()
        try:
            with shown(console) as show:

                def observe(event: Event) -> None:
                    show(event)
                    if board is not None:
                        board(event)

                watch = Watch(observe, stop)
                if dry_run:
                    return _run(_Trial(model_spec, watch, console.print), target, hang_timeout)
                start = None if init_from is None else open_weights(Path(init_from))
                for notice in () if start is None else start.notices:
                    observe(Warned(notice))
                options = {
                    "steps": steps,
                    "resume": resume,
                    "overwrite": overwrite,
                    "allow_changed": allow_changed,
                    "start": start,
                    "planned": planned,
                    "watch": watch,
                }
                return _run(_Training(model_spec, _folder(out, model_spec), options), target, hang_timeout)
        except Stopped as stopped:
            if os.environ.get("RANK", "0") == "0":
                click.echo("stopped by a signal" + ("" if dry_run else "; --resume goes on from here"), err=True)
            return stopped.exit_code
        finally:
            if board is not None:
                board.close()


def _folder(out: str | None, spec: "ModelSpec") -> Path:
    return Path(out) if out is not None else Path("runs", spec.name)


@dataclass(frozen=True, slots=True)
class _Training:
    """A run in a folder."""

    spec: "ModelSpec"
    out: Path
    options: Mapping[str, Any]

    def alone(self, device: str) -> None:
        from modelspec.builders.trainer import train

        train(self.spec, self.out, device=device, **self.options)

    def together(self, world: "World", device: str) -> None:
        from modelspec.builders.parallel.trainer import train

        train(self.spec, self.out, world, device=device, **self.options)


@dataclass(frozen=True, slots=True)
class _Trial:
    """One step that leaves nothing; `say` takes what it took."""

    spec: "ModelSpec"
    watch: "Watch"
    say: Callable[[str], None]

    def alone(self, device: str) -> None:
        from modelspec.builders.trainer import dry_run

        self.say(f"{_described(dry_run(self.spec, device=device, watch=self.watch))} of memory")

    def together(self, world: "World", device: str) -> None:
        from modelspec.builders.parallel.trainer import dry_run

        tried = dry_run(self.spec, world, device=device, watch=self.watch)
        if world.speaks:
            self.say(f"{_described(tried)} of memory on each of {world.size} ranks")


def _run(job: _Training | _Trial, device: str, hang_timeout: int) -> int:
    """Does it alone, or as one of the processes that a launcher started."""
    from modelspec.beat import FOLDER, LOST
    from modelspec.builders.parallel.start import Lost, device_of, joined, place
    from modelspec.builders.requirements import require_world

    here = place(os.environ)
    require_world(job.spec)
    if here is None or here.world_size == 1:
        job.alone(device)
        return 0

    # Who started the ranks says which one failed first: those that lost it need not.
    watched = FOLDER in os.environ

    def end(words: str | None) -> None:
        if words is not None:
            # The panel of a terminal hides the cursor.
            click.echo(("\x1b[?25h\n" if sys.stderr.isatty() else "") + f"error: {words}", err=True)
        os._exit(3 if words is not None or not watched else LOST)

    mine = device_of(device, here)
    try:
        with joined(here, mine, timedelta(seconds=hang_timeout), end) as world:
            job.together(world, mine)
    except Lost as lost:
        if lost.speaks and not watched:
            raise
        return LOST if watched else lost.exit_code
    return 0


def _planned(file: Path, spec: "ModelSpec", resolved: "Resolved") -> "Planned":
    """What was planned of this spec. Raises SpecError for no plan, and for one of another spec."""
    from modelspec.plan.saved import read_plan

    saved = read_plan(file)
    saved.require(spec, resolved)
    return saved.planned


@contextmanager
def stop_signals() -> Iterator[Callable[[], int | None]]:
    """Whether SIGINT or SIGTERM came while the block runs: the number of the first, or None.

    The handlers are set here because a job in the background starts with SIGINT ignored. Later signals change
    nothing: the first one is being obeyed.
    """
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: came[0] if came else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _described(tried: "DryRun") -> str:
    step = tried.step
    return f"one step of {step.tokens:,} tokens: {step.seconds:.2f} s, at most {tried.peak_memory / 2**30:.2f} GiB"


def best_device() -> str:
    """A GPU if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
