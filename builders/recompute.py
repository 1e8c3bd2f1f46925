"""What the backward pass computes again instead of keeping it (arXiv 1604.06174, 2205.05198; `parallelism.recompute`).

Much of what operations keep is cheap to make out of something that is kept anyway. A norm's output is kept by every
product that reads it, though the norm keeps its own input too.

    norm                x kept                  norm(x)                     no product
    swiglu              gate and up kept        silu(gate) * up             no product
    mla_up_projection   latents kept            queries, keys, values       the products out of the latents
    layer               the layer's input kept  everything in the layer     all products of the layer

The first three are regions of a layer (see builders/region.py), the last is torch's checkpoint. Nothing that is chosen
is chosen again: experts of a token and keys of a query are kept, since a product that rounds otherwise could choose
others. Tokens go to the ranks of their experts once more, by the same choice.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from modelspec.builders.attention.indexer import LightningIndexer
from modelspec.builders.attention.mla import MLA
from modelspec.builders.block import Block
from modelspec.builders.ffn.moe import Experts
from modelspec.builders.ffn.router import Router
from modelspec.builders.fp8 import FP8Experts, FP8Linear, FP8SwiGLU, Policy, policy_of
from modelspec.builders.layers import RMSNorm, SwiGLU
from modelspec.builders.mtp import MTPModule
from modelspec.builders.region import Scope, unwatched
from modelspec.kernels.op import Form, form, use
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


def _in_block(block: Block, items: frozenset[Recompute], scope: Scope) -> None:
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
        self.layer, self.choices = layer, choices
        self.kernels: Form = form()

    def __enter__(self) -> None:
        self.layer.repeating = iter(self.choices)
        self._within = ExitStack()
        self._within.enter_context(use(self.kernels))
        self._within.enter_context(unwatched(self.layer.policy))

    def __exit__(self, *failure: object) -> None:
        self.layer.repeating = None
        self._within.close()


_keeping_choices = partial(create_selective_checkpoint_contexts, [torch.ops.aten.topk.default])
