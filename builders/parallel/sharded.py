"""ZeRO 2 and 3: gradients, and under 3 weights too, divided between the ranks that have them in common (FSDP2).

torch's `fully_shard` (arXiv 2304.11277) gathers the weights of a layer when it computes and sums and divides their
gradients behind its backward pass. ZeRO 2 keeps weights gathered from the first microbatch of a step to the end of the
last, ZeRO 3 gathers them anew for each pass. Experts are units of their own, since other ranks have them in common; so
are parameters that must not be rounded to the compute dtype on their way.

Under a pipeline whole gradients are added up on every rank and divided once, at the end of a step: a backward pass in
two halves does not say when a layer's gradient is complete. The half that is left for later reads the weights of the
forward pass, so that they stay gathered through such a step under ZeRO 3 too.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from modelspec.builders.attention.gated_deltanet import GatedDeltaNet
from modelspec.builders.block import Block
from modelspec.builders.ffn.moe import Experts
from modelspec.builders.ffn.router import Router
from modelspec.builders.parallel.data import Kind, Part
from modelspec.builders.parallel.mesh import Mesh, device_mesh
from modelspec.builders.parallel.pieces import Piece
from modelspec.builders.parallel.stage import Stage


def shard_stage(
    stage: Stage,
    axes: Mesh,
    reshard: bool,
    master: torch.dtype,
    compute: torch.dtype,
    device: torch.device,
    apart: frozenset[nn.Parameter],
) -> None:
    """Makes units of a stage on the meta device, whose weights are let go of behind a forward pass if `reshard`.
    Parameters in `apart`, and experts that stand on no other rank, are left as they are.
    """
    stage.to(master)
    narrow = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=master, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    mesh, experts = device_mesh(axes.dense, device), axes.experts
    others = set(apart)

    def unit(module: nn.Module, policy: MixedPrecisionPolicy) -> None:
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard, ignored_params=others)

    for module in list(stage.modules()):
        if isinstance(module, Experts):
            if experts.shard.size == 1:
                others |= set(module.parameters())
            else:
                fully_shard(
                    module,
                    mesh=device_mesh(experts, device),
                    mp_policy=narrow,
                    reshard_after_forward=reshard,
                    shard_placement_fn=_rows_or_columns(experts.shard.size),
                )
    for module in list(stage.modules()):
        if isinstance(module, Router | GatedDeltaNet):
            unit(module, exact)
    for module in list(stage.modules()):
        if isinstance(module, Block):
            unit(module, narrow)
    unit(stage, narrow)
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _rows_or_columns(ranks: int) -> Callable[[nn.Parameter], Shard]:
    """Stacked experts are divided between ranks; where they do not come out even and their rows do, these are."""
    return lambda stacked: Shard(1 if stacked.shape[0] % ranks and stacked.shape[1] % ranks == 0 else 0)


class Sharded:
    """The parameters of a stage that fully_shard divides. `kinds` and `boxes` are those of every parameter by name."""

    def __init__(
        self, stage: Stage, kinds: dict[str, Kind], boxes: dict[str, Piece], zero: int, *, pipelined: bool
    ) -> None:
        self.stage, self.kinds, self.boxes, self.zero, self.pipelined = stage, kinds, boxes, zero, pipelined
        self.root: FSDPModule = stage  # type: ignore[assignment]  # fully_shard changed its class.

    def before(self, last: bool) -> None:
        """Tells the units what comes: the last microbatch of a step, or another."""
        self.root.set_is_last_backward(last and not self.pipelined)
        self.root.set_requires_gradient_sync(not self.pipelined)
        self.root.set_reshard_after_backward(not self.pipelined and (last or self.zero == 3))

    def parts(self) -> Sequence[Part]:
        # ZeRO 2 leaves weights gathered where no backward pass came after, as an evaluation does.
        for module in self.stage.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return list(self._parts())

    def _parts(self) -> Iterator[Part]:
        for name, parameter in self.stage.named_parameters():
            if not isinstance(parameter, DTensor):
                continue
            kind, weight = self.kinds[name], parameter.to_local()
            gradient = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else None
            (placement,) = (each for each in parameter.placements if isinstance(each, Shard))
            piece = _chunk(self.boxes[name], placement.dim, kind.shard.rank, kind.shard.size)
            yield Part(name, piece, weight.detach(), gradient, kind.copies, kind.counts, kind.owns)

    def collect(self) -> None:
        """FSDP takes gradients from where they are."""

    def reduce(self) -> None:
        if self.pipelined:
            _divide_now(self.root)
        for part in self.parts():
            for axis in self.kinds[part.name].sums:
                if part.gradient is not None:
                    torch.distributed.all_reduce(part.gradient, group=axis.group)

    def publish(self) -> None:
        """Weights are gathered from their shares when a layer computes."""

    def clear(self) -> None:
        for parameter in self.stage.parameters():
            # Gradients of what FSDP does not divide are views that others clear.
            if isinstance(parameter, DTensor):
                parameter.grad = None


def _chunk(piece: Piece, dim: int, rank: int, ranks: int) -> Piece:
    """The rank's share of a box along `dim`, as torch.chunk cuts it."""
    each = -(-piece.size[dim] // ranks)
    start = min(rank * each, piece.size[dim])
    return piece.box(dim, start, min(each, piece.size[dim] - start))


def _divide_now(root: FSDPModule) -> None:
    """Sums and divides the gradients that were added up, as torch's pipeline stages do at the end of a step."""
    root.set_is_last_backward(True)
    root.set_reshard_after_backward(True)
    root.set_requires_gradient_sync(True)
    state = fully_shard.state(root)  # type: ignore[attr-defined]
    for each in state._state_ctx.all_states:
        for group in groups_of(each):
            group.post_backward()
    state._root_post_backward_final_callback()


def groups_of(state: Any) -> list[Any]:
    """What FSDP calls the groups of a unit's parameters; torch 2.11 has one or none."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]
