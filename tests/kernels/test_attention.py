"""Attention over part of the keys, against loops over queries and heads."""

import pytest
import torch
from torch import Tensor

from modelspec.kernels.attention import Sight, causal_attention


def by_loop(q: Tensor, k: Tensor, v: Tensor, scale: float, sight: Sight) -> Tensor:
    """Each query of each head over the keys that it sees, one after the other."""
    batch, heads, length, _ = q.shape
    groups = heads // k.shape[1]
    out = torch.zeros(batch, heads, length, v.shape[-1], dtype=v.dtype)
    for b in range(batch):
        for h in range(heads):
            for t in range(length):
                first = 0 if sight.window is None else max(0, t - sight.window + 1)
                seen = [s for s in range(first, t + 1) if sight.chosen is None or sight.chosen[b, 0, t, s]]
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


def test_sinks_learn() -> None:
    q, k, v = (torch.randn(1, 2, 5, 4, dtype=torch.float64) for _ in range(3))
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: causal_attention(q, k, v, 0.5, Sight(sinks=s)), (sinks,))
