"""Attention over part of the keys, against loops over queries and heads."""

import pytest
import torch
from torch import Tensor

from modelspec.kernels.attention import BLOCK, LONGEST, Sight, _last_queries, causal_attention


def by_loop(q: Tensor, k: Tensor, v: Tensor, scale: float, sight: Sight) -> Tensor:
    """Each query of each head over the keys that it sees, one after the other; the queries are the last ones."""
    batch, heads, length, _ = q.shape
    groups, before = heads // k.shape[1], k.shape[2] - length
    out = torch.zeros(batch, heads, length, v.shape[-1], dtype=v.dtype)
    for b in range(batch):
        for h in range(heads):
            for t in range(length):
                own = before + t
                first = 0 if sight.window is None else max(0, own - sight.window + 1)
                seen = [s for s in range(first, own + 1) if sight.chosen is None or sight.chosen[b, 0, t, s]]
                scores = torch.stack([q[b, h, t] @ k[b, h // groups, s] * scale for s in seen])
                if sight.sinks is not None:
                    scores = torch.cat((scores, sight.sinks[h : h + 1]))
                shares = scores.softmax(0)[: len(seen)]
                out[b, h, t] = shares @ torch.stack([v[b, h // groups, s] for s in seen])
    return out


SIGHTS = {
    "all": Sight(),
    "window": Sight(window=3),
    "window-of-one": Sight(window=1),
    "window-longer-than-the-text": Sight(window=50),
    "sinks": Sight(sinks=torch.tensor([0.5, -2.0, 3.0, 0.0, 1.0, 0.1], dtype=torch.float64)),
    "sinks-and-window": Sight(window=2, sinks=torch.linspace(-2, 2, 6, dtype=torch.float64)),
    "chosen": Sight(chosen=torch.eye(7, dtype=torch.bool).expand(2, 1, 7, 7) | (torch.rand(2, 1, 7, 7) < 0.5)),
}


@pytest.mark.parametrize("kv_heads", [6, 3, 1])
@pytest.mark.parametrize("sight", SIGHTS.values(), ids=list(SIGHTS))
def test_a_query_sees_what_it_may_and_nothing_else(sight: Sight, kv_heads: int) -> None:
    q, k, v = (
        torch.randn(2, heads, 7, 4, dtype=torch.float64, requires_grad=True) for heads in (6, kv_heads, kv_heads)
    )
    mine, theirs = causal_attention(q, k, v, 0.7, sight), by_loop(q, k, v, 0.7, sight)
    torch.testing.assert_close(mine, theirs)
    cotangent = torch.randn_like(mine)
    torch.testing.assert_close(
        torch.autograd.grad(mine, (q, k, v), cotangent), torch.autograd.grad(theirs, (q, k, v), cotangent)
    )


@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize("sight", SIGHTS.values(), ids=list(SIGHTS))
def test_fewer_queries_than_keys_are_the_last_ones(sight: Sight, kv_heads: int) -> None:
    q = torch.randn(2, 6, 3, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, kv_heads, 7, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    last = sight if sight.chosen is None else sight._replace(chosen=sight.chosen[:, :, -3:])
    mine, theirs = causal_attention(q, k, v, 0.7, last), by_loop(q, k, v, 0.7, last)
    torch.testing.assert_close(mine, theirs)
    cotangent = torch.randn_like(mine)
    torch.testing.assert_close(
        torch.autograd.grad(mine, (q, k, v), cotangent), torch.autograd.grad(theirs, (q, k, v), cotangent)
    )


@pytest.mark.parametrize(("queries", "keys"), [(BLOCK + 3, BLOCK + 3), (BLOCK + 3, 3 * BLOCK), (5, 2 * BLOCK), (1, 9)])
def test_blocks_of_queries_see_what_the_square_of_scores_sees(queries: int, keys: int) -> None:
    q = torch.randn(2, 3, queries, 6, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 3, keys, 6, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, 3, keys, 4, dtype=torch.float64, requires_grad=True)
    assert causal_attention.applies(q, k, v, 0.7, Sight())
    blocks, square = causal_attention.fast(q, k, v, 0.7, Sight()), causal_attention.reference(q, k, v, 0.7, Sight())
    torch.testing.assert_close(blocks, square)
    cotangent = torch.randn_like(square)
    torch.testing.assert_close(
        torch.autograd.grad(blocks, (q, k, v), cotangent), torch.autograd.grad(square, (q, k, v), cotangent)
    )


@pytest.mark.parametrize("kv_heads", [6, 2])
def test_the_form_for_gpus_sees_what_the_square_of_scores_sees(kv_heads: int) -> None:
    q = torch.randn(2, 6, 3, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, kv_heads, 7, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    bias, square = _last_queries(q, k, v, 0.7), causal_attention.reference(q, k, v, 0.7, Sight())
    torch.testing.assert_close(bias, square)
    cotangent = torch.randn_like(square)
    torch.testing.assert_close(
        torch.autograd.grad(bias, (q, k, v), cotangent), torch.autograd.grad(square, (q, k, v), cotangent)
    )


def test_few_queries_of_many_keys_do_not_keep_their_probabilities() -> None:
    q, k, v = torch.empty(1, 1, 8, 6), torch.empty(1, 1, LONGEST + 1, 6), torch.empty(1, 1, LONGEST + 1, 4)
    assert not causal_attention.applies(q, k, v, 0.7, Sight())


def test_sinks_learn() -> None:
    q, k, v = (torch.randn(1, 2, 5, 4, dtype=torch.float64) for _ in range(3))
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: causal_attention(q, k, v, 0.5, Sight(sinks=s)), (sinks,))
