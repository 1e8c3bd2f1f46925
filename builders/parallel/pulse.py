"""What a rank is doing: said by the loop of training, seen in its stack, and told to the other ranks.

The loop names what it begins, a step or a checkpoint, and marks what it finishes inside, a microbatch: all ranks begin
the same in the same order, so their numbers compare. In which collective a rank stands is read off its Python stack,
so that nothing has to say so beforehand.
"""

import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from traceback import walk_tb
from types import FrameType
from typing import TextIO

from modelspec.beat import Beat

_OURS = str(Path(__file__).parents[1])
_TORCH = os.path.join("torch", "distributed", "")
# They hand on to collectives: who called them says more. So do the wrappers of torch.
_PLUMBING = ("collectives.py", "world.py", "watchdog.py", "pulse.py")
_WRAPPERS = ("wrapper", "_wait", "wait")
_NAMED = 8


class Pulse:
    """What this rank is doing, and the file that takes its stacks, also on SIGUSR1: stderr until there is another."""

    def __init__(self) -> None:
        self.begun, self.finished, self.ticks, self.doing = 0, 0, 0, "the start"
        self.stacks: TextIO = sys.stderr
        self.file: Path | None = None

    def begin(self, doing: str) -> None:
        """The rank begins something that all ranks begin, like a step."""
        self.doing, self.finished = doing, 0
        self.begun += 1

    def finish(self) -> None:
        """A part of it is done, like a microbatch."""
        self.finished += 1

    def beat(self, left: str | None = None) -> Beat:
        """Where this rank is now."""
        self.ticks += 1
        where, collective = whereabouts(_stack())
        return Beat(self.begun, self.finished, self.doing, where, collective, self.ticks, left)

    def keep_stacks(self, file: Path) -> None:
        """From now on stacks go to the end of a file."""
        with suppress(OSError):
            file.parent.mkdir(exist_ok=True)
            self.stacks, self.file = file.open("a", encoding="utf-8"), file
            self.listen()

    def listen(self) -> None:
        """Lets SIGUSR1 write the stacks of all threads."""
        # What stands for stderr in a test may have no descriptor.
        with suppress(OSError, ValueError, AttributeError):
            faulthandler.register(signal.SIGUSR1, file=self.stacks, all_threads=True)

    def close(self) -> None:
        """Stacks go to stderr again; a file that none were written to is deleted."""
        if self.file is not None:
            kept, file = self.stacks, self.file
            self.stacks, self.file = sys.stderr, None
            self.listen()
            with suppress(OSError):
                kept.close()
                if not file.stat().st_size:
                    file.unlink()
                    file.parent.rmdir()

    def dump(self) -> None:
        """Writes the stacks of all threads."""
        with suppress(OSError, ValueError, AttributeError):
            self.stacks.write(f"stacks of a rank in {self.beat().text}\n")
            self.stacks.flush()
            faulthandler.dump_traceback(self.stacks, all_threads=True)


def whereabouts(frames: Iterable[FrameType]) -> tuple[str, str | None]:
    """The place in our code, and torch's collective, if it is in one; frames come innermost first."""
    collective, place, fallback = None, None, "the interpreter"
    for frame in frames:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if file.startswith(_OURS):
            here = f"builders{file.removeprefix(_OURS)}:{frame.f_lineno}, {name}"
            if not file.endswith(_PLUMBING):
                return here, collective
            place = place or here
        elif _TORCH in file and collective is None and name not in _WRAPPERS:
            collective = name.strip("_")
        elif fallback == "the interpreter":
            fallback = f"{os.path.basename(file)}:{frame.f_lineno}, {name}"
    return place or fallback, collective


def raised_at(error: BaseException) -> tuple[str, str | None]:
    """Where an error came from, as `whereabouts`."""
    return whereabouts([frame for frame, _ in walk_tb(error.__traceback__)][::-1])


def named(ranks: Sequence[int]) -> str:
    """`rank 3`, or `ranks 0, 1, 2`; of many the first and how many more."""
    shown = ", ".join(map(str, ranks[:_NAMED])) + (f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def _stack() -> Iterator[FrameType]:
    """The frames of the main thread; of the one in a collective, where backward passes have threads of their own."""
    frames = sys._current_frames()
    main = threading.main_thread().ident
    others = [frame for thread, frame in frames.items() if thread not in (main, threading.get_ident())]
    first = frames.get(main) if main is not None else None
    inside = next((each for each in others if _TORCH in each.f_code.co_filename), None)
    if first is not None and (inside is None or _TORCH in first.f_code.co_filename):
        inside = first
    while inside is not None:
        yield inside
        inside = inside.f_back
