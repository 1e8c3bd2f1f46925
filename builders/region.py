"""A computation that is remembered instead of its result.

An operation keeps what its backward pass reads. Inside of a `Scope`, where that is the output of a `Region`, or was
made inside of one, it keeps a handle; when the backward pass asks for the tensor, the region is computed once more,
from what it took. The graph of the forward pass stays as it is, so gradients are equal to the last bit.

A region may take what another one gave: then that is computed again first. In compiled code torch's checkpoint marks
the same regions, and the compiler does the rest.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from modelspec.builders.fp8 import Policy
from modelspec.kernels.op import Form, form, use

P = ParamSpec("P")
R = TypeVar("R")


class _Given(NamedTuple):
    """A region's output, by its place; the tensor is alive, so that its storage is not another's."""

    region: "Region"
    place: int
    tensor: Tensor


class Scope:
    """A forward pass of one part of the model, and what in it can be computed again."""

    def __init__(self, policy: Policy | None = None) -> None:
        self.policy = policy
        self._open = False
        self._given: dict[int, _Given] = {}
        self._taken: frozenset[int] = frozenset()

    def around(self, forward: Callable[P, R]) -> Callable[P, R]:
        """`forward`, in which operations keep handles of what regions gave. When it ends these tensors are let go."""

        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            self._open = True
            try:
                with saved_tensors_hooks(self.pack, _unpacked):
                    return forward(*args, **kwargs)
            finally:
                self._open = False
                self._given.clear()

        return run

    def again(self, compute: Callable[..., R]) -> Callable[..., R]:
        """`compute` as a region: it takes tensors, alone or in tuples, and gives a tensor or a tuple of them."""

        def run(*args: Any) -> R:
            # Inside of another region there is nothing to remember: that one is computed again as a whole.
            if self._taken or not torch.is_grad_enabled():
                return compute(*args)
            if torch.compiler.is_compiling():
                marked: R = checkpoint(compute, *args, use_reentrant=False)
                return marked
            region = Region(self, compute, args)
            with self._inside(region.taken), saved_tensors_hooks(region.pack, _unpacked):
                out = compute(*args)
            if self._open:
                for place, tensor in enumerate(_tensors(out)):
                    if (storage := _storage(tensor)) not in region.taken:
                        self._given[storage] = _Given(region, place, tensor.detach())
            return out

        return run

    def holds(self, x: Tensor) -> bool:
        """Whether x costs nothing to keep: a region gave it, or the one that runs now takes it."""
        if torch.compiler.is_compiling():
            return False
        storage = _storage(x)
        return storage in self._given or storage in self._taken

    def pack(self, tensor: Tensor) -> "Tensor | Handle":
        """What an operation keeps in the place of a tensor."""
        given = self._given.get(_storage(tensor))
        if given is None or given.tensor.dtype != tensor.dtype:
            # An operation that keeps its own result would otherwise keep itself.
            return tensor if tensor.is_leaf else tensor.detach()
        view = tensor.size(), tensor.stride(), tensor.storage_offset()
        return given.region.handle(_Key("given", given.place), view)

    @contextmanager
    def _inside(self, taken: frozenset[int]) -> Iterator[None]:
        before, self._taken = self._taken, taken
        try:
            yield
        finally:
            self._taken = before

    @contextmanager
    def repeating(self, kernels: Form, taken: frozenset[int]) -> Iterator[None]:
        """For the second time, by the kernels of the first: nobody counts what FP8 loses twice."""
        with use(kernels), unwatched(self.policy), self._inside(taken):
            yield


class _Key(NamedTuple):
    """What a region can bring back: its outputs by their places, and what it saved, in its order."""

    kind: str
    place: int


@dataclass(frozen=True, slots=True)
class Handle:
    """Stands for a tensor that its region can bring back, seen through `view`: size, stride, offset."""

    region: "Region"
    key: _Key
    view: tuple[Any, ...] | None
    number: int


class _Argument(NamedTuple):
    """A tensor that a region takes: kept, or computed again by another region."""

    kept: Tensor | Handle
    requires_grad: bool


class Region:
    """How one computation was done, and from what."""

    def __init__(self, scope: Scope, compute: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._scope, self._compute = scope, compute
        self._kernels: Form = form()
        leaves, self._tree = tree_flatten(args)
        self.taken = frozenset(_storage(leaf) for leaf in leaves if isinstance(leaf, Tensor))
        self._args = [
            _Argument(scope.pack(leaf.detach()), leaf.requires_grad) if isinstance(leaf, Tensor) else leaf
            for leaf in leaves
        ]
        self._packs, self._saved = 0, set[int]()
        self._handles, self._waiting = 0, set[int]()
        self._values: dict[_Key, Tensor] | None = None

    def pack(self, tensor: Tensor) -> Tensor | Handle:
        """What an operation inside of the region keeps: what came from outside as it is, a handle of all else."""
        place = self._packs
        self._packs += 1
        if _storage(tensor) in self.taken or (tensor.is_leaf and tensor.requires_grad):
            return self._scope.pack(tensor)
        self._saved.add(place)
        return self.handle(_Key("saved", place))

    def handle(self, key: _Key, view: tuple[Any, ...] | None = None) -> Handle:
        """A new one."""
        self._handles += 1
        return Handle(self, key, view, self._handles - 1)

    def value(self, handle: Handle) -> Tensor:
        """The tensor that a handle stands for. All that the region gave is there until every handle was asked for."""
        if self._values is None:
            self._values, self._waiting = self._computed(), set(range(self._handles))
        value = self._values[handle.key]
        self._waiting.discard(handle.number)
        if not self._waiting:
            self._values = None
        return value if handle.view is None else value.as_strided(*handle.view)

    def _computed(self) -> dict[_Key, Tensor]:
        leaves = [
            _unpacked(each.kept).detach().requires_grad_(each.requires_grad) if isinstance(each, _Argument) else each
            for each in self._args
        ]
        taken = frozenset(_storage(leaf) for leaf in leaves if isinstance(leaf, Tensor))
        values: dict[_Key, Tensor] = {}
        places = count()

        def collect(tensor: Tensor) -> None:
            if (place := next(places)) in self._saved:
                values[_Key("saved", place)] = tensor.detach()

        with (
            self._scope.repeating(self._kernels, taken),
            torch.enable_grad(),
            saved_tensors_hooks(collect, _unpacked),
        ):
            out = self._compute(*tree_unflatten(leaves, self._tree))
        assert next(places) == self._packs, "a region keeps as many tensors each time"
        for place, tensor in enumerate(_tensors(out)):
            values[_Key("given", place)] = tensor.detach()
        return values


def _unpacked(kept: Tensor | Handle) -> Tensor:
    return kept.region.value(kept) if isinstance(kept, Handle) else kept


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(out: Any) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(out)


@contextmanager
def unwatched(policy: Policy | None) -> Iterator[None]:
    """Nobody counts what FP8 loses."""
    if policy is None:
        yield
        return
    health, policy.health = policy.health, None
    try:
        yield
    finally:
        policy.health = health
