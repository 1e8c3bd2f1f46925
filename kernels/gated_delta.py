"""The gated delta rule: a memory that forgets, and that corrects what it holds under a key (arXiv 2412.06464).

The memory S maps keys to values. A step lets it decay by alpha, replaces a part beta of what it recalls under the key
k by the value v, and reads it with the query q:

    S_t = alpha_t S_(t-1) (I - beta_t k_t k_t^T) + beta_t v_t k_t^T          o_t = S_t q_t

`gated_delta_steps` is this definition, step by step. `gated_delta_chunks` gives the same by matrix products over
chunks of the sequence (arXiv 2406.06484). Inside a chunk that begins with S, the memory is what is left of S and of
every correction u since, with D[t, i] = alpha_(i+1) ... alpha_t, and d[t] = alpha_1 ... alpha_t of the chunk:

    S_t = d[t] S + sum over i <= t of D[t, i] u_i k_i^T
    u_t = beta_t (v_t - d[t] S k_t - sum over i < t of D[t, i] (k_i . k_t) u_i)

The second line is a triangular system for all u at once. It is linear in S, so all chunks solve it before any of them
knows its S, and only products with S remain to be done one chunk after another.

These are two functions and no `Op`: an op's reference is what the compiler traces, and it must not unroll a sequence.
"""

import torch
from torch import Tensor

# Tokens per chunk. Work inside a chunk grows with its square, and what is done one after another with their number.
CHUNK = 64


def gated_delta_steps(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor) -> Tensor:
    """The definition. q and k [batch, heads, sequence, qk], v [batch, heads, sequence, dim], log_alpha (at most 0) and
    beta [batch, heads, sequence] -> [batch, heads, sequence, dim] in v's dtype, computed in at least FP32.
    """
    q, k, wide_v, log_alpha, beta = _widened(q, k, v, log_alpha, beta)
    memory = wide_v.new_zeros(*v.shape[:2], v.shape[-1], k.shape[-1])
    outputs = []
    for t in range(v.shape[2]):
        memory = memory * log_alpha[:, :, t, None, None].exp()
        correction = beta[:, :, t, None] * (wide_v[:, :, t] - _read(memory, k[:, :, t]))
        memory = memory + correction.unsqueeze(-1) * k[:, :, t].unsqueeze(-2)
        outputs.append(_read(memory, q[:, :, t]))
    return torch.stack(outputs, dim=2).to(v.dtype)


def gated_delta_chunks(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor) -> Tensor:
    """The same by chunks: arguments and result as in `gated_delta_steps`."""
    length = v.shape[2]
    size = min(CHUNK, length)
    q, k, wide_v, log_alpha, beta = (_chunked(x, size) for x in _widened(q, k, v, log_alpha, beta))
    decay = _decay(log_alpha)
    since_start = log_alpha.cumsum(-1).exp().unsqueeze(-1)
    to_end = decay[..., -1, :].unsqueeze(-1)
    beta = beta.unsqueeze(-1)

    # The system's matrix is 1 on the diagonal, which the solver supplies.
    system = (beta * (k @ k.mT) * decay).tril(-1)
    right = torch.cat((beta * wide_v, beta * since_start * k), dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    from_values, from_memory = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    scores = (q @ k.mT) * decay
    queries, keys = since_start * q, (to_end * k).mT

    memory = wide_v.new_zeros(*v.shape[:2], k.shape[-1], v.shape[-1])
    outputs = []
    for chunk in range(wide_v.shape[2]):
        corrections = from_values[:, :, chunk] - from_memory[:, :, chunk] @ memory
        outputs.append(queries[:, :, chunk] @ memory + scores[:, :, chunk] @ corrections)
        memory = since_start[:, :, chunk, -1:] * memory + keys[:, :, chunk] @ corrections
    return torch.cat(outputs, dim=2)[:, :, :length].to(v.dtype)


def _chunked(x: Tensor, size: int) -> Tensor:
    """[batch, heads, sequence, ...] -> [batch, heads, chunks, size, ...]."""
    # Tokens of zeros at the end neither decay the memory nor correct it.
    padding = x.new_zeros(*x.shape[:2], -x.shape[2] % size, *x.shape[3:])
    return torch.cat((x, padding), dim=2).unflatten(2, (-1, size))


def _decay(log_alpha: Tensor) -> Tensor:
    """D [..., size, size] of log_alpha [..., size], 0 above the diagonal.

    Each entry is a sum of its own: a difference of two long sums would lose a weak decay behind a strong one.
    """
    size = log_alpha.shape[-1]
    below = torch.ones(size, size, dtype=torch.bool, device=log_alpha.device).tril(-1)
    steps = log_alpha.unsqueeze(-1).expand(*log_alpha.shape, size).masked_fill(~below, 0.0)
    future = below.mT
    return steps.cumsum(-2).masked_fill(future, float("-inf")).exp()


def _widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors)


def _read(memory: Tensor, key: Tensor) -> Tensor:
    return (memory @ key.unsqueeze(-1)).squeeze(-1)
