"""The data axis: gradients summed over ranks, and under ZeRO 1 an optimizer that every rank runs for its share.

ZeRO 1 (arXiv 1910.02054): weights stand whole on every rank, and so do gradients while they are added up; at the end of
a step each rank gets the sums of its share (reduce-scatter), updates that share of the weights, and hands it to the
others (all-gather). That sends as much as summing gradients does, and the moments, and the master weights where the
model computes in a narrower format, are divided by the number of ranks. Without ZeRO gradients are summed everywhere
and every rank makes the same update.

Parameters lie one after the other in flat tensors, so that one collective serves all of a kind: kinds differ in dtype,
in the ranks that have them in common, and in what else their gradients are summed over.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from modelspec import schema
from modelspec.builders.parallel.collectives import all_gather, reduce_scatter
from modelspec.builders.parallel.mesh import Axis
from modelspec.builders.parallel.pieces import Piece


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank updates of a parameter: its place in the whole tensor, weight and gradient in the master's dtype.

    The gradient is None where there is none: before a step, and of what no loss reaches.
    `copies` ranks hold the same elements, this one included; `counts` is False on those of a parameter that stands on
    two pipeline stages, but for the first. Of all that hold the same, one `owns` it.
    """

    name: str
    piece: Piece
    weight: Tensor
    gradient: Tensor | None
    copies: int
    counts: bool = True
    owns: bool = True


class DataParallel(Protocol):
    """How the ranks that share a layout's data axis keep their parameters in step."""

    def parts(self) -> Sequence[Part]:
        """What this rank updates, in the same order on all ranks that have it in common."""
        ...

    def before(self, last: bool) -> None:
        """Hears that a microbatch's passes come, and whether they are the step's last."""
        ...

    def collect(self) -> None:
        """Adds up gradients that a backward pass in two halves left at their parameters."""
        ...

    def reduce(self) -> None:
        """Sums the gradients of a step over ranks; afterwards `Part.gradient` is that of the whole batch."""
        ...

    def publish(self) -> None:
        """Brings updated weights to where they are read."""
        ...

    def clear(self) -> None:
        """Forgets all gradients."""
        ...


@dataclass(frozen=True, slots=True)
class Kind:
    """Parameters that are treated alike: `shard` divides their update, and their gradients are summed over it, over
    `replica`, and over each axis of `sums`. `copies`, `counts` and `owns` are as in Part.
    """

    shard: Axis
    replica: Axis
    sums: tuple[Axis, ...]
    dtype: torch.dtype
    copies: int
    counts: bool = True
    owns: bool = True


@dataclass(frozen=True, slots=True)
class Member:
    """A parameter, `leaf` of a module, with its place in the whole tensor."""

    name: str
    module: nn.Module
    leaf: str
    piece: Piece


class Flat:
    """Parameters of one kind in flat tensors, of which new parameters and their gradients become views.

    `master` is the dtype of updates and of summed gradients. Where parameters have another, the update keeps a copy of
    its share in it.
    """

    def __init__(self, members: Sequence[Member], kind: Kind, master: torch.dtype, device: torch.device) -> None:
        self.kind = kind
        sizes = [member.piece.numel for member in members]
        self.chunk = -(-sum(sizes) // kind.shard.size)
        total = self.chunk * kind.shard.size
        self.weights = torch.zeros(total, dtype=kind.dtype, device=device)
        self.gradients = torch.zeros(total, dtype=master, device=device)
        here = slice(kind.shard.rank * self.chunk, (kind.shard.rank + 1) * self.chunk)
        self.own = self.weights[here]
        self.master = self.own if kind.dtype == master else torch.zeros(self.chunk, dtype=master, device=device)
        # Sums take the place of this rank's own summands.
        self.summed = self.gradients[here]
        self._parts: list[Part] = []
        self._narrow: list[tuple[nn.Parameter, Tensor]] = []
        start = 0
        for member, size in zip(members, sizes, strict=True):
            self._lay(member, start)
            first, last = max(start, here.start), min(start + size, here.stop)
            if first < last:
                mine = slice(first - here.start, last - here.start)
                piece = member.piece.run(first - start, last - start)
                gradient = self.summed[mine] if schema.is_learnt(member.name) else None
                self._parts.append(
                    Part(member.name, piece, self.master[mine], gradient, kind.copies, kind.counts, kind.owns)
                )
            start += size

    def _lay(self, member: Member, start: int) -> None:
        place = slice(start, start + member.piece.numel)
        parameter = nn.Parameter(self.weights[place].view(member.piece.size))
        gradient = self.gradients[place].view(member.piece.size)
        member.module.register_parameter(member.leaf, parameter)
        if parameter.dtype == gradient.dtype:
            parameter.grad = gradient
            return

        parameter.register_post_accumulate_grad_hook(lambda narrow: _widen(narrow, gradient))
        self._narrow.append((parameter, gradient))

    def parts(self) -> Sequence[Part]:
        return self._parts

    def before(self, last: bool) -> None:
        """Gradients are added up until the end of the step."""

    def collect(self) -> None:
        for narrow, gradient in self._narrow:
            _widen(narrow, gradient)

    def reduce(self) -> None:
        kind = self.kind
        if kind.shard.group is not None:
            reduce_scatter(self.summed, self.gradients, kind.shard)
        for axis in (kind.replica, *kind.sums):
            if axis.group is not None:
                dist.all_reduce(self.summed, group=axis.group)

    def publish(self) -> None:
        if self.master is not self.own:
            self.own.copy_(self.master)
        if self.kind.shard.group is not None:
            all_gather(self.weights, self.own.clone(), self.kind.shard)

    def clear(self) -> None:
        self.gradients.zero_()


def _widen(narrow: Tensor, gradient: Tensor) -> None:
    if narrow.grad is not None:
        gradient.add_(narrow.grad)
        narrow.grad = None


class Together:
    """Several kinds as one."""

    def __init__(self, kinds: Iterable[DataParallel]) -> None:
        self.kinds = tuple(kinds)

    def parts(self) -> Sequence[Part]:
        return [part for kind in self.kinds for part in kind.parts()]

    def before(self, last: bool) -> None:
        for kind in self.kinds:
            kind.before(last)

    def collect(self) -> None:
        for kind in self.kinds:
            kind.collect()

    def reduce(self) -> None:
        for kind in self.kinds:
            kind.reduce()

    def publish(self) -> None:
        for kind in self.kinds:
            kind.publish()

    def clear(self) -> None:
        for kind in self.kinds:
            kind.clear()


def flat(members: Iterable[tuple[Member, Kind]], master: torch.dtype, device: torch.device) -> Iterator[Flat]:
    """Parameters sorted by kind, each kind in flat tensors."""
    kinds: dict[Kind, list[Member]] = {}
    for member, kind in members:
        kinds.setdefault(kind, []).append(member)
    for kind, alike in kinds.items():
        yield Flat(alike, kind, master, device)
