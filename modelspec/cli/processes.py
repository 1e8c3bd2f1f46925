"""`train --nproc N`: N processes on this machine, watched by the one that the user started.

Rank 0 has the terminal; what the others say goes to a file each, which is shown where one of them fails, and kept in
`logs` of the run. A signal goes on to all, which save together. A rank that dies ends the others: they get the time to
end by themselves, and no more. The socket through which ranks find each other is opened here, on loopback: no other
program can take its port first.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

import click

from modelspec.beat import FOLDER, LISTENER, LOST, Beat

# Seconds that ranks have to notice that one of them is gone, and after SIGTERM to end.
_GRACE, _LAST = 10.0, 5.0
_TAIL = 30
_POLL = 0.05


def run_processes(arguments: Sequence[str], world: int, out: Path | None, stop: Callable[[], int | None]) -> int:
    """Runs `modelspec ARGUMENTS` as `world` processes and gives the exit code of the whole: 0 if all end well, else
    that of the rank that failed first.

    `out` is the folder of the run, None where none is written, and `stop` says which signal came, if one did.
    """
    with tempfile.TemporaryDirectory(prefix="modelspec-") as name:
        folder = Path(name)
        with socket.create_server(("127.0.0.1", 0), backlog=world + 1) as listener:
            ranks = [_started(arguments, rank, world, listener, folder) for rank in range(world)]
        before = signal.signal(signal.SIGUSR1, lambda number, frame: _ask_for_stacks(ranks))
        try:
            ended = _watched(ranks, stop)
            _end([rank.process for rank in ranks])
            return _told(ended, ranks, resumes=out is not None)
        finally:
            signal.signal(signal.SIGUSR1, before)
            for rank in ranks:
                rank.process.kill()
                if out is not None:
                    rank.keep(out)


@dataclass(frozen=True, slots=True)
class Rank:
    """A process, the file that takes what it says, and the one that takes what it is doing."""

    number: int
    process: "subprocess.Popen[bytes]"
    log: Path
    beat: Path

    def last(self) -> str:
        """What it was doing last, in words."""
        try:
            return f" in {Beat.read(self.beat.read_text('utf-8')).text}"
        except (OSError, ValueError, TypeError):
            return " before it met the others"

    def tail(self) -> str:
        """The last lines that it said."""
        lines = self.log.read_text("utf-8", errors="replace").splitlines(keepends=True) if self.log.exists() else []
        return "".join(lines[-_TAIL:])

    def keep(self, out: Path) -> None:
        """Adds what it said to the logs of the run."""
        if self.log.exists() and self.log.stat().st_size and (out / "spec.yaml").exists():
            with suppress(OSError):
                (out / "logs").mkdir(exist_ok=True)
                with (out / "logs" / self.log.name).open("ab") as kept:
                    kept.write(self.log.read_bytes())


def _started(arguments: Sequence[str], rank: int, world: int, listener: socket.socket, folder: Path) -> Rank:
    host, port = listener.getsockname()
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": host, "MASTER_PORT": port}
    environment = os.environ | {name: str(value) for name, value in place.items()} | {FOLDER: str(folder)}
    # A core for each, unless the user says otherwise: as many threads as cores in every process crawl.
    environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // world, 1)))
    command = [sys.executable, "-m", "modelspec", *arguments]
    log = folder / f"rank-{rank}.log"
    if rank == 0:
        environment[LISTENER] = str(listener.fileno())
        process = subprocess.Popen(command, env=environment, pass_fds=[listener.fileno()])
    else:
        with log.open("wb") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    return Rank(rank, process, log, folder / f"rank-{rank}.beat")


def _ask_for_stacks(ranks: Sequence[Rank]) -> None:
    """Passes SIGUSR1 on to the ranks that have met: before, it would end them."""
    for rank in ranks:
        if rank.process.poll() is None and rank.beat.exists():
            rank.process.send_signal(signal.SIGUSR1)


@dataclass(frozen=True, slots=True)
class Ended:
    """The rank that failed first, if one did, and the signal that was passed on, if one was."""

    rank: Rank | None
    signal: int | None


def _watched(ranks: Sequence[Rank], stop: Callable[[], int | None]) -> Ended:
    """Waits until all have ended, or one has failed, and the others had their time. Passes a signal on, once."""
    sent: int | None = None
    first: Rank | None = None
    deadline = float("inf")
    while any(rank.process.poll() is None for rank in ranks) and monotonic() < deadline:
        if sent is None and (sent := stop()) is not None:
            for rank in ranks:
                if rank.process.poll() is None:
                    rank.process.send_signal(sent)
        ends = {rank.number: rank.process.poll() or 0 for rank in ranks}
        failed = [rank for rank in ranks if ends[rank.number] and not _obeys(ends[rank.number], sent)]
        if failed and deadline == float("inf"):
            deadline = monotonic() + _GRACE
        first = first or _cause(failed)
        sleep(_POLL)
    failed = [rank for rank in ranks if rank.process.poll() and not _obeys(rank.process.poll() or 0, sent)]
    return Ended(first or _cause(failed) or next(iter(failed), None), sent)


def _obeys(code: int, sent: int | None) -> bool:
    """Whether a process ended as the signal wanted: with its state saved, or before there was any."""
    return sent is not None and code in (-sent, 128 + sent)


def _cause(failed: Sequence[Rank]) -> Rank | None:
    """Of these the one that was killed, else one that did not just lose another."""
    killed = (rank for rank in failed if rank.process.returncode < 0)
    return next(killed, next((rank for rank in failed if rank.process.returncode != LOST), None))


def _end(processes: "Sequence[subprocess.Popen[bytes]]") -> None:
    for number, wait in ((signal.SIGTERM, _LAST), (signal.SIGKILL, _LAST)):
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)
        end = monotonic() + wait
        while monotonic() < end and any(process.poll() is None for process in processes):
            sleep(_POLL)


def _told(ended: Ended, ranks: Sequence[Rank], *, resumes: bool) -> int:
    """Says who failed first, and gives the exit code of the whole."""
    rank = ended.rank
    if rank is None:
        return 128 + ended.signal if ended.signal is not None and any(r.process.returncode for r in ranks) else 0
    code = rank.process.returncode
    if code < 0:
        name = signal.Signals(-code).name
        after = ", and --resume goes on from the last checkpoint" if resumes else ""
        click.echo(
            f"error: rank {rank.number} was killed by {name}{rank.last()}; the other ranks were ended{after}", err=True
        )
        return 3
    if code == LOST:
        click.echo("error: the ranks lost each other, and none says why\n" + ranks[-1].tail(), err=True)
        return 3
    # What is raised on all ranks, rank 0 has said.
    if rank.number > 0 and ranks[0].process.returncode != code:
        click.echo(f"rank {rank.number} failed{rank.last()}:\n{rank.tail()}", err=True, nl=False)
    return code
