"""What operations ask of indices that stand on the device: which type they have, and that they lie within the rows.

Kernels do not wait for their values: they take an index that lies outside for the nearest one inside, so that nothing
is read or written beyond a tensor. References read the values and refuse such.
"""

import torch
from torch import Tensor


def require_int32(name: str, indices: Tensor) -> None:
    """Raises ValueError unless indices are int32 in one dim, as kernels read them."""
    if indices.dtype != torch.int32 or indices.ndim != 1:
        raise ValueError(f"{name} {list(indices.shape)} are {indices.dtype}: they must be int32 in one dim")


def require_ascending(name: str, indices: Tensor, most: int) -> list[int]:
    """The indices; raises ValueError unless they are int32 from 0 to `most` and none is below the one before it."""
    require_int32(name, indices)
    values: list[int] = indices.tolist()
    if values and (values[0] < 0 or values[-1] > most or values != sorted(values)):
        raise ValueError(f"{name} {values} must ascend and lie between 0 and {most}")
    return values
