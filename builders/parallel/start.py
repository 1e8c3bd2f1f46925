"""How a process finds its place and joins the others: from the environment of torchrun, accelerate or `train --nproc`.

RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are torch's own names. Data travels by NCCL between GPUs and
by gloo between CPUs; words, such as whether a signal came, by gloo in either case. A watchdog sees to it that a rank
that is gone or hangs ends the others, so collectives themselves wait as long as it takes.
"""

import fcntl
import logging
import os
import re
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from modelspec.beat import FOLDER, LISTENER
from modelspec.builders.device import require_device
from modelspec.builders.errors import EnvironmentFailed, Misuse, Stopped
from modelspec.builders.parallel.pulse import Pulse, raised_at
from modelspec.builders.parallel.watchdog import LOST, Watchdog, another
from modelspec.builders.parallel.world import World

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_ALWAYS = timedelta(days=1)
# Machines of a job do not start at once.
_ARRIVAL = timedelta(minutes=2)
_SIOCGIFADDR = 0x8915


@dataclass(frozen=True, slots=True)
class Place:
    """A process among those that a launcher started."""

    rank: int
    world_size: int
    local_rank: int


class Lost(EnvironmentFailed):
    """Other ranks are gone. `speaks`: of all that notice, this is the one to say so."""

    def __init__(self, message: str, speaks: bool) -> None:
        super().__init__(message)
        self.speaks = speaks


def place(environment: Mapping[str, str]) -> Place | None:
    """Where the launcher put this process; None where there was none. Raises Misuse for what is no place."""
    if "WORLD_SIZE" not in environment:
        return None
    numbers = {}
    for name in _NAMES:
        text = environment.get(name, environment.get("RANK", "") if name == "LOCAL_RANK" else "")
        if not text.isdecimal():
            raise Misuse(
                f"the environment says {name}={text!r}, which is no number: start by torchrun, or with --nproc"
            )
        numbers[name] = int(text)
    found = Place(numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"])
    if not found.rank < found.world_size:
        raise Misuse(f"the environment says RANK={found.rank} of WORLD_SIZE={found.world_size}: ranks count from 0")
    return found


def device_of(device: str, place: Place) -> str:
    """The device of this process: of GPUs that all processes of a machine see, the one with its number."""
    return f"cuda:{place.local_rank % max(torch.cuda.device_count(), 1)}" if device == "cuda" else device


@contextmanager
def joined(place: Place, device: str, patience: timedelta, end: Callable[[str | None], None]) -> Iterator[World]:
    """The world of a run, as long as the block runs.

    Raises Misuse where the environment does not say where they meet, EnvironmentFailed where the device is not there
    or the others cannot be reached, and Lost where they are gone. Where no rank gets on for `patience`, `end` is called
    from another thread with what is to be said, None on ranks that say nothing; it ends the process.
    """
    # Where a rank is gone, torch's schedules would print theirs, line by line, on every other.
    logging.getLogger("torch.distributed.pipelining").setLevel(logging.CRITICAL)
    gpu = device.startswith("cuda")
    if gpu:
        torch.cuda.set_device(require_device(device))
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not (address and port):
        raise Misuse(
            "the environment has no MASTER_ADDR or MASTER_PORT, where ranks meet: start by torchrun, or with --nproc"
        )
    if (interface := _interface(address)) is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    try:
        store = _store(place, max(patience, _ARRIVAL))
    except (dist.DistError, ValueError, RuntimeError) as error:
        raise EnvironmentFailed(
            f"rank {place.rank} cannot join the others at {address}:{port}: {_first_line(error)}"
        ) from error
    watchdog = Watchdog(
        another(store),
        place.rank,
        place.world_size,
        Pulse(),
        patience,
        end,
        _holder(f"{address}:{port}"),
        Path(os.environ[FOLDER], f"rank-{place.rank}.beat") if FOLDER in os.environ else None,
    )
    watchdog.pulse.listen()
    watchdog.start()
    try:
        world = _world(place, store, watchdog.pulse, gpu, patience)
        try:
            yield world
        except Stopped:
            _part(world)
            raise
        _part(world)
    except Stopped:
        raise
    except (dist.DistError, RuntimeError) as error:
        if not is_connection(error):
            watchdog.leave(_first_line(error))
            raise
        raise _lost(place.rank, error, watchdog) from error
    except BaseException as error:
        watchdog.leave(_first_line(error))
        raise
    finally:
        watchdog.stop()
        watchdog.pulse.close()
        # A group whose members are gone would wait for them.
        if dist.is_initialized():
            dist.destroy_process_group()


def _store(place: Place, patience: timedelta) -> Store:
    """Where ranks find each other. Under --nproc rank 0 listens on a socket that is open already, on loopback."""
    if place.rank == 0 and (listener := os.environ.get(LISTENER)) is not None:
        return TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            place.world_size,
            is_master=True,
            timeout=patience,
            master_listen_fd=int(listener),
        )
    store, _, _ = next(rendezvous("env://", place.rank, place.world_size, timeout=patience))
    return store


def _holder(where: str) -> str:
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return f"{'the launcher' if by_agent else 'rank 0'}, which holds the store at {where},"


def _world(place: Place, store: Store, pulse: Pulse, gpu: bool, patience: timedelta) -> World:
    # NCCL ends a process whose collective takes too long without a word, so the watchdog comes first.
    timeout = 2 * patience + timedelta(minutes=1) if gpu else _ALWAYS
    dist.init_process_group(
        "nccl" if gpu else "gloo", store=store, rank=place.rank, world_size=place.world_size, timeout=timeout
    )
    group = dist.new_group(backend="gloo", timeout=_ALWAYS) if gpu else dist.group.WORLD
    assert not isinstance(group, int)  # What ranks outside of a new group get.
    return World(place.rank, place.world_size, place.local_rank, group, pulse)


def _part(world: World) -> None:
    """Waits for the others, so that none closes what another still reads. What there was to do is done: that one of
    them has gone already is no failure.
    """
    with suppress(RuntimeError):
        world.barrier()


def _lost(rank: int, error: BaseException, watchdog: Watchdog) -> Lost:
    where, collective = raised_at(error)
    doing = f"{watchdog.pulse.doing}, {collective or 'a collective'} ({where})"
    who, speaks = watchdog.lost()
    watchdog.leave(LOST)
    return Lost(
        f"rank {rank}: {doing} failed, {_reason(error)}: {who}; --resume goes on from the last checkpoint", speaks
    )


def _interface(address: str) -> str | None:
    """The network interface through which an address is reached; None where that cannot be told.

    gloo itself takes that of the machine's own name, which is often one that no other machine reaches.
    """
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))
        mine = probe.getsockname()[0]
        if mine.startswith("127.") and int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:
            return None
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                request = struct.pack("256s", name.encode()[:15])
                if socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24]) == mine:
                    return name
    return None


def is_connection(error: BaseException) -> bool:
    """Whether an error says that another process is gone or silent."""
    words = ("Connection", "connection", "Timed out", "timeout", "Socket", "remote", "NCCL", "GLOO", "gloo")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def _reason(error: BaseException) -> str:
    """The few words of gloo's or NCCL's message that mean something."""
    found = re.search(r"(Connection (?:closed|reset|refused)[\w ]*|[Tt]imed out[\w ]*|Broken pipe)", str(error))
    return found[1].strip().lower() if found else _first_line(error)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
