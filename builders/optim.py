"""AdamW: decoupled weight decay, moments in the spec's dtype, the update in FP32.

Moments may be kept in BF16. A step then widens them, lets torch's fused kernel do the arithmetic in FP32 (FP64 for an
FP64 model), and rounds them back: one tensor at a time, so that the wide copies stay small. Without rounding the
result is torch.optim.AdamW's, bit for bit. Decay falls on matrices and embeddings, not on norms and biases.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from modelspec import schema
from modelspec.builders.build import DTYPES


class AdamW(torch.optim.Optimizer):
    """State of each parameter: `step` (float32 scalar), `exp_avg` and `exp_avg_sq` in `state_dtype`."""

    def __init__(
        self,
        params: list[dict[str, Any]],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        state_dtype: torch.dtype,
    ) -> None:
        super().__init__(params, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.state_dtype = state_dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # No closure: it would compute losses.
        """Updates every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=self.state_dtype)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=self.state_dtype)
        kept = (parameter, state["exp_avg"], state["exp_avg_sq"])
        wide = torch.promote_types(parameter.dtype, torch.float32)
        weight, exp_avg, exp_avg_sq = (tensor.to(wide) for tensor in kept)
        adamw(
            [weight],
            [parameter.grad.to(wide)],
            [exp_avg],
            [exp_avg_sq],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        # The fused kernel does not count what it changes; who keeps something made of a parameter asks for its version.
        torch.autograd.graph.increment_version(parameter)
        for tensor, updated in zip(kept, (weight, exp_avg, exp_avg_sq), strict=True):
            if tensor is not updated:
                tensor.copy_(updated)


def build_optimizer(model: nn.Module, spec: schema.Optimizer, precision: schema.Precision) -> AdamW:
    """The optimizer of a spec over all parameters of the model; set the rate with `set_learning_rate`."""
    return optimizer_of([(name, p.ndim, p) for name, p in model.named_parameters()], spec, precision)


def optimizer_of(
    named: Sequence[tuple[str, int, Tensor]], spec: schema.Optimizer, precision: schema.Precision
) -> AdamW:
    """The optimizer of a spec over tensors, each with its parameter's name and that parameter's number of dims."""
    return AdamW(
        [
            {"params": [tensor for name, ndim, tensor in named if _decays(name, ndim)]},
            {"params": [tensor for name, ndim, tensor in named if not _decays(name, ndim)], "weight_decay": 0.0},
        ],
        betas=spec.betas,
        eps=spec.eps,
        weight_decay=spec.weight_decay,
        state_dtype=DTYPES[precision.optimizer_states],
    )


def _decays(name: str, ndim: int) -> bool:
    """Whether weight decay falls on a parameter. Biases of experts are stacked, and look like matrices."""
    return ndim >= 2 and not name.endswith("bias")


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """The step size from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def clip_gradients(model: nn.Module, limit: float | None) -> float:
    """The norm of all gradients together; they are scaled down to `limit` if it is larger."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    total = math.sqrt(float(sum(squares(gradient) for gradient in gradients)))
    if limit is not None and total > limit:
        for gradient in gradients:
            gradient.mul_(limit / total)
    return total


def squares(gradient: Tensor) -> Tensor:
    """The sum of a gradient's squares, a scalar in FP64: in FP32 that of a million elements was off by 1e-4."""
    return torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
