"""A layout without its ranks: what each would hold, built on the meta device in a world that is only pretended.

torch's fake process group has a rank and a size and sends nothing. In it one rank of every pipeline rank is laid out by
the code that lays out a run; the others of its pipeline rank hold as much. So a layout of thousands of devices is tried
in seconds on one that has none, and what comes out is held against the table of tensors that the spec states.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from modelspec import layout, schema
from modelspec.builders.parallel.local import lay_out
from modelspec.builders.parallel.mesh import mesh


@dataclass(frozen=True, slots=True)
class Laid:
    """What one rank of a pipeline rank holds: its stages, their layers, the shapes of its parameters and buffers by
    name, as they are before ZeRO divides them; `updated` counts the elements whose update is this rank's.
    """

    pipeline_rank: int
    stages: tuple[int, ...]
    layers: tuple[int, ...]
    parameters: dict[str, tuple[int, ...]]
    buffers: dict[str, tuple[int, ...]]
    updated: int

    @property
    def elements(self) -> int:
        """Of all its parameters."""
        return sum(map(prod, self.parameters.values()))


def laid_out(spec: schema.ModelSpec) -> Iterator[Laid]:
    """The first rank of each pipeline rank of a spec's layout, one after the other. Allocates nothing, sends nothing.

    Raises RuntimeError inside of a process group that is real.
    """
    if dist.is_initialized():
        raise RuntimeError("this process has joined others; a layout is tried by one that stands alone")
    lengths = layout.mesh(spec.parallelism)
    for rank in range(lengths.pipeline):
        with _pretended(spec.parallelism.world_size, rank * spec.parallelism.world_size // lengths.pipeline):
            local = lay_out(spec, mesh(spec.parallelism), torch.device("meta"))
            updated = sum(part.weight.numel() for part in local.data.parts())
        # Outside of the pretended world, which would stay where nobody asks for the next rank.
        stages = local.stages.values()
        yield Laid(
            rank,
            tuple(local.stages),
            tuple(sorted(layer for stage in stages for layer in stage.held.layers)),
            _shapes(parameter for stage in stages for parameter in stage.named_parameters()),
            _shapes(buffer for stage in stages for buffer in stage.named_buffers()),
            updated,
        )


def differences(spec: schema.ModelSpec, ranks: Sequence[Laid]) -> list[str]:
    """Names of tensors that no rank holds, that the spec does not state, or whose parts do not add up to the whole."""
    stated = spec.tensors()
    built = {name: shape for rank in ranks for name, shape in (rank.parameters | rank.buffers).items()}
    return sorted(
        name
        for name in {*stated, *built}
        if name not in stated or name not in built or not _adds_up(name, built[name], stated[name], spec)
    )


def _adds_up(name: str, part: tuple[int, ...], whole: schema.TensorSpec, spec: schema.ModelSpec) -> bool:
    """Whether so many parts as there are experts' or tensor ranks, along one dim at most, are the whole."""
    parallelism = spec.parallelism
    if whole.experts_per_token is not None:
        ways = parallelism.expert
    else:
        dim = layout.tensor_cut(name, parallelism.tensor, layout.attention_of(name, spec.model))
        ways = 1 if dim is None else parallelism.tensor
    cut = [size for size, full in zip(part, whole.shape, strict=True) if size != full]
    return len(cut) <= 1 and prod(part) * ways == prod(whole.shape)


def _shapes(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors}


@contextmanager
def _pretended(world: int, rank: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()
