"""Which elements of a tensor stand where: the one map between whole tensors and what ranks hold.

A tensor is cut into boxes, along its heads or widths by the tensor axis, along its experts by the expert axis, along
its rows by FSDP. ZeRO 1 cuts on without regard to rows: a run of a box's elements in row order. Initial values, the
optimizer, checkpoints and tests all read their elements of the whole by the piece alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """Of a tensor of `shape`, the box of `size` at `start`; and of its elements in row order those from `first` up to
    `last`, which is all of them where `last` is None.
    """

    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]
    first: int = 0
    last: int | None = None

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> "Piece":
        """All of a tensor."""
        return cls(shape, (0,) * len(shape), shape)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return (prod(self.size) if self.last is None else self.last) - self.first

    def part(self, dim: int, rank: int, ranks: int) -> "Piece":
        """The box's `rank`-th of so many equal parts along `dim`."""
        length = self.size[dim] // ranks
        return self.box(dim, rank * length, length)

    def box(self, dim: int, start: int, length: int) -> "Piece":
        """The box from `start` of this one on along `dim`, `length` long."""
        moved = (*self.start[:dim], self.start[dim] + start, *self.start[dim + 1 :])
        return replace(self, start=moved, size=(*self.size[:dim], length, *self.size[dim + 1 :]))

    def run(self, first: int, last: int) -> "Piece":
        """Elements of the box from `first` up to `last`, in row order."""
        return replace(self, first=first, last=last)

    def among_rows(self) -> tuple[int, "Piece"]:
        """The first row of the whole tensor that has elements of the piece, and the piece of those rows alone."""
        if not self.shape:
            return 0, self
        each = prod(self.size[1:])
        last = each * self.size[0] if self.last is None else self.last
        low, high = (self.first // each, -(-last // each)) if last > self.first else (0, 0)
        rows = replace(
            self, shape=(high - low, *self.shape[1:]), start=(0, *self.start[1:]), size=(high - low, *self.size[1:])
        )
        return self.start[0] + low, rows if self.last is None else rows.run(self.first - low * each, last - low * each)

    def boxed(self, whole: Tensor) -> Tensor:
        """A view of the box in the whole tensor."""
        for dim, (start, length) in enumerate(zip(self.start, self.size, strict=True)):
            whole = whole.narrow(dim, start, length)
        return whole

    def of(self, whole: Tensor) -> Tensor:
        """The piece's elements of the whole tensor: shaped as the box, or flat where it is a run of it."""
        box = self.boxed(whole)
        return box if self.last is None else box.flatten()[self.first : self.last]

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """Consecutive elements of the whole tensor that the piece has: (place in the whole, in the piece, count)."""
        last = prod(self.size) if self.last is None else self.last
        # A run spans the dims that the box has in whole, and its part of the one before.
        cut = len(self.size)
        while cut > 1 and self.size[cut - 1] == self.shape[cut - 1]:
            cut -= 1
        strides = [prod(self.shape[dim + 1 :]) for dim in range(len(self.shape))]
        outer, length = self.size[: max(cut - 1, 0)], prod(self.size[max(cut - 1, 0) :])
        begin = sum(start * stride for start, stride in zip(self.start, strides, strict=True))
        for index in range(self.first // max(length, 1), -(-last // max(length, 1))):
            place, rest = begin, index
            for dim in reversed(range(len(outer))):
                rest, coordinate = divmod(rest, outer[dim])
                place += coordinate * strides[dim]
            low, high = max(self.first - index * length, 0), min(last - index * length, length)
            if low < high:
                yield place + low, index * length + low - self.first, high - low

    def put(self, whole: Tensor, values: Tensor) -> None:
        """Writes the piece's elements into the whole tensor, which is contiguous."""
        flat, given = whole.view(-1), values.flatten()
        for place, begin, count in self.runs():
            flat[place : place + count] = given[begin : begin + count]
