"""The context axis: a sequence cut over ranks, for windows that one device cannot hold.

A query sees the keys before it, so ranks with the end of a sequence would have most of the work. Cut into twice as many
chunks as there are ranks, each rank takes one from the beginning and its mirror from the end, and all have the same.
What a cache would keep of the other positions is gathered: of latent attention the latents, else keys and values.
"""

import torch
from torch import Tensor

from modelspec.builders.parallel.collectives import gathered
from modelspec.builders.parallel.mesh import Axis
from modelspec.kernels.attention import ALL, Sight, causal_attention


def positions(length: int, axis: Axis) -> Tensor:
    """Positions of a sequence of `length` that are here, int64 [length / ranks]."""
    if axis.size == 1:
        return torch.arange(length)
    chunk = length // (2 * axis.size)
    return torch.cat([torch.arange(place * chunk, (place + 1) * chunk) for place in _chunks(axis)])


def cut(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """Of a tensor with all positions along `dim`, those that are here."""
    return x if axis.size == 1 else x.index_select(dim, positions(x.shape[dim], axis).to(x.device))


def _chunks(axis: Axis) -> tuple[int, int]:
    """The chunks of this rank, of twice as many as there are ranks."""
    return axis.rank, 2 * axis.size - 1 - axis.rank


class CutSequence:
    """The part of a sequence that is here, as attention needs it (see builders/attention/sequence.py)."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    def length(self, here: int) -> int:
        return here * self.axis.size

    def gather(self, *parts: Tensor, dim: int) -> tuple[Tensor, ...]:
        first, *others = parts
        joined = torch.cat(parts, dim=-1) if others else first
        # As gathered: the first and the last chunk, the second and the last but one, and so on.
        chunks = gathered(joined, dim, self.axis).chunk(2 * self.axis.size, dim)
        whole = torch.cat((*chunks[::2], *reversed(chunks[1::2])), dim)
        return whole.split([part.shape[-1] for part in parts], dim=-1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, sight: Sight = ALL) -> Tensor:
        each = q.shape[-2] // 2
        halves = []
        for half, chunk in enumerate(_chunks(self.axis)):
            mine = slice(half * each, (half + 1) * each)
            first = 0 if sight.window is None else max(0, chunk * each - sight.window + 1)
            keys = slice(first, (chunk + 1) * each)
            narrowed = sight if sight.chosen is None else sight._replace(chosen=sight.chosen[:, :, mine, keys])
            halves.append(causal_attention(q[:, :, mine], k[:, :, keys], v[:, :, keys], scale, narrowed))
        return torch.cat(halves, dim=-2)

    def future(self, queries: int, keys: int, device: torch.device) -> Tensor:
        return torch.arange(keys, device=device) > positions(keys, self.axis).to(device).unsqueeze(-1)
