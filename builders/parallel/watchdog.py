"""Ends a run whose ranks wait for each other in vain, and says which of them is behind, and in what.

Once a second every rank writes its beat into the store and adds one to a number of all ranks' if it has got on since.
Where that number stands still for too long no rank gets on: a hang. All see it, each writes its stacks, one says what
it was, and all end: the main thread stands in a collective and cannot be asked to.

    silent     stopped, dead or out of reach: its beats do not come any more
    behind     alive, and has begun less than the others, or is the only one that is in no collective

Reading and writing has a thread of its own, since a store behind a cut link never answers; who judges never asks it.
"""

import json
import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from time import monotonic, sleep
from typing import Any, TypeVar, cast

from torch._C._distributed_c10d import Store

from modelspec.beat import Beat
from modelspec.builders.parallel.pulse import Pulse, named

Answer = TypeVar("Answer")

# Seconds: between beats, until a rank without one is silent, for an answer of the store, and for the others' stacks.
_INTERVAL, _SILENT, _ASKED, _STACKS = 1.0, 5.0, 5.0, 3.0
_RESUME = "--resume goes on from the last checkpoint"


class Watchdog:
    """Watches the ranks of a run from one of them. `store` is a connection of its own.

    `end` is called, from a thread, with what is to be said, None on ranks that say nothing, and ends the process.
    `file`, if any, takes the newest beat, for whoever started this process.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        pulse: Pulse,
        patience: timedelta,
        end: Callable[[str | None], None],
        holder: str,
        file: Path | None = None,
    ) -> None:
        self.store, self.rank, self.size, self.pulse, self.end = store, rank, size, pulse, end
        self.patience, self.holder, self.file = patience.total_seconds(), holder, file
        self.interval = min(_INTERVAL, self.patience / 5)
        self.moved, self.closed = monotonic(), False
        self._stop, self._over = threading.Event(), threading.Event()
        self._writing, self._parent = threading.Lock(), os.getppid()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._judge)]

    def start(self) -> None:
        """Starts to watch, until `stop`. The threads do not keep a process alive that has ended."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends watching."""
        self._stop.set()
        self._over.set()
        # A thread that comes back from the store while the interpreter ends would end it badly.
        for thread in self._threads:
            thread.join(2 * _INTERVAL)

    def leave(self, why: str) -> None:
        """Tells the other ranks why this one ends. Says nothing where the store is out of reach."""
        beat = self.pulse.beat(left=why)
        self._stop.set()
        self._over.set()
        self._keep(beat)

        def write() -> None:
            with self._writing:
                self.store.set(_key(self.rank), beat.dumped())

        _within(_ASKED, write)

    def lost(self) -> tuple[str, bool]:
        """Who is gone, in words, and whether it is on this rank to say so; for one whose collective has failed."""
        self._over.set()
        found = _within(_SILENT + _ASKED, self._gone)
        return found if found is not None else (f"{self.holder} does not answer", True)

    def _gone(self) -> tuple[str, bool]:
        store = another(self.store)
        beats = self._beats(store, until=lambda beats: any(_has_failed(beat) for beat in beats.values()))
        ended = [
            f"rank {rank} has ended in {beat.doing}: {beat.left}" for rank, beat in beats.items() if _has_failed(beat)
        ]
        silent = [rank for rank in range(self.size) if rank not in beats]
        # Where one says why it has failed, nobody waited for the others' beats.
        words = "; ".join(ended) or (f"{named(silent)} {_are(silent)} gone" if silent else "")
        return words or "no rank says why", store.add("lost", 1) == 1

    def _beat(self) -> None:
        told, total, orphaned = (0, 0), -1, False
        while not self._stop.is_set():
            beat = self.pulse.beat()
            self._keep(beat)
            now = (beat.begun, beat.finished)
            try:
                with self._writing:
                    if self._stop.is_set():
                        return
                    self.store.set(_key(self.rank), beat.dumped())
                    if (moved := self.store.add("moved", int(now != told))) != total:
                        total, self.moved = moved, monotonic()
                told = now
            except RuntimeError:
                self.closed = True
                return
            if os.getppid() != self._parent and not orphaned:
                # Who started the ranks is gone: they save and end, as if it had sent them the signal.
                orphaned = True
                os.kill(os.getpid(), signal.SIGTERM)
            self._stop.wait(self.interval)

    def _keep(self, beat: Beat) -> None:
        if self.file is not None:
            with suppress(OSError):
                self.file.write_text(beat.dumped(), "utf-8")

    def _judge(self) -> None:
        closed: float | None = None
        while not self._over.wait(self.interval):
            if self.closed and closed is None:
                closed = monotonic()
            # The collective that the main thread is in fails too, in a moment: it says more.
            if closed is not None and monotonic() - closed > 2 * _ASKED:
                self._finish(f"rank {self.rank} in {self.pulse.beat().text}: {self.holder} is gone; {_RESUME}")
                return
            if monotonic() - self.moved > self.patience:
                self._finish(self._verdict())
                return

    def _verdict(self) -> str | None:
        """What to say, None where another rank does."""
        self.pulse.dump()
        found = _within(_SILENT + _ASKED, self._agreed)
        if found is None:
            return (
                f"rank {self.rank}: no progress for {self.patience:g} s in {self.pulse.beat().text}, and {self.holder} "
                f"does not answer; {self._stacks()}{_RESUME}"
            )
        return found[1] if found[0] == self.rank else None

    def _agreed(self) -> tuple[int, str]:
        """The rank that speaks, and what it says; the first to come here finds it out."""
        # Beats go on meanwhile, over the other connection.
        store = another(self.store)
        if store.add("hung", 1) == 1:
            beats = self._beats(store, until=lambda beats: len(beats) == self.size)
            words = f"no progress for {self.patience:g} s: {described(beats, self.size)}; {self._stacks()}{_RESUME}"
            store.set("verdict", json.dumps([min(beats, default=self.rank), words]))
        store.set_timeout(timedelta(seconds=_SILENT + _ASKED))
        rank, words = json.loads(store.get("verdict"))
        return rank, words

    def _stacks(self) -> str:
        return f"each rank's stacks are in {self.pulse.file.parent}; " if self.pulse.file is not None else ""

    def _finish(self, words: str | None) -> None:
        if self._over.is_set():
            return
        # Others write their stacks; who speaks ends first, so that its words are those of the first failure.
        sleep(_STACKS / 2 if words is not None else _STACKS)
        self.end(words)

    def _beats(self, store: Store, until: Callable[[dict[int, Beat]], bool]) -> dict[int, Beat]:
        """Beats of the ranks that are not silent. Waits until enough are there, or the rest is silent."""
        before = {rank: beat.tick for rank, beat in self._read(store).items()}
        end = monotonic() + _SILENT
        while True:
            found = {
                rank: beat
                for rank, beat in self._read(store).items()
                if rank == self.rank or beat.left is not None or beat.tick != before.get(rank)
            }
            if until(found) or monotonic() > end:
                return found
            sleep(self.interval / 2)

    def _read(self, store: Store) -> dict[int, Beat]:
        keys = {rank: _key(rank) for rank in range(self.size)}
        there = {rank: key for rank, key in keys.items() if store.check([key])}
        return {rank: Beat.read(store.get(key).decode()) for rank, key in there.items()}


def another(store: Store) -> Store:
    """Another connection to a store, for another thread: one waits while an answer to another is due."""
    connected: Store = cast(Any, store).clone()
    return connected


def described(beats: dict[int, Beat], size: int) -> str:
    """Which ranks are behind and which wait, from the beats of those that are not silent."""
    silent = [rank for rank in range(size) if rank not in beats]
    alive = {rank: beat for rank, beat in beats.items() if beat.left is None}
    ended = [rank for rank, beat in beats.items() if beat.left is not None]
    parts = [f"{named(silent)} {_are(silent)} silent, stopped or out of reach"] if silent else []
    if ended:
        parts.append(f"{named(ended)} {'have' if len(ended) > 1 else 'has'} ended")
    behind = _behind(alive) if not parts else []
    waiting = [rank for rank in alive if rank not in behind]
    for word, ranks in (("behind", behind), ("waiting", waiting)):
        for text in dict.fromkeys(alive[rank].text for rank in ranks):
            same = [rank for rank in ranks if alive[rank].text == text]
            parts.append(f"{named(same)} {_are(same)} {word} in {text}")
    return "; ".join(parts)


def _behind(alive: dict[int, Beat]) -> list[int]:
    least = min((beat.begun for beat in alive.values()), default=0)
    late = [rank for rank, beat in alive.items() if beat.begun == least]
    if len(late) < len(alive):
        return late
    busy = [rank for rank, beat in alive.items() if beat.collective is None]
    return busy if busy else []


def _has_failed(beat: Beat) -> bool:
    return beat.left is not None and beat.left != LOST


# Why a rank ends that only lost the others: no reason for others.
LOST = "it lost the others"


def _within(seconds: float, ask: Callable[[], Answer]) -> Answer | None:
    """What `ask` gives; None where it fails or takes longer."""
    answers: list[Answer] = []

    def work() -> None:
        with suppress(RuntimeError, ValueError, OSError):
            answers.append(ask())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def _key(rank: int) -> str:
    return f"beat/{rank}"


def _are(ranks: Sequence[int]) -> str:
    return "are" if len(ranks) > 1 else "is"
