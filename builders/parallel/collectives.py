"""Collectives over flat tensors, by the names that torch has given them from release to release."""

from typing import Any

import torch.distributed as dist
from torch import Tensor

from modelspec.builders.parallel.mesh import Axis

# Since torch 2.13 the first of each pair; 2.11 has the second alone.
_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(whole: Tensor, share: Tensor, axis: Axis) -> None:
    """Fills `whole` with the shares of all ranks, one after the other."""
    _gather(whole, share, group=axis.group)


def reduce_scatter(share: Tensor, whole: Tensor, axis: Axis) -> None:
    """Fills `share` with this rank's part of the sum of all `whole`."""
    _scatter(share, whole, group=axis.group)
