"""`train --nproc N`: N processes on this machine, watched by the one that the user started.

Rank 0 has the terminal; what the others say goes to a file each and is shown where one of them fails. A signal goes on
to all, which save together. A rank that dies ends the others: they get the time to say so themselves, and no more.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import monotonic, sleep

import click

# Seconds that ranks have to notice that one of them is gone, and after SIGTERM to end.
_GRACE, _LAST = 10.0, 5.0
_TAIL = 30


def run_processes(arguments: Sequence[str], world: int) -> int:
    """Runs `modelspec ARGUMENTS` as `world` processes and gives the exit code of the whole: 0 if all end well, else
    that of the rank that failed first.
    """
    with tempfile.TemporaryDirectory(prefix="modelspec-") as folder:
        logs = [Path(folder) / f"rank-{rank}.log" for rank in range(world)]
        port = _free_port()
        ranks = [_started(arguments, rank, world, port, log) for rank, log in enumerate(logs)]
        _forward_signals(ranks)
        failed = _watched(ranks)
        if failed is None:
            return 0
        code = ranks[failed].returncode
        _end(ranks)
        if failed > 0:
            click.echo(_tail(logs[failed]), err=True, nl=False)
        if code < 0:
            name = signal.Signals(-code).name
            click.echo(f"rank {failed} was killed by {name}; the other ranks were ended", err=True)
            return 3
        return code


def _started(arguments: Sequence[str], rank: int, world: int, port: int, log: Path) -> "subprocess.Popen[bytes]":
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = os.environ | {name: str(value) for name, value in place.items()}
    # A core for each, unless the user says otherwise: as many threads as cores in every process crawl.
    environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // world, 1)))
    command = [sys.executable, "-m", "modelspec", *arguments]
    if rank == 0:
        return subprocess.Popen(command, env=environment)
    with log.open("wb") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


def _forward_signals(ranks: "Sequence[subprocess.Popen[bytes]]") -> None:
    def forward(number: int, frame: object) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)


def _watched(ranks: "Sequence[subprocess.Popen[bytes]]") -> int | None:
    """Waits until all have ended, or one has failed, and gives that one."""
    while True:
        codes = [process.poll() for process in ranks]
        killed = next((rank for rank, code in enumerate(codes) if code is not None and code < 0), None)
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if killed is not None or failed is not None:
            return killed if killed is not None else failed
        if all(code == 0 for code in codes):
            return None
        sleep(0.05)


def _end(ranks: "Sequence[subprocess.Popen[bytes]]") -> None:
    for wait, number in ((_GRACE, signal.SIGTERM), (_LAST, signal.SIGKILL)):
        end = monotonic() + wait
        while monotonic() < end and any(process.poll() is None for process in ranks):
            sleep(0.05)
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)
    for process in ranks:
        process.wait()


def _tail(log: Path) -> str:
    lines = log.read_text("utf-8", errors="replace").splitlines(keepends=True)
    return "".join(lines[-_TAIL:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
