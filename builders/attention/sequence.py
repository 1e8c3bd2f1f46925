"""What attention reads of a sequence beside its own positions.

Everything else in a layer works on each position by itself. So this is the one place in the model that changes where a
sequence is not here as a whole: keys are gathered from wherever they are, and queries attend to those before them.
"""

from typing import Protocol

import torch
from torch import Tensor

from modelspec.kernels.attention import ALL, Sight, causal_attention


class Sequence(Protocol):
    """Positions that an attention module has, and those that it reads."""

    def length(self, here: int) -> int:
        """Positions in all, where so many are here."""
        ...

    def gather(self, *parts: Tensor, dim: int) -> tuple[Tensor, ...]:
        """Each part with all positions of the sequence along `dim`, in order. Parts differ in their last dim alone."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, sight: Sight = ALL) -> Tensor:
        """As `causal_attention`: queries of the positions that are here, keys and values of all."""
        ...

    def future(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """Which keys come after each query that is here, bool [queries, keys]."""
        ...


class Whole:
    """All positions are here."""

    def length(self, here: int) -> int:
        return here

    def gather(self, *parts: Tensor, dim: int) -> tuple[Tensor, ...]:
        return parts

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, sight: Sight = ALL) -> Tensor:
        return causal_attention(q, k, v, scale, sight)

    def future(self, queries: int, keys: int, device: torch.device) -> Tensor:
        return torch.ones(queries, keys, dtype=torch.bool, device=device).triu(1)


WHOLE = Whole()
