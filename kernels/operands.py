"""What operations ask of their operands: matrices, codes in FP8, and indices that lie within the rows.

Kernels do not wait for the values of indices, which stand on the device: they take an index that lies outside for the
nearest one inside, so that nothing is read or written beyond a tensor. References read the values and refuse such.
"""

import torch
from torch import Tensor

_FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)


def require_matrix(name: str, x: Tensor) -> None:
    """Raises ValueError unless x has two dims."""
    if x.ndim != 2:
        remedy = f"{name}.flatten(0, -2) is one" if x.ndim > 2 else f"{name}[None] is one of a single row"
        raise ValueError(f"{name} {list(x.shape)} must be a matrix [rows, columns]: {remedy}")


def require_codes(name: str, q: Tensor) -> None:
    """Raises ValueError unless q is in E4M3, as quantisers give it."""
    if q.dtype not in _FP8:
        raise ValueError(f"{name} {list(q.shape)} is {q.dtype}: it must be in E4M3; quantise it first")


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


def require_below(name: str, indices: Tensor, count: int) -> None:
    """Raises ValueError unless indices, of any shape, lie from 0 to `count` - 1."""
    wrong = indices[(indices < 0) | (indices >= count)]
    if len(wrong):
        raise ValueError(f"{name} {wrong.unique().tolist()[:4]} are not there: they must lie between 0 and {count - 1}")
