"""Where this process stands among the others, axis by axis.

Ranks are laid out (pipeline, data, context, tensor), tensor fastest, so that those that talk most share a node. Experts
borrow the last three: of the ranks of one pipeline rank, `expert` neighbours hold all experts between them, and those
`expert` apart hold the same. ZeRO divides what ranks of data and context have in common inside a replica: `shard`; the
replicas are beside each other along `replica`. For experts, which fewer ranks have in common, both are counted anew.
"""

from dataclasses import dataclass
from math import gcd, prod

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from modelspec import layout, schema


@dataclass(frozen=True, slots=True)
class Axis:
    """Ranks that differ in one coordinate: how many, which is this one, and their group (None where it is alone)."""

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None


ALONE = Axis()


@dataclass(frozen=True, slots=True)
class Mesh:
    """The axes through this rank. `dense` and `experts` are the (replica, shard) meshes of ZeRO, for FSDP2."""

    lengths: layout.Mesh
    world: Axis
    pipeline: Axis
    data: Axis
    context: Axis
    tensor: Axis
    expert: Axis
    # All ranks with the same experts; those of data x context, with the same part of everything else.
    expert_data: Axis
    data_context: Axis
    # Ranks that see parts of the same sequences: context x tensor.
    sequence: Axis
    dense: DeviceMesh | None
    experts: DeviceMesh | None


def mesh(parallelism: schema.Parallelism, device: torch.device) -> Mesh:
    """The mesh of a layout in the running process group, whose world is the layout's. All ranks call it together."""
    lengths = layout.mesh(parallelism)
    shape = (lengths.pipeline, lengths.data, lengths.context, lengths.tensor)
    ranks = torch.arange(prod(shape)).view(shape)
    by_expert = ranks.view(lengths.pipeline, lengths.expert_data, lengths.expert)
    replicas = parallelism.data.replicate
    return Mesh(
        lengths=lengths,
        world=_axis(ranks.view(1, -1)),
        pipeline=_axis(ranks.flatten(1).T),
        data=_axis(ranks.movedim(1, -1)),
        context=_axis(ranks.movedim(2, -1)),
        tensor=_axis(ranks),
        expert=_axis(by_expert),
        expert_data=_axis(by_expert.mT),
        data_context=_axis(ranks.flatten(1, 2).mT),
        sequence=_axis(ranks.flatten(2, 3)),
        dense=_zero_mesh(ranks.flatten(1, 2).mT, replicas, device),
        experts=_zero_mesh(by_expert.mT, gcd(replicas, lengths.expert_data), device),
    )


def _axis(ranks: torch.Tensor) -> Axis:
    """The axis along the last dim of `ranks`, which has every rank once."""
    lines: list[list[int]] = ranks.reshape(-1, ranks.shape[-1]).tolist()
    if len(lines[0]) == 1:
        return ALONE
    mine, group = dist.get_rank(), None
    for line in lines:
        made = dist.new_group(line) if len(line) < dist.get_world_size() else dist.group.WORLD
        if mine in line:
            group = made
    line = next(line for line in lines if mine in line)
    return Axis(len(line), line.index(mine), group)


def _zero_mesh(lines: torch.Tensor, replicas: int, device: torch.device) -> DeviceMesh | None:
    """(replica, shard), or (shard) of one replica, along the last dim of `lines`; None where nothing is divided."""
    shards = lines.shape[-1] // replicas
    if shards == 1:
        return None
    names = ("line", "replica", "shard")
    whole = DeviceMesh(device.type, lines.reshape(-1, replicas, shards), mesh_dim_names=names)
    return whole["shard"] if replicas == 1 else whole["replica", "shard"]
