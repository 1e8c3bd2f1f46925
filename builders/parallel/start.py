"""How a process finds its place: from the environment that torchrun, accelerate or `train --nproc` gives it.

RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are torch's own names. Data travels by NCCL between GPUs and
by gloo between CPUs; words, such as whether a signal came, by gloo in either case.
"""

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from modelspec.builders.errors import EnvironmentFailed, Misuse
from modelspec.builders.parallel.world import World

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class Place:
    """A process among those that a launcher started."""

    rank: int
    world_size: int
    local_rank: int


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
def joined(place: Place, device: str, timeout: timedelta) -> Iterator[World]:
    """The world of a run, as long as the block runs. Raises EnvironmentFailed where the others cannot be reached.

    A collective that waits longer than `timeout` fails.
    """
    gpu = device.startswith("cuda")
    # Where a rank is gone, torch's schedules would print theirs, line by line, on every other.
    logging.getLogger("torch.distributed.pipelining").setLevel(logging.CRITICAL)
    if gpu:
        torch.cuda.set_device(device)
    if not gpu and os.environ.get("MASTER_ADDR") in _LOOPBACK:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        dist.init_process_group(
            "nccl" if gpu else "gloo", rank=place.rank, world_size=place.world_size, timeout=timeout
        )
    except (dist.DistError, ValueError, RuntimeError) as error:
        raise EnvironmentFailed(f"rank {place.rank} cannot join the others at {where}: {_first_line(error)}") from error
    try:
        group = dist.new_group(backend="gloo", timeout=timeout) if gpu else dist.group.WORLD
        assert isinstance(group, dist.ProcessGroup)
        yield World(place.rank, place.world_size, place.local_rank, group)
    except (dist.DistError, RuntimeError) as error:
        if not is_connection(error):
            raise
        raise EnvironmentFailed(
            f"rank {place.rank} lost the others ({_reason(error)}): one of them has ended or hangs, and its own output "
            "says why; --resume goes on from the last checkpoint"
        ) from error
    finally:
        # A group whose members are gone would wait for them.
        if dist.is_initialized():
            dist.destroy_process_group()


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
