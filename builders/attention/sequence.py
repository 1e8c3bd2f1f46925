"""What attention reads of a sequence beside its own positions.

Everything else in a layer works on each position by itself. So this is the one place in the model that changes where a
sequence is not here as a whole: keys are gathered from wherever they are, and queries attend to those before them.
"""

from typing import Protocol

from torch import Tensor

from modelspec.kernels.attention import ALL, Sight, causal_attention


class Sequence(Protocol):
    """Positions that an attention module has, and those that it reads."""

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """x with all positions of the sequence along `dim`, in their order, of those that are here."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, sight: Sight = ALL) -> Tensor:
        """As `causal_attention`: queries of the positions that are here, keys and values of all."""
        ...


class Whole:
    """All positions are here."""

    def gather(self, x: Tensor, dim: int) -> Tensor:
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, sight: Sight = ALL) -> Tensor:
        return causal_attention(q, k, v, scale, sight)


WHOLE = Whole()
