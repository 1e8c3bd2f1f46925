"""What ranks decide together: one answer for all, and a failure that is everybody's.

A rank that fails alone leaves the others waiting in a collective that never ends. So whatever may fail on one rank, a
disk, a file, a signal, is done through here: afterwards all ranks go on, or all raise, and the message names the rank.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from modelspec.builders.errors import EnvironmentFailed, Misuse, Refused
from modelspec.builders.parallel.pulse import Pulse

Known = (EnvironmentFailed, Misuse, Refused)


@dataclass(frozen=True, slots=True)
class World:
    """This process among all of a run. `group` is one of CPU tensors: words, not data; None where it is alone.
    `pulse` is told what this process does, for a watchdog.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    group: dist.ProcessGroup | None = None
    pulse: Pulse = field(default_factory=Pulse)

    @property
    def speaks(self) -> bool:
        """Whether this is the rank that writes what a run writes once."""
        return self.rank == 0

    def first(self, work: Callable[[], str | None]) -> str:
        """What rank 0's work gives, on all ranks, if it gives something. What it raises is raised everywhere."""
        if self.size == 1:
            return work() or ""
        failure: Exception | None = None
        answer = ""
        if self.speaks:
            try:
                answer = work() or ""
            except Known as error:
                failure = error
        self._agree(failure)
        return self._told(answer, 0)

    def together(self, work: Callable[[], None]) -> None:
        """Every rank's work. Where it fails on one, all raise: that one its error, the others the same from there."""
        failure: Exception | None = None
        try:
            work()
        except Known as error:
            failure = error
        self._agree(failure)

    def largest(self, value: int) -> int:
        """The largest of all ranks' values."""
        if self.size == 1:
            return value
        found = torch.tensor(value)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.group)
        return int(found)

    def total(self, values: Tensor) -> Tensor:
        """The sum of all ranks' values, a tensor on the CPU; in place."""
        if self.size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.size > 1:
            dist.barrier(group=self.group)

    def _agree(self, failure: Exception | None) -> None:
        where = self.largest(-1 if failure is None else self.rank)
        if where < 0:
            return
        kind = self.largest(-1 if failure is None or where != self.rank else _kind(failure))
        message = self._told("" if failure is None else str(failure), where) if self.size > 1 else ""
        if failure is not None:
            raise failure
        raise Known[kind](f"rank {where}: {message}")

    def _told(self, text: str, by: int) -> str:
        """A rank's text, on all ranks."""
        content = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8)
        length = torch.tensor(len(text.encode()))
        dist.broadcast(length, by, group=self.group)
        if self.rank != by:
            content = torch.empty(max(int(length), 1), dtype=torch.uint8)
        dist.broadcast(content, by, group=self.group)
        return bytes(content.tolist())[: int(length)].decode()


def _kind(failure: Exception) -> int:
    return next(index for index, known in enumerate(Known) if isinstance(failure, known))
