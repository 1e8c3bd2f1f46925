"""What a pipeline stage computes: some of the layers, and embedding, head and multi-token prediction where they stand.

A stage is the model with parts missing; those that it has keep their names. The first takes tokens, the last gives the
loss, and between them passes the residual stream. Each rank holds a part of the sequences, so a loss here is a sum over
its own tokens divided by the count of all: added up over ranks these are the mean, and so are their gradients. Losses
of layers in the middle, which balance experts, ride on the residual stream: their gradient enters as it passes by.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from modelspec import schema
from modelspec.builders.ffn.moe import Routing
from modelspec.builders.inputs import Window
from modelspec.builders.model import Decoder, LossWeights
from modelspec.builders.parallel.mesh import Axis, Mesh
from modelspec.builders.parallel.vocabulary import cross_entropy, embed
from modelspec.kernels.linear_cross_entropy import linear_cross_entropy


@dataclass(frozen=True, slots=True)
class Held:
    """Layers of a stage, and whether it is the first and the last one."""

    layers: range
    first: bool
    last: bool


@dataclass(slots=True)
class Tally:
    """What forward passes of a step add up: parts of the losses here, float64, and tokens per expert by router.

    `share` is what part of the batch a microbatch of this rank is.
    """

    weights: LossWeights
    share: float
    losses: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)

    def lose(self, name: str, loss: Tensor) -> None:
        """Adds a part of a loss."""
        self.losses[name] = self.losses.get(name, 0) + loss.detach().double()

    def count(self, routings: dict[str, Routing]) -> None:
        """Adds what routers chose."""
        for name, routing in routings.items():
            self.counts[name] = self.counts[name] + routing.counts if name in self.counts else routing.counts


class Stage(Decoder):
    """x [batch, sequence, hidden] of the stage before, or what stands there for the first, and the ids, int64 [batch,
    2 + 2 x depth, sequence] (see `packed`) -> the residual stream, or the loss's part, [1], of the last.

    `spec` is what one rank builds; `mesh` says with whom it shares sequences and the vocabulary.
    """

    def __init__(
        self, spec: schema.ModelSpec, held: Held, mesh: Mesh, compute_dtype: torch.dtype, router_dtype: torch.dtype
    ) -> None:
        super().__init__(spec, compute_dtype, router_dtype)
        self.held, self.mesh = held, mesh
        blocks = list(self.layers.children())
        self.layers = nn.ModuleDict({str(index): blocks[index] for index in held.layers})
        if not held.last:
            del self.norm
            self.mtp = nn.ModuleList()
            if not spec.model.tie_embeddings:
                del self.lm_head
        if not held.first and not self.mtp and not (held.last and spec.model.tie_embeddings):
            del self.embed_tokens
        self.tally: Tally | None = None
        # Of each place here, its position in the window.
        self.positions = torch.empty(0, dtype=torch.int64)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        assert self.tally is not None
        tally, window = self.tally, unpacked(ids, self.positions)
        rotaries = self.rotaries(window.positions)
        routings: dict[str, Routing] = {}
        x = self.run_layers(self.embed(window.tokens) if self.held.first else x, rotaries, routings)
        if not self.held.last:
            x = self._balanced(x, routings)
            tally.count(routings)
            return x
        x = self.norm(x)
        assert window.targets is not None
        lm = self.cross_entropy(x, window.targets) * tally.share
        tally.lose("lm", lm)
        loss = lm
        if self.mtp and self.training:
            mtp = self.multi_token_loss(x, window, rotaries, routings) * tally.share
            tally.lose("mtp", mtp)
            loss = loss + tally.weights.mtp * mtp
        loss = self._balanced(loss, routings)
        tally.count(routings)
        return torch.stack([loss])

    def embed(self, tokens: Tensor) -> Tensor:
        if self.mesh.tensor.size == 1:
            return super().embed(tokens)
        return embed(tokens, self.embed_tokens.weight, self.mesh.tensor).to(self.compute_dtype)

    def cross_entropy(self, x: Tensor, targets: Tensor, ahead: int = 0) -> Tensor:
        """This rank's part of the mean over all tokens of the sequences, all of which have a target."""
        head = self.head_weight().to(x.dtype)
        if self.mesh.tensor.size == 1:
            total = linear_cross_entropy(x.flatten(0, 1), head, targets.flatten())
        else:
            total = cross_entropy(x, head, targets, self.mesh.tensor)
        return total / (targets.shape[0] * max(targets.shape[1] * self.mesh.context.size - ahead, 1))

    def balance_loss(self, weight: float, routings: list[Routing]) -> Tensor:
        """This rank's part of the loss, whose positions are some of the sequences'."""
        each = [balance_part(routing.by_sequence(), routing.k, self.mesh.sequence) for routing in routings]
        return weight * torch.stack(each).sum()

    def _balanced(self, x: Tensor, routings: dict[str, Routing]) -> Tensor:
        assert self.tally is not None
        weight = self.tally.weights.balance
        if not routings:
            return x
        if weight == 0.0:
            self.tally.lose("balance", x.new_zeros(()))
            return x
        loss = self.balance_loss(weight, list(routings.values())) * self.tally.share
        self.tally.lose("balance", loss)
        return _Riding.apply(x, loss)


class _Riding(torch.autograd.Function):
    """x, through which a loss gets the gradient 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.new_ones(())
        # A view could not leave a stage: torch detaches what left it, in place.
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], ctx.like


def balance_part(affinities: Tensor, k: int, axis: Axis) -> Tensor:
    """A rank's part of `sequence_balance_loss`, whose sum over the axis is that of the whole sequences.

    affinities [batch, positions here, experts]. The share of tokens of each expert is counted over all positions; it
    carries no gradient, so that the rest is a sum over positions.
    """
    experts, length = affinities.shape[-1], affinities.shape[-2] * axis.size
    top = affinities.detach().topk(k, dim=-1, sorted=False).indices
    chosen = torch.zeros_like(affinities).scatter_(-1, top, 1.0).sum(dim=-2)
    if axis.group is not None:
        dist.all_reduce(chosen, group=axis.group)
    f = chosen / length * (experts / k)
    p = (affinities / affinities.sum(-1, keepdim=True)).sum(dim=-2) / length
    return (f * p).sum(-1).mean()


def packed(window: Window) -> Tensor:
    """Ids of a window in one tensor, [batch, 2 + 2 x depth, sequence]: tokens, targets, and those further on."""
    assert window.targets is not None
    return torch.stack([window.tokens, window.targets, *(ids for pair in window.ahead for ids in pair)], dim=1)


def unpacked(ids: Tensor, positions: Tensor) -> Window:
    """The window whose ids `packed` put together."""
    tokens, targets, *ahead = ids.unbind(1)
    return Window(tokens, positions, targets, tuple(zip(ahead[::2], ahead[1::2], strict=True)))


def held_of(lengths: tuple[int, ...]) -> Iterator[Held]:
    """The stages of a model whose stages have so many layers."""
    start = 0
    for index, length in enumerate(lengths):
        yield Held(range(start, start + length), index == 0, index == len(lengths) - 1)
        start += length
