"""What the backward pass computes again instead of keeping it (arXiv 1604.06174, 2205.05198; `parallelism.recompute`).

An operation keeps what its backward pass reads, and much of that is cheap to make out of something else that is kept
anyway. A norm's output is kept by every product that reads it, though the norm keeps its own input too. So a `Region`
remembers how its output was computed, and from what; where an operation would keep the output, or something inside of
the region, it keeps a handle, and when the backward pass asks for the tensor the region is computed once more:

    norm                x kept                  norm(x)                     no product
    swiglu              gate and up kept        silu(gate) * up             no product
    mla_up_projection   latents kept            queries, keys, values       the products out of the latents
    layer               the layer's input kept  everything in the layer     all products of the layer

The graph of the forward pass stays as it is, so gradients are equal to the last bit. Nothing that is chosen is chosen
again: experts of a token and keys of a query are kept, since a product that rounds otherwise could choose others.

In compiled layers torch's checkpoint marks the same regions, and the compiler does the rest.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from modelspec.builders.attention.indexer import LightningIndexer
from modelspec.builders.attention.mla import MLA
from modelspec.builders.block import Block
from modelspec.builders.ffn.moe import Experts
from modelspec.builders.ffn.router import Router
from modelspec.builders.fp8 import FP8Experts, FP8Linear, FP8SwiGLU, Policy, policy_of
from modelspec.builders.layers import RMSNorm, SwiGLU
from modelspec.builders.mtp import MTPModule
from modelspec.kernels.op import form, use
from modelspec.schema.parallelism import Recompute

P = ParamSpec("P")
R = TypeVar("R")


def recompute(model: nn.Module, items: Iterable[Recompute]) -> None:
    """Lets the model, or a stage of one, compute again what `items` name. FP8 layers must be in place already."""
    wanted, policy = frozenset(items), policy_of(model)
    if not wanted:
        return
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        if "layer" in wanted:
            _Layer(policy).install(block)
        else:
            _in_block(block, wanted, Scope(policy))
    if "norm" in wanted:
        _outside_blocks(model, policy)


def _in_block(block: Block, items: frozenset[Recompute], scope: "Scope") -> None:
    block.forward = scope.around(block.forward)  # type: ignore[method-assign]
    for module in block.modules():
        match module:
            case RMSNorm() if "norm" in items:
                module.forward = scope.again(module.forward)  # type: ignore[method-assign]
            case MLA() if "mla_up_projection" in items:
                if module.spec.q_lora_rank is not None:
                    module.queries = scope.again(module.queries)  # type: ignore[method-assign]
                module.positioned = scope.again(module.positioned)  # type: ignore[method-assign]
                module.keys_values = scope.again(module.keys_values)  # type: ignore[method-assign]
            case FP8Experts() | FP8SwiGLU():
                pass  # They compute their activation again by themselves.
            case SwiGLU() | Experts() if "swiglu" in items:
                module.gated = scope.again(module.gated)
            case FP8Linear():
                module.kept_elsewhere = scope.holds
            case _:
                pass


def _outside_blocks(model: nn.Module, policy: Policy | None) -> None:
    """The final norm and those of multi-token prediction."""
    mtp = [module for module in model.modules() if isinstance(module, MTPModule)]
    for module in mtp:
        scope = Scope(policy)
        module.joined = scope.again(module.joined)  # type: ignore[method-assign]
        module.entry = scope.around(module.entry)  # type: ignore[method-assign]
        if isinstance(module.proj, FP8Linear):
            module.proj.kept_elsewhere = scope.holds
    for norm in [getattr(owner, "norm", None) for owner in (model, *mtp)]:
        if isinstance(norm, RMSNorm):
            norm.forward = Scope(policy).again(norm.forward)  # type: ignore[method-assign]


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
            return tensor
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
    def repeating(self, kernels: Any, taken: frozenset[int]) -> Iterator[None]:
        """For the second time, by the kernels of the first: nobody counts what FP8 loses twice."""
        with use(kernels), _unwatched(self.policy), self._inside(taken):
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
        self._scope, self._compute, self._kernels = scope, compute, form()
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
def _unwatched(policy: Policy | None) -> Iterator[None]:
    """Nobody counts what FP8 loses."""
    if policy is None:
        yield
        return
    health, policy.health = policy.health, None
    try:
        yield
    finally:
        policy.health = health


class _Layer:
    """A layer that keeps its input and its choices, and is computed again as a whole."""

    def __init__(self, policy: Policy | None) -> None:
        self.policy = policy
        self.making: list[Tensor] | None = None
        self.repeating: Iterator[Tensor] | None = None

    def install(self, block: Block) -> None:
        """Wraps the block and whatever chooses in it."""
        block.forward = self._again(block.forward)  # type: ignore[method-assign]
        for module in block.modules():
            if isinstance(module, Router | LightningIndexer):
                module.choose = self._once(module.choose)  # type: ignore[method-assign]

    def _again(self, forward: Callable[P, R]) -> Callable[P, R]:
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            contexts = _keeping_choices if torch.compiler.is_compiling() else self._contexts
            # No layer draws random numbers.
            out: R = checkpoint(
                partial(forward, **kwargs), *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
            )
            return out

        return run

    def _once(self, choose: Callable[P, Tensor]) -> Callable[P, Tensor]:
        def chosen(*args: P.args, **kwargs: P.kwargs) -> Tensor:
            if self.repeating is not None:
                return next(self.repeating)
            choice = choose(*args, **kwargs)
            if self.making is not None:
                self.making.append(choice)
            return choice

        return chosen

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        choices: list[Tensor] = []
        return self._first(choices), _Repeated(self, choices)

    @contextmanager
    def _first(self, choices: list[Tensor]) -> Iterator[None]:
        self.making = choices
        try:
            yield
        finally:
            self.making = None


class _Repeated(AbstractContextManager[None]):
    """The layer computed again, each time that it is entered."""

    def __init__(self, layer: _Layer, choices: list[Tensor]) -> None:
        self.layer, self.choices, self.kernels = layer, choices, form()

    def __enter__(self) -> None:
        self.layer.repeating = iter(self.choices)
        self._within = ExitStack()
        self._within.enter_context(use(self.kernels))
        self._within.enter_context(_unwatched(self.layer.policy))

    def __exit__(self, *failure: object) -> None:
        self.layer.repeating = None
        self._within.close()


_keeping_choices = partial(create_selective_checkpoint_contexts, [torch.ops.aten.topk.default])
