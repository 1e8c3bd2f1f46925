"""Counts what a rank sends to others, collective by collective, at the level where torch hands them to a backend.

Bytes are those of algorithms that send nothing twice, as plan counts them: of an all-gather one's share to each other
rank, of a reduce-scatter all shares but one's own, of an all-reduce both, of an all-to-all what is not one's own.
"""

from collections import Counter
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

NAMES = {
    "c10d.alltoall_base_": "all-to-all",
    "c10d._allgather_base_": "all-gather",
    "c10d._reduce_scatter_base_": "reduce-scatter",
    "c10d.allreduce_": "all-reduce",
    "c10d.send": "send",
    "_c10d_functional.all_to_all_single": "all-to-all",
    "_c10d_functional.all_gather_into_tensor": "all-gather",
    "_c10d_functional.reduce_scatter_tensor": "reduce-scatter",
    "_c10d_functional.all_reduce": "all-reduce",
}


class Sent(TorchDispatchMode):
    """While it is entered: bytes that this rank sends, by collective, ranks of the group, and dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[tuple[str, tuple[int, ...], str]] = Counter()

    def of(self, name: str = "", ranks: tuple[int, ...] = (), dtype: str = "") -> int:
        """Bytes of collectives with this name, group and dtype; of all where one is left out."""
        wanted = name, ranks, dtype
        return sum(
            count for key, count in self.bytes.items() if all(not w or w == k for w, k in zip(wanted, key, strict=True))
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation = str(func).rsplit(".", 1)[0]
        if operation in NAMES:
            self._count(operation, dict(zip((each.name for each in func._schema.arguments), args, strict=False)))
        return func(*args, **(kwargs or {}))

    def _count(self, operation: str, given: dict[str, Any]) -> None:
        name = NAMES[operation]
        group = _group(given)
        tensor, size, rank = _sent(given), group.size(), dist.get_rank(group)
        count = tensor.numel() * tensor.element_size()
        match name:
            case "all-to-all":
                rows = given.get("input_split_sizes")
                count -= count * rows[rank] // max(sum(rows), 1) if rows else count // size
            case "all-gather":
                count *= size - 1
            case "reduce-scatter":
                count = count * (size - 1) // size
            case "all-reduce":
                count = 2 * count * (size - 1) // size
        self.bytes[name, tuple(dist.get_process_group_ranks(group)), str(tensor.dtype).removeprefix("torch.")] += count


def _group(given: dict[str, Any]) -> ProcessGroup:
    if "group_name" in given:
        named = given["group_name"]
        return named if isinstance(named, ProcessGroup) else _resolve_process_group(named)
    return ProcessGroup.unbox(given["process_group"])


def _sent(given: dict[str, Any]) -> Tensor:
    for key in ("input", "input_tensor", "inputs", "tensors", "self"):
        if key in given:
            value = given[key]
            tensor = value[0] if isinstance(value, list) else value
            assert isinstance(tensor, Tensor)
            return tensor
    raise KeyError(f"no tensor among {list(given)}")
