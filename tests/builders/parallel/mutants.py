"""Rules of gradients, counts and norms, each broken on purpose: parity must notice every one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor

from modelspec.builders.parallel.data import Flat
from modelspec.builders.parallel.learner import DistributedLearner
from modelspec.builders.parallel.sharded import Sharded
from modelspec.builders.parallel.stage import Tally
from tests.builders.parallel.layouts import layout


@contextmanager
def replaced(owner: type, name: str, broken: Callable[..., Any]) -> Iterator[None]:
    """A method that is another one while the block runs; `broken` gets the true one first."""
    true = getattr(owner, name)
    setattr(owner, name, lambda self, *args, **options: broken(true, self, *args, **options))
    try:
        yield
    finally:
        setattr(owner, name, true)


def mean_of_experts(true: Callable[..., None], self: Flat) -> None:
    """Experts' gradients as FSDP would scale them by itself: divided by the ranks that have them in common."""
    true(self)
    if any(".experts." in part.name for part in self.parts()):
        self.summed /= self.kind.shard.size * self.kind.replica.size


def mean_of_shards(true: Callable[..., None], self: Sharded) -> None:
    """Gradients divided by their number of shards."""
    true(self)
    for part in self.parts():
        if part.gradient is not None:
            part.gradient.div_(self.kinds[part.name].shard.size)


def counts_here(true: Callable[..., Any], self: DistributedLearner, tally: Tally) -> dict[str, Tensor]:
    """Tokens per expert of this rank alone."""
    return tally.counts


def squares_of_one_stage(
    true: Callable[..., dict[str, float]], self: DistributedLearner, *args: Any
) -> dict[str, float]:
    """A norm of one pipeline rank's gradients."""
    sums = true(self, *args)
    squares = self.local.data.parts()[0].weight.new_zeros(())
    for part in self.local.data.parts():
        if part.counts and part.gradient is not None:
            squares += part.gradient.square().sum() / part.copies
    dist.all_reduce(squares, group=self.mesh.peers.group)
    return sums | {"squares": float(squares)}


def squares_of_copies(true: Callable[..., dict[str, float]], self: DistributedLearner, *args: Any) -> dict[str, float]:
    """A norm in which elements count once for every rank that has them."""
    sums = true(self, *args)
    squares = self.local.data.parts()[0].weight.new_zeros(())
    for part in self.local.data.parts():
        if part.gradient is not None:
            squares += part.gradient.square().sum()
    dist.all_reduce(squares)
    return sums | {"squares": float(squares)}


# By name: the layout in which it shows, what is broken and how, and what must differ.
MUTANTS: dict[str, tuple[tuple[str, ...], type, str, Callable[..., Any], str]] = {
    "experts' gradients averaged": (layout(4, expert=2, zero=1), Flat, "reduce", mean_of_experts, "gradient"),
    "shards' gradients averaged": (layout(4, zero=3), Sharded, "reduce", mean_of_shards, "gradient"),
    "counts of one rank": (layout(4), DistributedLearner, "_counts", counts_here, "weight"),
    "norm of one stage": (
        layout(4, pipeline="1f1b", stages=2),
        DistributedLearner,
        "_sums",
        squares_of_one_stage,
        "norm",
    ),
    "norm of all copies": (layout(4, tensor=2, zero=1), DistributedLearner, "_sums", squares_of_copies, "norm"),
}
