"""Where this process stands among the others, axis by axis.

Ranks are laid out (pipeline, data, context, tensor), tensor fastest, so that those that talk most share a node. Experts
borrow the last three: of the ranks of one pipeline rank, `expert` neighbours hold all experts between them, and those
`expert` apart hold the same. ZeRO divides what ranks of data and context have in common inside a replica: `shard`; the
replicas are beside each other along `replica`. For experts, which fewer ranks have in common, both are counted anew.
"""

from dataclasses import dataclass
from math import gcd, prod
from typing import NamedTuple

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


class Zero(NamedTuple):
    """Ranks between which ZeRO divides what they have in common, and those with the same share beside them."""

    shard: Axis
    replica: Axis


@dataclass(frozen=True, slots=True)
class Mesh:
    """The axes through this rank."""

    lengths: layout.Mesh
    world: Axis
    pipeline: Axis
    data: Axis
    context: Axis
    tensor: Axis
    expert: Axis
    # Where these fill several nodes: those of one node, and those with the same place in each. Else all, and none.
    expert_node: Axis
    expert_network: Axis
    # All ranks with the same experts; those of data x context, with the same part of everything else.
    expert_data: Axis
    data_context: Axis
    # Ranks that see parts of the same sequences: context x tensor; all of one pipeline rank.
    sequence: Axis
    peers: Axis
    # The first and the last pipeline rank, where they differ; neither elsewhere.
    ends: Axis
    # How ZeRO divides experts, and everything else.
    dense: Zero
    experts: Zero


def mesh(parallelism: schema.Parallelism) -> Mesh:
    """The mesh of a layout in the running process group, whose world is the layout's. All ranks call it together."""
    lengths = layout.mesh(parallelism)
    shape = (lengths.pipeline, lengths.data, lengths.context, lengths.tensor)
    ranks = torch.arange(prod(shape)).view(shape)
    by_expert = ranks.view(lengths.pipeline, lengths.expert_data, lengths.expert)
    replicas = parallelism.data.replicate
    expert = _axis(by_expert)
    expert_node, expert_network = expert, ALONE
    if lengths.expert > parallelism.gpus_per_node and lengths.expert % parallelism.gpus_per_node == 0:
        by_node = by_expert.unflatten(-1, (-1, parallelism.gpus_per_node))
        expert_node, expert_network = _axis(by_node), _axis(by_node.mT)
    return Mesh(
        lengths=lengths,
        world=_axis(ranks.view(1, -1)),
        pipeline=_axis(ranks.flatten(1).T),
        data=_axis(ranks.movedim(1, -1)),
        context=_axis(ranks.movedim(2, -1)),
        tensor=_axis(ranks),
        expert=expert,
        expert_node=expert_node,
        expert_network=expert_network,
        expert_data=_axis(by_expert.mT),
        data_context=_axis(ranks.flatten(1, 2).mT),
        sequence=_axis(ranks.flatten(2, 3)),
        peers=_axis(ranks.flatten(1)),
        ends=_axis(ranks.flatten(1)[[0, -1]].T) if lengths.pipeline > 1 else ALONE,
        dense=_zero(ranks.flatten(1, 2).mT, replicas),
        experts=_zero(by_expert.mT, gcd(replicas, lengths.expert_data)),
    )


def _axis(ranks: torch.Tensor) -> Axis:
    """The axis along the last dim of `ranks`, which has every rank once at most."""
    lines: list[list[int]] = ranks.reshape(-1, ranks.shape[-1]).tolist()
    mine, found = dist.get_rank(), ALONE
    if len(lines[0]) == 1:
        return found
    for line in lines:
        # All ranks make all groups, in the same order.
        group = dist.new_group(line)
        if mine in line and isinstance(group, dist.ProcessGroup):
            found = Axis(len(line), line.index(mine), group)
    return found


def _zero(lines: torch.Tensor, replicas: int) -> Zero:
    """The last dim of `lines` as so many replicas, one after the other."""
    split = lines.unflatten(-1, (replicas, -1))
    return Zero(shard=_axis(split), replica=_axis(split.mT))


def device_mesh(zero: Zero, device: torch.device) -> DeviceMesh:
    """(replica, shard), or (shard) where there is one replica, for FSDP2; the axis to shard over has several ranks."""
    groups = [axis.group for axis in (zero.replica, zero.shard) if axis.group is not None]
    # A layout that is only looked at, on meta, has a mesh that could be the CPU's.
    kind = "cpu" if device.type == "meta" else device.type
    if len(groups) == 1:
        return DeviceMesh.from_group(groups[0], kind, mesh_dim_names=("shard",))
    shards = dist.get_process_group_ranks(groups[1])
    replicas = dist.get_process_group_ranks(groups[0])
    here = torch.tensor(shards) - shards[zero.shard.rank]
    ranks = torch.tensor(replicas).unsqueeze(-1) + here
    return DeviceMesh.from_group(groups, kind, mesh=ranks, mesh_dim_names=("replica", "shard"))
