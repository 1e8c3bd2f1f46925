"""The pipeline axis: microbatches through the stages of all ranks, in the order of a schedule.

The schedules and their communication are torch's (torch.distributed.pipelining). Between stages passes the residual
stream, and on the way back its gradient; the ids of a batch are on every rank, since the last stage reads tokens too.
"""

from typing import Any, Final, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle
from torch.distributed.tensor import DTensor

from modelspec import layout
from modelspec.builders.parallel.data import DataParallel
from modelspec.builders.parallel.local import Local
from modelspec.builders.parallel.mesh import Mesh
from modelspec.builders.parallel.stage import Stage
from modelspec.schema.parallelism import PipelineSchedule

_Schedule = PipelineScheduleSingle | PipelineScheduleMulti


class Passes(Protocol):
    """Forward and backward passes of a step, or forward passes alone."""

    def learn(self, ids: Tensor) -> None:
        """Leaves the gradients of ids [sequences, kinds, positions]; the stages' tallies have the losses."""
        ...

    def read(self, ids: Tensor) -> None:
        """Forward passes without gradients; the stages' tallies have the losses."""
        ...


class OneAfterAnother:
    """Without a pipeline: microbatches one by one through the only stage."""

    def __init__(self, local: Local, microbatches: int) -> None:
        (self.stage,) = local.stages.values()
        self.microbatches, self.data = microbatches, local.data

    def learn(self, ids: Tensor) -> None:
        for index, part in enumerate(ids.chunk(self.microbatches)):
            self.data.before(last=index == self.microbatches - 1)
            self.stage(part, part).sum().backward()

    def read(self, ids: Tensor) -> None:
        with torch.no_grad():
            for part in ids.chunk(self.microbatches):
                self.stage(part, part)


class Pipelined:
    """Through the stages of all ranks by a schedule of torch's, for batches of one shape: so many microbatches of
    `sequences` x `positions` tokens on this rank.
    """

    def __init__(
        self, local: Local, mesh: Mesh, schedule: PipelineSchedule, microbatches: int, sequences: int, positions: int
    ) -> None:
        stages: list[Any] = [_torch_stage(index, local, mesh, sequences, positions) for index in local.stages]
        kind = _chosen(schedule, mesh, microbatches)
        if kind in _SINGLE:
            self.schedule: _Schedule = _SINGLE[kind](stages[0], microbatches, loss_fn=_sum, scale_grads=False)
        else:
            self.schedule = _MULTI[kind](stages, microbatches, loss_fn=_sum, scale_grads=False)
        self.data, self.stages, self.microbatches, self.group = (
            local.data,
            local.stages,
            microbatches,
            mesh.pipeline.group,
        )
        # Of every stage its pipeline rank; and what one stage hands to the next on this rank.
        holders = layout.stages_of(schedule, mesh.lengths.pipeline, mesh.lengths.stages_per_rank)
        self.owner = {index: rank for rank, held in enumerate(holders) for index in held}
        self.passed = torch.empty(0)
        hidden = next(iter(local.stages.values())).spec.model.hidden_size
        self.shape = sequences, positions // mesh.tensor.size, hidden
        self.first = any(stage.held.first for stage in local.stages.values())

    def learn(self, ids: Tensor) -> None:
        self.data.before(last=False)
        self.schedule.step(*self._first(ids), target=ids, ids=ids, return_outputs=False)

    def read(self, ids: Tensor) -> None:
        """One microbatch after the other through all stages: torch's own evaluation cannot follow a V."""
        with torch.no_grad():
            for part in ids.chunk(self.microbatches):
                for index in sorted(self.stages):
                    self._read_stage(index, part)

    def _read_stage(self, index: int, ids: Tensor) -> None:
        stage = self.stages[index]
        before, after = (self.owner.get(index + step) for step in (-1, 1))
        if before is None:
            x = ids
        elif index - 1 in self.stages:
            x = self.passed
        else:
            x = torch.empty(self.shape, dtype=stage.compute_dtype, device=ids.device)
            dist.recv(x, group=self.group, group_src=before)
        self.passed = stage(x, ids)
        if after is not None and index + 1 not in self.stages:
            dist.send(self.passed, group=self.group, group_dst=after)

    def _first(self, ids: Tensor) -> tuple[Tensor, ...]:
        return (ids,) if self.first else ()


_SINGLE: Final = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
_MULTI: Final = {
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}


def _chosen(schedule: PipelineSchedule, mesh: Mesh, microbatches: int) -> PipelineSchedule:
    """The schedule for so many microbatches. With few of them 1f1b is gpipe, and zbv stands in for dualpipev."""
    if microbatches >= mesh.lengths.stages:
        return schedule
    match schedule:
        case "1f1b":
            return "gpipe"
        case "dualpipev":
            return "zbv"
        case _:
            return schedule


# Before this release torch sums the gradients of a node's outputs where it splits a backward pass, and loses nodes that
# are Python's: there the half for the input is the whole, and that for the weights does nothing. Seen with 2.11.
_SPLITS: Final = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


class _TorchStage(PipelineStage):
    """torch's stage, whose weights' half of a backward pass ends with gradients where they are added up."""

    def __init__(self, stage: Stage, data: DataParallel, index: int, stages: int, **shapes: Any) -> None:
        rest = None if _SPLITS else lambda: _nothing
        super().__init__(stage, index, stages, stage.positions.device, dw_builder=rest, **shapes)
        self.data = data

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        # At the turn of a V the neighbour is this rank itself, which torch 2.11 greets and gloo cannot.
        return [each for each in super()._get_init_p2p_neighbors_ops() if each.group_peer != self.group_rank]

    def _post_metadata_inference_cleanup(self) -> None:
        # torch drops the gradients of FSDP's modules, and with them places where those of undivided experts add up.
        places = [(each, each.grad) for each in self.submod.parameters() if not isinstance(each, DTensor)]
        super()._post_metadata_inference_cleanup()
        for parameter, gradient in places:
            parameter.grad = gradient

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward=last_backward)
        self.data.collect()


def _nothing() -> None:
    """What is left for the weights of a backward pass that is done."""


def _torch_stage(index: int, local: Local, mesh: Mesh, sequences: int, positions: int) -> PipelineStage:
    """The stage with the shapes that it takes and gives, so that ranks need not tell each other."""
    stage = local.stages[index]
    depth = len(stage.mtp) if stage.held.last else (stage.spec.model.mtp.depth if stage.spec.model.mtp else 0)
    ids = torch.empty(sequences, 2 + 2 * depth, positions, dtype=torch.int64, device="meta")
    residual = torch.empty(
        sequences,
        positions // mesh.tensor.size,
        stage.spec.model.hidden_size,
        dtype=stage.compute_dtype,
        device="meta",
        requires_grad=True,
    )
    loss = torch.empty(
        1, dtype=torch.promote_types(stage.compute_dtype, torch.float32), device="meta", requires_grad=True
    )
    return _TorchStage(
        stage,
        local.data,
        index,
        mesh.lengths.stages,
        input_args=ids if stage.held.first else residual,
        output_args=loss if stage.held.last else residual,
        group=mesh.pipeline.group,
    )


def _sum(loss: Tensor, ids: Tensor) -> Tensor:
    return loss.sum()
