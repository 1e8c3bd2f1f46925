"""The output head and its cross-entropy in one op, so that logits of the whole batch never exist.

A batch of 2,048 tokens with V3's vocabulary has 1 GB of FP32 logits, and plain autograd keeps them twice. Here rows
are taken in chunks: logits of a chunk, their loss, and at once their gradient softmax(logits) - onehot(target), which
is multiplied into the gradients of input and weight while it is still in cache. The backward pass only scales them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from modelspec.kernels.linear import matmul_nt

IGNORE = -100

# Rows of logits that exist at once. At 8,192 entries the products of 512 rows run as fast as those of all rows, and
# thinner ones lose up to a quarter.
CHUNK_ROWS = 512


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The definition: the sum over rows of cross-entropy, in at least FP32."""
    logits = F.linear(hidden, weight)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets, ignore_index=IGNORE, reduction="sum")


def _in_chunks(
    hidden: Tensor, weight: Tensor, targets: Tensor, with_gradients: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss and, if wanted, its gradients with respect to hidden and weight (the latter in at least FP32)."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    valid = (targets != IGNORE).unsqueeze(-1)
    columns = targets.unsqueeze(-1).where(valid, 0)
    total = torch.zeros((), dtype=wide, device=hidden.device)
    grad_hidden = torch.empty_like(hidden) if with_gradients else None
    # Summed as [in, vocabulary]: so the wide gradient of the logits is read where it lies, as a transposed view.
    grad_weight_t = hidden.new_zeros(weight.shape[::-1], dtype=wide) if with_gradients else None
    for start in range(0, hidden.shape[0], CHUNK_ROWS):
        rows = slice(start, min(start + CHUNK_ROWS, hidden.shape[0]))
        scores = matmul_nt(hidden[rows], weight).to(wide)
        target = scores.gather(-1, columns[rows])
        largest = scores.amax(-1, keepdim=True)
        probabilities = torch.softmax(scores, -1, out=scores)
        # The largest probability is exp(largest - log_z), and it is never too small for its logarithm.
        log_z = largest - probabilities.amax(-1, keepdim=True).log()
        # Not in place: the compiler of torch 2.11 takes a sum that was added to for one without gradient.
        total = total + (log_z - target).where(valid[rows], 0).sum()
        if grad_hidden is not None and grad_weight_t is not None:
            grad = probabilities.scatter_add_(-1, columns[rows], scores.new_full(columns[rows].shape, -1.0))
            # An ignored row is dropped from the thin operands, not from the wide gradient of the logits.
            grad_hidden[rows] = matmul_nt(grad.to(hidden.dtype), weight.T).where(valid[rows], 0)
            thin = hidden[rows].where(valid[rows], 0).to(wide)
            grad_weight_t += matmul_nt(thin.T.contiguous(), grad.T)
    return total, grad_hidden, None if grad_weight_t is None else grad_weight_t.T.contiguous()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        total, grad_hidden, grad_weight = _in_chunks(hidden, weight, targets, with_gradients=True)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,), (grad_hidden, grad_weight) = grads, ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), (grad_weight * grad).to(ctx.weight_dtype), None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log softmax(hidden weight^T)[target] over rows whose target is not -100; scalar, at least FP32.

    hidden [rows, in], weight [vocabulary, in], targets [rows] int64.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(hidden, weight, targets)
    return _in_chunks(hidden, weight, targets, with_gradients=False)[0]
