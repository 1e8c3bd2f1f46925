"""Causal attention: softmax(q k^T * scale) v, each query over the keys up to its own position.

Queries may be fewer than keys: then they are those of the last positions. Heads of keys and values may be fewer than of
queries, and then serve several each. `Sight` narrows what a query sees: to a window, to chosen keys, and by a sink, a
logit per head that takes its share of the softmax and gives nothing.

torch's flash attention on CPU wants queries, keys and values of one width; for MLA, whose values are narrower, torch
computes the full square of scores. The fast form takes queries in blocks and each block's keys up to its own end, which
saves nearly half of the work, and multiplies in place: 11 ms against 20 ms for a layer of 8 x 256 tokens.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from modelspec.kernels.op import Op, on_cpu

# Queries per block: smaller ones save more of the square and lose more to small products.
BLOCK = 64
# Beyond this, keeping the probabilities of every block costs more memory than torch's own attention.
LONGEST = 1024


class Sight(NamedTuple):
    """What a query sees of the keys up to its own: the last `window`; those of `chosen`, bool [batch, 1, queries,
    keys]; and the sinks, [heads].
    """

    window: int | None = None
    chosen: Tensor | None = None
    sinks: Tensor | None = None


ALL = Sight()


def _reference(q: Tensor, k: Tensor, v: Tensor, scale: float, sight: Sight = ALL) -> Tensor:
    grouped, (queries, keys) = q.shape[1] != k.shape[1], (q.shape[-2], k.shape[-2])
    if sight == ALL and queries == keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    position = torch.arange(keys, device=q.device)
    distance = position[keys - queries :].unsqueeze(-1) - position
    seen = distance >= 0
    if sight.window is not None:
        seen = seen & (distance < sight.window)
    if sight.chosen is not None:
        seen = seen & sight.chosen
    if sight.sinks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=grouped)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q @ k.mT * scale).masked_fill(~seen, float("-inf"))
    sinks = sight.sinks.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    return torch.cat((scores, sinks), dim=-1).softmax(-1, dtype=wide)[..., :-1].to(v.dtype) @ v


def _blocks(queries: int, keys: int) -> list[tuple[slice, slice, int]]:
    """Of each block its queries, the keys up to its end, and how many of these are up to its first query."""
    before = keys - queries
    return [
        (slice(start, end), slice(0, before + end), before + start)
        for start, end in pairwise([*range(0, queries, BLOCK), queries])
    ]


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        shape = (*q.shape[:-1], v.shape[-1])
        q, k, v = (x.flatten(0, 1).contiguous() for x in (q, k, v))
        out = v.new_empty(*q.shape[:-1], v.shape[-1])
        future = torch.full((BLOCK, BLOCK), float("-inf"), dtype=q.dtype).triu_(1)
        weights = []
        for mine, seen, own in _blocks(q.shape[1], k.shape[1]):
            scores = q[:, mine].bmm(k[:, seen].mT).mul_(scale)
            count = scores.shape[1]
            scores[:, :, own:].add_(future[:count, :count])
            torch.softmax(scores, -1, out=scores)
            torch.bmm(scores, v[:, seen], out=out[:, mine])
            weights.append(scores)
        ctx.save_for_backward(q, k, v, *weights)
        ctx.scale = scale
        return out.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *weights = ctx.saved_tensors
        leading = grads[0].shape[:2]
        grad = grads[0].flatten(0, 1).contiguous()
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (mine, seen, _), p in zip(_blocks(q.shape[1], k.shape[1]), weights, strict=True):
            g = grad[:, mine]
            # Not baddbmm_, which runs head by head on one core when its output is a slice.
            grad_v[:, seen].add_(p.mT.bmm(g))
            scores = g.bmm(v[:, seen].mT)
            torch.ops.aten._softmax_backward_data.out(scores, p, -1, p.dtype, grad_input=scores)
            scores.mul_(ctx.scale)
            torch.bmm(scores, k[:, seen], out=grad_q[:, mine])
            grad_k[:, seen].add_(scores.mT.bmm(q[:, mine]))
        return grad_q.unflatten(0, leading), grad_k.unflatten(0, leading), grad_v.unflatten(0, leading), None


def _last_queries(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """By a bias that torch's flash attention on GPUs knows: no mask, and nothing computed of what is hidden."""
    last, grouped = causal_lower_right(q.shape[-2], k.shape[-2]), q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=last, scale=scale, enable_gqa=grouped)


def _fast(q: Tensor, k: Tensor, v: Tensor, scale: float, sight: Sight = ALL) -> Tensor:
    return _last_queries(q, k, v, scale) if q.is_cuda else _CausalAttention.apply(q, k, v, scale)


def _applies(q: Tensor, k: Tensor, v: Tensor, scale: float, sight: Sight = ALL) -> bool:
    if sight != ALL:
        return False
    if q.is_cuda:
        # The bias is a tensor of its own class, which no dispatch mode lets through.
        return q.shape[-2] < k.shape[-2] and type(q) is Tensor and not is_in_torch_dispatch_mode()
    alike = q.shape[1] == k.shape[1]
    return alike and on_cpu(q, k, v) and q.shape[-1] != v.shape[-1] and k.shape[-2] <= LONGEST


# causal_attention(q [batch, heads, queries, qk], k [batch, kv heads, keys, qk],
#                  v [batch, kv heads, keys, dim], scale, sight) -> [batch, heads, queries, dim]
causal_attention: Op[[Tensor, Tensor, Tensor, float, Sight], Tensor] = Op(
    reference=_reference, fast=_fast, applies=_applies
)
