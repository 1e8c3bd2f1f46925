"""How well FP8 holds the numbers of a training step: counts of what its codes lose, by kind of tensor.

    health = Health(device)
    health.count("gradient", grad, q)            # wherever something is quantised
    health.saturation(), health.underflow()      # {"activation": share, "weight": share, "gradient": share}

Blocks are scaled by their own largest magnitude, so nothing is clipped. Saturated are the codes of the largest
magnitude: with FP32 scales one in every block, a little over 1/128 of an activation. Underflown are numbers that are
not zero and became zero: those smaller than 2^-19 of their block's largest. Of large tensors only the first rows are
counted, which costs less than a percent of what it watches.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

Kind = Literal["activation", "weight", "gradient"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Health:
    """Counts of elements, saturated ones, non-zero ones and underflown ones of each kind, on a device."""

    # Of larger matrices, the rows that are looked at.
    ROWS = 128

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(len(KINDS), 4, dtype=torch.int64, device=device)

    def count(self, kind: Kind, x: Tensor, q: Tensor) -> None:
        """Counts x [rows, columns] and its codes of the same shape."""
        x, magnitude = x[: self.ROWS], q[: self.ROWS].view(torch.uint8) & 127
        # 448, and 240 in the variant without negative zero; the code above 448 is NaN.
        largest = 127 if q.dtype == torch.float8_e4m3fnuz else 126
        nonzero = x != 0
        each = (magnitude == largest).sum(), nonzero.sum(), (nonzero & (magnitude == 0)).sum()
        self.counts[KINDS.index(kind), 0] += x.numel()
        self.counts[KINDS.index(kind), 1:] += torch.stack(each)

    def has_counted(self, *kinds: Kind) -> bool:
        """Whether there was something of one of these kinds."""
        return any(self.counts[KINDS.index(kind), 0] > 0 for kind in kinds)

    def saturation(self) -> dict[str, float]:
        """The share of codes that have the largest magnitude, of each kind; 0 where nothing was counted."""
        return self._shares(1, 0)

    def underflow(self) -> dict[str, float]:
        """The share of numbers other than zero that became zero, of each kind; 0 where nothing was counted."""
        return self._shares(3, 2)

    def _shares(self, part: int, whole: int) -> dict[str, float]:
        # One copy from the device.
        return {kind: row[part] / max(row[whole], 1) for kind, row in zip(KINDS, self.counts.tolist(), strict=True)}
