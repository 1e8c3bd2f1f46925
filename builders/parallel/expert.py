"""The expert axis: tokens go to the ranks that hold their experts, and what these make of them comes back.

Experts are divided between ranks in their order, so pairs of token and expert that are sorted by expert are sorted by
rank. One all-to-all brings each rank its rows, a copy of the token for every pair, with the weight of the pair: there a
row is a token of one expert. Rows go back the way they came, and a token's are summed at home. No token is dropped; an
expert, or a rank, may get none.

    out[t] = sum over pairs (t, e) of  home(weight * expert_e(outward(x[t])))

Going out and coming home are each other's gradient: outward copies a token to its rows, home sums the rows of a token.
The weight travels because the experts apply it where rows are narrow, and because nothing must then be kept at home.

Where experts span nodes, pairs of one token on one node share their way over the network: one copy goes to a rank of
that node, which hands it on inside, and one partial sum comes back (arXiv 2412.19437, section 3.2.2). A router that
limits a token to the groups of few nodes bounds these copies by itself.

In FP8 whatever goes outward, tokens in the forward pass and gradients in the backward pass, is codes with powers of two
as scales, each quantised once; whatever comes home is as wide as it was computed (the same, section 3.3.3).

Who sends must know on the host how many rows go and come, so an exchange waits for the device once, and one by node
twice, in every forward pass. Kernels that exchange without the host would stand in the place of these classes.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from modelspec import schema
from modelspec.builders.ffn.moe import Dispatch, Experts
from modelspec.builders.ffn.router import Choice
from modelspec.builders.parallel.collectives import Way, moved
from modelspec.builders.parallel.mesh import Axis, Mesh
from modelspec.kernels.block_scale import e4m3
from modelspec.kernels.experts import tokens_per_expert
from modelspec.kernels.quantize import dequantize, quantize


def exchange(mesh: Mesh, fp8: schema.FP8 | None) -> Dispatch:
    """How tokens reach the experts of the mesh: by node where whole nodes share the experts, else straight."""
    wire: Wire = Narrow(fp8.scales == "ue8m0") if fp8 is not None and fp8.dispatch else Wide()
    if mesh.expert_network.size > 1:
        return ExchangeByNode(mesh.expert_network, mesh.expert_node, wire)
    return Exchange(mesh.expert, wire)


class Wire(Protocol):
    """The form that rows [rows, width] have on their way out."""

    def packed(self, x: Tensor) -> Tensor:
        """One message, [rows, whatever], of each row."""
        ...

    def unpacked(self, messages: Tensor, like: Tensor) -> Tensor:
        """The rows of messages, in the dtype and width of `like`."""
        ...


class Wide:
    """As they are."""

    def packed(self, x: Tensor) -> Tensor:
        return x

    def unpacked(self, messages: Tensor, like: Tensor) -> Tensor:
        return messages


@dataclass(frozen=True, slots=True)
class Narrow:
    """E4M3 codes and, of every 128 of them, a power of two: in FP32, or with `ue8m0` its exponent alone, in a byte.

    A row that was unpacked and is packed again has the same codes.
    """

    ue8m0: bool

    def packed(self, x: Tensor) -> Tensor:
        codes, scales = quantize(x.contiguous(), True)
        # Not `contiguous`, which leaves a single column as it is, with strides that bytes cannot have.
        scales = scales.clone(memory_format=torch.contiguous_format)
        scales = scales.to(torch.float8_e8m0fnu) if self.ue8m0 else scales
        return torch.cat([codes.view(torch.uint8), scales.view(torch.uint8)], dim=-1)

    def unpacked(self, messages: Tensor, like: Tensor) -> Tensor:
        width = like.shape[-1]
        codes, scales = messages.tensor_split((width,), dim=-1)
        kind = torch.float8_e8m0fnu if self.ue8m0 else torch.float32
        wide = scales.clone(memory_format=torch.contiguous_format).view(kind).to(torch.float32)
        return dequantize(codes.contiguous().view(e4m3(like.device)), wide, like.dtype)


class Pairs(NamedTuple):
    """Pairs of tokens, ascending, and experts that are to see them: int64 [pairs] each; their weights [pairs]."""

    token: Tensor
    expert: Tensor
    weight: Tensor


class Copies(NamedTuple):
    """Rows that are copies of tokens: the token of each, int64 [rows]; the rows in the order of their tokens, int64
    [rows]; and where in it each token's begin, int64 [tokens].
    """

    token: Tensor
    rows: Tensor
    starts: Tensor

    def of(self, x: Tensor) -> Tensor:
        """[rows, width] of x [tokens, width]."""
        return x.index_select(0, self.token)

    def sums(self, rows: Tensor) -> Tensor:
        """[tokens, width], each the sum of a token's rows, always in the same order: no atomics."""
        return F.embedding_bag(self.rows, rows, self.starts, mode="sum")


@dataclass(frozen=True, slots=True)
class Route:
    """A way over an axis, and the form of what goes out on it."""

    axis: Axis
    way: Way
    wire: Wire

    def outward(self, x: Tensor, copies: Copies) -> Tensor:
        """Copies of the tokens x [tokens, width] to other ranks: the rows that come here, [rows, width]."""
        return self.wire.unpacked(moved(copies.of(self.wire.packed(x)), self.way, self.axis), like=x)

    def home(self, rows: Tensor, copies: Copies) -> Tensor:
        """Rows back to where they are from: the sums of each token here, [tokens, width]."""
        return copies.sums(moved(rows, self.way.back, self.axis))


class _Outward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, copies: Copies, route: Route) -> Tensor:
        ctx.save_for_backward(*copies)
        ctx.route = route
        return route.outward(x, copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.route.home(grads[0], Copies(*ctx.saved_tensors)), None, None


class _Home(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, copies: Copies, route: Route) -> Tensor:
        ctx.save_for_backward(*copies)
        ctx.route = route
        return route.home(rows, copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.route.outward(grads[0], Copies(*ctx.saved_tensors)), None, None


class Exchange:
    """A row for every pair, straight to the rank of its expert."""

    def __init__(self, axis: Axis, wire: Wire) -> None:
        self.axis, self.wire = axis, wire

    def __call__(self, experts: Experts, x: Tensor, choice: Choice) -> Tensor:
        """x [tokens, hidden] of this rank and their choice among all experts -> their weighted sums."""
        return self.sums(experts, x, pairs_of(choice))

    def sums(self, experts: Experts, x: Tensor, pairs: Pairs) -> Tensor:
        """The same of any pairs: x [tokens, hidden] -> each token's weighted sum over its pairs, zeros without any."""
        here, ranks = experts.gate_up_proj.shape[0], self.axis.size
        expert, order = pairs.expert.sort(stable=True)
        counts = tokens_per_expert(expert, ranks * here).view(ranks, here)
        coming = told(counts, self.axis)
        way = Way(*torch.stack([counts.sum(-1), coming.sum(-1)]).tolist())
        # Summed in the order of the pairs, as one process does: bits are the same on a mesh of any size.
        copies = copies_of(pairs.token[order], order.argsort(), len(x))
        route = Route(self.axis, way, self.wire)

        rows = _Outward.apply(x, copies, route)
        weights = moved(pairs.weight[order], way, self.axis).unsqueeze(-1)
        mine = torch.arange(here, device=x.device).repeat(ranks)
        expert = mine.repeat_interleave(coming.flatten(), output_size=len(rows)).unsqueeze(-1)
        done = experts(rows, Choice(expert, weights, weights))
        return _Home.apply(done, copies, route)


class ExchangeByNode:
    """A copy of a token to each node that has an expert of it, over `network`, whose ranks have the same place in their
    nodes; `node`, the ranks of one, then exchanges rows for every pair.
    """

    def __init__(self, network: Axis, node: Axis, wire: Wire) -> None:
        self.network, self.wire, self.inside = network, wire, Exchange(node, wire)

    def __call__(self, experts: Experts, x: Tensor, choice: Choice) -> Tensor:
        """As `Exchange`."""
        pairs, nodes = pairs_of(choice), self.network.size
        each = experts.gate_up_proj.shape[0] * self.inside.axis.size
        # Pairs of one token on one node side by side: they share a copy.
        copy_id, order = (pairs.expert // each * len(x) + pairs.token).sort(stable=True)
        token, expert, weight = (of[order] for of in pairs)
        is_first = copy_id.diff(prepend=copy_id.new_full((1,), -1)) != 0
        copy, node = is_first.cumsum(0) - 1, expert // each
        counts = torch.zeros(nodes, 2, dtype=torch.int64, device=x.device)
        counts.index_add_(0, node, torch.stack([is_first, torch.ones_like(is_first)], dim=-1).to(torch.int64))
        coming = told(counts, self.network)
        (copies_sent, pairs_sent), (copies_come, pairs_come) = torch.stack([counts, coming]).mT.tolist()
        way, way_of_pairs = Way(copies_sent, copies_come), Way(pairs_sent, pairs_come)

        token_of_copy = token[torch.searchsorted(copy, torch.arange(sum(copies_sent), device=x.device))]
        copies = copies_of(token_of_copy, token_of_copy.argsort(stable=True), len(x))
        route = Route(self.network, way, self.wire)
        rows = _Outward.apply(x, copies, route)
        # A pair says which of the copies for its node it is of, and its expert there.
        label = moved((copy - _starts(counts[:, 0])[node]) * each + expert % each, way_of_pairs, self.network)
        base = _starts(coming[:, 0]).repeat_interleave(coming[:, 1], output_size=len(label))
        theirs = Pairs(base + label // each, label % each, moved(weight, way_of_pairs, self.network))
        return _Home.apply(self.inside.sums(experts, rows, theirs), copies, route)


def pairs_of(choice: Choice) -> Pairs:
    """Every token with each of its experts."""
    tokens, k = choice.experts.shape
    token = torch.arange(tokens, device=choice.experts.device).repeat_interleave(k, output_size=tokens * k)
    return Pairs(token, choice.experts.flatten(), choice.weights.flatten())


def copies_of(token: Tensor, rows: Tensor, tokens: int) -> Copies:
    """Rows with these tokens, int64 [rows], of so many; and the rows in the order of their tokens."""
    return Copies(token, rows, _starts(tokens_per_expert(token, tokens)))


def told(counts: Tensor, axis: Axis) -> Tensor:
    """counts [ranks, ...], what this rank has for each -> what each has for this."""
    one = [1] * axis.size
    return moved(counts, Way(one, one), axis)


def _starts(counts: Tensor) -> Tensor:
    return counts.cumsum(0) - counts
